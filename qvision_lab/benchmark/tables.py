"""Tables and a figure of what was measured, drawn from the result files alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from qvision_lab import plots
from qvision_lab.benchmark.harness import RESULTS
from qvision_lab.data.whole_files import write_whole
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
CARD_TIME = "~50 ms"
CARD_PEERS = {  # how many times QVision's follows from the times
    "BLIP-2": "~7B, ~7B trained; ~250 ms, 5 times QVision's",
    "LLaVA": "~13B, ~13B trained; ~500 ms, 10 times QVision's",
    "CLIP + GPT-4": "~20B, ~20B trained; ~2000 ms, 40 times QVision's",
}


def latency(folder: Path = RESULTS) -> pd.DataFrame:
    """Ways to caption, beside the original's in the same dtype."""
    result = _read(folder, "latency")
    return _frame(
        {
            "way": row["mode"],
            "dtype": row["dtype"],
            "images at once": row["batch"],
            "ms an image": _milliseconds(row["seconds_per_image"]),
            "times as fast as the original": _spread(row["ratio"]),
            "times the memory limit": f"{row['times_the_limit']:.1f}",
            "the original's tokens": f"{row['same_tokens']:.0%}",
            "compiling": f"{row['compile_seconds']:.0f} s" if row["compile_seconds"] else "",
            "pays after": f"{row['pays_after']:,.0f} captions" if row["pays_after"] else "",
        }
        for row in result["rows"]
    )


def peers(folder: Path = RESULTS) -> pd.DataFrame:
    """Peers beside QVision, at the same number of tokens."""
    return _frame(
        {
            "system": row["name"],
            "parameters": _size(row["parameters"], row["trained"]),
            "dtype": row["dtype"] or "",
            "time": _time(row),
            "times QVision's": f"{row['ratio_to_qvision']:.2f}" if row["ratio_to_qvision"] else "",
        }
        for row in _read(folder, "peers")["rows"]
    )


def loading(folder: Path = RESULTS) -> pd.DataFrame:
    """Ways to load; memory above that before loading."""
    return _frame(
        {
            "way": f"{row['way']}, {row['dtype']}",
            "seconds": _spread(row["spread"]),
            "times as fast": f"{row['ratio_to_card']:.1f}",
            "GB of weights": f"{row['gigabytes_needed']:.2f}",
            "read": f"{row['loads'][0]['gigabytes_read']:.2f}",
            "resident": f"{row['loads'][-1]['resident_gigabytes']:.2f}",
            "peak": f"{row['loads'][-1]['peak_gigabytes']:.2f}",
            "peak, 16 captions": f"{row['loads'][-1]['captioning_gigabytes']:.2f}",
        }
        for row in _read(folder, "loading")["rows"]
    )


def folders(folder: Path = RESULTS) -> pd.DataFrame:
    """`caption_folder` beside the model alone, with the embedded checkpoint."""
    return _frame(
        {
            "pictures": f"{row['pictures']:,}",
            "a second": f"{row['pictures_per_second']['median']:.0f}",
            "the model alone": f"{row['model_pictures_per_second']['median']:.0f}",
            "share": _spread(row["share_of_model_rate"]),
            "resident after 1,000": f"{row['early_gigabytes']:.3f} GB",
            "after all": f"{row['late_gigabytes']:.3f} GB",
        }
        for row in _read(folder, "folder")["rows"]
    )


def recovery(folder: Path = RESULTS) -> pd.DataFrame:
    """A Q-Former and bridge that start from random weights, beside those of the checkpoint."""
    rows = _read(folder, "recovery")["rows"]
    return _frame(
        {
            "learned anew from": f"{row['pictures']:,} pictures" if row["pictures"] else "(not)",
            "epochs": row["epochs"] or "",
            "minutes": f"{row['seconds'] / 60:.1f}" if row["seconds"] else "",
            "CIDEr": _share(row),
            "of the checkpoint's": f"{row['score'] / rows[0]['score']:.1%}",
            "true captions": f"{row['true']:.1%}",
        }
        for row in rows
    )


def claims(folder: Path = RESULTS) -> pd.DataFrame:
    """The card's lines, and peers that it leaves out: claimed, measured, on what, how."""
    lines, parts = [], _read(folder, "parameters")["rows"]
    for group, claimed in CARD_PARTS.items():
        sizes = [part for part in parts if group in (part["group"], "all")]
        total, trained = (sum(part[name] for part in sizes) for name in ("total", "trained"))
        measured = _size(total, trained) if sizes else NOT_MEASURED
        lines.append((f"QVision, {group}", claimed, measured, "", "parameters"))
    timed = _read(folder, "latency")
    one = [row for row in timed["rows"] if row["batch"] == 1]
    for row in one:
        measured = f"{_milliseconds(row['seconds_per_image'])} ms, {row['mode']}"
        on = f"{row['dtype']}, {_machine(timed)}"
        lines.append(("QVision, time", CARD_TIME, measured, on, "latency"))
    if not one:
        lines.append(("QVision, time", CARD_TIME, NOT_MEASURED, "", "latency"))
    result = _read(folder, "peers")
    for row in result["rows"]:
        claimed = next((c for n, c in CARD_PEERS.items() if row["name"].startswith(n)), "")
        times = row["ratio_to_qvision"]
        ratio = f", {times:.2g} times QVision's" if times else ""
        measured = f"{_size(row['parameters'], row['trained'])}; {_time(row)}{ratio}"
        on = f"{row['dtype']}, {_machine(result)}" if row["seconds"] else ""
        lines.append((row["name"], claimed or "not on the card", measured, on, "peers"))
    for name, claimed in {} if result["rows"] else CARD_PEERS.items():
        lines.append((name, claimed, NOT_MEASURED, "", "peers"))
    frame = pd.DataFrame(lines, columns=["line", "claimed", "measured", "on", "command"])
    return frame.assign(command="`qvision bench " + frame.command + "`")


