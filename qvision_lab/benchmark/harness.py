"""Interleaved timing (A B A B within one run), and result files that say what a time depends on."""

import json
import os
import platform
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from qvision_lab.captioning import Captioner
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset
from qvision_lab.data.identity import fingerprint, identify
from qvision_lab.model.parameters import fingerprint_weights

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5  # of which a ratio is reported, at least


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Spread":
        lower, median, upper = np.quantile([*samples], [0.25, 0.5, 0.75]).tolist()
        return cls(median, lower, upper)

    @classmethod
    def ratio(cls, baseline: Iterable[float], candidate: Iterable[float]) -> "Spread":
        """Speed-up of the candidate: baseline's seconds over its own, round by round."""
        return cls.of(b / c for b, c in zip(baseline, candidate, strict=True))

    def __format__(self, spec: str) -> str:
        """All three numbers, by default short; `ms` gives the median alone, in milliseconds."""
        if spec == "ms":
            return f"{1000 * self.median:{',.0f' if self.median >= 0.1 else '.3g'}}"
        spec = spec or ".3g"
        return f"{self.median:{spec}} ({self.lower:{spec}} to {self.upper:{spec}})"


def machine(gpu: bool = True) -> dict:
    """Hardware that times depend on, by model; `gpu`: whether what is timed uses CUDA if in use."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu and torch.cuda.max_memory_allocated() else None,
    }


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one kind that one run measured, by field, and what they depend on."""

    name: str
    settings: dict = field(default_factory=dict)
    quick: bool = False
    machine: dict = field(default_factory=machine)
    identity: dict = field(default_factory=identify)
    taken: str = field(default_factory=lambda: f"{datetime.now(timezone.utc):%FT%T+00:00}")
    rows: tuple[dict, ...]

    def save(self, folder: str | Path | None = None) -> Path:
        """Write `<name>.json`, by default to a folder named after the GPU, or `cpu`."""
        device = re.sub(r"\W+", "_", self.machine["gpu"] or "cpu").strip("_").lower()
        folder = Path(folder or RESULTS / device)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace(' ', '_')}.json"
        content = asdict(self)
        content = {"name": self.name, **content.pop("identity"), **content}
        return write_atomic(path, json.dumps(content, indent=1) + "\n")

    def __str__(self) -> str:
        """The last row, without its samples."""
        row = {k: v for k, v in self.rows[-1].items() if not isinstance(v, list | None)}
        return ", ".join(f"{name} {value}" for name, value in row.items())


def identity_of(captioner: Captioner, **data: CaptionDataset) -> dict:
    """Identity of a result that depends on a captioner's weights, and on data sets."""
    digests = {name: fingerprint(images) for name, images in data.items()}
    return identify(fingerprint_weights(captioner.model), digests)


def growing_table(name: str, rows: Iterable[dict], **about) -> Iterator[Table]:
    """The table after each row, so that a run that stops early has saved what it measured."""
    for measured in accumulate((row,) for row in rows):
        yield Table(name=name, rows=measured, **about)


class OutOfTime(BaseException):  # not an Exception, which suites catch
    """A suite reached its time limit."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` inside after so many seconds; None: never. Unix only (SIGALRM)."""

    def stop(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int, quick: bool = False
) -> dict[str, list[float]]:
    """Seconds of callables, each warmed up once, then run in turn in each round (`quick`: two)."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(min(rounds, 2) if quick else rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def clock() -> float:
    """Seconds; where CUDA is in use, it is synchronised before the clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()
