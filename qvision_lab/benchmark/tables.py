"""Tables and figures of what was measured, drawn from the result files alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.resources import files
from itertools import chain, product
from pathlib import Path

import pandas as pd
import yaml
from matplotlib.axes import Axes
from scipy.stats import binomtest

from qvision_lab import plots
from qvision_lab.benchmark.harness import RESULTS, Spread
from qvision_lab.data.atomic import write_atomic

PAGE = RESULTS / "README.md"
LAYOUT = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8"))
COLUMNS, CARD, SCORES = LAYOUT["columns"], LAYOUT["card"], LAYOUT["scores"]
NOT_MEASURED = "not measured"

Row = dict  # of a result, or of a table by column


def read_table(name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """One of `NAMES`, drawn from result files in the folder, or in its folders by device."""
    rows = TABLES[name](folder) if name in TABLES else _read_rows(name, folder)
    return pd.DataFrame([*rows] or [{"result": NOT_MEASURED}])


def _read_rows(name: str, folder: Path) -> Iterator[Row]:
    """Rows of a table of `COLUMNS`, as text."""
    for device, rows in _read_results(name, folder).items():
        for row in EXPANSIONS.get(name, iter)(rows):
            values = {"device": device, **{k: v for k, v in row.items() if v is not None}}
            yield {title: _fill_in(cell, values) for title, cell in COLUMNS[name].items()}


def _fill_in(cell: str, values: Row) -> str:
    try:
        return cell.format_map(values)
    except KeyError:
        return ""


def _peers(rows: list[Row]) -> Iterator[Row]:
    """A row for a peer as it is, and one for a peer compiled by its library where tried.

    Ratios are its seconds over QVision's, median over the rounds: below 1 the peer is faster.
    """
    for row, (method, prefix) in product(rows, {"default": "", "compiled": "fastest_"}.items()):
        theirs, reason = row.get(f"{prefix}seconds"), row.get(f"{prefix}not_measured")
        if theirs or reason:
            time = f"{Spread.of(theirs):ms} ms" if theirs else f"{NOT_MEASURED} ({reason})"
            size = _size(row["parameters"], row["trained"])
            more = {"size": size, "method": method, "time": time}
            for name in ("qvision", "qvision_compiled"):
                if theirs and (ours := row.get(f"{name}_seconds")):
                    more[f"ratio_to_{name}"] = Spread.ratio(theirs, ours).median
            yield row | more


def _loading(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        speedup = Spread.ratio(rows[0]["seconds"], row["seconds"])
        yield row | {"first": row["loads"][0], "last": row["loads"][-1], "speedup": speedup}


def _training(rows: list[Row]) -> Iterator[Row]:
    """Rows with ratios of medians to the original's step, of one caption per image."""
    steps = {(r["way"], r["images"], r["precision"]): Spread.of(r["seconds"]).median for r in rows}
    for row in rows:
        step = Spread.of(row["seconds"]).median
        more = {"step_milliseconds": 1000 * step}
        if original := steps.get(("original", row["images"], row["precision"])):
            captions = row["captions_per_second"] / row["images_per_second"]
            more |= {"images_ratio": original / step, "captions_ratio": captions * original / step}
        yield row | more


def _recovery(rows: list[Row]) -> Iterator[Row]:
    whole, *tuned = ({**row, "true": _share(row["true"], row["scenes"])} for row in rows)
    yield whole | {"retrained_on": "(not)", "interval": _interval(whole), "share": 1.0}
    for row in sorted(tuned, key=lambda row: row["pictures"]):
        more = {"retrained_on": f"{row['pictures']:,} images", "minutes": row["seconds"] / 60}
        yield row | more | {"interval": _interval(row), "share": row["score"] / whole["score"]}


EXPANSIONS = {"peers": _peers, "loading": _loading, "training": _training, "recovery": _recovery}


