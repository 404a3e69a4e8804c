"""Which of two is faster, and by how much: both in turn, A B A B, within one run."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    def of(cls, samples: list[float]) -> Spread:
        lower, median, upper = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g} to {self.upper:.3g})"


@dataclass(frozen=True)
class Comparison:
    """Seconds of two callables; `baseline[i]` and `candidate[i]` were taken one after the other.

    Times differ from machine to machine and from hour to hour; the ratio within a round is what
    can be compared.
    """

    name: str
    baseline: list[float]
    candidate: list[float]
    settings: dict
    quick: bool
    machine: dict = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    taken: str  # date and time, UTC

    @property
    def speedup(self) -> Spread:
        """Baseline's seconds over the candidate's, round by round: above 1 the candidate wins."""
        pairs = zip(self.baseline, self.candidate, strict=True)
        return Spread.of([baseline / candidate for baseline, candidate in pairs])

    def __str__(self) -> str:
        return (
            f"{self.name}: {Spread.of(self.baseline)} s -> {Spread.of(self.candidate)} s, "
            f"{self.speedup} times as fast; median (quartiles) of {len(self.baseline)} rounds"
        )

    def save(self, folder: str | Path | None = None) -> Path:
        """Write all of it as `<name>.json`, by default among the package's results."""
        folder = Path(folder or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace(' ', '_')}.json"
        summary = {
            "baseline_seconds": asdict(Spread.of(self.baseline)),
            "candidate_seconds": asdict(Spread.of(self.candidate)),
            "speedup": asdict(self.speedup),
        }
        return write_whole(path, json.dumps({**summary, **asdict(self)}, indent=1) + "\n")


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

    CUDA, where it is in use, is waited for before the clock is read.

    Args:
        rounds: times that each is run; `quick` takes two, to show that the comparison runs.
        settings: what was compared, for the record.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; a median needs at least 1.")
    seconds: tuple[list[float], list[float]] = ([], [])
    baseline(), candidate()
    for _ in range(2 if quick else rounds):
        for run, samples in zip((baseline, candidate), seconds, strict=True):
            _synchronise()
            start = perf_counter()
            run()
            _synchronise()
            samples.append(perf_counter() - start)
    return Comparison(
        name,
        *seconds,
        settings=settings or {},
        quick=quick,
        machine=_machine(),
        versions={"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        taken=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
