"""Faithfulness of maps: pointing game, deletion and insertion, and randomised weights."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import CaptionDataset
from qvision_lab.evaluation import bootstrap
from qvision_lab.evaluation.chair import Vocabulary, coco_vocabulary
from qvision_lab.interpretation.maps import METHODS, Method
from qvision_lab.interpretation.trace import Trace, Word, trace_all

MEASURES = "pointing", "deletion", "insertion", "correlation"
STEPS = 11  # points of a removal curve
CENTRE_SPREAD = 0.25  # standard deviation of the centre baseline, in sides of the image


class RemovalCurves(NamedTuple):
    """Probability of words while a growing share of the patches is kept."""

    kept: Float[np.ndarray, " S"]  # shares of the patches, from one patch to all
    deletion: Float[np.ndarray, "*M W S"]  # the highest patches of a map are removed first
    insertion: Float[np.ndarray, "*M W S"]  # the highest patches of a map are added first


class _Target(NamedTuple):
    """A word that names an object of the image, and the patches that show it."""

    word: Word
    centres: Bool[np.ndarray, " P"]  # whether the patch's centre lies in a box
    covered: float  # share of the image that the boxes cover
    size: str  # "large", or "small" where every box has a side shorter than a patch


def score_words(
    captioner: Captioner,
    dataset: CaptionDataset,
    methods: Mapping[str, Method] = METHODS,
    captions: Sequence[str] | None = None,
    removal: bool = True,
) -> pd.DataFrame:
    """Score the maps of every word that names an object of its image, in a row for each method.

    Its columns are `image`, `method`, `size` of what is named ("small": every box has a side
    shorter than a patch), and the measures, which `summarise` averages:

    The words are of `captions`, one an image, or of those that greedy search finds. Boxes are those
    that `open_dataset` reads from COCO's instances.

    - pointing (Zhang et al. 2018, arXiv:1608.00507): the centre of the peak patch lies in a box of
      an object that the word names.
    - deletion, insertion (Petsiuk et al. 2018, arXiv:1806.07421): mean probability of the word
      while patches are removed or added, those of the highest value first. Low and high are good.
      Without `removal` they are left out.

    Two baselines are added: "centre", a Gaussian on the middle of the image, and "chance", whose
    pointing is the share of the image that the boxes cover, and whose order of patches is random.
    """
    rng = np.random.default_rng(0)

    def noise(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
        return rng.random((len(words), len(trace.image_tokens)))

    methods = {**methods, "centre": _centre, "chance": noise}
    records = []
    located = tqdm(_locate(captioner, dataset, captions), "maps", len(dataset), leave=False)
    for image, (trace, targets) in enumerate(located):
        words = [target.word for target in targets]
        values = np.stack([method(trace, words) for method in methods.values()])  # [M,W,P]
        areas = {}
        if removal:
            curves = removal_curves(trace, words, values)
            width = curves.kept[-1] - curves.kept[0]
            pairs = ("deletion", curves.deletion), ("insertion", curves.insertion)
            areas = {name: np.trapezoid(y, curves.kept) / width for name, y in pairs}  # [M,W]
        for (m, method), (w, target) in product(enumerate(methods), enumerate(targets)):
            hit = float(target.centres[values[m, w].argmax()])
            record = {"image": image, "method": method, "size": target.size}
            record["pointing"] = target.covered if method == "chance" else hit
            records.append(record | {name: area[m, w] for name, area in areas.items()})
    return pd.DataFrame(records)


def check_randomised(
    captioner: Captioner,
    dataset: CaptionDataset,
    methods: Mapping[str, Method] = METHODS,
    captions: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Compare maps with those of randomised weights (Adebayo et al. 2018, arXiv:1810.03292).

    From the words to the pixels, the weights of one part after another are shuffled within each
    tensor, in a copy of the model. The measure is the rank correlation of a word's map with that of
    the original model: near 1, a map does not depend on what the model has learned. Returns means
    of `summarise` for each `method` and last `shuffled` part.
    """
    located = list(_locate(captioner, dataset, captions))
    traces, words = [t for t, _ in located], [[x.word for x in targets] for _, targets in located]
    images, captions = [trace.image for trace in traces], [trace.caption for trace in traces]
    before = {name: list(map(method, traces, words)) for name, method in methods.items()}
    model, generator = copy.deepcopy(captioner.model), torch.Generator().manual_seed(0)
    parts = {"bridge": model.decoder.bridge, "Q-Former": model.qformer, "vision": model.vision}
    records = []
    for part, module in parts.items():
        for weights in module.parameters():
            order = torch.randperm(weights.numel(), generator=generator).to(weights.device)
            weights.data = weights.data.flatten()[order].view_as(weights)
        traces = trace_all(replace(captioner, model=model), images, captions)
        for image, (trace, of) in enumerate(zip(traces, words, strict=True)):
            for name, method in methods.items():
                first, second = map(pd.DataFrame, (before[name][image], method(trace, of)))
                correlations = first.corrwith(second, axis=1, method="spearman").fillna(0)
                key = {"image": image, "method": name, "shuffled": part}
                records += [{**key, "correlation": value} for value in correlations]
    return summarise(pd.DataFrame(records), ["method", "shuffled"])


def object_words(trace: Trace, vocabulary: Vocabulary | None = None) -> list[tuple[Word, str]]:
    """Words (of a phrase the last) that name an object, in the image or not, and its category."""
    return [
        (word, mention.category)
        for mention in (vocabulary or coco_vocabulary()).mentions(trace.caption)
        for word in trace.words
        if word.span[0] < mention.span[1] <= word.span[1]
    ]


