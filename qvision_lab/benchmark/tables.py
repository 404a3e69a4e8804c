"""Tables and a figure of what was measured, drawn from the result files alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from qvision_lab import plots
from qvision_lab.benchmark.harness import RESULTS, Spread
from qvision_lab.data.atomic import write_atomic
from qvision_lab.training.card import OURS, OVERLAPS, SIXTH

NOT_MEASURED = "not measured"
CARD_PARTS = {
    "image encoder": "152.06M, 0M trained (0%)",
    "GPT-Neo": "355.80M, 240.36M trained (67.56%)",
    "Q-Former and bridge": "66.20M, 66.20M trained (100%)",
    "all": "574.06M, 306.56M trained (53.40%)",
}
TRUTHS = {
    "pairs right": "every object named, in its color, and no other",
    "hallucination": "captions with an object that is not there",
    "count right": "counts right, of those stated",
    "relation right": "relations right, of those stated",
    "true": "every word of the caption true",
}
CARD_TIME = "~50 ms, no hardware named"
CARD_PEERS = {  # how many times QVision's follows from the times
    "BLIP-2": "~7B, ~7B trained; ~250 ms, 5 times QVision's",
    "LLaVA": "~13B, ~13B trained; ~500 ms, 10 times QVision's",
    "CLIP + GPT-4": "~20B, ~20B trained; ~2000 ms, 40 times QVision's",
}
PEER_WAYS = {"default": "", "compiled": "fastest_"}  # to the prefix of their fields


def latency(folder: Path = RESULTS) -> pd.DataFrame:
    """Ways to caption, beside the original's in the same dtype, on each device."""
    found = {
        device: {
            (row["dtype"], row["mode"], row["batch"]): {
                "ms an image": _milliseconds(row["seconds_per_image"]),
                "times the original": _spread(row["ratio"]),
                "times the memory limit": f"{row['times_the_limit']:.1f}",
                "images a second": f"{1 / row['seconds_per_image']['median']:,.1f}",
                "the original's tokens": _cell(row, "same_tokens", "{:.0%}"),
                "compiling": _cell(row, "compile_seconds", "{:.0f} s"),
                "pays after": _cell(row, "pays_after", "{:,.0f} captions"),
            }
            for row in result["rows"]
        }
        for device, result in _devices(folder, "latency").items()
    }
    return _beside(("dtype", "way", "images at once"), found)


def peers(folder: Path = RESULTS) -> pd.DataFrame:
    """Peers beside QVision, at the same number of tokens, on each device.

    The large ones also by the fastest way of their own library, where that was tried.
    """
    found: dict[str, dict] = {}
    for device, result in _devices(folder, "peers").items():
        found[device] = {}
        for row, (way, prefix) in product(result["rows"], PEER_WAYS.items()):
            if prefix and not (row.get("fastest_seconds") or row.get("fastest_not_measured")):
                continue
            size = _size(row["parameters"], row["trained"])
            found[device][row["name"], size, row["dtype"] or "", way] = {
                "time": _time(row, prefix),
                "times QVision's": _cell(row, f"{prefix}ratio_to_qvision", "{:.2f}"),
                "times QVision's, compiled": _cell(row, f"{prefix}ratio_to_compiled", "{:.2f}"),
            }
    return _beside(("system", "parameters", "dtype", "way"), found)


def loading(folder: Path = RESULTS) -> pd.DataFrame:
    """Ways to load; memory above that before loading."""
    return _frame(
        {
            "device": device,
            "way": f"{row['way']}, {row['dtype']}",
            "seconds": _spread(row["spread"]),
            "times as fast": f"{row['ratio_to_card']:.1f}",
            "GB of weights": f"{row['gigabytes_needed']:.2f}",
            "read": f"{row['loads'][0]['gigabytes_read']:.2f}",
            "resident": f"{row['loads'][-1]['resident_gigabytes']:.2f}",
            "peak": f"{row['loads'][-1]['peak_gigabytes']:.2f}",
            "peak, 16 captions": f"{row['loads'][-1]['captioning_gigabytes']:.2f}",
        }
        for device, row in _rows(folder, "loading")
    )


def folders(folder: Path = RESULTS) -> pd.DataFrame:
    """`caption_folder` beside the model alone, with the embedded checkpoint."""
    return _frame(
        {
            "device": device,
            "pictures": f"{row['pictures']:,}",
            "a second": f"{row['pictures_per_second']['median']:,.0f}",
            "the model alone": f"{row['model_pictures_per_second']['median']:,.0f}",
            "share": _spread(row["share_of_model_rate"]),
            "resident after 1,000": f"{row['early_gigabytes']:.3f} GB",
            "after all": f"{row['late_gigabytes']:.3f} GB",
        }
        for device, row in _rows(folder, "folder")
    )


def training(folder: Path = RESULTS) -> pd.DataFrame:
    """What is learned in a second at the published sizes, beside the original's way."""
    rows = _rows(folder, "training")
    originals = {
        (device, row["images"], row["precision"]): row
        for device, row in rows
        if row["way"] == "original"
    }
    return _frame(
        {
            "device": device,
            "way": f"{row['way']}, {row['precision']}",
            "images a step": row["images"],
            "ms a step": f"{1000 * Spread.of(row['seconds']).median:,.1f}",
            "captions a second": f"{row['captions_per_second']:,.2f}",
            "images a second": f"{row['images_per_second']:,.2f}",
            "times the original's captions": _ratio(originals, device, row, "captions"),
            "times its images": _ratio(originals, device, row, "images"),
            "peak GB": _cell(row, "peak_gigabytes", "{:.1f}"),
            "estimated": _cell(row, "estimated_gigabytes", "{:.1f}"),
            "compiling": _cell(row, "compile_seconds", "{:.0f} s"),
        }
        for device, row in rows
    )


def _ratio(originals: dict[tuple, dict], device: str, row: dict, what: str) -> str:
    """Captions or images a second over the original's in the same precision, by the medians."""
    original = originals.get((device, row["images"], row["precision"]))
    if original is None:
        return ""
    steps = [Spread.of(each["seconds"]).median for each in (original, row)]
    a_step = [each[f"{what}_per_second"] * sum(each["seconds"]) for each in (original, row)]
    counts = [
        many / len(each["seconds"]) for many, each in zip(a_step, (original, row), strict=True)
    ]
    return f"{steps[0] / steps[1] * counts[1] / counts[0]:.2f}"


def recovery(folder: Path = RESULTS) -> pd.DataFrame:
    """A Q-Former and bridge that start from random weights, beside those of the checkpoint."""
    return _frame(
        {
            "device": device,
            "learned anew from": f"{row['pictures']:,} pictures" if row["pictures"] else "(not)",
            "epochs": row["epochs"] or "",
            "minutes": f"{row['seconds'] / 60:.1f}" if row["seconds"] else "",
            "CIDEr": _share(row),
            "of the checkpoint's": f"{row['score'] / result['rows'][0]['score']:.1%}",
            "true captions": f"{row['true']:.1%}",
        }
        for device, result in _devices(folder, "recovery").items()
        for row in sorted(result["rows"], key=lambda row: row["pictures"] or 0)
    )


def claims(folder: Path = RESULTS) -> pd.DataFrame:
    """The card's lines, and peers that it leaves out: claimed, measured, on what, how."""
    lines: list[tuple[str, ...]] = []
    counts = [*_devices(folder, "parameters").values()]  # the same on every device
    parts = counts[0]["rows"] if counts else []
    for group, claimed in CARD_PARTS.items():
        sizes = [part for part in parts if group in (part["group"], "all")]
        total, trained = (sum(part[name] for part in sizes) for name in ("total", "trained"))
        measured = _size(total, trained) if sizes else NOT_MEASURED
        lines.append((f"QVision, {group}", claimed, measured, "counted", "parameters"))
    timed = [(on, row) for on, row in _rows(folder, "latency") if row["batch"] == 1]
    for on, row in timed:
        measured = f"{_milliseconds(row['seconds_per_image'])} ms, {row['mode']}"
        lines.append(("QVision, time", CARD_TIME, measured, f"{row['dtype']}, {on}", "latency"))
    if not timed:
        lines.append(("QVision, time", CARD_TIME, NOT_MEASURED, "", "latency"))
    compared = _rows(folder, "peers")
    names = [row["name"] for _, row in compared]
    for on, row in sorted(compared, key=lambda told: names.index(told[1]["name"])):
        claimed = next((c for n, c in CARD_PEERS.items() if row["name"].startswith(n)), "")
        measured = [_size(row["parameters"], row["trained"]), _time(row) + _times(row)]
        if row.get("fastest_seconds"):
            measured.append(
                f"compiled by its library {_time(row, 'fastest_')}{_times(row, 'fastest_')}"
            )
        on = f"{row['dtype']}, {on}" if row["dtype"] else on
        lines.append((row["name"], claimed or "not on the card", "; ".join(measured), on, "peers"))
    for name, claimed in {} if compared else CARD_PEERS.items():
        lines.append((name, claimed, NOT_MEASURED, "", "peers"))
    frame = pd.DataFrame(lines, columns=["line", "claimed", "measured", "on", "command"])
    return frame.assign(command="`qvision bench " + frame.command + "`")


