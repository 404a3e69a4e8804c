"""Confidence intervals of scores and shares, and paired tests, over images."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import norm

Formula = Callable[[Float[np.ndarray, "... K"]], Float[np.ndarray, "... S"]]
Counts = Float[np.ndarray, "images ..."]
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
    tail = _tail(confidence)
    quantiles = pd.DataFrame(np.concatenate(draws)).quantile([tail, 1 - tail])  # without nan
    return quantiles.to_numpy(copy=True)


def share_interval(hits: Counts, cases: Counts, confidence: float = 0.95) -> Counts:
    """Interval of shares of yes/no outcomes, `hits` of `cases` per image; never of zero width.

    With one case an image it is Wilson's (1927, JASA 22:209), else with as many cases as the design
    effect leaves (Dean and Pagano 2015, J. Surv. Stat. Methodol. 3:484), since those of one image
    are alike: entirely so where the share is 0 or 1. NaN without a case.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n = cases.sum(0)
        share = hits.sum(0) / n
        least = n**2 / (cases**2).sum(0)
        variance = ((hits - share * cases) ** 2).sum(0) / n**2  # of the share, between images
        n = np.clip(np.nan_to_num(share * (1 - share) / variance, posinf=np.inf), least, n)
        z = norm.isf(_tail(confidence))
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return np.clip([centre - half, centre + half], 0, 1).round(12)  # 0 and 1 exactly


def paired_difference(
    first: Float[np.ndarray, "images K"],
    second: Float[np.ndarray, "images K"],
    formula: Formula,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    shares: bool = False,
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "2 S"], Float[np.ndarray, " S"]]:
    """Difference `first` - `second` on the same images, its interval and its p-value.

    The interval is normal, its standard error the spread of resamples of the same images. The
    p-value is that of approximate randomisation (Riezler and Maxwell 2005): the share of random
    swaps of the two captions of each image with as large a difference, at least 1 in resamples + 1.

    For `shares`, hits and cases in turn, one discordant case is added, half to each side (Agresti
    and Min 2005, Stat. Med. 24:729), so that no interval has zero width. Their p-value is normal
    too, since swaps would also find that one system has more cases.
    """
    one, other = first.sum(0), second.sum(0)
    difference = formula(one) - formula(other)
    weights = _resample(len(first), resamples, seed)
    draws = [formula(w @ first) - formula(w @ second) for w in weights]
    error = pd.DataFrame(np.concatenate(draws)).std(ddof=0).to_numpy()  # without nan
    if shares:
        error = np.hypot(error, 1 / np.maximum(np.minimum(one, other)[1::2], 1))
        p_value = 2 * norm.sf(np.abs(difference) / error)
    else:
        coins = _draw(2, len(first), resamples, seed)
        moved = [c.astype(float) @ (second - first) for c in coins]
        swapped = [formula(one + m) - formula(other - m) for m in moved]
        # A difference without a score counts as large.
        smaller = np.abs(np.concatenate(swapped)) < np.abs(difference) - 1e-12
        p_value = (1 + (~smaller).sum(0)) / (1 + resamples)
        p_value[np.isnan(difference)] = np.nan
    half = error * norm.isf(_tail(confidence))
    return difference, np.stack([difference - half, difference + half]), p_value


def holm(p: pd.Series) -> pd.Series:
    """Holm's correction (1979, Scand. J. Statist. 6:65): p-values for the family of all of them."""
    ranked = p.dropna().sort_values()
    return (ranked * np.arange(len(ranked), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does.")
    return (1 - confidence) / 2


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