def _claims(folder: Path) -> Iterator[Row]:
    """The model card's lines, and peers that it leaves out: claimed, measured, on what, how."""

    def line(name: str, claimed: str, measured: str, on: str, suite: str) -> Row:
        cells = {"line": name, "claimed": claimed, "measured": measured, "on": on}
        return cells | {"command": f"`qvision bench {suite}`"}

    parts = next(iter(_read_results("parameters", folder).values()), [])  # on any device
    for group, claimed in CARD["parts"].items():
        sizes = [part for part in parts if group in (part["group"], "all")]
        total, trained = (sum(part[key] for part in sizes) for key in ("total", "trained"))
        measured = _size(total, trained) if sizes else NOT_MEASURED
        yield line(f"QVision, {group}", claimed, measured, "counted", "parameters")
    timed = [
        (f"{row['ms per image']} ms, {row['method']}", f"{row['dtype']}, {row['device']}")
        for row in _read_rows("latency", folder)
        if row["batch"] == "1"
    ]
    for measured, on in timed or [(NOT_MEASURED, "")]:
        yield line("QVision, time", CARD["time"], measured, on, "latency")
    compared = [*_read_rows("peers", folder)]
    names = [row["system"] for row in compared]
    for row in sorted(compared, key=lambda row: names.index(row["system"])):
        claimed = [claim for name, claim in CARD["peers"].items() if row["system"].startswith(name)]
        measured = f"{row['parameters']}; {row['time']}"
        measured += " compiled by its library" if row["method"] == "compiled" else ""
        for title in ("times QVision's", "times QVision's, compiled"):
            measured += f", {row[title]} {title}" if row[title] else ""
        on = f"{row['dtype']}, {row['device']}".removeprefix(", ")
        yield line(row["system"], *(claimed or ["not on the card"]), measured, on, "peers")
    for name, claimed in {} if compared else CARD["peers"].items():
        yield line(name, claimed, NOT_MEASURED, "", "peers")


def _maps(folder: Path) -> Iterator[Row]:
    """Methods of word maps on Scenes, with a checkpoint whose tower was trained without boxes."""
    cells = {
        (name, device.split(",")[0], row["method"], row["size"], row["measure"]): _interval(
            row, "words" if row["measure"] == "pointing" else None
        )
        for name in ("maps", "maps_told_by_pictures")
        for device, rows in _read_results(name, folder).items()
        for row in rows
    }
    for device, method in dict.fromkeys(key[1:3] for key in cells if key[0] == "maps"):
        yield {"map": method.replace("_", " "), "device": device} | {
            title: cells.get((name, device, method, *kind), "")
            for title, (name, *kind) in LAYOUT["maps"].items()
        }


def _scores(_: Path) -> Iterator[Row]:
    """Scores of the embedded checkpoint, from the file next to its weights."""
    path = files("qvision_lab") / "scenes_checkpoint" / "scores.json"
    splits, ours, sixth = json.loads(path.read_text("utf-8")), "captioner", "a sixth caption"
    rows = [(title, ours, name) for name, title in SCORES["truths"].items()]
    for name in SCORES["overlaps"]:
        rows += [(name, ours, name), (f"{name} of {sixth}", sixth, name)]
    counts = {split: splits[split][ours]["true"]["of"] for split in SCORES["splits"]}
    for title, by, name in rows:
        of = "of" if name in SCORES["truths"] else None
        yield {"": title} | {
            f"{head} ({counts[split]:,})": _interval(splits[split][by][name], of)
            for split, head in SCORES["splits"].items()
        }


def _headlines(folder: Path) -> Iterator[Row]:
    """The README's results, each with the command that measures it."""
    for headline in LAYOUT["headlines"]:
        found = [
            {"measured": _fill_in(headline["cell"], row), "on": row.get("device", "CPU")}
            for row in read_table(headline["table"], folder).to_dict("records")
            if headline["where"].items() <= row.items()
        ]
        for row in found or [{"measured": NOT_MEASURED, "on": ""}]:
            command = f"`qvision {headline['command']}`"
            yield {"result": headline["result"]} | row | {"command": command}


TABLES = {"claims": _claims, "maps": _maps, "scores": _scores, "headlines": _headlines}
NAMES = (*COLUMNS, *TABLES)


