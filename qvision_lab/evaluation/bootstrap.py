"""Confidence intervals and paired tests of scores, by resampling images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

Formula = Callable[[Float[np.ndarray, "... K"]], Float[np.ndarray, "... S"]]
CELLS = 2**22  # of resamples x images per batch (32 MB)


def bootstrap_interval(
    counts: Float[np.ndarray, "images K"],
    formula: Formula,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Float[np.ndarray, "2 S"]:
    """Percentile interval over images (Efron and Tibshirani 1993; for BLEU, Koehn 2004).

    The formula is applied to the summed counts of each resample, so corpus scores such as BLEU are
    not averaged over images. ValueError for a confidence not between 0 and 1, or no image.
    """
    draws = [formula(weights @ counts) for weights in _resample(len(counts), resamples, seed)]
    return _interval(np.concatenate(draws), confidence)


def paired_difference(
    first: Float[np.ndarray, "images K"],
    second: Float[np.ndarray, "images K"],
    formula: Formula,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "2 S"], Float[np.ndarray, " S"]]:
    """Difference `first` - `second` on the same images, its interval and its p-value.

    The interval resamples the same images for both. The p-value is that of approximate
    randomisation (Riezler and Maxwell 2005): the share of random swaps of the two captions of each
    image with as large a difference; never below 1 / (resamples + 1).
    """
    one, other = first.sum(0), second.sum(0)
    difference = formula(one) - formula(other)
    weights = _resample(len(first), resamples, seed)
    draws = [formula(w @ first) - formula(w @ second) for w in weights]
    coins = _draw(2, len(first), resamples, seed)
    moved = [c.astype(float) @ (second - first) for c in coins]
    swapped = [formula(one + m) - formula(other - m) for m in moved]
    # A difference without a score counts as large.
    smaller = np.abs(np.concatenate(swapped)) < np.abs(difference) - 1e-12
    p_value = (1 + (~smaller).sum(0)) / (1 + resamples)
    p_value[np.isnan(difference)] = np.nan
    return difference, _interval(np.concatenate(draws), confidence), p_value


def _interval(draws: Float[np.ndarray, "R S"], confidence: float) -> Float[np.ndarray, "2 S"]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does.")
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():  # a score that no draw has is nan
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.nanquantile(draws, [tail, 1 - tail], axis=0)


def _resample(n: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "R images"]]:
    """Number of draws of each image in each resample."""
    for drawn in _draw(n, n, resamples, seed):
        cells = (drawn + n * np.arange(len(drawn))[:, None]).ravel()
        yield np.bincount(cells, minlength=drawn.size).reshape(drawn.shape).astype(float)


def _draw(below: int, n: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "R images"]]:
    """Random integers in [0, below) for each of n images in each resample, in batches."""
    if n < 1 or resamples < 1:
        raise ValueError(f"{resamples} resamples of {n} images: both must be at least 1.")
    rng, batch = np.random.default_rng(seed), max(1, CELLS // n)
    for start in range(0, resamples, batch):
        yield rng.integers(below, size=(min(batch, resamples - start), n))
