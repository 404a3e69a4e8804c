"""Every metric as counts of each image and a formula of their sum.

That one shape gives everything: the score of a corpus is the formula of the summed counts, that of
an image the formula of its own, and a bootstrap or a paired test sums other choices of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from qvision_lab import scenes
from qvision_lab.data.coco import ImageId
from qvision_lab.evaluation.chair import Vocabulary, chair
from qvision_lab.evaluation.java import UnavailableError, spice, tokenize
from qvision_lab.scenes.checker import RATES


@dataclass
class Evidence:
    """All that a metric may look at, image by image in one order."""

    captions: Mapping[ImageId, str]
    references: Mapping[ImageId, Sequence[str]]
    objects: Mapping[ImageId, AbstractSet[str]] | None = None
    vocabulary: Vocabulary | None = None
    layouts: Mapping[ImageId, scenes.Layout] | None = None
    meteor: Future | None = None  # the counts that it is at work on

    @cached_property
    def words(self) -> tuple[list[str], list[list[str]]]:
        """Captions and references, tokenised in one run and in COCO's order."""
        several = self.references.values()
        texts = [text for of_image in several for text in of_image]
        words = iter(tokenize(texts + list(self.captions.values())))
        references = [[next(words) for _ in of_image] for of_image in several]
        return list(words), references


@dataclass(frozen=True)
class Metric:
    """The scores that a metric gives, and how: from evidence to counts, from counts to scores.

    `count` returns one row an image, with the columns `counts`. `formula` takes counts [..., K] and
    returns scores [..., S], nan where there is nothing to score.
    """

    scores: tuple[str, ...]
    counts: tuple[str, ...]
    count: Callable[[Evidence], Float[np.ndarray, "images K"]]
    formula: Callable[[Float[np.ndarray, "... K"]], Float[np.ndarray, "... S"]]
    needs: str = "words"  # the part of the evidence that cannot be left out


