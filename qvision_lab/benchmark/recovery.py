"""Fine-tuning from few images: the score that a Q-Former with random weights recovers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import pandas as pd
from PIL import Image

from qvision_lab.benchmark.harness import Table, growing_table
from qvision_lab.captioning import Captioner, load
from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.evaluation import evaluate_dataset
from qvision_lab.training import load_recipe, train_captioner

EPOCHS = {6000: 6, 3000: 10, 1000: 25, 300: 45, 100: 60}  # by images; 1 to 5 minutes on two cores
SCENES = 1000


@dataclass(frozen=True)
class RecoveryRow:
    """A checkpoint, or one whose Q-Former and bridge were retrained from random weights."""

    pictures: int | None  # None: the checkpoint as it was
    epochs: int | None
    seconds: float | None  # of the whole run, with feature extraction and validation
    score: float  # CIDEr of greedy captions of test scenes, with the bootstrap's 95% interval
    low: float
    high: float
    true: float  # share of them of which every word is true
    curve: dict[int, float]  # by step, CIDEr of the validation scenes, 0 to 10


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Fine-tune by the recipe `finetune_scenes`, with fewer and fewer images."""
    tests = open_dataset("scenes:test", n=6 if quick else SCENES)
    rows = _rows(captioner, tests, {48: 1} if quick else EPOCHS)
    return growing_table("recovery", rows, quick=quick)


def _rows(
    captioner: Captioner, tests: CaptionDataset, epochs: dict[int, int]
) -> Iterator[RecoveryRow]:
    drawn = [image.picture for image in tests]  # once
    yield RecoveryRow(None, None, None, **_score(captioner, tests, drawn), curve={})
    for images, count in epochs.items():
        changes = {"data.train.n": images, "training.phases.0.epochs": count}
        with TemporaryDirectory() as folder:
            start = perf_counter()
            checkpoint = train_captioner(load_recipe("finetune_scenes", changes), folder)
            seconds = perf_counter() - start
            scores = _score(load(checkpoint, device=captioner.model.device), tests, drawn)
            curve = pd.read_csv(Path(folder, "phase-1", "curve.csv")).dropna(subset="eval_cider")
        by_step = (curve.set_index("step")["eval_cider"] / 100).to_dict()
        yield RecoveryRow(images, count, seconds, **scores, curve=by_step)


def _score(
    captioner: Captioner, tests: CaptionDataset, drawn: list[Image.Image]
) -> dict[str, float]:
    captions = captioner.caption(drawn, preset="greedy")
    texts = {i: caption.text for i, caption in zip(tests.ids, captions, strict=True)}
    table = evaluate_dataset(texts, tests, ("cider", "scenes")).table
    return {**table.loc["CIDEr", ["score", "low", "high"]], "true": table.loc["true", "score"]}
