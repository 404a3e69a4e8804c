"""The demo, the figures of the README, and the findings of a study."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qvision_lab import plots, scenes
from qvision_lab.ablation import averages, differences, part, parts, summarise
from qvision_lab.ablation.study import SETTINGS, STUDIES
from qvision_lab.captioning import load
from qvision_lab.data.atomic import atomic
from qvision_lab.data.coco import open_dataset
from qvision_lab.interpretation.collapse import MEASURES, THRESHOLDS, TOLERANCE, Diagnosis
from qvision_lab.interpretation.faithfulness import object_words, removal_curves
from qvision_lab.interpretation.maps import METHODS, PatchMap, query_maps, word_maps
from qvision_lab.interpretation.queries import compare_raised_and_fallen, profile_queries
from qvision_lab.interpretation.trace import trace_all
from qvision_lab.model.architecture import architecture
from qvision_lab.model.config import QVisionConfig
from qvision_lab.scenes.checker import RATES
from qvision_lab.scenes.dataset import SceneJudge
from qvision_lab.scenes.layout import COLORS
from qvision_lab.training.recipe import read_yaml

__all__ = ["collapse_table", "draw_curves", "draw_findings", "draw_inside", "draw_parts"]
__all__ += ["findings_table", "margin_of", "photographs", "run_demo"]
__dir__ = __all__.copy  # for completion

EXAMPLE = 2  # index of the test scene in the figures of words and queries
CURVES = {  # stages of the embedded checkpoint's training, and the measures that are drawn
    "vision": ("Vision tower", ["category", "color", "number", "background"]),
    "captioner": ("Captioner", ["true", "pairs_right", "object_recall", "hallucination"]),
}
PHOTOGRAPHS = (
    *("chelsea.png", "coffee.png", "astronaut.png"),
    *("camera.png", "rocket.jpg", "clock_motion.png"),
)
CREDITS = (
    "Photographs of scikit-image. CC0: cat by Stefan van der Walt, coffee by Rachel Michetti, man\n"
    "with a camera by Lav Varshney; public domain: astronaut by NASA, rocket by SpaceX, clock by\n"
    "Stefan van der Walt."
)
STYLE = str(files("qvision_lab.plots") / "qvision.mplstyle")
ABOVE = "{} above the base (* corrected p < 0.05)"
RESULTS = files("qvision_lab.ablation") / "results"
STUDY, COLLAPSE = RESULTS / "length", RESULTS / "collapse"
COMPARED = "architecture", "length", "queries", "tower", "photographs", "random_tower", "phases"


def run_demo(n: int, output: str | Path, seed: int = 0, model: str | None = None) -> None:
    """Caption n scenes of the split `test`, draw a contact sheet, print the rates."""
    if n < 1:
        raise ValueError(f"n={n} scenes cannot be shown; choose at least 1.")
    captioner = load(model)
    with TemporaryDirectory() as place:
        dataset = open_dataset(scenes.write_coco(place, n, split="test", seed=seed))
        captions = captioner.caption([image.image for image in dataset])
        checks = [scenes.check(captions[i].text, t) for i, t in dataset.judge.truths.items()]
        shown = [check.true for check in checks][:24]
        write_figure(plots.caption_sheet(captions[:24], ncols=6, marks=shown), Path(output), dpi=80)
    print(f"\n{n} held-out scenes, captioned from disk:\n")
    for name, rate in scenes.score(checks).items():
        print(f"  {name:<18}{rate!s:>18}   of {RATES[name]}")
    print(f"\ncontact sheet: {output}")


def photographs() -> list[Path]:
    """Six free photographs that scikit-image brings; ImportError if it is not installed."""
    if (package := find_spec("skimage")) is None:
        raise ImportError("scikit-image has the photographs: pip install 'qvision-lab[photos]'.")
    return [Path(package.origin).with_name("data") / name for name in PHOTOGRAPHS]


def draw_photographs(output: Path) -> None:
    """Draw `photographs` with their captions by the checkpoint `photos`."""
    captions = load("photos").caption(photographs())
    sheet = plots.caption_sheet(captions, ncols=3)
    sheet.text(0.34, 0.02, CREDITS, fontsize=7)  # below the shorter photographs
    write_figure(sheet, output, dpi=80)
    for caption in captions:
        print(f"  {Path(caption.source).stem}: {caption.text}")
    print(f"\nphotographs: {output}")


@plt.style.context(STYLE)
def draw_curves(output: str | Path) -> None:
    """Draw the training curves of the embedded checkpoint: losses and metrics of both stages."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.8), layout="constrained")
    for ax, (stage, (title, measures)) in zip(axes, CURVES.items(), strict=True):
        table = pd.read_csv(files("qvision_lab") / f"scenes_checkpoint/{stage}.csv")
        columns = ["step", "loss", *(f"eval_{measure}" for measure in measures)]
        plots.plot_training_curves(table[columns], ax).set_title(title)
    write_figure(figure, Path(output))


