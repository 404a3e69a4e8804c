"""Confidence in captions and claims of scenes: how it separates true from false, and its error."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float

from qvision_lab.benchmark.harness import Table, identity_of
from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.evaluation.bootstrap import bootstrap_interval
from qvision_lab.model.confidence import Confidence, probability
from qvision_lab.training.confidence import KINDS, calibrate, fit_logistic, judge_captions

SCENES = {"val": 2000, "test": 2000, "compose": 1000, "crowd": 1000}  # of each split
OF = ("caption", "claim", *KINDS)
BINS, RESAMPLES = 15, 500
COVERAGES = np.arange(1, 21) / 20


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Score the confidence of greedy captions that all claims are right, and of each claim.

    Compared with a constant (the share of `val`), the caption's length in tokens and the
    probability of its words, which a logistic regression on `val` makes probabilities too.
    A captioner without a calibration is calibrated on `val` first.
    """
    names = {split: f"scenes:{split}" for split in SCENES}
    splits = {s: open_dataset(names[s], n=20 if quick else n) for s, n in SCENES.items()}
    confidence = captioner.confidence or calibrate(captioner, splits["val"])
    about = {"settings": {"scenes": SCENES, "bins": BINS}, "quick": quick}
    about["identity"] = identity_of(captioner, **splits)
    rows, known = [], describe_cases(captioner, splits.pop("val"), confidence)
    for split, scenes in splits.items():
        cases = describe_cases(captioner, scenes, confidence)
        for of in OF:
            if of in known and of in cases:
                rows += [{"split": split, "of": of, **row} for row in score(known[of], cases[of])]
        if rows:
            yield Table(name="confidence", rows=tuple(rows), **about)


def describe_cases(
    captioner: Captioner, scenes: CaptionDataset, confidence: Confidence
) -> dict[str, pd.DataFrame]:
    """By `OF`, a row for every case: whether it is right, and what may predict that."""
    rows = defaultdict(list)
    for image, judged in enumerate(judge_captions(captioner, scenes, confidence)):
        caption, rights, true = judged
        cases = [("caption", true, caption.confidence or 0.0, slice(None))]
        for claim, right in zip(caption.claims, rights, strict=True):
            tokens = slice(*claim.tokens)
            cases += [(of, right, claim.confidence, tokens) for of in ("claim", claim.kind)]
        for of, right, sure, tokens in cases:
            known = {"image": image, "length": len(caption.tokens), "right": right}
            probability = np.sum(caption.logprobs[tokens])
            rows[of].append(known | {"confidence": sure, "probability": probability})
    return {of: pd.DataFrame(cases) for of, cases in rows.items()}


def score(known: pd.DataFrame, cases: pd.DataFrame) -> Iterator[dict]:
    """Scores of what predicts whether cases are right; all but the confidence fitted to `known`.

    `ece_if_exact` is what chance alone gives: the mean ECE of outcomes drawn from the predictions.
    """
    right, images = cases["right"].to_numpy(float), cases["image"].to_numpy()
    predicted = {"confidence": cases["confidence"]}
    predicted["constant"] = pd.Series(known["right"].mean(), cases.index)
    for name in ("probability", "length"):
        weights = fit_logistic(known[[name, "right"]].to_numpy(float))
        predicted[name] = cases[name].map(partial(probability, weights))
    for name, values in predicted.items():
        values = values.to_numpy()

        def measure(weights: Float[np.ndarray, "R I"], values=values) -> Float[np.ndarray, "R 1"]:
            return auroc(right, values, weights[:, images])[:, None]

        low, high = bootstrap_interval(np.eye(images.max() + 1), measure, RESAMPLES)[:, 0]
        drawn = np.random.default_rng(0).random((RESAMPLES, len(values))) < values
        yield {
            **{"predictor": name, "cases": len(cases), "share": right.mean()},
            **{"auroc": float(auroc(right, values)), "low": low, "high": high},
            "ece": calibration_error(right, values),
            "ece_if_exact": np.mean([calibration_error(each, values) for each in drawn]),
            "brier": np.mean((values - right) ** 2),
            "risks": risk_curve(right, values),
        }


def auroc(
    right: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"], weights: np.ndarray | float = 1
) -> Float[np.ndarray, "*R"]:
    """Probability that a right case has a higher value than a wrong one, ties counted as half.

    `weights` of the cases [*R,N], of resamples for example. NaN where all are right or all wrong.
    """
    order = np.argsort(values, kind="stable")
    begins = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # of equal values
    counts = (np.add.reduceat((weights * x)[..., order], begins, -1) for x in (right, 1 - right))
    ours, theirs = counts
    below = theirs.cumsum(-1) - theirs / 2
    with np.errstate(invalid="ignore"):
        return (ours * below).sum(-1) / (ours.sum(-1) * theirs.sum(-1))


def calibration_error(right: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"]) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599), in `BINS` of equal width."""
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, right - values)).sum() / len(values))


def risk_curve(right: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"]) -> list[float]:
    """Share of wrong cases among the most confident, at `COVERAGES` (Geifman and El-Yaniv 2017)."""
    _, rank, size = np.unique(-values, return_inverse=True, return_counts=True)
    wrong = np.bincount(rank, 1 - right)[rank] / size[rank]  # equal values in a random order
    risks = wrong[np.argsort(rank, kind="stable")].cumsum() / np.arange(1, len(right) + 1)
    return risks[np.ceil(COVERAGES * len(right)).astype(int) - 1].tolist()
