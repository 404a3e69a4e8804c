"""Confidence in claims, calibrated on captions of scenes, whose truth is known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from tqdm.auto import tqdm

from qvision_lab.captioning import Caption, Captioner, load
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.model.confidence import Calibration, Confidence, all_right, claim_probability
from qvision_lab.model.loading.checkpoint import CONFIDENCE
from qvision_lab.scenes.captions import NUMERALS, RELATIONS
from qvision_lab.scenes.checker import check
from qvision_lab.scenes.dataset import SceneJudge
from qvision_lab.scenes.layout import CATEGORIES, COLORS

NUMBERS = {word: [word] for word in NUMERALS} | {"one": ["a", "an", "one"]}
NUMBERS["two"] = ["two", "a pair of"]
KINDS = {  # spellings of each value, and the kinds one of which follows immediately
    "object": ({name: [*{c.noun: 0, c.plural: 0}] for name, c in CATEGORIES.items()}, []),
    "color": ({name: [name] for name in COLORS}, ["object"]),
    "count": (
        {name: [*words, *map(str.capitalize, words)] for name, words in NUMBERS.items()},
        ["color", "object"],
    ),
    "relation": (RELATIONS, ["count", "color", "object"]),
}
PLAIN = [0.0, 1.0, 0.0, 0.0]  # a claim's own log-odds
RIDGE = 0.1  # penalty of squared slopes: the evidence of a kind may be equal, or separate it


def calibrate_checkpoint(folder: str | Path, n: int) -> Path:
    """Calibrate a checkpoint on the first n scenes of `val`; returns the file in its folder."""
    confidence = calibrate(load(folder), open_dataset("scenes:val", n=n))
    return write_atomic(Path(folder) / CONFIDENCE, confidence.calibration.model_dump_json(indent=1))


def calibrate(captioner: Captioner, scenes: CaptionDataset) -> Confidence:
    """Fit the confidence in claims to a captioner's greedy captions of scenes.

    A kind without a claim keeps its log-odds. ValueError for images that are no scenes.
    """
    judged = judge_captions(captioner, scenes, _confidence(captioner, {}, [0.0, 1.0]))
    evidence: dict[str, list] = {}
    for caption, rights, _ in judged:
        for claim, right in zip(caption.claims, rights, strict=True):
            evidence.setdefault(claim.kind, []).append((claim.own, claim.noun, claim.least, right))
    weights = {kind: fit_logistic(np.array(rows, float)) for kind, rows in evidence.items()}
    whole = []
    for caption, _, true in judged:
        claims = [
            c._replace(confidence=claim_probability(weights[c.kind], c.own, c.noun, c.least))
            for c in caption.claims
        ]
        whole += [(all_right(claims), true)] if claims else []
    fitted = fit_logistic(np.array(whole, float)) if whole else [0.0, 1.0]
    return _confidence(captioner, weights, fitted)


def judge_captions(
    captioner: Captioner, scenes: CaptionDataset, confidence: Confidence | None
) -> list[tuple[Caption, list[bool], bool]]:
    """Greedy captions of scenes, whether each claim is right, and whether all of a caption is true.

    Claims that the checker does not find are wrong. ValueError for images that are no scenes.
    """
    if not isinstance(scenes.judge, SceneJudge):
        raise ValueError(f"{scenes.name}: only of scenes the truth of every claim is known.")
    captioner = replace(captioner, familiarity=None, confidence=confidence)
    pictures = (image.picture for image in tqdm(scenes, f"captioning {scenes.name}"))
    captions = captioner.caption(pictures, preset="greedy", batch_size=50)
    judged = []
    for caption, truth in zip(captions, scenes.judge.truths.values(), strict=True):
        checked = check(caption.text, truth)
        found = {kind: [c.right for c in checked.claims if c.kind == kind] for kind in KINDS}
        named = [claim.kind for claim in caption.claims]
        known = {kind: iter(x) for kind, x in found.items() if len(x) == named.count(kind)}
        rights = [next(known.get(kind, iter(())), False) for kind in named]
        judged.append((caption, rights, checked.true))
    return judged


def fit_logistic(rows: Float[np.ndarray, "N K+1"]) -> list[float]:
    """Bias and weights of a logistic regression of the last column, 0 or 1, on the others.

    Targets are Platt's (1999), between 0 and 1, so that outcomes of one kind have a finite fit.
    """
    x, y = np.c_[np.ones(len(rows)), rows[:, :-1]], rows[:, -1]
    targets = np.where(y > 0, (y.sum() + 1) / (y.sum() + 2), 1 / (len(y) - y.sum() + 2))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds, slopes = x @ weights, np.r_[0, weights[1:]]
        value = (np.logaddexp(0, odds) - targets * odds).sum() + RIDGE / 2 * slopes @ slopes
        return value, (1 / (1 + np.exp(-odds)) - targets) @ x + RIDGE * slopes

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B")
    return found.x.round(4).tolist()


def _confidence(
    captioner: Captioner, weights: dict[str, list[float]], caption: Sequence[float]
) -> Confidence:
    kinds = {
        kind: {"words": words, "before": before, "weights": weights.get(kind, PLAIN)}
        for kind, (words, before) in KINDS.items()
    }
    calibration = Calibration.model_validate({"kinds": kinds, "caption": caption})
    return Confidence(calibration, captioner.processor.tokenizer)