@torch.no_grad()
def removal_curves(
    trace: Trace, words: Sequence[Word], values: Float[np.ndarray, "*M W P"]
) -> RemovalCurves:
    """Remove or add patches in the order of maps, and follow the probabilities of their words."""
    tokens = trace.to_tensor(trace.image_tokens)  # [P,D]
    order = np.argsort(-values.reshape(-1, len(tokens)), axis=1)  # [M*W,P]
    sizes = np.linspace(1, len(tokens), STEPS).round().astype(int)
    rows = torch.arange(2 * len(order))
    curves = []
    for size in sizes:
        kept = torch.from_numpy(np.vstack([order[:, -size:], order[:, :size]]))  # [2*M*W,size]
        logprobs = trace.word_logprobs(words, tokens[kept])  # [2*M*W,W]
        curves.append(logprobs[rows, rows % len(words)].exp().cpu().numpy())
    deletion, insertion = np.stack(curves, -1).reshape(2, *values.shape[:-1], len(sizes))
    return RemovalCurves(sizes / len(tokens), deletion, insertion)


def _locate(
    captioner: Captioner, dataset: CaptionDataset, captions: Sequence[str] | None = None
) -> Iterator[tuple[Trace, list[_Target]]]:
    """Traces of images whose captions name an object in them, and those words."""
    vocabulary = dataset.judge.vocabulary if dataset.judge else None
    traces = trace_all(captioner, (image.picture for image in dataset), captions)
    for trace, image in zip(traces, dataset, strict=True):
        boxes = defaultdict(list)
        for category, box in image.boxes or ():
            boxes[category].append(box)
        targets = [
            _target(trace, word, np.array(boxes[category], float))
            for word, category in object_words(trace, vocabulary)
            if category in boxes
        ]
        if targets:
            yield trace, targets


def _target(trace: Trace, word: Word, boxes: Float[np.ndarray, "n 4"]) -> _Target:
    config = trace.model.config.vision_config
    side, patch = config.image_size, config.patch_size
    height, width, _ = trace.image.shape
    boxes = boxes * side / np.array([width, height, width, height])  # in the preprocessed image
    inside = np.zeros((side, side), bool)
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    for x, y, right, bottom in corners.round().astype(int):
        inside[y:bottom, x:right] = True
    rows, columns = trace.patch_grid
    inside = inside[: rows * patch, : columns * patch]
    centres = inside[patch // 2 :: patch, patch // 2 :: patch].ravel()
    size = "small" if (boxes[:, 2:].min(1) < patch).all() else "large"
    return _Target(word, centres, inside.mean(), size)


def _centre(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    rows, columns = ((np.arange(n) + 0.5) / n - 0.5 for n in trace.patch_grid)
    distance = rows[:, None] ** 2 + columns**2
    return np.tile(np.exp(-distance / (2 * CENTRE_SPREAD**2)).ravel(), (len(words), 1))


def compare_methods(scores: pd.DataFrame, against: Mapping[str, str]) -> pd.DataFrame:
    """Paired differences of methods to others, by name, on the same words of `score_words`.

    A row for each `method`, `size` and `measure`: `difference`, with an interval from `least` to
    `most` that holds for all methods together (95%, Bonferroni), and its `p`, corrected (Holm).
    """
    measures = [name for name in scores if name in MEASURES]
    sums = scores.assign(words=1).groupby(["size", "method", "image"])[["words", *measures]].sum()
    rows = []
    for size, pair, measure in product(scores["size"].unique(), against.items(), measures):
        both = (sums.loc[size, name][[measure, "words"]].to_numpy(float) for name in pair)
        difference, limits, p = bootstrap.paired_difference(
            *both,
            lambda counts: counts[..., :1] / counts[..., 1:],
            confidence=1 - 0.05 / len(against),
            shares=measure == "pointing" and not any("chance" in name for name in pair),
        )
        found = {"difference": difference, "least": limits[0], "most": limits[1], "p": p}
        key = {"method": pair[0], "size": size, "measure": measure}
        rows.append(key | {name: value.item() for name, value in found.items()})
    table = pd.DataFrame(rows)
    return table.assign(p=table.groupby(["size", "measure"])["p"].transform(bootstrap.holm))


def summarise(scores: pd.DataFrame, by: Sequence[str] = ("method", "size")) -> pd.DataFrame:
    """Means over words, in one row for each group and `measure`; ValueError without a word.

    `value`, `low` and `high` (95%, over images: `share_interval` of hits in pointing, else
    bootstrap), and the number of `words` and `images`.
    """
    if scores.empty:
        raise ValueError("no caption names an object of its image; give other images.")
    measures = [name for name in scores if name in MEASURES]
    tables = []
    for key, group in scores.groupby([*by], sort=False):
        per_image = group.assign(words=1).groupby("image")[["words", *measures]].sum()
        counts = per_image.to_numpy(float)  # [images,1+S]
        low, high = bootstrap.bootstrap_interval(counts, lambda sums: sums[..., 1:] / sums[..., :1])
        if measures[0] == "pointing" and "chance" not in key:  # words that hit or miss
            low[0], high[0] = bootstrap.share_interval(counts[:, 1], counts[:, 0])
        table = pd.DataFrame({**dict(zip(by, key, strict=True)), "measure": measures})
        value = [group[name].mean() for name in measures]
        table = table.assign(value=value, low=low, high=high, words=len(group), images=len(counts))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