def draw_ratios(folder: Path = RESULTS) -> Axes:
    """Speed over the original's, per image, with quartiles over the rounds, by device.

    ValueError if that was not measured, as of `draw_recovery`.
    """
    results = _read_results("latency", folder, required=True)
    frames = {}
    for device, rows in results.items():
        names = ["{mode} {dtype}, batch {batch}".format_map(row) for row in rows]
        ratios = pd.DataFrame([vars(row["ratio"]) for row in rows], index=names)
        frames[device] = ratios.set_axis(["score", "low", "high"], axis=1)
    ax = plots.plot_scores(frames, scale=1)
    ax.set(xlabel="times the original's speed, per image", xscale="log")
    if len(frames) == 1:  # more have a legend
        ax.set_title(*frames, fontsize=9)
    return ax


def draw_recovery(folder: Path = RESULTS) -> Axes:
    """CIDEr while a Q-Former is retrained, with the checkpoint's, on the first device."""
    results = _read_results("recovery", folder, required=True)
    device, (whole, *tuned) = next(iter(results.items()))
    curves = pd.DataFrame(
        {"variant": f"{row['pictures']:,} images", "step": int(step), "CIDEr": 100 * cider}
        for row in tuned
        for step, cider in row["curve"].items()
    )
    ax = plots.plot_curves(curves, "CIDEr")
    ax.axhline(100 * whole["score"], color="gray", lw=1, ls="--")
    ax.set_title(f"{device}; dashed: the checkpoint as it was, on its test scenes", fontsize=9)
    return ax


FIGURES = {"speed": draw_ratios, "recovery": draw_recovery}


def fill(
    page: Path, folder: Path = RESULTS, more: Mapping[str, Callable[[], pd.DataFrame]] | None = None
) -> Path:
    """Redraw a page's tables: everything between `<!-- table NAME -->` and `<!-- end -->`.

    `more` are tables besides those of `read_table`, such as a study's. ValueError if a page names
    any other.
    """
    readers = {name: partial(read_table, name, folder) for name in NAMES} | dict(more or {})

    def redraw(match: re.Match) -> str:
        if (name := match[1]) not in readers:
            raise ValueError(f"{page}: no table {name!r}; choose among {', '.join(readers)}.")
        table = readers[name]()
        lines = [[*table.columns], ["---"] * table.shape[1], *table.itertuples(index=False)]
        markdown = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        return f"<!-- table {name} -->\n\n{markdown}\n\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    filled = re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", redraw, text, flags=re.DOTALL)
    return write_atomic(page, filled)


def _read_results(name: str, folder: Path, required: bool = False) -> dict[str, list[Row]]:
    """Rows by device, the CPU's first, from folders of devices or from the folder itself."""

    def spreads(values: dict) -> dict | Spread:
        return Spread(**values) if "median" in values else values

    paths = (sorted(Path(folder).glob(f"{place}{name}.json")) for place in ("", "cpu/", "*/"))
    devices: dict[str, list[Row]] = {}
    for path in dict.fromkeys(chain(*paths)):
        result = json.loads(path.read_text(encoding="utf-8"), object_hook=spreads)
        machine = result["machine"]
        processor = machine["processor"].replace("(R)", "")
        device = machine["gpu"] or f"CPU, {processor}, {machine['threads']} threads"
        if device in devices:  # two of one kind
            device += f" ({path.parent.name})"
        devices[device] = result["rows"]
    if required and not devices:
        raise ValueError(f"{folder} has no {name}.json: run `qvision bench {name}` first.")
    return devices


def _size(total: int | None, trained: int | None) -> str:
    return f"{total:,}, {trained:,} trained ({trained / total:.2%})" if total else "not public"


def _share(value: float, n: int) -> str:
    interval = binomtest(round(n * value), n).proportion_ci(method="wilson")
    return _interval({"value": value, "of": n, **interval._asdict()}, "of")


def _interval(row: Row, of: str | None = None) -> str:
    """A share times 100 with its 95% interval, and the number of its cases."""
    value = row.get("value", row.get("score"))
    if value is None:
        return "no case"
    number = f" of {row[of]:,}" if of else ""
    return f"{100 * value:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]{number}"
