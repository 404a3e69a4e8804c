"""The demo: held-out scenes as picture files, captioned from disk, judged against their truth."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from qvision_lab.captioning import load
from qvision_lab.data import scenes
from qvision_lab.data.scenes.checking import RATES, Rate
from qvision_lab.plots import caption_sheet, plot_training_curves

SHEET = 24  # scenes that are drawn on the contact sheet
CURVES = {"vision": "Learning to see", "captioner": "Learning to tell"}


def run_demo(
    n: int = 24,
    output: str | Path = "figures/demo.png",
    folder: str | Path | None = None,
    seed: int = 0,
    model: str | None = None,
) -> dict[str, Rate]:
    """Caption n scenes of the split `test`, write a contact sheet, and print how many were true.

    Args:
        output: file of the contact sheet, in any format that matplotlib writes.
        folder: where the pictures are written and stay; by default they are deleted.
        model: folder or Hub id; by default the embedded checkpoint.

    Returns:
        The rates of `scenes.score`.
    """
    if n < 1:
        raise ValueError(f"n={n} scenes cannot be shown; choose at least 1.")
    captioner = load(model)
    with nullcontext(folder) if folder else TemporaryDirectory() as place:
        place = scenes.write_coco(place, n, split="test", seed=seed)
        images = json.loads((place / "captions.json").read_text(encoding="utf-8"))["images"]
        captions = captioner.caption([place / "images" / image["file_name"] for image in images])
        checks = [
            scenes.check(caption.text, scenes.layout(image["split"], image["seed"], image["index"]))
            for caption, image in zip(captions, images, strict=True)
        ]
        marks = [check.true for check in checks[:SHEET]]
        _write(caption_sheet(captions[:SHEET], ncols=6, marks=marks), Path(output))
    rates = scenes.score(checks)
    print(f"\n{n} scenes that training never saw, captioned from disk:\n")
    for name, rate in rates.items():
        print(f"  {name:<18}{str(rate) if rate.total else '-':>18}   of {RATES[name]}")
    print(f"\ncontact sheet: {output}")
    return rates


def draw_curves(output: str | Path = "figures/training.png") -> None:
    """Draw how the embedded checkpoint learned: loss and measures of both stages of its recipe."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 8), layout="constrained")
    for ax, (stage, title) in zip(axes, CURVES.items(), strict=True):
        with (files("qvision_lab") / "scenes_checkpoint" / f"{stage}.csv").open() as file:
            plot_training_curves(pd.read_csv(file), ax).set_title(title, loc="left")
    _write(figure, Path(output))


def _write(figure: Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"partial-{output.name}")  # the suffix chooses the format
    figure.savefig(partial, dpi=80)
    partial.replace(output)
