"""Drawing scenes with Pillow: a backdrop, then every object in a separate tile.

Everything is drawn at double size and halved at the end, which smooths edges.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageChops

from qvision_lab.scenes.backdrops import Backdrops
from qvision_lab.scenes.captions import caption_scene
from qvision_lab.scenes.layout import CATEGORIES, PICTURE, Layout, SceneObject, layout
from qvision_lab.scenes.pen import DARK
from qvision_lab.scenes.sketches import Sketches

# Opacity, 0 to 255, of the shadow on an object (light falls from the upper left) and at its foot;
# and the grain of the film.
DOWN, RIGHT = np.mgrid[0:32, 0:32] / 31
SHADE = Image.fromarray((70 * np.clip(0.8 * DOWN + 0.4 * RIGHT - 0.35, 0, 1)).astype(np.uint8))
EDGE = np.hypot(2 * DOWN - 1, 2 * RIGHT - 1)
FOOT = Image.fromarray((110 * np.clip(1 - EDGE, 0, 1) ** 0.7).astype(np.uint8))
GRAIN = np.random.default_rng(0).normal(0, 4, (2 * PICTURE, 2 * PICTURE, 1)).astype(np.float32)
AHEAD, CHUNK = 1024, 16  # scenes that workers draw before all are taken, and scenes per task
FLOATING = ("airplane", "bird", "kite", "boat", "fish")  # these cast no shadow at their foot


@dataclass(frozen=True, eq=False, repr=False)
class Scene(Layout):
    """A layout with its image and five captions."""

    masks: Bool[np.ndarray, "objects 224 224"]  # visible pixels of each object
    image: Image.Image  # RGB, 224 x 224
    captions: tuple[str, ...]


def scene(split: str, seed: int, index: int) -> Scene:
    """Scene `index` of a split, drawn."""
    return draw(layout(split, seed, index))


def generate(
    n: int, *, split: str = "train", seed: int = 0, start: int = 0, workers: int = 0
) -> Iterator[Scene]:
    """Scenes `start` to `start + n` of a split, in order, drawn lazily.

    `workers` > 0 draws in that many spawned processes; a script that does so needs its
    `if __name__ == "__main__":`.
    """
    if n < 0 or start < 0 or workers < 0:
        raise ValueError(f"n, start and workers count from 0, got {n}, {start} and {workers}")
    make, indices = partial(scene, split, seed), range(start, start + n)
    return _spread(make, indices, workers) if workers else map(make, indices)


def _spread(make: partial[Scene], indices: range, workers: int) -> Iterator[Scene]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for i in range(0, len(indices), AHEAD):
            yield from pool.map(make, indices[i : i + AHEAD], chunksize=CHUNK)


def draw(truth: Layout) -> Scene:
    """Draw and caption a layout; pixels depend on it and the versions of Pillow and numpy alone."""
    rng = random.Random(f"drawing/{truth.split}/{truth.seed}/{truth.index}")
    canvas = Image.new("RGB", (2 * PICTURE, 2 * PICTURE))
    horizon = getattr(Backdrops(canvas, rng), truth.background)()
    if truth.sky_box is not None:
        x, y, width, height = truth.sky_box
        tile = Image.new("RGBA", (2 * width, 2 * height))
        getattr(Backdrops(tile, rng), truth.sky)()
        canvas.paste(tile, (2 * x, 2 * y), tile)
    owner = np.zeros((PICTURE, PICTURE), np.uint8)  # 1 + the index of the visible object
    for i, thing in enumerate(truth.objects):
        x, y, width, height = thing.box
        tile, corner = sketch(thing), (2 * x, 2 * y)
        alpha = tile.getchannel("A")
        if thing.category not in FLOATING and y + height > horizon * PICTURE:
            depth = height // 5
            foot = FOOT.resize((2 * width, 2 * depth))
            canvas.paste(DARK, (2 * x, 2 * (y + height) - depth), foot)
        canvas.paste(tile, corner, alpha)
        canvas.paste(DARK, corner, ImageChops.multiply(alpha, SHADE.resize(tile.size)))
        owner[y : y + height, x : x + width][np.asarray(alpha.reduce(2)) >= 128] = i + 1
    masks = owner == np.arange(1, len(truth.objects) + 1, dtype=np.uint8)[:, None, None]
    # Film grain and up to 10% more or less light, so that no surface is flat.
    x, y = rng.randrange(PICTURE), rng.randrange(PICTURE)
    pixels = np.asarray(canvas.reduce(2)) * np.float32(rng.uniform(0.9, 1.1))
    pixels += GRAIN[y : y + PICTURE, x : x + PICTURE]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    known = [getattr(truth, field.name) for field in fields(Layout)]
    return Scene(*known, masks, image, caption_scene(truth))


def sketch(thing: SceneObject) -> Image.Image:
    """One object alone: an RGBA tile of twice its box."""
    rng = random.Random(thing.pose)
    tile = Image.new("RGBA", (2 * thing.box[2], 2 * thing.box[3]))
    getattr(Sketches(tile, rng, thing.color), CATEGORIES[thing.category].noun)()
    return tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else tile
