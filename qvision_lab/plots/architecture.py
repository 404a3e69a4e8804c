"""One diagram of the model, drawn from its stages."""

from collections.abc import Collection, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch

from qvision_lab.plots.images import INK

FROZEN, TRAINED, EMPTY = "#dfe5ea", "#f6d7a7", "white"  # without parameters of its own: white
WIDTH, HEIGHT, STEP = 2.0, 1.0, 2.5  # of a box, and from one to the next
ARROW = {"arrowstyle": "-|>", "color": "0.3", "lw": 1}


def plot_architecture(
    stages: Sequence[Any],
    highlight: str | None = None,
    trained: Collection[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw the path from an image and the words so far to the next word.

    Stages are those of `qvision_lab.model.architecture.architecture(config)`. By name, one may be
    outlined and some marked as trained by a phase; ValueError for a name of none.
    """
    by_name, trained = {stage.name: stage for stage in stages}, {*trained}
    for name in [*trained, *([highlight] if highlight else [])]:
        if name not in by_name:
            raise ValueError(f"no stage {name!r}; choose from {', '.join(by_name)}.")
    column: dict[str, int] = {}  # counted from the last stage; each as late as its readers allow
    for name in reversed(by_name):
        readers = [column[stage.name] for stage in stages if name in stage.reads]
        column[name] = 1 + max(readers, default=-1)
    lower = {"words so far", "GPT-Neo"}
    lower |= {stage.name for stage in stages if stage.name == "head" and "GPT-Neo" in stage.reads}
    most = max(column.values())
    places = {n: (STEP * (most - c), 0.0 if n in lower else 1.8) for n, c in column.items()}
    right = max(x for x, _ in places.values()) + WIDTH
    if ax is None:
        ax = plt.subplots(figsize=(0.78 * right, 3.1), layout="constrained")[1]
    for name, (x, y) in places.items():
        stage = by_name[name]
        color = TRAINED if name in trained else FROZEN if stage.parameters else EMPTY
        edge, thick = (INK, 2.5) if name == highlight else ("0.45", 0.8)
        style = {"boxstyle": "round,pad=0,rounding_size=0.12", "fc": color, "ec": edge, "lw": thick}
        ax.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, **style))
        lines = stage.file, f"{stage.parameters:,}" if stage.parameters else None
        detail, middle = "\n".join(filter(None, lines)), {"ha": "center", "va": "center"}
        height = 0.72 if detail else 0.5
        ax.text(x + WIDTH / 2, y + height, name, weight="bold", fontsize=9, **middle)
        ax.text(x + WIDTH / 2, y + 0.33, detail, fontsize=7.5, **middle)
        ax.text(x + WIDTH / 2, y - 0.16, stage.output, fontsize=7.5, **middle)
        for source in stage.reads:  # from the right of its box, perhaps in the other lane
            from_x, from_y = places[source]
            into = 0.5 if from_y == y else 0.75 if from_y > y else 0.25
            start, end = (from_x + WIDTH, from_y + HEIGHT / 2), (x, y + into * HEIGHT)
            ax.annotate("", end, start, arrowprops=ARROW)
    if trained:
        colors = {"trained": TRAINED, "frozen": FROZEN}
        legend = [Patch(fc=color, ec="0.45", label=label) for label, color in colors.items()]
        ax.legend(handles=legend, loc="lower left", frameon=False, fontsize=8)
    ax.set(xlim=(-0.1, right + 0.1), ylim=(-0.45, 2.95), aspect="equal")
    ax.axis("off")
    return ax