@plt.style.context(STYLE)
def draw_inside(
    folder: str | Path, n: int, seed: int, model: str | None, picture: str | None
) -> None:
    """Draw `architecture.png` of the published model, and `{words,queries,deletion}.png` of one.

    Those are word maps, query profiles and removal curves; the latter are averages over the first
    `n` (at least 3) scenes of the split `test`, or of one picture of yours. Printed is whether the
    words that queries raise are those that fall without them, as if queries were independent.
    """
    if n <= EXAMPLE:
        raise ValueError(f"n={n} scenes are too few; choose at least {EXAMPLE + 1}.")
    folder, captioner = Path(folder), load(model)
    diagram = plots.plot_architecture(architecture(QVisionConfig()))
    write_figure(diagram.figure, folder / "architecture.png")
    images, example = [picture], 0
    if picture is None:
        images = [scene.image for scene in scenes.generate(n, split="test", seed=seed)]
        example = EXAMPLE
    traces = list(trace_all(captioner, images))
    named = [[word for word, _ in object_words(t, SceneJudge.vocabulary)] for t in traces]
    trace = traces[example]
    words = [word for word in trace.words if word.text in COLORS or word in named[example]]
    if not words:  # of a photograph, named by a vocabulary of its own
        words = named[example] = list(trace.words)
    rows = {name: [_as_shares(m) for m in word_maps(trace, name, words)] for name in METHODS}
    sheet = plots.map_sheet(trace.image, rows, caption=trace.caption)
    write_figure(sheet, folder / "words.png")

    pairs = zip(profile_queries(traces), query_maps(trace), strict=True)
    profiles = [replace(profile, map=query_map) for profile, query_map in pairs]
    if len(profiles) > 1:
        print(f"words that queries raise, that fall without: {compare_raised_and_fallen(profiles)}")
    write_figure(plots.query_sheet(profiles, trace.image), folder / "queries.png")

    rng, patches = np.random.default_rng(seed), len(trace.image_tokens)
    orders = METHODS | {"chance": lambda trace, words: rng.random((len(words), patches))}
    runs = [
        removal_curves(trace, words, np.stack([order(trace, words) for order in orders.values()]))
        for trace, words in zip(traces, named, strict=True)
        if words
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for ax, kind in zip(axes, ("deletion", "insertion"), strict=True):
        curves = np.concatenate([getattr(run, kind) for run in runs], axis=1)  # [M,W,S]
        plots.plot_removal_curves(runs[0].kept, dict(zip(orders, curves, strict=True)), ax)
        ax.set_title(f"{kind}: {curves.shape[1]} words in {len(runs)} images")
    axes[0].invert_xaxis()
    write_figure(figure, folder / "deletion.png")


@plt.style.context(STYLE)
def write_styled(draw: Callable[[], Axes], output: Path) -> None:
    """Draw in the package's style, and write the figure."""
    write_figure(draw().figure, output)


def write_figure(figure: Figure, output: Path, dpi: float | None = None) -> None:
    """Write a figure atomically, by default at least 1,200 pixels wide; its folder is created."""
    dpi = dpi or max(160, 1200 / figure.get_figwidth())
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as partial:
        figure.savefig(partial, dpi=dpi, format=output.suffix[1:] or None)


def _as_shares(patch_map: PatchMap) -> PatchMap:
    """Positive values as shares of their sum, which makes maps of any unit comparable."""
    positive = patch_map.values.clip(0)
    return replace(patch_map, values=positive / (positive.sum() or 1))


@plt.style.context(STYLE)
def draw_findings(
    results: str | Path = STUDY, metric: str = "CIDEr", folder: str | Path | None = None
) -> None:
    """Print what the intervals of a study support, and draw `folder/study_*.png` if one is given.

    `results` holds the study's `table.csv` and `curves.csv`; `metric` is a column of the table. Of
    a study of lengths, effects are drawn of every tuned part, the others of the longest.
    """
    table, curves = (pd.read_csv(Path(results) / f"{name}.csv") for name in ("table", "curves"))
    compared, margin = parts(table), margin_of(results, metric)
    for title, rows in compared.items():
        print("\n".join([f"{title}:"] * bool(title) + summarise(rows, metric, margin)))
    if folder is None:
        return
    figures = {}
    if len(compared) > 1:
        figures["lengths"] = plots.plot_lengths(table, metric).figure
        figures["effects"] = draw_parts(results, metric)
    if "length" in table:  # the longest is drawn
        longest, tuned = table["length"].max(), "tuned" not in table or table["tuned"].any()
        table, curves = (part(rows, longest, tuned=tuned) for rows in (table, curves))
    effects = differences(table, metric)
    largest = effects["difference"].abs().nlargest(4).index
    shown = curves["variant"].isin({table["variant"].iloc[0], *largest})
    if len(compared) == 1:
        ax = plots.plot_differences(effects, ABOVE.format(metric), margin=margin)
        figures["effects"] = ax.figure
    figures["tradeoff"] = plots.plot_tradeoff(table, "parameters", metric).figure
    figures["curves"] = plots.plot_curves(curves[shown]).figure
    for name, figure in figures.items():
        write_figure(figure, Path(folder) / f"study_{name}.png")


@plt.style.context(STYLE)
def draw_parts(results: str | Path, metric: str = "CIDEr") -> Figure:
    """Differences from the base in each part of a study of lengths, with tuned rates if it has.

    ValueError if no part has an interval: each takes two seeds.
    """
    table = pd.read_csv(Path(results) / "table.csv")
    if table.get("tuned", pd.Series([False])).any():
        table = table[table["tuned"]]
    compared = parts(table.drop(columns="tuned", errors="ignore"))
    found = {title: differences(rows, metric) for title, rows in compared.items()}
    found = {title: rows for title, rows in found.items() if rows["low"].notna().any()}
    if not found:
        raise ValueError(f"{results}: no interval to draw; train with two seeds or more.")
    return plots.plot_parts(found, ABOVE.format(metric), margin_of(results, metric))


def margin_of(results: str | Path, metric: str = "CIDEr") -> float | None:
    """The margin of equivalence that a study states, written with its results or the package's."""
    places = Path(results) / SETTINGS, STUDIES / f"{Path(results).name}.yaml"
    found = next((place for place in places if place.is_file()), None)
    return read_yaml(found).get("margin") if found and metric == "CIDEr" else None


def findings_table(results: str | Path = STUDY, metric: str = "CIDEr") -> pd.DataFrame:
    """A study's variants with their scores, the best first, and differences from the base."""
    tables, scale = [], 1 if metric == "CIDEr" else 100
    shares = {"true": "true captions", "object recall": "objects named", "pointing": "maps point"}
    margin, runs = margin_of(results, metric), pd.read_csv(Path(results) / "table.csv")
    for trained, table in parts(runs).items():
        rows = averages(table).join(differences(table, metric, margin), rsuffix=" of pairs")
        failed = table.groupby("variant")["failed"].count()
        rows = rows.sort_values(metric, ascending=False)  # the base has no difference
        pairs = scale * rows[["difference", "low", "high"]]
        columns = {
            **({"trained": trained} if trained else {}),
            "variant": rows.index,
            "runs": rows["n"].map("{:.0f}".format),
            **({"failed": failed[rows.index].map(str)} if runs["failed"].count() else {}),
            **({"rate": rows["rate"].map("{:g}".format)} if "rate" in rows else {}),
            f"{metric} x 100": (scale * rows[metric]).map("{:.0f}".format),
            "above the base": [f"{d:+.0f} [{a:+.0f}, {b:+.0f}]" for d, a, b in pairs.values],
            "p, corrected": rows["corrected"].map("{:.2g}".format),
            **(
                {f"p, within {margin:g}": rows["equivalent"].map("{:.2g}".format)} if margin else {}
            ),
            **{shares[name]: rows[name].map("{:.1%}".format) for name in shares if name in rows},
            "parameters trained": rows["parameters"].map("{:,.0f}".format),
        }
        shown = pd.DataFrame(columns)
        if "pointing" in rows:
            shown.loc[rows["pointing"].isna() & (rows["n"] > 0), "maps point"] = "no map"
        tables.append(shown)
    return pd.concat(tables).replace(r".*nan.*", "", regex=True)


def collapse_table(results: str | Path = COLLAPSE) -> pd.DataFrame:
    """Runs whose queries have collapsed, and verdicts of the thresholds that say otherwise.

    Collapse is counted with the tolerance of `diagnose`, and by the letter: no caption changes. The
    thresholds were set on the first five seeds of the base. Runs that failed are left out.
    """
    measures = ["changed", *THRESHOLDS]
    runs = pd.read_csv(Path(results) / "table.csv").dropna(subset=measures)
    rows = runs[measures].to_dict("records")
    said = [Diagnosis(0, 0, 0, (), **row).collapsed for row in rows]
    seeds = np.where(runs["seed"] < 5, "0 to 4", "from 5")
    counts = {}
    for title, tolerance in {"": TOLERANCE, ", no caption changed": 0}.items():
        collapsed = runs["changed"] <= tolerance
        counts |= {f"collapsed{title}": collapsed, f"wrong verdicts{title}": collapsed != said}
    runs = runs.assign(seeds=seeds, **counts)
    groups = runs.groupby(["length", "variant", "seeds"], sort=False)
    columns = {
        "runs": groups.size(),
        **{title: groups[title].sum() for title in counts},
        **{MEASURES[name]: groups[name].mean().map("{:.3f}".format) for name in measures},
        "CIDEr x 100": groups["CIDEr"].mean().map("{:.0f}".format),
    }
    return pd.DataFrame(columns).reset_index().rename(columns={"length": "steps"})


STUDY_TABLES = {  # of pages
    **{name: partial(findings_table, RESULTS / name) for name in COMPARED},
    "collapse": collapse_table,
}
