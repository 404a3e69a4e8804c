"""Numbers and pictures drawn with matplotlib; computing and saving happen elsewhere."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from PIL import ImageOps

from qvision_lab.captioning.images import Picture, open_image

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, INK = "#1a7f37", "#c4314b", "#24292f"
CELL = 2.7  # inches a picture is wide
LINE = 28  # characters that fit below it
SHOWN = 320  # pixels of the longer side
HEAT = "magma"  # colours of maps, perceptually uniform
VEIL = 0.25, 0.85  # their opacity on a photo, from 0 to the brightest
TILE = 1.5  # inches a map is wide on a sheet


class Captioned(Protocol):
    """What a contact sheet needs of a caption."""

    text: str
    source: str


class Mapped(Protocol):
    """A value for every patch of a picture, such as `interpretation.maps.PatchMap`."""

    values: Float[np.ndarray, "rows columns"]
    label: str
    method: str


class Profiled(Protocol):
    """What a query does, such as `interpretation.queries.QueryProfile`."""

    map: Mapped
    words: Sequence[str]
    cost: float


class Affected(Protocol):
    """What an intervention does to words, such as `interpretation.interventions.Effect`."""

    label: str
    words: Sequence[Captioned]
    change: Float[np.ndarray, " W"]


def caption_sheet(
    captions: Sequence[Captioned],
    images: Sequence[Picture] | None = None,
    ncols: int = 4,
    marks: Sequence[bool] | None = None,
) -> Figure:
    """Pictures with their captions below, in rows of `ncols`.

    Args:
        captions: as `Captioner.caption` returns them for many pictures.
        images: the pictures, where they do not lie at the captions' `source`.
        marks: whether each caption is right: a green tick or a red cross stands before it.

    Raises:
        ValueError: if there is no caption, or not one picture and mark for each.
    """
    for name, values in (("images", images), ("marks", marks)):
        if values is not None and len(values) != len(captions):
            raise ValueError(
                f"{len(values)} {name} for {len(captions)} captions; give one for each."
            )
    if not captions:
        raise ValueError("no caption to draw; pass at least one.")
    ncols = min(ncols, len(captions))
    nrows = -(-len(captions) // ncols)
    texts = [textwrap.fill(caption.text, LINE) for caption in captions]
    lines = max(text.count("\n") for text in texts) + 1
    height = CELL + 0.2 * lines + 0.1
    figure, axes = plt.subplots(
        nrows, ncols, figsize=(ncols * CELL, nrows * height), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set_anchor("N")
    for i, (ax, text) in enumerate(zip(axes.flat, texts, strict=False)):
        image = open_image(captions[i].source if images is None else images[i])
        image.thumbnail((SHOWN, SHOWN))
        ax.imshow(image)
        below = {"transform": ax.transAxes, "va": "top", "fontsize": 9.5, "linespacing": 1.25}
        ax.text(0 if marks is None else 0.08, -0.03, text, color=INK, **below)
        if marks is not None:
            mark, color = ("✓", RIGHT) if marks[i] else ("✗", WRONG)
            ax.text(0, -0.03, mark, color=color, fontweight="bold", **below)
    return figure


def plot_training_curves(log: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss and measures of a training stage over its steps, from its `curve.csv`.

    Args:
        log: a row for each logged step; `loss` goes on the left axis, and columns that begin with
            `eval_` (shares from 0 to 1) on the right one.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    loss = log.dropna(subset=["loss"])
    ax.plot(loss["step"], loss["loss"], color=INK, lw=1.2, label="loss")
    ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
    measures = [name for name in log if name.startswith("eval_")]
    if measures:
        shares = ax.twinx()
        shares.set(ylabel="right", ylim=(0, 1.02))
        for name, color in zip(measures, plt.get_cmap("tab20").colors, strict=False):
            rows = log.dropna(subset=[name])
            label = name.removeprefix("eval_").replace("_", " ")
            shares.plot(rows["step"], rows[name], "o-", color=color, ms=3, lw=1, label=label)
        shares.legend(loc="center left", bbox_to_anchor=(1.12, 0.5), frameon=False, fontsize=8)
    return ax


def plot_scores(
    tables: Mapping[str, pd.DataFrame], scale: float = 100, ax: Axes | None = None
) -> Axes:
    """Scores as dots with their intervals, of one system or of several beside each other.

    Args:
        tables: by the system's name: a row a score with `score`, `low` and `high`, as in
            `EvaluationReport.table`.
        scale: what they are multiplied by.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table.index))
    ax = ax or plt.subplots(figsize=(6, 1 + 0.3 * len(names)), layout="constrained")[1]
    colors = plt.get_cmap("tab10").colors
    for i, ((system, table), color) in enumerate(zip(tables.items(), colors, strict=False)):
        rows = [names.index(name) + 0.18 * (i - (len(tables) - 1) / 2) for name in table.index]
        sides = [table["score"] - table["low"], table["high"] - table["score"]]
        ax.errorbar(
            *(scale * table["score"], rows),
            xerr=[scale * side for side in sides],
            **{"fmt": "o", "color": color, "ms": 4, "capsize": 2, "label": system},
        )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel(f"score, times {scale:g}" if scale != 1 else "score")
    ax.grid(axis="x", alpha=0.3)
    if len(tables) > 1:
        ax.legend(frameon=False, fontsize=8)
    return ax


