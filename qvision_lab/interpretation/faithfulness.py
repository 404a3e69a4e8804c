"""Are maps true? Held against boxes, against what losing patches does, and against noise."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import nn

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import Picture
from qvision_lab.data.coco import CaptionDataset
from qvision_lab.evaluation.bootstrap import bootstrap_interval
from qvision_lab.evaluation.chair import Vocabulary, coco_vocabulary, scenes_vocabulary
from qvision_lab.interpretation.maps import METHODS, Method, to_model, word_logprobs
from qvision_lab.interpretation.trace import Trace, Word, trace_all

STEPS = 11  # points of a removal curve
SPREAD = 0.25  # standard deviation of the centre baseline, in sides of the picture


@dataclass(frozen=True)
class Example:
    """A picture and the boxes (x, y, width, height in its pixels) of what is in it, by category."""

    image: Picture
    boxes: Mapping[str, Sequence[Sequence[float]]]
    vocabulary: Vocabulary  # what captions call the categories
    caption: str | None = None  # None: what the model says


@dataclass(frozen=True, eq=False)
class RemovalCurves:
    """Probability of words while a growing share of the patches is there."""

    kept: Float[np.ndarray, " S"]  # shares of the patches, from one patch to all
    deletion: Float[np.ndarray, "*M W S"]  # the highest patches of a map leave first
    insertion: Float[np.ndarray, "*M W S"]  # the highest patches of a map come first


@dataclass(frozen=True, eq=False)
class _Target:
    """A word that names something in the picture, and the patches that show it."""

    word: Word
    centres: Bool[np.ndarray, " P"]  # whether the patch's centre lies in a box
    shares: Float[np.ndarray, " P"]  # of the patch that lie in a box
    size: str  # "large", or "small" where every box has a side shorter than a patch


def examples_of(
    dataset: CaptionDataset, instances: str | PathLike | None = None
) -> Iterator[Example]:
    """Scenes with their truth, or COCO's pictures with the boxes of an `instances_*.json`."""
    boxes: dict = {}
    if instances is not None:
        content = json.loads(Path(instances).read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        for row in content["annotations"]:
            pair = names[row["category_id"]], row["bbox"]
            boxes.setdefault(row["image_id"], []).append(pair)
    for image in dataset:
        if image.scene:
            pairs = [(thing.category, thing.box) for thing in image.scene.objects]
        else:
            pairs = boxes.get(image.image_id, [])
        by_category = {name: [box for other, box in pairs if other == name] for name, _ in pairs}
        vocabulary = scenes_vocabulary() if image.scene else coco_vocabulary()
        yield Example(image.picture, by_category, vocabulary)


def score_maps(
    captioner: Captioner,
    examples: Iterable[Example],
    methods: Mapping[str, Method] = METHODS,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Score the maps of all words that name an object of their picture.

    - pointing (Zhang et al. 2018, arXiv:1608.00507): the centre of the peak patch lies in a box of
      what the word names; of several such things any will do.
    - mass: share of the map's positive values that lies in the boxes.
    - deletion, insertion (Petsiuk et al. 2018, arXiv:1806.07421): mean probability of the word
      while patches leave or come, those of the highest value first. Low and high are good.

    Two baselines stand beside the methods: "centre", a Gaussian on the middle of the picture, and
    "chance", whose pointing and mass are the share of the picture that the boxes cover, and whose
    patches leave and come in random order.

    Args:
        methods: by name, such as `{"first block": partial(composition, block=0)}`.

    Returns:
        A row for each `method`, `size` of what is named ("small": every box has a side shorter
        than a patch) and `measure`: `value`, `low` and `high` (95%, bootstrap over images), and
        how many `words` and `images` it is of.
    """
    rng = np.random.default_rng(seed)

    def noise(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
        return rng.random((len(words), len(trace.image_tokens)))

    methods = {**methods, "centre": _centre, "chance": noise}
    records = []
    for image, (trace, targets) in enumerate(_locate(captioner, examples, batch_size)):
        words = [target.word for target in targets]
        values = np.stack([method(trace, words) for method in methods.values()])  # [M,W,P]
        curves = removal_curves(trace, words, values)
        width = curves.kept[-1] - curves.kept[0]
        deletion, insertion = (
            np.trapezoid(heights, curves.kept) / width  # [M,W]
            for heights in (curves.deletion, curves.insertion)
        )
        for m, method in enumerate(methods):
            for w, target in enumerate(targets):
                positive = values[m, w].clip(0)
                found = {
                    "pointing": float(target.centres[values[m, w].argmax()]),
                    "mass": positive @ target.shares / (positive.sum() or 1),
                }
                if method == "chance":
                    found = dict.fromkeys(found, target.shares.mean())
                found |= {"deletion": deletion[m, w], "insertion": insertion[m, w]}
                records.append({"image": image, "method": method, "size": target.size, **found})
    return _summarise(records, ["method", "size"])


def check_randomised(
    captioner: Captioner,
    examples: Iterable[Example],
    methods: Mapping[str, Method] = METHODS,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the maps stays when the model forgets (Adebayo et al. 2018, arXiv:1810.03292).

    From the words down to the pixels, the weights of one part after another are shuffled within
    each tensor, in a copy of the model. The measure is the rank correlation of a word's map with
    that of the whole model: near 1, a map shows something else than what the model has learned.

    Returns:
        As `score_maps`, a row for each `method` and last `shuffled` part.
    """
    located = list(_locate(captioner, examples, batch_size))
    words = [[target.word for target in targets] for _, targets in located]
    images, captions = [trace.image for trace, _ in located], [t.caption for t, _ in located]
    whole = {
        name: [method(trace, of) for (trace, _), of in zip(located, words, strict=True)]
        for name, method in methods.items()
    }
    model, generator = copy.deepcopy(captioner.model), torch.Generator().manual_seed(seed)
    parts = {"bridge": model.decoder.bridge, "Q-Former": model.qformer, "vision": model.vision}
    records = []
    for part, module in parts.items():
        _shuffle(module, generator)
        traces = trace_all(replace(captioner, model=model), images, captions, batch_size)
        for image, (trace, of) in enumerate(zip(traces, words, strict=True)):
            for name, method in methods.items():
                correlations = _rank_correlation(whole[name][image], method(trace, of))
                key = {"image": image, "method": name, "shuffled": part}
                records += [{**key, "correlation": value} for value in correlations]
    return _summarise(records, ["method", "shuffled"])


@torch.no_grad()
def removal_curves(
    trace: Trace, words: Sequence[Word], values: Float[np.ndarray, "*M W P"]
) -> RemovalCurves:
    """Let patches leave or come in the order of maps: `occlusion` of more than one."""
    tokens = to_model(trace, trace.image_tokens)  # [P,D]
    order = np.argsort(-values.reshape(-1, len(tokens)), axis=1)  # [M*W,P]
    sizes = np.linspace(1, len(tokens), STEPS).round().astype(int)
    rows = torch.arange(2 * len(order))
    curves = []
    for size in sizes:
        there = torch.from_numpy(np.vstack([order[:, -size:], order[:, :size]]))  # [2*M*W,size]
        logprobs = word_logprobs(trace, words, tokens[there])  # [2*M*W,W]
        curves.append(logprobs[rows, rows % len(words)].exp().cpu().numpy())
    deletion, insertion = np.stack(curves, -1).reshape(2, *values.shape[:-1], len(sizes))
    return RemovalCurves(sizes / len(tokens), deletion, insertion)


def _locate(
    captioner: Captioner, examples: Iterable[Example], batch_size: int
) -> Iterator[tuple[Trace, list[_Target]]]:
    """Traces of examples whose captions name something of the picture, and those words."""
    examples = list(examples)
    images, captions = [e.image for e in examples], [e.caption for e in examples]
    traces = trace_all(captioner, images, captions, batch_size)
    for trace, example in zip(traces, examples, strict=True):
        targets = []
        for mention in example.vocabulary.mentions(trace.caption):
            boxes, end = example.boxes.get(mention.category), mention.span[1]
            word = next((w for w in trace.words if w.span[0] < end <= w.span[1]), None)
            if boxes and word:
                targets.append(_target(captioner, trace, word, np.array(boxes, float)))
        if targets:
            yield trace, targets


def _target(
    captioner: Captioner, trace: Trace, word: Word, boxes: Float[np.ndarray, "n 4"]
) -> _Target:
    side, patch = captioner.processor.image_size, captioner.processor.image_processor.patch_size
    height, width, _ = trace.image.shape
    boxes = boxes * side / np.array([width, height, width, height])  # as the model sees them
    inside = np.zeros((side, side), bool)
    for x, y, right, bottom in np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]).round():
        inside[int(y) : int(bottom), int(x) : int(right)] = True
    rows, columns = trace.patch_grid
    patches = inside[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch)
    centres = patches[:, patch // 2, :, patch // 2].ravel()
    size = "small" if (boxes[:, 2:].min(1) < patch).all() else "large"
    return _Target(word, centres, patches.mean((1, 3)).ravel(), size)


def _centre(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    rows, columns = ((np.arange(n) + 0.5) / n - 0.5 for n in trace.patch_grid)
    distance = rows[:, None] ** 2 + columns**2
    return np.tile(np.exp(-distance / (2 * SPREAD**2)).ravel(), (len(words), 1))


@torch.no_grad()
def _shuffle(module: nn.Module, generator: torch.Generator) -> None:
    for weights in module.parameters():
        order = torch.randperm(weights.numel(), generator=generator).to(weights.device)
        weights.copy_(weights.flatten()[order].view_as(weights))


def _rank_correlation(
    ones: Float[np.ndarray, "W P"], others: Float[np.ndarray, "W P"]
) -> Float[np.ndarray, " W"]:
    """Spearman's, row by row; 0 where all values of a row are the same."""
    ranks = (pd.DataFrame(values).rank(axis=1).to_numpy() for values in (ones, others))
    a, b = (x - x.mean(1, keepdims=True) for x in ranks)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1)


def _summarise(records: list[dict], by: list[str]) -> pd.DataFrame:
    """Means over words, in one row for each group and measure."""
    if not records:
        raise ValueError("no caption names anything that is in its picture; give other examples.")
    measures = [name for name in records[0] if name not in ("image", *by)]
    rows = []
    for key, group in pd.DataFrame(records).groupby(by, sort=False):
        per_image = group.assign(words=1).groupby("image")[["words", *measures]].sum()
        counts = per_image.to_numpy(float)  # [images,1+S]
        low, high = bootstrap_interval(counts, lambda sums: sums[..., 1:] / sums[..., :1])
        size = {"words": len(group), "images": len(counts)}
        for i, name in enumerate(measures):
            found = {"measure": name, "value": group[name].mean(), "low": low[i], "high": high[i]}
            rows.append({**dict(zip(by, key, strict=True)), **found, **size})
    return pd.DataFrame(rows)