def maps(folder: Path = RESULTS) -> pd.DataFrame:
    """Methods of word maps on Scenes, and those of a checkpoint that was never told of places."""
    columns = {
        "points into the box": ("maps", "large", "pointing"),
        "of things smaller than a patch": ("maps", "small", "pointing"),
        "deletion (low is good)": ("maps", "large", "deletion"),
        "insertion (high is good)": ("maps", "large", "insertion"),
        "points, tower never told where": ("maps_told_by_pictures", "large", "pointing"),
    }
    cells = {
        (name, row["method"], row["size"], row["measure"], result["machine"]["gpu"] or "CPU"): row
        for name in ("maps", "maps_told_by_pictures")
        for result in _devices(folder, name).values()
        for row in result["rows"]
    }
    return _frame(
        {"map": method.replace("_", " "), "device": device}
        | {
            title: _share(cells.get((name, method, size, measure, device)))
            for title, (name, size, measure) in columns.items()
        }
        for device, method in dict.fromkeys((key[4], key[1]) for key in cells if key[0] == "maps")
    )


def scores(_folder: Path = RESULTS) -> pd.DataFrame:
    """What the embedded checkpoint's captions are worth, from the scores that lie beside it."""
    path = files("qvision_lab") / "scenes_checkpoint" / "scores.json"
    splits = json.loads(path.read_text(encoding="utf-8"))
    heads = {"test": "test", "compose": "new color-object pairs", "crowd": "crowds"}
    rows = [(title, OURS, name) for name, title in TRUTHS.items()]
    for name in OVERLAPS:
        rows += [(name, OURS, name), (f"{name} of {SIXTH}", SIXTH, name)]
    return _frame(
        {"": title}
        | {
            f"{head} ({splits[split][OURS]['true']['of']:,})": _share(splits[split][by][name])
            for split, head in heads.items()
        }
        for title, by, name in rows
    )


TABLES: dict[str, Callable[[Path], pd.DataFrame]] = {
    "latency": latency,
    "peers": peers,
    "loading": loading,
    "folder": folders,
    "training": training,
    "recovery": recovery,
    "claims": claims,
    "maps": maps,
    "scores": scores,
}


def draw_ratios(folder: Path = RESULTS, ax: Axes | None = None) -> Axes:
    """How many times as fast as the original's way, with quartiles over the rounds, by device.

    Raises:
        ValueError: if that was not measured.
    """
    if not (results := _devices(folder, "latency")):
        raise ValueError(f"{folder} has no latency.json: run `qvision bench latency` first.")
    frames = {
        device: pd.DataFrame(
            {
                "name": f"{row['mode']} {row['dtype']}, {row['batch']} at once",
                "score": row["ratio"]["median"],
                "low": row["ratio"]["lower"],
                "high": row["ratio"]["upper"],
            }
            for row in result["rows"]
        ).set_index("name")
        for device, result in results.items()
    }
    ax = plots.plot_scores(frames, scale=1, ax=ax)
    ax.set(xlabel="times as fast as the original's way, an image", xscale="log")
    if len(frames) == 1:  # more have a legend
        ax.set_title(*frames, fontsize=9)
    return ax


def draw_recovery(folder: Path = RESULTS, ax: Axes | None = None) -> Axes:
    """CIDEr while a Q-Former learns anew, beside that of the checkpoint, on the first device.

    Raises:
        ValueError: if that was not measured.
    """
    if not (results := _devices(folder, "recovery")):
        raise ValueError(f"{folder} has no recovery.json: run `qvision bench recovery` first.")
    device, result = next(iter(results.items()))
    whole, *tuned = result["rows"]
    curves = pd.DataFrame(
        {"variant": f"{row['pictures']:,} pictures", "step": int(step), "CIDEr": 100 * cider}
        for row in tuned
        for step, cider in row["curve"].items()
    )
    ax = plots.plot_curves(curves, "CIDEr", ax=ax)
    ax.axhline(100 * whole["score"], color="gray", lw=1, ls="--")
    ax.set_title(f"{device}; dashed: the checkpoint as it was, on its test scenes", fontsize=9)
    return ax


