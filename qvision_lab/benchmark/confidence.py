"""Confidence in captions and claims of scenes: how it separates true from false, and its error."""

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
    frames, rows = {}, []
    for split, scenes in splits.items():
        frames[split] = describe_cases(captioner, scenes, confidence)
        for of in OF if split != "val" else ():
            known, cases = (_select(frames[s], of) for s in ("val", split))
            if len(known) and len(cases):
                rows += [{"split": split, "of": of, **row} for row in score(known, cases)]
        if rows:
            yield Table(name="confidence", rows=tuple(rows), **about)


def describe_cases(
    captioner: Captioner, scenes: CaptionDataset, confidence: Confidence
) -> pd.DataFrame:
    """A row for every caption and claim: whether it is right, and what may predict that."""
    rows = []
    judged = judge_captions(captioner, scenes, confidence)
    for image, (caption, rights, true) in enumerate(judged):
        shared = {"image": image, "length": len(caption.tokens)}
        logprobs = np.array(caption.logprobs)
        sure = {"confidence": caption.confidence or 0.0, "probability": logprobs.sum()}
        rows.append({"of": "caption", "right": true, **sure, **shared})
        for claim, right in zip(caption.claims, rights, strict=True):
            sure = {
                "confidence": claim.confidence,
                "probability": logprobs[slice(*claim.tokens)].sum(),
            }
            rows.append({"of": claim.kind, "right": right, **sure, **shared})
    return pd.DataFrame(rows)


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
    whole = (cases["of"] == "caption").all()
    for name, values in predicted.items():
        values = values.to_numpy()
        measure = partial(_auroc_of_images, right, values, images)
        low, high = bootstrap_interval(np.eye(images.max() + 1), measure, RESAMPLES)[:, 0]
        drawn = np.random.default_rng(0).random((RESAMPLES, len(values))) < values
        yield {
            **{"predictor": name, "cases": len(cases), "share": right.mean()},
            **{"auroc": float(auroc(right, values)), "low": low, "high": high},
            "ece": calibration_error(right, values),
            "ece_if_exact": np.mean([calibration_error(each, values) for each in drawn]),
            "brier": np.mean((values - right) ** 2),
            **({"risks": risk_curve(right, values)} if whole else {}),
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


def _auroc_of_images(right, values, images, weights: Float[np.ndarray, "R I"]) -> np.ndarray:
    return auroc(right, values, weights[:, images])[:, None]


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


def _select(frame: pd.DataFrame, of: str) -> pd.DataFrame:
    return frame[frame["of"] != "caption" if of == "claim" else frame["of"] == of]
