"""Tables and figures of what was measured, drawn from the result files alone."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.resources import files
from itertools import chain, groupby, product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import yaml
from matplotlib.axes import Axes
from scipy.stats import binomtest

from qvision_lab import plots
from qvision_lab.benchmark.harness import RESULTS, ROUNDS, Spread
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.identity import read_identity
from qvision_lab.training.results import interval_cell as _interval

PAGE = RESULTS / "README.md"
LAYOUT = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8"))
COLUMNS, SOURCES, SCORES = LAYOUT["columns"], LAYOUT["sources"], LAYOUT["scores"]
NOT_MEASURED = "not measured"

Row = dict  # of a result, or of a table by column


def read_table(name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """One of `NAMES`, drawn from result files in the folder, or in its folders by device."""
    rows = TABLES.get(name, partial(_read_rows, name))(folder)
    return pd.DataFrame([*rows] or [{"result": NOT_MEASURED}])


def read_footer(name: str, folder: Path = RESULTS) -> str:
    """The identity of the results that a table is drawn from, and their machines."""
    machines: dict[str, set[str]] = defaultdict(set)
    for result in chain(*(_read_results(each, folder) for each in SOURCES.get(name, [name]))):
        known, machine = read_identity(result), result["machine"]
        parts = [f"{package} {number}" for package, number in known["versions"].items()]
        parts += [f"commit {known['commit']}", f"model {known['model'] or 'with any weights'}"]
        parts += ["few rounds (`--quick`)"] * result["quick"]
        more = f" with {machine['processor']}" if machine["gpu"] else ""
        machines[", ".join(parts)].add(f"{result['device']}{more}, {machine['cores']} cores")
    lines = [f"{'; '.join(sorted(found))}: {parts}." for parts, found in machines.items()]
    several = len(set().union(*machines.values())) > 1
    return " ".join(["Rows of several machines: compare ratios, not times."] * several + lines)


def _read_rows(name: str, folder: Path) -> Iterator[Row]:
    """Rows of a table of `COLUMNS`, as text; those of too few rounds say so, without a ratio."""
    for result in _read_results(name, folder):
        for row in EXPANSIONS.get(name, iter)(result["rows"]):
            values = {"device": result["device"], **{k: v for k, v in row.items() if v is not None}}
            samples = values.get("seconds")
            if isinstance(samples, list) and len(samples) < ROUNDS and not result["quick"]:
                values = {k: v for k, v in values.items() if k not in LAYOUT["ratios"]}
                values["device"] += f" ({len(samples)} rounds: no ratio)"
            yield {title: _fill_in(cell, values) for title, cell in COLUMNS[name].items()}


def _fill_in(cell: str, values: Row) -> str:
    try:
        return cell.format_map(values)
    except KeyError:
        return ""


def _parameters(rows: list[Row]) -> Iterator[Row]:
    for group in dict.fromkeys([row["group"] for row in rows] + ["all"]):
        parts = [row for row in rows if group in (row["group"], "all")]
        total, trained = (sum(part[key] for part in parts) for key in ("total", "trained"))
        yield {"group": group, "size": _size(total, trained)}


def _peers(rows: list[Row]) -> Iterator[Row]:
    """A row for a peer as it is, and one for a peer compiled by its library where tried."""
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
    """Rows with ratios of medians to the original's."""
    steps = {(r["way"], r["images"], r["precision"]): Spread.of(r["seconds"]).median for r in rows}
    for row in rows:
        step = Spread.of(row["seconds"]).median
        more = {"step_milliseconds": 1000 * step}
        if original := steps.get(("original", row["images"], row["precision"])):
            captions = row["captions_per_second"] / row["images_per_second"]
            more |= {"images_ratio": original / step, "captions_ratio": captions * original / step}
            if fill := row.get("fill_seconds"):
                more["filled_ratio"] = original / (step + Spread.of(fill).median)
        yield row | more