def maps(folder: Path = RESULTS) -> pd.DataFrame:
    """Methods of word maps on Scenes, and those of a checkpoint that was never told of places."""
    cells = {
        (result, row["method"], row["size"], row["measure"]): row
        for result in ("maps", "maps_told_by_pictures")
        for row in _read(folder, result)["rows"]
    }
    methods = dict.fromkeys(method for result, method, *_ in cells if result == "maps")
    columns = {
        "points into the box": ("maps", "large", "pointing"),
        "of things smaller than a patch": ("maps", "small", "pointing"),
        "deletion (low is good)": ("maps", "large", "deletion"),
        "insertion (high is good)": ("maps", "large", "insertion"),
        "points, tower never told where": ("maps_told_by_pictures", "large", "pointing"),
    }
    return _frame(
        {"map": method.replace("_", " ")}
        | {
            title: _share(cells.get((result, method, size, measure)))
            for title, (result, size, measure) in columns.items()
        }
        for method in methods
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
    "recovery": recovery,
    "claims": claims,
    "maps": maps,
    "scores": scores,
}


def draw_ratios(folder: Path = RESULTS, ax: Axes | None = None) -> Axes:
    """How many times as fast as the original's way, with quartiles over the rounds.

    Raises:
        ValueError: if that was not measured.
    """
    if not (rows := _read(folder, "latency")["rows"]):
        raise ValueError(f"{folder} has no latency.json: run `qvision bench latency` first.")
    frame = pd.DataFrame(
        {
            "name": f"{row['mode']} {row['dtype']}, {row['batch']} at once",
            "score": row["ratio"]["median"],
            "low": row["ratio"]["lower"],
            "high": row["ratio"]["upper"],
        }
        for row in rows
    )
    ax = plots.plot_scores({"latency": frame.set_index("name")}, scale=1, ax=ax)
    ax.set(xlabel="times as fast as the original's way, an image", xscale="log")
    return ax


def draw_recovery(folder: Path = RESULTS, ax: Axes | None = None) -> Axes:
    """CIDEr while a Q-Former learns anew, beside that of the checkpoint.

    Raises:
        ValueError: if that was not measured.
    """
    if not (rows := _read(folder, "recovery")["rows"]):
        raise ValueError(f"{folder} has no recovery.json: run `qvision bench recovery` first.")
    whole, *tuned = rows
    curves = pd.DataFrame(
        {"variant": f"{row['pictures']:,} pictures", "step": int(step), "CIDEr": 100 * cider}
        for row in tuned
        for step, cider in row["curve"].items()
    )
    ax = plots.plot_curves(curves, "CIDEr", ax=ax)
    ax.axhline(100 * whole["score"], color="gray", lw=1, ls="--")
    ax.set_title("dashed: the checkpoint as it was, on its test scenes", fontsize=9)
    return ax


FIGURES = {"speed": draw_ratios, "recovery": draw_recovery}


def fill(page: Path, folder: Path = RESULTS) -> Path:
    """Draw a page's tables anew: whatever stands between `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: if there is no such table.
    """

    def table(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"{page}: no table {match[1]!r}; there are {', '.join(TABLES)}.")
        drawn = as_markdown(TABLES[match[1]](folder))
        return f"<!-- table {match[1]} -->\n\n{drawn}\n\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    filled = re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)
    return write_whole(page, filled)


def as_markdown(table: pd.DataFrame) -> str:
    """A table as a page shows it."""
    lines = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _read(folder: Path, name: str) -> dict:
    """A result, with no rows where it was not measured."""
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def _frame(rows) -> pd.DataFrame:
    return pd.DataFrame([*rows] or [{"result": NOT_MEASURED}])


def _machine(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"


def _size(total: int | None, trained: int | None) -> str:
    if total is None:
        return "not public"
    return f"{total:,}, {trained:,} trained ({trained / total:.2%})"


def _time(row: dict) -> str:
    if row["seconds"] is None:
        return f"{NOT_MEASURED} ({row['not_measured']})"
    return f"{_milliseconds(row['seconds_per_caption'])} ms"


def _milliseconds(spread: dict) -> str:
    return f"{1000 * spread['median']:,.0f}"


def _spread(spread: dict) -> str:
    return f"{spread['median']:.2f} ({spread['lower']:.2f} to {spread['upper']:.2f})"


def _share(row: dict | None) -> str:
    """A share times 100 with its interval; empty where there is nothing to count."""
    value = row and row.get("value", row.get("score"))
    if value is None:
        return ""
    return f"{100 * value:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
