"""Scenes by number: a layout, drawn and told, in this process or in several."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context
from statistics import mean, median, quantiles

import numpy as np
from jaxtyping import Bool
from PIL import Image

from qvision_lab.data.scenes.drawing import draw
from qvision_lab.data.scenes.telling import RELATIONS, tell
from qvision_lab.data.scenes.world import Group, Layout, Relation, SceneObject, layout

CHUNK = 16  # scenes that a worker process makes at a time


@dataclass(frozen=True, eq=False)
class DrawnObject(SceneObject):
    """An object with the pixels that show it (others may stand before a little of it)."""

    mask: Bool[np.ndarray, "224 224"]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, five captions that are true of it, and the whole truth."""

    layout: Layout
    image: Image.Image  # RGB, 224 x 224
    captions: tuple[str, ...]
    masks: Bool[np.ndarray, "objects 224 224"]

    @cached_property
    def objects(self) -> tuple[DrawnObject, ...]:
        pairs = zip(self.layout.objects, self.masks, strict=True)
        return tuple(DrawnObject(**vars(thing), mask=mask) for thing, mask in pairs)

    @property
    def background(self) -> str:
        return self.layout.background

    @property
    def sky(self) -> str | None:
        return self.layout.sky

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.layout.groups

    @property
    def relations(self) -> tuple[Relation, ...]:
        return self.layout.relations


def scene(split: str, seed: int, index: int) -> Scene:
    """Scene `index` of a split; the truth is the same on every machine."""
    truth = layout(split, seed, index)
    picture = draw(truth)
    return Scene(truth, picture.image, tell(truth), picture.masks)


def generate(
    n: int, *, split: str = "train", seed: int = 0, start: int = 0, workers: int = 0
) -> Iterator[Scene]:
    """Scenes `start` to `start + n` of a split, in order, made as they are asked for.

    `workers` > 0 draws in that many spawned processes, a few chunks ahead; as always with spawn,
    a script that does so needs its `if __name__ == "__main__":`.
    """
    if n < 0 or start < 0 or workers < 0:
        raise ValueError(f"n, start and workers count from 0, got {n}, {start} and {workers}")
    make, indices = partial(scene, split, seed), range(start, start + n)
    return _spread(make, indices, workers) if workers else map(make, indices)


def _spread(make: partial[Scene], indices: range, workers: int) -> Iterator[Scene]:
    chunks = (indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        ahead = deque(pool.submit(_several, make, chunk) for chunk in islice(chunks, 3 * workers))
        while ahead:
            done = ahead.popleft().result()
            ahead.extend(pool.submit(_several, make, chunk) for chunk in islice(chunks, 1))
            yield from done
    finally:  # also when the caller stops early
        pool.shutdown(cancel_futures=True)


def _several(make: partial[Scene], indices: range) -> list[Scene]:
    return [make(index) for index in indices]


def describe(split: str, n: int = 2000, seed: int = 0) -> dict[str, float | dict[str, float]]:
    """What a split is like, from its first n layouts: numbers, and shares (0 to 1) by name."""
    if n < 2:
        raise ValueError(f"a distribution needs at least 2 scenes, got n={n}")
    layouts = [layout(split, seed, index) for index in range(n)]
    things = [thing for truth in layouts for thing in truth.objects]
    sides = [min(thing.box[2:]) for thing in things]
    pairs = [truth for truth in layouts if len(truth.objects) == 2]
    captions = [caption for truth in layouts for caption in tell(truth)]
    related = [_relates(caption) for truth in pairs for caption in tell(truth)]
    return {
        "objects per picture": mean(len(truth.objects) for truth in layouts),
        "number of objects": _shares(str(len(truth.objects)) for truth in layouts),
        "group size": _shares(str(group.count) for truth in layouts for group in truth.groups),
        "shorter side, median px": median(sides),
        "shorter side, 5th percentile px": quantiles(sides, n=20)[0],
        "shorter side under 34 px": mean(side < 34 for side in sides),
        "category": _shares(thing.category for thing in things),
        "color": _shares(thing.color for thing in things),
        "size": _shares(thing.size for thing in things),
        "background": _shares(truth.background for truth in layouts),
        "sky": _shares(truth.sky or "neither" for truth in layouts),
        "words per caption": mean(len(caption.split()) for caption in captions),
        "two-object captions with a relation": mean(related) if related else 0.0,
    }


def _relates(caption: str) -> bool:
    return any(f" {phrase} " in caption for phrase in RELATIONS.values())


def _shares(names: Iterable[str]) -> dict[str, float]:
    counts = Counter(names)
    return {name: count / counts.total() for name, count in sorted(counts.items())}