def bleu_formula(counts: Float[np.ndarray, "... 10"]) -> Float[np.ndarray, "... 4"]:
    """BLEU-1 to 4 (Papineni et al. 2002), with the small numbers that COCO's code adds."""
    small, tiny = 1e-9, 1e-15
    length, closest, guessed, correct = np.split(counts, [1, 2, 6], -1)
    precision = np.cumprod((correct + tiny) / (guessed + small), -1) ** (1 / np.arange(1, 5))
    ratio = (length + tiny) / (closest + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def bleu_counts(evidence: Evidence) -> Float[np.ndarray, "images 10"]:
    scorer = BleuScorer(n=4)
    for caption, references in zip(*evidence.words, strict=True):
        scorer += (caption, references)
    rows = []
    for told in scorer.ctest:
        length = told["testlen"]
        closest = min((abs(other - length), other) for other in told["reflen"])[1]
        rows.append([length, closest, *told["guess"], *told["correct"]])
    return np.array(rows, float)


def meteor_formula(counts: Float[np.ndarray, "... 23"]) -> Float[np.ndarray, "... 1"]:
    """METEOR 1.5's score of its English task, as in the jar's `MeteorScorer.computeMetrics`."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    modules = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    kinds = np.array([delta, 1 - delta])  # content words, function words
    length, function = counts[..., :2], counts[..., 2:4]  # of caption and reference
    matches = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)  # [module,kind,caption/ref.]
    chunks, matched = counts[..., 20], counts[..., 21:23].mean(-1)
    weighed = delta * (length - function) + (1 - delta) * function
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(
            np.einsum("...mks,m,k->...s", matches, modules, kinds) / weighed, -1, 0
        )
        mean = 1 / ((1 - alpha) / precision + alpha / recall)
        score = mean * (1 - gamma * (chunks / matched) ** beta)
    return np.nan_to_num(score)[..., None]


def meteor_counts(evidence: Evidence) -> Float[np.ndarray, "images 23"]:
    """The jar's counts; a perfect caption, being one chunk, has none, as where the jar sums up."""
    counts = evidence.meteor.result()
    matched = counts[:, 4:20].reshape(-1, 8, 2).sum(1)
    counts[(matched == counts[:, :2]).all(1) & (counts[:, 20] == 1), 20] = 0
    return counts


def ratio_formula(counts: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "... S"]:
    """Shares and means: counts are S pairs of a sum and what it is divided by."""
    hits, totals = counts[..., ::2], counts[..., 1::2]
    return np.divide(hits, totals, out=np.full(hits.shape, np.nan), where=totals > 0)


def rouge_counts(evidence: Evidence) -> Float[np.ndarray, "images 2"]:
    """ROUGE-L (Lin 2004)."""
    pairs = zip(*evidence.words, strict=True)
    return _of_a_mean([Rouge().calc_score([caption], references) for caption, references in pairs])


def cider_counts(evidence: Evidence) -> Float[np.ndarray, "images 2"]:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726)."""
    captions, references = evidence.words
    if len(captions) < 2:
        raise UnavailableError("not available: of a single image, no word is rarer than another")
    told = {i: [caption] for i, caption in enumerate(captions)}
    return _of_a_mean(Cider().compute_score(dict(enumerate(references)), told)[1])


def spice_counts(evidence: Evidence) -> Float[np.ndarray, "images 2"]:
    """SPICE (Anderson et al. 2016, arXiv:1607.08822)."""
    return _of_a_mean(spice(*evidence.words))


def chair_counts(evidence: Evidence) -> Float[np.ndarray, "images 6"]:
    """CHAIR (Rohrbach et al. 2018, arXiv:1809.02156) and the recall of objects."""
    table = chair(evidence.captions, evidence.objects, evidence.vocabulary, evidence.references)
    pairs = ["hallucinated", "mentioned", "has_hallucination", "captions", "recalled", "objects"]
    return table[pairs].to_numpy(float)


def scenes_counts(evidence: Evidence) -> Float[np.ndarray, "images K"]:
    """The rates of `scenes.score`, whose `RATES` says what each is a share of."""
    judged = [scenes.check(said, evidence.layouts[i]) for i, said in evidence.captions.items()]
    rates = [scenes.score([check]).values() for check in judged]
    return np.array([[n for rate in row for n in (rate.hits, rate.total)] for row in rates], float)


def _of_a_mean(values: Sequence[float]) -> Float[np.ndarray, "images 2"]:
    return np.stack([np.asarray(values, float), np.ones(len(values))], 1)


def _parts(*scores: str) -> tuple[str, ...]:
    return tuple(f"{score}, {part}" for score in scores for part in ("sum", "of"))


BLEU = tuple(f"BLEU-{n}" for n in range(1, 5))
BLEU_COUNTS = (
    "length",
    "closest reference length",
    *(f"{n}-grams {what}" for what in ("guessed", "correct") for n in range(1, 5)),
)
METEOR_COUNTS = tuple(f"METEOR {i}" for i in range(23))
CHAIR = ("CHAIR-i", "CHAIR-s", "CHAIR recall")

METRICS: dict[str, Metric] = {
    "bleu": Metric(BLEU, BLEU_COUNTS, bleu_counts, bleu_formula),
    "meteor": Metric(("METEOR",), METEOR_COUNTS, meteor_counts, meteor_formula),
    "rouge": Metric(("ROUGE-L",), _parts("ROUGE-L"), rouge_counts, ratio_formula),
    "cider": Metric(("CIDEr",), _parts("CIDEr"), cider_counts, ratio_formula),
    "spice": Metric(("SPICE",), _parts("SPICE"), spice_counts, ratio_formula),
    "chair": Metric(CHAIR, _parts(*CHAIR), chair_counts, ratio_formula, needs="objects"),
    "scenes": Metric(tuple(RATES), _parts(*RATES), scenes_counts, ratio_formula, needs="layouts"),
}