def _scored(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        true, n = row["true"], row["scenes"]
        limits = binomtest(round(n * true), n).proportion_ci(method="wilson")._asdict()
        true = _interval({"value": true, "of": n, **limits}, "of")
        yield row | {"interval": _interval(row), "true": true}


def _confidence(rows: list[Row]) -> Iterator[Row]:
    """A row for what predicts whether the same cases are right."""
    for _, group in groupby(rows, key=lambda row: (row["split"], row["of"])):
        first, *_ = by = [*group]
        more = {f"{row['predictor']}_{name}": row[name] for row in by for name in ("ece", "brier")}
        for row in by:
            cell = {"value": row["auroc"], "low": row["low"], "high": row["high"]}
            more[f"{row['predictor']}_auroc"] = _interval(cell)
        yield first | more


def _recovery(rows: list[Row]) -> Iterator[Row]:
    whole, *tuned = _scored(rows)
    yield whole | {"retrained_on": "(not)", "share": 1.0}
    for row in sorted(tuned, key=lambda row: row["pictures"]):
        more = {"retrained_on": f"{row['pictures']:,} images", "minutes": row["seconds"] / 60}
        yield row | more | {"share": row["score"] / whole["score"]}


EXPANSIONS = {"parameters": _parameters, "peers": _peers, "loading": _loading}
EXPANSIONS |= {"training": _training, "learning": _scored, "recovery": _recovery}
EXPANSIONS["confidence"] = _confidence


def _maps(table: str, folder: Path) -> Iterator[Row]:
    """Methods of word maps, in the columns of a table of one result or several."""
    cells = {}
    for name in SOURCES[table]:
        for row in chain(*(result["rows"] for result in _read_results(name, folder))):
            key = (row["method"], name, row.get("split", "test"), row["size"], row["measure"])
            cells[key] = _interval(row, "words" if row["measure"] == "pointing" else None)
            if row.get("difference") is not None:
                numbers = (100 * row[each] for each in ("difference", "least", "most"))
                p = f"p = {row['p']:.2g}" if row["p"] >= 1e-4 else "p < 0.0001"
                text = "{:+.1f} [{:+.1f}, {:+.1f}], {}".format(*numbers, p)
                cells[(*key, "difference")] = text
    first = SOURCES[table][0]
    for method in dict.fromkeys(method for method, name, *_ in cells if name == first):
        row = {title: cells.get((method, *key), "") for title, key in LAYOUT[table].items()}
        yield {"map": method.replace("_", " "), **row}


def _baselines(folder: Path) -> Iterator[Row]:
    """Scores of the embedded checkpoints and of captions that read no image, or a similar one."""
    for name in SOURCES["baselines"]:
        for result in _read_results(name, folder):
            rows = {(row["source"], row["metric"]): _interval(row) for row in result["rows"]}
            for source in dict.fromkeys(source for source, _ in rows):
                cells = {title: rows.get((source, title), "") for title in LAYOUT["baselines"]}
                yield {"images": result["settings"]["test"], "captions": source, **cells}


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


def _pick(name: str, folder: Path) -> Iterator[Row]:
    """Cells of those rows of other tables that have given values, and how they are measured."""
    for line in LAYOUT[name]:
        found = dict.fromkeys(  # once, where several devices counted the same
            (_fill_in(line["cell"], row), row.get("device", "CPU"))
            for row in read_table(line["table"], folder).to_dict("records")
            if line["where"].items() <= row.items()
        )
        for measured, on in found or {(NOT_MEASURED, ""): None}:
            cells = {"measured": measured, "on": on, "command": f"`qvision {line['command']}`"}
            yield line["line"] | cells


TABLES = {"scores": _scores, "baselines": _baselines}
TABLES |= {name: partial(_maps, name) for name in ("maps", "boxes")}
TABLES |= {name: partial(_pick, name) for name in ("claims", "headlines")}
NAMES = (*COLUMNS, *TABLES)


def draw_ratios(folder: Path = RESULTS) -> Axes:
    """Speed over the original's, per image, with quartiles; ValueError if it was not measured."""
    frames = {}
    for result in _read_results("latency", folder, required=True):
        names = ["{mode} {dtype}, batch {batch}".format_map(row) for row in result["rows"]]
        ratios = pd.DataFrame([vars(row["ratio"]) for row in result["rows"]], index=names)
        frames[result["device"]] = ratios.set_axis(["score", "low", "high"], axis=1)
    ax = plots.plot_scores(frames, scale=1)
    ax.set(xlabel="times the original's speed, per image", xscale="log")
    if len(frames) == 1:  # more have a legend
        ax.set_title(*frames, fontsize=9)
    return ax


def draw_recovery(folder: Path = RESULTS) -> Axes:
    """CIDEr while a Q-Former is retrained, with the checkpoint's, on the first device."""
    first, *_ = _read_results("recovery", folder, required=True)
    whole, *tuned = first["rows"]
    curves = pd.DataFrame(
        {"variant": f"{row['pictures']:,} images", "step": int(step), "CIDEr": 100 * cider}
        for row in tuned
        for step, cider in row["curve"].items()
    )
    ax = plots.plot_curves(curves, "CIDEr")
    ax.axhline(100 * whole["score"], color="gray", lw=1, ls="--")
    for row, line in zip(tuned, ax.get_lines(), strict=False):  # the last is dashed
        end = max(map(int, row["curve"]))
        ax.plot(end, 100 * row["score"], "*", ms=11, color=line.get_color())
    ax.set_title(f"Q-Former retrained from random weights, {first['device']}", fontsize=9)
    ax.set_xlabel("step (curves: val; stars, and dashed the checkpoint as it was: test)")
    return ax


def draw_confidence(folder: Path = RESULTS) -> Axes:
    """Wrong captions among the most confident, an axes for each split; returns the last."""
    first, *_ = _read_results("confidence", folder, required=True)
    captions = [row for row in first["rows"] if row["of"] == "caption"]
    splits = dict.fromkeys(row["split"] for row in captions)
    size = {"figsize": (3.4 * len(splits), 3), "layout": "constrained"}
    _, axes = plt.subplots(1, len(splits), squeeze=False, **size)
    for ax, split in zip(axes[0], splits, strict=True):
        rows = [row for row in captions if row["split"] == split]
        plots.plot_risk_coverage({row["predictor"]: row["risks"] for row in rows}, ax)
        ax.set_title(f"{split}, {rows[0]['cases']:,} captions", fontsize=9)
    return ax


FIGURES = {"speed": draw_ratios, "recovery": draw_recovery, "confidence": draw_confidence}


def fill(
    page: Path, folder: Path = RESULTS, more: Mapping[str, Callable[[], pd.DataFrame]] | None = None
) -> Path:
    """Redraw a page's tables, each between `<!-- table NAME -->` and `<!-- end -->`.

    `more` are tables besides `NAMES`, such as a study's. ValueError if a page names any other.
    """
    readers = {name: partial(read_table, name, folder) for name in NAMES} | dict(more or {})

    def redraw(match: re.Match) -> str:
        if (name := match[1]) not in readers:
            raise ValueError(f"{page}: no table {name!r}; choose among {', '.join(readers)}.")
        table = readers[name]()
        lines = [[*table.columns], ["---"] * table.shape[1], *table.itertuples(index=False)]
        markdown = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        footer = read_footer(name, folder) if name in NAMES else ""
        parts = [f"<!-- table {name} -->", markdown, footer, "<!-- end -->"]
        return "\n\n".join(filter(None, parts))

    text = page.read_text(encoding="utf-8")
    filled = re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", redraw, text, flags=re.DOTALL)
    return write_atomic(page, filled)


def _read_results(name: str, folder: Path, required: bool = False) -> list[dict]:
    """Results with their `device`, the CPU's first, from a folder or its folders of devices."""

    paths = (sorted(Path(folder).glob(f"{place}{name}.json")) for place in ("", "cpu/", "*/"))
    results: dict[str, dict] = {}
    for path in dict.fromkeys(chain(*paths)):
        text = path.read_text(encoding="utf-8").replace("(R)", "")
        result = json.loads(text, object_hook=lambda x: Spread(**x) if "median" in x else x)
        machine = result["machine"]
        device = machine["gpu"] or "CPU, {processor}, {threads} threads".format_map(machine)
        if device in results:  # two of one kind
            device += f" ({path.parent.name})"
        results[device] = result | {"device": device}
    if required and not results:
        raise ValueError(f"{folder} has no {name}.json: run `qvision bench {name}` first.")
    return [*results.values()]


def _size(total: int | None, trained: int | None) -> str:
    return f"{total:,}, {trained:,} trained ({trained / total:.2%})" if total else "not public"