FIGURES = {"speed": draw_ratios, "recovery": draw_recovery}


def fill(
    page: Path,
    folder: Path = RESULTS,
    tables: Mapping[str, Callable[[Path], pd.DataFrame]] = TABLES,
) -> Path:
    """Draw a page's tables anew: whatever stands between `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: if there is no such table.
    """

    def table(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(f"{page}: no table {match[1]!r}; there are {', '.join(tables)}.")
        drawn = as_markdown(tables[match[1]](folder))
        return f"<!-- table {match[1]} -->\n\n{drawn}\n\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    filled = re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)
    return write_atomic(page, filled)


def as_markdown(table: pd.DataFrame) -> str:
    """A table as a page shows it; groups of columns stand above their titles, once each."""
    lines = [[*table.columns], ["---"] * table.shape[1]]
    if table.columns.nlevels == 2:
        groups, titles = zip(*table.columns, strict=True)
        lines[0] = [new if new != old else "" for old, new in pairwise(("", *groups))]
        lines.append([f"**{title}**" for title in titles])
    lines += table.itertuples(index=False)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _devices(folder: Path, name: str) -> dict[str, dict]:
    """Each device's result, the CPU's first: those in folders of their own, or one right there."""
    results: dict[str, dict] = {}
    for pattern in (f"{name}.json", f"cpu/{name}.json", f"*/{name}.json"):
        for path in sorted(Path(folder).glob(pattern)):
            result = json.loads(path.read_text(encoding="utf-8"))
            machine = result["machine"]
            processor = machine["processor"].replace("(R)", "")
            device = machine["gpu"] or f"CPU, {processor}, {machine['threads']} threads"
            if results.get(device, result) != result:  # two of one kind
                device += f" ({path.parent.name})"
            results[device] = result
    return results


def _rows(folder: Path, name: str) -> list[tuple[str, dict]]:
    """Rows of each device's result, with the device."""
    results = _devices(folder, name).items()
    return [(device, row) for device, result in results for row in result["rows"]]


def _frame(rows) -> pd.DataFrame:
    return pd.DataFrame([*rows] or [{"result": NOT_MEASURED}])


def _beside(names: Sequence[str], found: dict[str, dict[tuple, dict]]) -> pd.DataFrame:
    """Rows by their keys, with a group of columns for each device; empty columns are left out."""
    keys = [*dict.fromkeys(key for rows in found.values() for key in rows)]
    ranks = [[*dict.fromkeys(values)] for values in zip(*keys, strict=True)]  # as they first came
    keys.sort(key=lambda key: [rank.index(v) for rank, v in zip(ranks, key, strict=True)])
    columns = {("", name): [key[i] for key in keys] for i, name in enumerate(names)}
    for device, rows in found.items():
        for title in dict.fromkeys(title for cells in rows.values() for title in cells):
            column = [rows.get(key, {}).get(title, "") for key in keys]
            if any(column):
                columns[device, title] = column
    return pd.DataFrame(columns) if keys else _frame([])


def _cell(row: dict, name: str | None, form: str) -> str:
    """A number as it is shown; empty where there is none."""
    return "" if row.get(name) is None else form.format(row[name])


def _size(total: int | None, trained: int | None) -> str:
    if total is None:
        return "not public"
    return f"{total:,}, {trained:,} trained ({trained / total:.2%})"


def _time(row: dict, prefix: str = "") -> str:
    if row.get(f"{prefix}seconds_per_caption") is None:
        return f"{NOT_MEASURED} ({row[f'{prefix}not_measured']})"
    return f"{_milliseconds(row[f'{prefix}seconds_per_caption'])} ms"


def _times(row: dict, prefix: str = "") -> str:
    whose = {"qvision": "QVision's", "compiled": "QVision's compiled"}
    ratios = {name: row.get(f"{prefix}ratio_to_{way}") for way, name in whose.items()}
    return "".join(f", {ratio:.2g} times {name}" for name, ratio in ratios.items() if ratio)


def _milliseconds(spread: dict) -> str:
    milliseconds = 1000 * spread["median"]
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _spread(spread: dict) -> str:
    return f"{spread['median']:.2f} ({spread['lower']:.2f} to {spread['upper']:.2f})"


def _share(row: dict | None) -> str:
    """A share times 100 with its interval; empty where there is nothing to count."""
    value = row and row.get("value", row.get("score"))
    if value is None:
        return ""
    return f"{100 * value:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
