"""Which of several is fastest, and by how much: all in turn, A B A B, within one run."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from qvision_lab.data.whole_files import write_whole

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("qvision-lab", "torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers, and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        lower, median, upper = np.quantile([*samples], [0.25, 0.5, 0.75]).tolist()
        return cls(median, lower, upper)

    @classmethod
    def ratio(cls, baseline: Iterable[float], candidate: Iterable[float]) -> Spread:
        """Of baseline's seconds over the candidate's, round by round."""
        return cls.of(b / c for b, c in zip(baseline, candidate, strict=True))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g} to {self.upper:.3g})"


def _machine() -> dict:
    """What the times hang on; no names of hosts or users."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Something measured, with all that it hangs on."""

    name: str
    settings: dict = field(default_factory=dict)
    quick: bool = False
    machine: dict = field(default_factory=_machine, repr=False)
    versions: dict[str, str] = field(default_factory=_versions, repr=False)
    taken: str = field(default_factory=_now)  # date and time, UTC

    def as_dict(self) -> dict:
        return asdict(self)

    def save(self, folder: str | Path | None = None) -> Path:
        """Write all of it as `<name>.json`, by default among the package's results."""
        folder = Path(folder or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace(' ', '_')}.json"
        return write_whole(path, json.dumps(self.as_dict(), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """Seconds of two callables; `baseline[i]` and `candidate[i]` were taken one after the other.

    Times differ from machine to machine and from hour to hour; the ratio within a round is what
    can be compared.
    """

    baseline: list[float]
    candidate: list[float]

    @property
    def speedup(self) -> Spread:
        """Baseline's seconds over the candidate's, round by round: above 1 the candidate wins."""
        return Spread.ratio(self.baseline, self.candidate)

    def as_dict(self) -> dict:
        summary = {
            "ratio": self.speedup.median,
            "speedup": asdict(self.speedup),
            "baseline_seconds": asdict(Spread.of(self.baseline)),
            "candidate_seconds": asdict(Spread.of(self.candidate)),
        }
        return summary | super().as_dict()

    def __str__(self) -> str:
        return (
            f"{self.name}: {Spread.of(self.baseline)} s -> {Spread.of(self.candidate)} s, "
            f"{self.speedup} times as fast; median (quartiles) of {len(self.baseline)} rounds"
        )


@dataclass(frozen=True, kw_only=True)
class Table(Result):
    """Rows of one kind that one run measured: small dataclasses."""

    rows: tuple

    def __str__(self) -> str:
        last = [(part.name, getattr(self.rows[-1], part.name)) for part in fields(self.rows[-1])]
        told = {name: value for name, value in last if not isinstance(value, list | None)}
        numbers = {name: f"{value:.3g}" for name, value in told.items() if type(value) is float}
        return ", ".join(f"{name} {value}" for name, value in (told | numbers).items())


def growing_table(name: str, rows: Iterable, **about) -> Iterator[Table]:
    """The table after each row, so that a run that stops early has saved what it measured."""
    measured: tuple = ()
    for row in rows:
        measured += (row,)
        yield Table(name=name, rows=measured, **about)


def compare(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    name: str,
    rounds: int = 15,
    quick: bool = False,
    settings: dict | None = None,
) -> Comparison:
    """Time two callables in turn, after one warm-up of each.

    Args:
        rounds: times that each is run; `quick` takes two, to show that the comparison runs.
        settings: what was compared, for the record.
    """
    ways = {"baseline": baseline, "candidate": candidate}
    seconds = take_turns(ways, rounds, quick)
    return Comparison(name=name, settings=settings or {}, quick=quick, **seconds)


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, quick: bool = False, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of callables, called in turn; the i-th of each were taken in the same round.

    CUDA, where it is in use, is waited for before the clock is read.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; a median needs at least 1.")
    for way in ways.values() if warm_up else ():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(min(rounds, 2) if quick else rounds):
        for name, way in ways.items():
            _synchronise()
            start = perf_counter()
            way()
            _synchronise()
            seconds[name].append(perf_counter() - start)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def process_bytes(file: str, field: str) -> int:
    """Bytes that Linux counts of this process; elsewhere 0."""
    path = Path("/proc/self") / file
    found = re.search(rf"{field}:\s+(\d+)( kB)?", path.read_text()) if path.exists() else None
    return int(found[1]) * (1024 if found[2] else 1) if found else 0
