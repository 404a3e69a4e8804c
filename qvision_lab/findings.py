"""What a study found: in sentences, in a table, and drawn."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pandas as pd

from qvision_lab import plots
from qvision_lab.ablation import averages, differences, summarise

STUDY = files("qvision_lab.ablation") / "results" / "architecture"


def tell(
    results: str | Path = STUDY, metric: str = "CIDEr", folder: str | Path | None = None
) -> None:
    """Print what the intervals of a study support, and draw it.

    Args:
        results: folder with the study's `table.csv` and `curves.csv`.
        metric: column of the table.
        folder: of `study_effects.png`, `study_tradeoff.png` and `study_curves.png`, if any.
    """
    table, curves = (pd.read_csv(Path(results) / f"{name}.csv") for name in ("table", "curves"))
    print("\n".join(summarise(table, metric)))
    if folder is None:
        return
    found = differences(table, metric)
    furthest = found["difference"].abs().nlargest(4).index
    effects = plots.plot_differences(found, f"{metric}, less the base's")
    tradeoff = plots.plot_tradeoff(table, "parameters", metric)
    learning = plots.plot_curves(curves[curves["variant"].isin([table["variant"][0], *furthest])])
    for name, ax in {"effects": effects, "tradeoff": tradeoff, "curves": learning}.items():
        plots.write_figure(ax.figure, Path(folder) / f"study_{name}.png")


def as_table(results: str | Path = STUDY, metric: str = "CIDEr") -> pd.DataFrame:
    """What a study's variants are worth, the best first, and what they have over the base."""
    table = pd.read_csv(Path(results) / "table.csv")
    rows = averages(table).join(differences(table, metric), rsuffix=" of pairs")
    rows = rows.sort_values(metric, ascending=False)  # the base has no difference
    pairs = 100 * rows[["difference", "low", "high"]]
    shares = {"true": "true captions", "object recall": "objects named", "pointing": "maps point"}
    columns = {
        "variant": rows.index,
        f"{metric} x 100": rows[metric].map(lambda score: f"{100 * score:.0f}"),
        "above the base's": [
            f"{d:+.0f} [{low:+.0f}, {high:+.0f}]" for d, low, high in pairs.values
        ],
        "p, corrected": rows["corrected"].map("{:.2g}".format),
        **{title: rows[name].map("{:.1%}".format) for name, title in shares.items()},
        "parameters trained": rows["parameters"].map("{:,.0f}".format),
    }
    return pd.DataFrame(columns).replace(r".*nan.*", "", regex=True)
