"""Numbers and pictures drawn with matplotlib; computing and saving happen elsewhere."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import matplotlib.pyplot as plt

from qvision_lab.images import Picture, open_image

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, INK = "#1a7f37", "#c4314b", "#24292f"
CELL = 2.7  # inches a picture is wide
LINE = 28  # characters that fit below it
SHOWN = 320  # pixels of the longer side


class Captioned(Protocol):
    """What a contact sheet needs of a caption."""

    text: str
    source: str


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
