"""The demo: held-out scenes as picture files, captioned from disk, judged against their truth."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from qvision_lab import plots, scenes
from qvision_lab.captioning import load
from qvision_lab.data.coco import open_dataset
from qvision_lab.evaluation.chair import scenes_vocabulary
from qvision_lab.interpretation.faithfulness import removal_curves
from qvision_lab.interpretation.maps import METHODS, PatchMap
from qvision_lab.interpretation.queries import profile_queries
from qvision_lab.interpretation.trace import Trace, Word, trace_all
from qvision_lab.scenes.checker import RATES, Rate
from qvision_lab.scenes.layout import COLORS

SHEET = 24  # scenes that are drawn on the contact sheet
LOOKED_INTO = 2  # the test scene whose words and queries are drawn
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
        written = open_dataset(place)
        captions = captioner.caption([image.image for image in written])
        checks = [
            scenes.check(caption.text, image.scene)
            for caption, image in zip(captions, written, strict=True)
        ]
        marks = [check.true for check in checks[:SHEET]]
        plots.write_figure(
            plots.caption_sheet(captions[:SHEET], ncols=6, marks=marks), Path(output)
        )
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
            plots.plot_training_curves(pd.read_csv(file), ax).set_title(title, loc="left")
    plots.write_figure(figure, Path(output))


def draw_inside(
    folder: str | Path = "figures", n: int = 16, seed: int = 0, model: str | None = None
) -> None:
    """Draw what the model looks at: `words.png`, `queries.png` and `deletion.png`.

    Args:
        n: scenes of the split `test`, of which queries and removal curves are means; at least 3.
        model: folder or Hub id; by default the embedded checkpoint.
    """
    if n <= LOOKED_INTO:
        raise ValueError(f"n={n} scenes are too few; choose at least {LOOKED_INTO + 1}.")
    folder, captioner = Path(folder), load(model)
    images = [scene.image for scene in scenes.generate(n, split="test", seed=seed)]
    traces = list(trace_all(captioner, images))

    shown = traces[LOOKED_INTO]
    things = _objects(shown)
    told = [word for word in shown.words if word.text in COLORS or word in things]
    rows = {name: [_as_shares(m) for m in shown.word_maps(name, words=told)] for name in METHODS}
    plots.write_figure(plots.map_sheet(shown.image, rows), folder / "words.png")

    profiles = zip(profile_queries(traces), shown.query_maps(), strict=True)
    here = [replace(profile, map=of_picture) for profile, of_picture in profiles]
    plots.write_figure(plots.query_sheet(here, shown.image), folder / "queries.png")

    rng = np.random.default_rng(seed)
    size = len(shown.image_tokens)
    orders = METHODS | {"chance": lambda trace, words: rng.random((len(words), size))}
    runs = []
    for trace in traces:
        if words := _objects(trace):
            values = np.stack([order(trace, words) for order in orders.values()])
            runs.append(removal_curves(trace, words, values))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for ax, kind in zip(axes, ("deletion", "insertion"), strict=True):
        curves = np.concatenate([getattr(run, kind) for run in runs], axis=1)  # [M,W,S]
        plots.plot_removal_curves(runs[0].kept, dict(zip(orders, curves, strict=True)), ax)
        ax.set_title(kind, loc="left")
    axes[0].invert_xaxis()
    plots.write_figure(figure, folder / "deletion.png")


def _objects(trace: Trace) -> list[Word]:
    """Words that name an object, be it there or not."""
    ends = {mention.span[1] for mention in scenes_vocabulary().mentions(trace.caption)}
    return [word for word in trace.words if word.span[1] in ends]


def _as_shares(patch_map: PatchMap) -> PatchMap:
    """Positive values as shares of their sum: where a map points, whatever its unit."""
    positive = patch_map.values.clip(0)
    return replace(patch_map, values=positive / (positive.sum() or 1))
