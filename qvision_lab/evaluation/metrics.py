"""Metrics as counts per image and a formula of summed counts.

The score of a corpus is the formula of all counts summed, that of an image the formula of its
counts; a bootstrap or a paired test sums other choices of the images.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from jaxtyping import Float
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from qvision_lab.data.coco import ImageId
from qvision_lab.evaluation.chair import Vocabulary, chair
from qvision_lab.evaluation.java import UnavailableError, spice, tokenize


class Judge(Protocol):
    """Scores captions against the truth of drawn images by its own rates; see `CaptionDataset`."""

    name: str  # of the metric
    rates: Sequence[str]
    truths: Mapping[ImageId, object]
    vocabulary: Vocabulary  # of the categories

    def count(self, image_id: ImageId, caption: str) -> Sequence[tuple[int, int]]:
        """Hits and total of each rate."""


@dataclass
class Evidence:
    """Input of the metrics, by image in one order."""

    captions: Mapping[ImageId, str]
    references: Mapping[ImageId, Sequence[str]]
    objects: Mapping[ImageId, AbstractSet[str]] | None = None
    vocabulary: Vocabulary | None = None
    judge: Judge | None = None
    meteor: Future | None = None  # its counts

    @cached_property
    def words(self) -> tuple[list[str], list[list[str]]]:
        """Captions and references, tokenised in one run and in COCO's order."""
        texts = [text for several in self.references.values() for text in several]
        words = iter(tokenize(texts + list(self.captions.values())))
        references = [[next(words) for _ in several] for several in self.references.values()]
        return list(words), references


@dataclass(frozen=True)
class Metric:
    """`count` returns a row per image with the columns `counts`; `formula` the `scores` of a sum.

    A score is nan where there is nothing to count.
    """

    scores: tuple[str, ...]
    counts: tuple[str, ...]
    count: Callable[[Evidence], Float[np.ndarray, "images K"]]
    formula: Callable[[Float[np.ndarray, "... K"]], Float[np.ndarray, "... S"]]
    shares: bool = False  # of yes/no outcomes; all others count `Evidence.words`


def bleu_formula(counts: Float[np.ndarray, "... 10"]) -> Float[np.ndarray, "... 4"]:
    """BLEU-1 to 4 (Papineni et al. 2002), with the small constants of COCO's code."""
    small, tiny = 1e-9, 1e-15
    length, closest, guessed, correct = np.split(counts, [1, 2, 6], -1)
    precision = np.cumprod((correct + tiny) / (guessed + small), -1) ** (1 / np.arange(1, 5))
    ratio = (length + tiny) / (closest + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def bleu_counts(evidence: Evidence) -> Float[np.ndarray, "images 10"]:
    rows = []
    for caption, references in zip(*evidence.words, strict=True):
        image = cook_test(caption, cook_refs(references), "closest")
        rows.append([image["testlen"], image["reflen"], *image["guess"], *image["correct"]])
    return np.array(rows, float)


def meteor_formula(counts: Float[np.ndarray, "... 23"]) -> Float[np.ndarray, "... 1"]:
    """METEOR 1.5 for English, as in the jar's `MeteorScorer.computeMetrics`."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    modules = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    kinds = np.array([delta, 1 - delta])  # content words, function words
    length, function = counts[..., :2], counts[..., 2:4]  # of caption and reference
    matches = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)  # [module,kind,caption/ref.]
    chunks, matched = counts[..., 20], counts[..., 21:23].mean(-1)
    weighed = delta * (length - function) + (1 - delta) * function
    with np.errstate(divide="ignore", invalid="ignore"):
        matched_weight = np.einsum("...mks,m,k->...s", matches, modules, kinds)
        precision, recall = np.moveaxis(matched_weight / weighed, -1, 0)
        mean = 1 / ((1 - alpha) / precision + alpha / recall)
        score = mean * (1 - gamma * (chunks / matched) ** beta)
    return np.nan_to_num(score)[..., None]


def meteor_counts(evidence: Evidence) -> Float[np.ndarray, "images 23"]:
    """The jar's counts; a perfect caption, one chunk, counts as none, as in the jar's own sums."""
    counts = evidence.meteor.result()
    matched = counts[:, 4:20].reshape(-1, 8, 2).sum(1)
    counts[(matched == counts[:, :2]).all(1) & (counts[:, 20] == 1), 20] = 0
    return counts


def ratio_formula(counts: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... S"]:
    """Shares and means: counts are S pairs of a sum and its denominator."""
    hits, totals = counts[..., ::2], counts[..., 1::2]
    return np.divide(hits, totals, out=np.full(hits.shape, np.nan), where=totals > 0)


def rouge_counts(evidence: Evidence) -> Float[np.ndarray, "images 2"]:
    """ROUGE-L (Lin 2004)."""
    pairs = zip(*evidence.words, strict=True)
    return _as_mean([Rouge().calc_score([caption], references) for caption, references in pairs])


def cider_counts(evidence: Evidence) -> Float[np.ndarray, "images 2"]:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726)."""
    captions, references = evidence.words
    if len(captions) < 2:
        raise UnavailableError("not available: word frequencies need more than a single image")
    candidates = {i: [caption] for i, caption in enumerate(captions)}
    return _as_mean(Cider().compute_score(dict(enumerate(references)), candidates)[1])


def spice_counts(evidence: Evidence) -> Float[np.ndarray, "images 2"]:
    """SPICE (Anderson et al. 2016, arXiv:1607.08822)."""
    return _as_mean(spice(*evidence.words))


def chair_counts(evidence: Evidence) -> Float[np.ndarray, "images 6"]:
    """CHAIR (Rohrbach et al. 2018, arXiv:1809.02156) and the recall of objects."""
    table = chair(evidence.captions, evidence.objects, evidence.vocabulary, evidence.references)
    pairs = ["hallucinated", "mentioned", "has_hallucination", "captions", "recalled", "objects"]
    return table[pairs].to_numpy(float)


def judge_counts(evidence: Evidence) -> Float[np.ndarray, "images K"]:
    rows = [np.ravel(evidence.judge.count(i, text)) for i, text in evidence.captions.items()]
    return np.array(rows, float)


def judge_metric(rates: Sequence[str]) -> Metric:
    """The metric of a judge with these rates."""
    return _ratios(judge_counts, *rates, shares=True)


def _as_mean(values: Sequence[float]) -> Float[np.ndarray, "images 2"]:
    return np.stack([np.asarray(values, float), np.ones(len(values))], 1)


def _ratios(count: Callable, *scores: str, shares: bool = False) -> Metric:
    counts = tuple(f"{score}, {part}" for score in scores for part in ("sum", "of"))
    return Metric(scores, counts, count, ratio_formula, shares)


BLEU = tuple(f"BLEU-{n}" for n in range(1, 5))
BLEU_COUNTS = ("length", "closest reference length")
BLEU_COUNTS += tuple(f"{n}-grams {kind}" for kind in ("guessed", "correct") for n in range(1, 5))
METEOR_COUNTS = tuple(f"METEOR {i}" for i in range(23))

METRICS: dict[str, Metric] = {
    "bleu": Metric(BLEU, BLEU_COUNTS, bleu_counts, bleu_formula),
    "meteor": Metric(("METEOR",), METEOR_COUNTS, meteor_counts, meteor_formula),
    "rouge": _ratios(rouge_counts, "ROUGE-L"),
    "cider": _ratios(cider_counts, "CIDEr"),
    "spice": _ratios(spice_counts, "SPICE"),
    "chair": _ratios(chair_counts, "CHAIR-i", "CHAIR-s", "CHAIR recall", shares=True),
}