def plot_patch_map(
    image: Picture | None,
    patch_map: Mapped,
    ax: Axes | None = None,
    vmax: float | None = None,
    grid: bool = False,
) -> Axes:
    """A map over its picture, which turns grey: colours are the map's. A patch has one flat colour.

    Args:
        image: None for a map of no one picture, such as a mean.
        vmax: the value of the brightest colour (None: the map's largest); 0 and less is darkest.
        grid: draw the borders of the patches.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    rows, columns = patch_map.values.shape
    width, height = columns, rows
    if image is not None:
        photo = ImageOps.autocontrast(open_image(image).convert("L"))  # dark ones stay readable
        photo.thumbnail((SHOWN, SHOWN))
        width, height = photo.size
        ax.imshow(photo, "gray", extent=(0, width, height, 0), vmin=-128, vmax=255)  # pale
    values = patch_map.values
    vmax = values.max() if vmax is None else vmax
    ax.imshow(
        values,
        HEAT,
        extent=(0, width, height, 0),
        alpha=None if image is None else np.interp(values, (0, vmax), VEIL),
        interpolation="nearest",
        vmin=0,
        vmax=vmax,
    )
    if grid:
        style = {"color": "white", "lw": 0.5}
        ax.vlines(np.linspace(0, width, columns + 1), 0, height, **style)
        ax.hlines(np.linspace(0, height, rows + 1), 0, width, **style)
    ax.set_title(patch_map.label, fontsize=9, color=INK)
    ax.set_axis_off()
    return ax


def map_sheet(
    image: Picture | None, rows: Mapping[str, Sequence[Mapped]], grid: bool = False
) -> Figure:
    """Maps of one picture in named rows: words by methods, or heads by blocks.

    Maps of one method share a colour scale, which stands beside them.

    Raises:
        ValueError: if there is no map.
    """
    methods: dict[str, list[Mapped]] = {}
    for patch_map in (patch_map for row in rows.values() for patch_map in row):
        methods.setdefault(patch_map.method, []).append(patch_map)
    if not methods:
        raise ValueError("no map to draw; pass at least one.")
    vmax = {name: max(each.values.max() for each in maps) for name, maps in methods.items()}
    figure, axes = _tiles(len(rows), max(map(len, rows.values())))
    drawn: dict[str, list[Axes]] = {}
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for ax, patch_map in zip(line, row, strict=False):
            method = patch_map.method
            plot_patch_map(image, patch_map, ax, vmax[method], grid)
            drawn.setdefault(method, []).append(ax)
        beside = {"transform": line[0].transAxes, "ha": "right", "va": "center", "rotation": 90}
        line[0].text(-0.06, 0.5, name.replace("_", " "), color=INK, fontsize=9, **beside)
    for those in drawn.values():
        height = len({ax.get_subplotspec().rowspan.start for ax in those})
        bar = figure.colorbar(those[0].images[-1], ax=those, aspect=12 * height, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    return figure


def query_sheet(
    profiles: Sequence[Profiled], image: Picture | None = None, ncols: int = 5
) -> Figure:
    """Where queries look, on one colour scale; below, whom they serve and what muting them costs.

    Args:
        image: the picture, where the profiles hold maps of a single one.
    """
    vmax = max(profile.map.values.max() for profile in profiles)
    figure, axes = _tiles(-(-len(profiles) // ncols), ncols, below=0.75)
    for ax, profile in zip(axes.flat, profiles, strict=False):
        plot_patch_map(image, profile.map, ax, vmax)
        words = textwrap.fill(", ".join(profile.words), LINE)
        below = {"transform": ax.transAxes, "va": "top", "fontsize": 7, "color": INK}
        ax.text(0, -0.04, f"{words}\ncost {profile.cost:.2f}", **below)
    return figure


def plot_removal_curves(
    kept: Float[np.ndarray, " S"],
    curves: Mapping[str, Float[np.ndarray, "W S"]],
    ax: Axes | None = None,
) -> Axes:
    """How probable words are, on average, while patches leave or come in the order of maps.

    Args:
        kept: shares of the patches that are there, 0 to 1.
        curves: by what chose the order: probabilities of W words; the legend adds the areas.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    for name, probabilities in curves.items():
        mean = probabilities.mean(0)
        area = np.trapezoid(mean, kept) / (kept[-1] - kept[0])
        ax.plot(kept, mean, "o-", ms=3, lw=1.4, label=f"{name.replace('_', ' ')} ({area:.2f})")
    ax.set(xlabel="share of patches there", ylabel="probability of the word", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_effects(effects: Sequence[Affected], ax: Axes | None = None) -> Axes:
    """Change of each word's log-probability, in nats: a bar for every intervention."""
    words = [word.text for word in effects[0].words]
    ax = ax or plt.subplots(figsize=(1 + 0.7 * len(words), 2.8), layout="constrained")[1]
    places, width = np.arange(len(words)), 0.8 / len(effects)
    for i, effect in enumerate(effects):
        middle = places + width * (i - (len(effects) - 1) / 2)
        ax.bar(middle, effect.change, width, label=effect.label)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set_xticks(places, words, rotation=30, ha="right")
    ax.set_ylabel("change (nats)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_differences(
    differences: pd.DataFrame, label: str = "difference from the base", ax: Axes | None = None
) -> Axes:
    """What variants of a study have over its base: dots with their intervals, sorted.

    Args:
        differences: a row a variant with `difference`, `low` and `high`, as
            `ablation.differences` gives; those without an interval are left out.
    """
    rows = differences.dropna(subset=["low", "high"]).sort_values("difference")
    ax = ax or plt.subplots(figsize=(6, 1 + 0.3 * len(rows)), layout="constrained")[1]
    sides = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
    ax.errorbar(rows["difference"], range(len(rows)), xerr=sides, fmt="o", color=INK, capsize=2)
    ax.axvline(0, color=WRONG, lw=0.8)
    ax.set_yticks(range(len(rows)), rows.index)
    ax.set_xlabel(label)
    ax.grid(axis="x", alpha=0.3)
    return ax


def plot_tradeoff(table: pd.DataFrame, cost: str, quality: str, ax: Axes | None = None) -> Axes:
    """What runs are worth against what they cost: a small dot a run, a named one a variant's mean.

    Args:
        table: a row a run with `variant` and both columns, as `ablation.Study.table` gives.
    """
    ax = ax or plt.subplots(figsize=(8, 5), layout="constrained")[1]
    means = table.groupby("variant", sort=False)[[cost, quality]].mean().sort_values(quality)
    for variant in means.index:
        runs = table[table["variant"] == variant]
        dots = ax.scatter(runs[cost], runs[quality], s=8, alpha=0.4)
        ax.scatter(*means.loc[variant], s=40, color=dots.get_facecolor(), alpha=1)
    ax.margins(x=0.25)
    free = defaultdict(float)  # in a fifth of the width, the height from which no name stands
    for variant, mean in means.iterrows():
        point = ax.transData.transform(mean)  # in pixels
        fifth = int(5 * ax.transAxes.inverted().transform(point)[0])
        height = point[1] * 72 / ax.figure.dpi
        lifted = max(height, free[fifth])
        place = {"xytext": (14, lifted - height - 3), "textcoords": "offset points"}
        line = {"arrowstyle": "-", "lw": 0.4, "color": INK, "relpos": (0, 0.5)}
        ax.annotate(variant, mean, **place, fontsize=8, color=INK, arrowprops=line)
        free[fifth] = lifted + 10
    ax.set(xlabel=cost, ylabel=quality)
    ax.grid(alpha=0.3)
    return ax


def plot_curves(curves: pd.DataFrame, measure: str = "loss", ax: Axes | None = None) -> Axes:
    """How variants learned: the mean over their seeds, in a band from the least to the most.

    Args:
        curves: a row a logged step with `variant`, `seed`, `step` and the measure, as
            `ablation.Study.curves` gives.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    for variant, rows in curves.dropna(subset=[measure]).groupby("variant", sort=False):
        by_step = rows.groupby("step")[measure].agg(["mean", "min", "max"])
        (line,) = ax.plot(by_step.index, by_step["mean"], lw=1.4, label=variant)
        band = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
        ax.fill_between(by_step.index, by_step["min"], by_step["max"], **band)
    ax.set(xlabel="step", ylabel=measure.removeprefix("eval_").replace("_", " "))
    ax.legend(frameon=False, fontsize=8)
    return ax


def write_figure(figure: Figure, output: Path, dpi: int = 80) -> None:
    """Write a figure whole, in a folder that need not be there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"partial-{output.name}")  # the suffix chooses the format
    figure.savefig(partial, dpi=dpi)
    partial.replace(output)


def _tiles(nrows: int, ncols: int, below: float = 0.25) -> tuple[Figure, np.ndarray]:
    """Empty axes for maps, with `below` inches for text."""
    size = (ncols * TILE + 0.9, nrows * (TILE + below))
    figure, axes = plt.subplots(nrows, ncols, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes
