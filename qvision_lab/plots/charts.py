"""Charts of scores, curves, effects and studies; each returns its axes, by default new ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from qvision_lab.plots.images import INK, WRONG

LEGEND = {"frameon": False, "fontsize": 8}


def plot_training_curves(log: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss (left axis) and shares among the measures (right) of a training stage's `curve.csv`.

    Other measures, such as the effective rank of the queries, are drawn by `plot_curves`.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    loss = log.dropna(subset=["loss"])
    ax.plot(loss["step"], loss["loss"], color=INK, lw=1.2, label="loss")
    ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
    no_shares = "loss|cider|runtime|.*_per_second|effective_rank|bridge_scale"
    if measures := [*log.filter(regex=rf"^eval_(?!({no_shares})$)")]:
        shares = ax.twinx()
        shares.set(ylabel="share", ylim=(0, 1.02))
        shares.spines["right"].set_visible(True)
        for name in measures:
            rows, label = log.dropna(subset=[name]), name.removeprefix("eval_").replace("_", " ")
            shares.plot(rows["step"], rows[name], "o-", ms=3, lw=1, label=label)
        shares.legend(loc="center left", bbox_to_anchor=(1.12, 0.5), **LEGEND)
    return ax


def plot_scores(
    tables: Mapping[str, pd.DataFrame], scale: float = 100, ax: Axes | None = None, sign: str = ""
) -> Axes:
    """Scores, times `scale`, of systems as dots with their intervals: `score`, `low`, `high`.

    Next to each stands its value, with a plus if `sign` is one.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table.index))
    height = 1 + (0.24 + 0.08 * len(tables)) * len(names)
    ax = ax or plt.subplots(figsize=(6, height), layout="constrained")[1]
    for i, (system, table) in enumerate(tables.items()):
        rows = [names.index(name) + 0.32 * (i - (len(tables) - 1) / 2) for name in table.index]
        score, low, high = (scale * table[column] for column in ("score", "low", "high"))
        style = {"fmt": "o", "ms": 4, "capsize": 2, "label": system}
        line = ax.errorbar(score, rows, xerr=[score - low, high - score], **style)
        beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        for value, end, row in zip(score, high, rows, strict=True):
            text = f"{float(f'{value:.3g}'):{sign},g}"  # three digits, without an exponent
            ax.annotate(text, (end, row), color=line[0].get_color(), **beside)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first is at the top
    ax.margins(x=0.12)  # room for the values
    ax.set_xlabel(f"score, times {scale:g}" if scale != 1 else "score")
    ax.grid(axis="x", alpha=0.3)
    if len(tables) > 1:
        ax.legend(**LEGEND)
    return ax


def plot_differences(
    differences: pd.DataFrame,
    label: str = "above the base",
    ax: Axes | None = None,
    margin: float | None = None,
) -> Axes:
    """Dots and intervals of `ablation.differences`, best first; those without one are left out.

    A star marks what Holm's correction leaves at 5%; a band what lies within a `margin` of zero.
    """
    rows = differences.dropna(subset=["low", "high"]).sort_values("difference", ascending=False)
    if "corrected" in rows:
        rows = rows.rename({name: f"{name} *" for name in rows.index[rows["corrected"] < 0.05]})
    scores = rows.rename(columns={"difference": "score"})
    ax = plot_scores({label: scores}, scale=1, ax=ax, sign="+")
    ax.axvline(0, color=WRONG, lw=0.8)
    if margin:
        ax.axvspan(-margin, margin, color=INK, alpha=0.07, lw=0)
    ax.xaxis.set_major_formatter("{x:+g}")
    ax.set_xlabel(label)
    return ax


def plot_removal_curves(
    kept: Float[np.ndarray, " S"],
    curves: Mapping[str, Float[np.ndarray, "W S"]],
    ax: Axes | None = None,
) -> Axes:
    """Mean probability of W words, with a 95% band, by the share of patches that is kept, 0 to 1.

    A curve for each order in which patches are removed or added; the legend adds the areas.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    for name, probabilities in curves.items():
        mean = probabilities.mean(0)
        area = np.trapezoid(mean, kept) / (kept[-1] - kept[0])
        ax.plot(kept, mean, "o-", ms=3, lw=1.4, label=f"{name.replace('_', ' ')} ({area:.2f})")
        if (n := len(probabilities)) > 1:
            half = 1.96 * probabilities.std(0, ddof=1) / n**0.5
            band = {"color": ax.lines[-1].get_color(), "alpha": 0.12, "lw": 0}
            ax.fill_between(kept, (mean - half).clip(0), (mean + half).clip(max=1), **band)
    ax.set(xlabel="share of patches kept", ylabel="probability of the word", ylim=(0, None))
    ax.legend(**LEGEND)
    return ax


def plot_risk_coverage(
    curves: Mapping[str, Float[np.ndarray, " S"]], ax: Axes | None = None
) -> Axes:
    """Share of wrong captions among the most confident 1/S, 2/S ... of all, by what ranked them.

    The legend adds the area below (Geifman and El-Yaniv 2017, arXiv:1705.08500): low is good.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    for name, risks in curves.items():
        coverages = np.arange(1, len(risks) + 1) / len(risks)
        ax.plot(coverages, risks, "o-", ms=3, lw=1.4, label=f"{name} ({np.mean(risks):.3f})")
    top = 1.35 * max(map(max, curves.values()))  # room for the legend
    ax.set(xlabel="share of captions kept", ylabel="share wrong", xlim=(0, 1.03), ylim=(0, top))
    ax.legend(loc="upper left", ncols=2, columnspacing=1, handlelength=1.2, **LEGEND)
    return ax


def plot_effects(effects: Sequence[Any], ax: Axes | None = None) -> Axes:
    """Change of each word's log-probability (nats): a bar for every `interventions.Effect`."""
    words = [word.text for word in effects[0].words]
    ax = ax or plt.subplots(figsize=(1 + 0.7 * len(words), 2.8), layout="constrained")[1]
    places, width = np.arange(len(words)), 0.8 / len(effects)
    for i, effect in enumerate(effects):
        left = places + width * (i - len(effects) / 2)
        ax.bar(left, effect.change, width, align="edge", label=effect.label)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set_xticks(places, words, rotation=30, ha="right")
    ax.set_ylabel("change (nats)")
    ax.legend(**LEGEND)
    return ax


def plot_tradeoff(table: pd.DataFrame, cost: str, quality: str, ax: Axes | None = None) -> Axes:
    """Columns of `ablation.Study.table`: a small dot a run, a named one for a variant's mean."""
    ax = ax or plt.subplots(figsize=(8, 5), layout="constrained")[1]
    means = table.groupby("variant", sort=False)[[cost, quality]].mean().dropna()
    means = means.sort_values(quality)
    line = {"arrowstyle": "-", "lw": 0.4, "color": INK, "relpos": (0, 0.5)}
    for i, (variant, mean) in enumerate(means.iterrows()):  # names in a column, by quality
        runs = table[table["variant"] == variant]
        dots = ax.scatter(runs[cost], runs[quality], s=8, alpha=0.4)
        ax.scatter(*mean, s=40, color=dots.get_facecolor(), alpha=1)
        place = {"xytext": (1.03, (i + 0.5) / len(means)), "textcoords": "axes fraction"}
        ax.annotate(variant, mean, **place, va="center", fontsize=8, color=INK, arrowprops=line)
    ax.set(xlabel=cost, ylabel=quality)
    ax.xaxis.set_major_formatter("{x:,.9g}")  # millions in full
    ax.grid(alpha=0.3)
    return ax


def plot_curves(curves: pd.DataFrame, measure: str = "loss", ax: Axes | None = None) -> Axes:
    """Of `ablation.Study.curves`, the mean over a variant's seeds in a band from least to most."""
    ax = ax or plt.subplots(layout="constrained")[1]
    for variant, rows in curves.dropna(subset=[measure]).groupby("variant", sort=False):
        by_step = rows.groupby("step")[measure].agg(["mean", "min", "max"])
        (line,) = ax.plot(by_step.index, by_step["mean"], lw=1.4, label=variant)
        band = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
        ax.fill_between(by_step.index, by_step["min"], by_step["max"], **band)
    ax.set(xlabel="step", ylabel=measure.removeprefix("eval_").replace("_", " "))
    ax.legend(**LEGEND)
    return ax


def plot_lengths(table: pd.DataFrame, measure: str = "CIDEr", ax: Axes | None = None) -> Axes:
    """Of `ablation.Study.table`, each variant by its length, at equal steps, tuned if any is.

    Means of its seeds, with 95% intervals by Student's t where there are several.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    rows = table[table["equal"] == "steps"]
    rows = rows[rows["tuned"]] if "tuned" in rows and rows["tuned"].any() else rows
    lengths, variants = sorted(rows["length"].unique()), rows["variant"].unique()
    for i, variant in enumerate(variants):
        seeds = rows[rows["variant"] == variant].groupby("length")[measure]
        half = seeds.sem() * t.isf(0.025, seeds.count() - 1)
        places = seeds.mean().index * 1.04 ** (i - (len(variants) - 1) / 2)  # side by side
        ax.errorbar(places, seeds.mean(), half, fmt="o-", ms=3, lw=1, capsize=2, label=variant)
    ax.set(xscale="log", xlabel="steps", ylabel=measure)
    ax.set_xticks(lengths, map("{:,}".format, lengths), minor=False)
    ax.minorticks_off()
    ax.legend(**LEGEND)
    return ax


def plot_parts(
    parts: Mapping[str, pd.DataFrame], label: str, margin: float | None = None
) -> Figure:
    """`plot_differences` of several parts of a study, by their titles, each with its own scale."""
    nrows = -(-len(parts) // 2)
    size = 7.8, nrows * (0.9 + 0.32 * max(map(len, parts.values())))
    figure, axes = plt.subplots(nrows, 2, figsize=size, layout="constrained", squeeze=False)
    for ax, (title, rows) in zip(axes.flat, parts.items(), strict=False):
        plot_differences(rows, "", ax, margin).set_title(title, fontsize=9)
    for ax in axes.flat[len(parts) :]:
        ax.axis("off")
    figure.supxlabel(label, fontsize=9)
    return figure
