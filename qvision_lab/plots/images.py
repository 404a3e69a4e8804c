"""Images with captions below them, and maps over them.

An image is a PIL image, an array [H,W] or [H,W,C] of bytes, or the path of a file. A map has
`values` [rows, columns], a `label` and its `method`, as `interpretation.maps.PatchMap`.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

ImageLike: TypeAlias = Image.Image | np.ndarray | str | os.PathLike

RIGHT, WRONG, INK = "#1a7f37", "#c4314b", "#24292f"
CELL, TILE = 2.7, 1.5  # inches, width of an image with a caption, and with a map
LINE = 28  # characters that fit below it
MAX_SIDE = 320  # pixels of the longer side
HEAT = "magma"  # colours of maps, perceptually uniform
OPACITY = 0.25, 0.85  # of a map over an image, from 0 to the brightest


def caption_sheet(
    captions: Sequence[Any],
    images: Sequence[ImageLike] | None = None,
    ncols: int = 4,
    marks: Sequence[bool] | None = None,
) -> Figure:
    """Images with their captions below, in rows of `ncols`; ValueError if they do not match.

    Captions have `text` and `source`, as `Captioner.caption` returns them; by default the images
    are the files there. Marks are whether each is right, drawn as a green tick or a red cross.
    """
    for name, values in (("images", images), ("marks", marks)):
        if values is not None and len(values) != len(captions):
            raise ValueError(f"{len(values)} {name} for {len(captions)} captions; give one each.")
    if not captions:
        raise ValueError("no caption to draw; pass at least one.")
    ncols = min(ncols, len(captions))
    texts = [textwrap.fill(caption.text, LINE) for caption in captions]
    below = 0.3 + 0.2 * max(text.count("\n") for text in texts)
    figure, axes = _tiles(-(-len(captions) // ncols), ncols, CELL, below, margin=0)
    for i, (ax, text) in enumerate(zip(axes.flat, texts, strict=False)):
        image = _open(captions[i].source if images is None else images[i])
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        ax.imshow(image)
        ax.set_anchor("N")
        style = {"transform": ax.transAxes, "va": "top", "fontsize": 9.5, "linespacing": 1.25}
        ax.text(0 if marks is None else 0.08, -0.03, text, color=INK, **style)
        if marks is not None:
            mark, color = ("✓", RIGHT) if marks[i] else ("✗", WRONG)
            ax.text(0, -0.03, mark, color=color, fontweight="bold", **style)
    return figure


def plot_patch_map(
    image: ImageLike | None,
    patch_map: Any,
    ax: Axes | None = None,
    vmax: float | None = None,
    grid: bool = False,
) -> Axes:
    """A map over its image in grey, with one flat colour for each patch; `grid` draws the borders.

    A map of several images, such as a mean, has None. The brightest colour stands for `vmax` (None:
    the map's largest value), the darkest for 0 and less.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    values, (rows, columns) = patch_map.values, patch_map.values.shape
    width, height = columns, rows
    if image is not None:
        grey = ImageOps.autocontrast(_open(image).convert("L"))  # dark ones stay readable
        grey.thumbnail((MAX_SIDE, MAX_SIDE))
        width, height = grey.size
        ax.imshow(grey, "gray", extent=(0, width, height, 0), vmin=-128, vmax=255)  # pale
    vmax = values.max() if vmax is None else vmax
    alpha = None if image is None else np.interp(values, (0, vmax), OPACITY)
    style = {"interpolation": "nearest", "vmin": 0, "vmax": vmax, "alpha": alpha}
    ax.imshow(values, HEAT, extent=(0, width, height, 0), **style)
    if grid:
        ax.vlines(np.linspace(0, width, columns + 1), 0, height, color="white", lw=0.5)
        ax.hlines(np.linspace(0, height, rows + 1), 0, width, color="white", lw=0.5)
    ax.set_title(patch_map.label, fontsize=9, color=INK)
    ax.set_axis_off()
    return ax


def map_sheet(
    image: ImageLike | None,
    rows: Mapping[str, Sequence[Any]],
    grid: bool = False,
    caption: str | None = None,
) -> Figure:
    """Maps of one image in named rows; those of one method share a colour scale, with a bar.

    With a `caption`, the image in colour stands above it, in front of the first row.
    """
    maps = [patch_map for row in rows.values() for patch_map in row]
    if not maps:
        raise ValueError("no map to draw; pass at least one.")
    axes_of: dict[str, list[Axes]] = {each.method: [] for each in maps}
    vmax = {name: max(m.values.max() for m in maps if m.method == name) for name in axes_of}
    first = int(caption is not None)
    figure, axes = _tiles(len(rows), first + max(map(len, rows.values())))
    if first:
        axes[0, 0].imshow(_open(image))
        text = textwrap.fill(caption, 18)
        place = {"transform": axes[0, 0].transAxes, "va": "top", "fontsize": 8, "color": INK}
        axes[0, 0].text(0, -0.05, text, **place).set_in_layout(False)
    for line, (name, row) in zip(axes[:, first:], rows.items(), strict=True):
        for ax, patch_map in zip(line, row, strict=False):
            plot_patch_map(image, patch_map, ax, vmax[patch_map.method], grid)
            axes_of[patch_map.method].append(ax)
        left = {"transform": line[0].transAxes, "ha": "right", "va": "center", "rotation": 90}
        line[0].text(-0.06, 0.5, name.replace("_", " "), color=INK, fontsize=9, **left)
    for method, group in axes_of.items():
        _add_bar(figure, group, method.replace("_", " "))
    return figure


def query_sheet(profiles: Sequence[Any], image: ImageLike | None = None) -> Figure:
    """Maps of `interpretation.queries.QueryProfile`s on one colour scale, with words and cost.

    The words are those that read a query most; the cost of muting it is in nats a caption.
    """
    vmax = max(profile.map.values.max() for profile in profiles)
    figure, axes = _tiles(-(-len(profiles) // 5), 5, below=0.75)
    for ax, profile in zip(axes.flat, profiles, strict=False):
        plot_patch_map(image, profile.map, ax, vmax)
        cost = round(profile.cost, 2) + 0.0  # no "-0.00"
        text = f"{textwrap.fill(', '.join(profile.words), LINE)}\ncost {cost:.2f}"
        ax.text(0, -0.04, text, transform=ax.transAxes, va="top", fontsize=7, color=INK)
    _add_bar(figure, [*axes.flat], "share of a query's attention", rows=1, anchor=(0, 1))
    return figure


def _add_bar(
    figure: Figure, axes: list[Axes], label: str, rows: int | None = None, **place
) -> None:
    """A colour bar on the right of the axes, whose scale it has, as high as `rows` (None: all)."""
    height = len({ax.get_subplotspec().rowspan.start for ax in axes})
    rows = rows or height
    place |= {"shrink": rows / height, "aspect": 12 * rows, "pad": 0.01}
    bar = figure.colorbar(axes[0].images[-1], ax=axes, **place)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=7)


def _open(image: ImageLike) -> Image.Image:
    """An RGB copy, turned as EXIF says."""
    if isinstance(image, str | os.PathLike):
        image = Image.open(image)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return ImageOps.exif_transpose(image).convert("RGB")


def _tiles(
    nrows: int, ncols: int, width: float = TILE, below: float = 0.25, margin: float = 0.9
) -> tuple[Figure, np.ndarray]:
    """Empty axes of `width` inches; `below` inches for text, and a `margin` for colour bars."""
    size = ncols * width + margin, nrows * (width + below)
    figure, axes = plt.subplots(nrows, ncols, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes
