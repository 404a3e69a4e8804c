"""Folders of many pictures: does memory stay the same, and what do files cost beside the model?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from PIL import Image
from torch import Tensor

from qvision_lab.benchmark.harness import Spread, Table, take_turns
from qvision_lab.benchmark.latency import BATCH
from qvision_lab.captioning import Captioner
from qvision_lab.data import scenes

PICTURES, EARLY, TIMED = 10_000, 1_000, 512
DRAWN = 64  # different ones; the others are the same files under other names
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 30}


@dataclass(frozen=True)
class FolderRow:
    """`caption_folder` beside the model alone on tensors that are ready."""

    pictures: int
    early_gigabytes: float  # resident after the first 1,000 pictures
    late_gigabytes: float  # and after all
    pictures_per_second: Spread
    model_pictures_per_second: Spread
    share_of_model_rate: Spread
    seconds: list[float]  # for 512 pictures, round by round
    model_seconds: list[float]


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Caption 10,000 small pictures, in greedy batches of 16; in turn, 512 of them as tensors."""
    pictures, early, timed = (64, 32, 32) if quick else (PICTURES, EARLY, TIMED)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_pictures(folder / "pictures", pictures)
        tensors = captioner.processor(images=[Image.open(path) for path in paths[:timed]])
        ready = tensors["pixel_values"].to(captioner.model.device, captioner.model.dtype)
        outputs = (folder / f"{number}.jsonl" for number in range(pictures))
        ways = {
            "model": partial(_caption_tensors, captioner, ready),
            "folder": lambda: captioner.caption_folder(paths[:timed], next(outputs), **GREEDY),
        }
        seconds = take_turns(ways, 11, quick)
        resident = {}
        captioner.caption_folder(
            _noting(paths, resident, at=(early, pictures)), folder / "all.jsonl", **GREEDY
        )
    rates = [Spread.of(timed / s for s in seconds[way]) for way in ("folder", "model")]
    row = FolderRow(
        pictures,
        resident[early] / 1e9,
        resident[pictures] / 1e9,
        *rates,
        Spread.ratio(seconds["model"], seconds["folder"]),
        seconds["folder"],
        seconds["model"],
    )
    settings = {**GREEDY, "format": "JPEG", "batch": BATCH, "timed_pictures": timed}
    settings |= {"parameters": captioner.model.num_parameters()}
    yield Table(name="folder", rows=(row,), quick=quick, settings=settings)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """So many names for a few drawn scenes, as the JPEG files that folders of photos hold."""
    folder.mkdir()
    paths = [folder / f"{i:06}.jpg" for i in range(count)]
    for path, scene in zip(paths, scenes.generate(DRAWN, split="test"), strict=False):
        scene.image.save(path, quality=90)
    for i in range(DRAWN, count):
        os.link(paths[i % DRAWN], paths[i])
    return paths


def _caption_tensors(captioner: Captioner, ready: Tensor) -> None:
    for pixel_values in ready.split(BATCH):
        captioner.model.generate(pixel_values=pixel_values, **GREEDY)


def _noting(paths: list[Path], resident: dict[int, int], at: tuple[int, ...]) -> Iterator[Path]:
    """The paths, noting the bytes of resident memory when so many have been asked for."""
    for number, path in enumerate(paths, start=1):
        yield path
        if number in at:
            resident[number] = psutil.Process().memory_info().rss
