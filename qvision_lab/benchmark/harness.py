"""Which of several is fastest, and by how much: all in turn, A B A B, within one run."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from qvision_lab.data.atomic import write_atomic

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


def machine(gpu: bool = True) -> dict:
    """What the times depend on; no names of hosts or users.

    Args:
        gpu: name the GPU, where CUDA is in use; False for what is measured beside it.
    """
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu and _cuda_in_use() else None,
    }


def _versions() -> dict[str, str]:
    versions = {name: version(name) for name in PACKAGES}
    versions |= {"cuda": torch.version.cuda} if _cuda_in_use() else {}
    return {"python": platform.python_version(), **versions}


def _cuda_in_use() -> bool:
    """Whether this process has held anything on a GPU."""
    return torch.cuda.max_memory_allocated() > 0


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Something measured, with all that it depends on."""

    name: str
    settings: dict = field(default_factory=dict)
    quick: bool = False
    machine: dict = field(default_factory=machine, repr=False)
    versions: dict[str, str] = field(default_factory=_versions, repr=False)
    taken: str = field(default_factory=_now)  # date and time, UTC

    @property
    def device(self) -> str:
        """The GPU's name as a folder's, or `cpu`."""
        return re.sub(r"\W+", "_", self.machine["gpu"] or "cpu").strip("_").lower()

    def save(self, folder: str | Path | None = None) -> Path:
        """Write all of it as `<name>.json`, by default among the package's results by device."""
        folder = Path(folder or RESULTS / self.device)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace(' ', '_')}.json"
        return write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")


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


class OutOfTime(Exception):  # noqa: N818 - no error: what was measured is kept
    """A suite took as long as it may."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` in what runs inside for so long; the clock is Unix's."""

    def stop(*_):
        raise OutOfTime

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, quick: bool = False
) -> dict[str, list[float]]:
    """Seconds of callables, called in turn; the i-th of each were taken in the same round.

    Each is warmed up once. CUDA, where it is in use, is waited for before the clock is read.

    Args:
        rounds: times that each is run; `quick` takes two, to show that the comparison runs.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; a median needs at least 1.")
    for way in ways.values():
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
