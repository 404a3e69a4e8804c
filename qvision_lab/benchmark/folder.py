"""Folders of many pictures: does memory stay the same, and what do files cost beside the model?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image
from torch import Tensor

from qvision_lab import scenes
from qvision_lab.benchmark.harness import Spread, Table, take_turns
from qvision_lab.captioning import BATCH_SIZES, Captioner
from qvision_lab.captioning.sampling import Choice

PICTURES, EARLY = {"cpu": 5_000, "cuda": 20_000}, 1_000
TIMED, ROUNDS = {"cpu": 512, "cuda": 8_192}, {"cpu": 7, "cuda": 3}
SIZE, NOISE = (640, 480), 6  # pixels, and the deviation of noise like a camera's, of 255
DRAWN = 64  # different ones; the others are the same files under other names
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 30}


@dataclass(frozen=True)
class FolderRow:
    """`caption_folder` beside the model alone on tensors that are ready."""

    pictures: int
    early_gigabytes: float  # resident after the first 1,000 pictures, reading processes included
    late_gigabytes: float  # and after all
    pictures_per_second: Spread
    model_pictures_per_second: Spread
    share_of_model_rate: Spread
    seconds: list[float]  # for `settings["timed_pictures"]`, round by round
    model_seconds: list[float]


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Caption many photographs' worth of JPEG files; in turn, some of them as tensors."""
    device = captioner.model.device.type
    pictures, early, timed = (PICTURES[device], EARLY, TIMED[device])
    if quick:
        pictures, early, timed = 64, 32, 32
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_pictures(folder / "pictures", pictures)
        tensors = captioner.processor(images=[Image.open(path) for path in paths[:DRAWN]])
        ready = tensors["pixel_values"].to(captioner.model.device, captioner.model.dtype)
        ready = ready.repeat(-(-timed // len(ready)), 1, 1, 1)[:timed]
        outputs = (folder / f"{number}.jsonl" for number in range(pictures))
        ways = {
            "model": partial(_caption_tensors, captioner, ready),
            "folder": lambda: captioner.caption_folder(paths[:timed], next(outputs), **GREEDY),
        }
        seconds = take_turns(ways, ROUNDS[device], quick)
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
    settings = {**GREEDY, "format": "JPEG", "size": SIZE, "timed_pictures": timed}
    settings |= {"batch": BATCH_SIZES[device]}
    settings |= {"parameters": captioner.model.num_parameters()}
    yield Table(name="folder", rows=(row,), quick=quick, settings=settings)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """So many names for a few drawn scenes, as large and as noisy as photographs."""
    folder.mkdir()
    paths = [folder / f"{i:06}.jpg" for i in range(count)]
    random = np.random.default_rng(0)
    for path, scene in zip(paths, scenes.generate(DRAWN, split="test"), strict=False):
        pixels = np.asarray(scene.image.resize(SIZE), np.float32)
        pixels = (pixels + random.normal(0, NOISE, pixels.shape)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    for i in range(DRAWN, count):
        os.link(paths[i % DRAWN], paths[i])
    return paths


def _caption_tensors(captioner: Captioner, ready: Tensor) -> None:
    greedy = Choice(repetition_penalty=1.0, min_length=0, sampling=None)
    for pixel_values in ready.split(BATCH_SIZES[ready.device.type]):
        captioner.decoding.run(greedy, GREEDY["max_new_tokens"], pixel_values=pixel_values)


def _noting(paths: list[Path], resident: dict[int, int], at: tuple[int, ...]) -> Iterator[Path]:
    """The paths, noting the bytes of resident memory when so many have been asked for."""
    for number, path in enumerate(paths, start=1):
        yield path
        if number in at:
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            resident[number] = sum(process.memory_info().rss for process in processes)
