"""The published card's claims beside what was counted and measured, from the result files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from qvision_lab.benchmark.harness import RESULTS
from qvision_lab.benchmark.original import LatencyRow
from qvision_lab.benchmark.parameters import parameter_table
from qvision_lab.benchmark.peers import PeerRow
from qvision_lab.data.whole_files import write_whole
from qvision_lab.model.config import QVisionConfig

CARD_PARTS = {
    "image encoder": "152.06M, 0M trained (0%)",
    "GPT-Neo": "355.80M, 240.36M trained (67.56%)",
    "Q-Former and bridge": "66.20M, 66.20M trained (100%)",
    "all": "574.06M, 306.56M trained (53.40%)",
}
CARD_TIME = "~50 ms"
CARD_PEERS = {  # how many times QVision's follows from the times
    "BLIP-2": "~7B, ~7B trained; ~250 ms, 5 times QVision's",
    "LLaVA": "~13B, ~13B trained; ~500 ms, 10 times QVision's",
    "CLIP + GPT-4": "~20B, ~20B trained; ~2000 ms, 40 times QVision's",
}


@dataclass(frozen=True)
class Claim:
    """One line of the card, and what became of it."""

    line: str
    claimed: str
    measured: str
    on: str  # dtype and machine
    command: str  # that finds it out again


def save_rows(
    name: str, rows: Iterable[LatencyRow | PeerRow], folder: str | Path | None = None
) -> Path:
    """Write rows as `<name>.json`, by default among the package's results."""
    folder = Path(folder or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps({"rows": [asdict(row) for row in rows]}, indent=1)
    return write_whole(folder / f"{name}.json", told + "\n")


def check_claims(folder: str | Path | None = None) -> list[Claim]:
    """The card's lines, and peers that it leaves out; a time without a result is "not measured".

    QVision's parameters are counted here and now; all else is read from the folder's
    `latency_*.json`, `peers_*.json` and `gpt4.json`.
    """
    folder, table = Path(folder or RESULTS), []
    parts = parameter_table(QVisionConfig())
    for group, claimed in CARD_PARTS.items():
        sizes = [part for part in parts if group in (part.group, "all")]
        size = _size(sum(part.total for part in sizes), sum(part.trained for part in sizes))
        table.append(Claim(f"QVision, {group}", claimed, size, "", "qvision bench claims"))
    races = [row for row in _rows(folder, "latency_*.json") if row["batch"] == 1]
    for row in races:
        measured = f"{_milliseconds(row['seconds_per_image'])}, {row['mode']}"
        table.append(
            Claim("QVision, time", CARD_TIME, measured, _on(row), "qvision bench original")
        )
    if not races:
        table.append(
            Claim("QVision, time", CARD_TIME, "not measured", "", "qvision bench original")
        )
    peers = _rows(folder, "peers_*.json") + _rows(folder, "gpt4.json")
    for system in CARD_PEERS:
        if not any(row["name"].startswith(system) for row in peers):
            peers.append(asdict(PeerRow(system, None, None, not_measured="no result file")))
    for row in peers:
        claims = (claim for system, claim in CARD_PEERS.items() if row["name"].startswith(system))
        size = _size(row["parameters"], row["trained"]) if row["parameters"] else "size not public"
        time = f"not measured ({row['not_measured']})"
        if row["seconds"]:
            time = _milliseconds(row["seconds"])
        if row["ratio_to_qvision"]:
            time += f", {row['ratio_to_qvision']:.3g} times QVision's"
        command = "qvision bench gpt4" if "GPT-4" in row["name"] else "qvision bench peers"
        claimed = next(claims, "not on the card")
        table.append(Claim(row["name"], claimed, f"{size}; {time}", _on(row), command))
    return table


def as_markdown(table: Iterable[Claim]) -> str:
    """The table as the README shows it."""
    names = [field.name for field in fields(Claim)]
    lines = [names, ["---"] * len(names), *map(astuple, table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(folder: Path, pattern: str) -> list[dict]:
    return [
        row for path in sorted(folder.glob(pattern)) for row in json.loads(path.read_text())["rows"]
    ]


def _size(total: int, trained: int) -> str:
    return f"{total:,}, {trained:,} trained ({trained / total:.2%})"


def _milliseconds(spread: dict) -> str:
    return f"{1000 * spread['median']:,.0f} ms"


def _on(row: dict) -> str:
    if row["comparison"] is None:
        return ""
    machine = row["comparison"]["machine"]
    return f"{row['dtype']}, {machine['gpu'] or machine['processor']}, {machine['threads']} threads"
