"""What fine-tuning is worth: how much a Q-Former that forgot all wins back, from few pictures."""

from __future__ import annotations

import copy
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
from qvision_lab.training.finetune import run_finetune
from qvision_lab.training.recipe import load_recipe

# By pictures; what two cores learn in one minute to five.
EPOCHS = {6000: 6, 3000: 10, 1000: 25, 300: 45, 100: 60}
SCENES = 1000


@dataclass(frozen=True)
class RecoveryRow:
    """A checkpoint, or one whose Q-Former and bridge learned anew from some pictures."""

    pictures: int | None  # None: the checkpoint as it was
    epochs: int | None
    seconds: float | None  # of all of the run, looking at the pictures and validation included
    score: float  # CIDEr of greedy captions of test scenes, with the bootstrap's 95% interval
    low: float
    high: float
    true: float  # share of them of which every word is true
    curve: dict[int, float]  # by step, CIDEr of the validation scenes, 0 to 10


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Fine-tune by the recipe `finetune_scenes`, with fewer and fewer pictures."""
    tests = open_dataset("scenes:test", n=6 if quick else SCENES)
    epochs = {48: 1} if quick else EPOCHS
    return growing_table("recovery", _rows(captioner, tests, epochs), quick=quick)


def _rows(
    captioner: Captioner, tests: CaptionDataset, epochs: dict[int, int]
) -> Iterator[RecoveryRow]:
    drawn = [image.picture for image in tests]  # once
    yield RecoveryRow(None, None, None, **_score(captioner, tests, drawn), curve={})
    base = load_recipe("finetune_scenes")
    for pictures, visits in epochs.items():
        recipe = copy.deepcopy(base)
        recipe["data"]["train"]["n"] = pictures
        recipe["training"]["phases"][0]["epochs"] = visits
        with TemporaryDirectory() as folder:
            start = perf_counter()
            checkpoint = run_finetune(recipe, folder)
            seconds = perf_counter() - start
            tuned = load(checkpoint, device=captioner.model.device)
            measured = _score(tuned, tests, drawn)
            curve = pd.read_csv(Path(folder, "phase-1", "curve.csv")).dropna(subset="eval_cider")
        by_step = (curve.set_index("step")["eval_cider"] / 100).to_dict()
        yield RecoveryRow(pictures, visits, seconds, **measured, curve=by_step)


def _score(
    captioner: Captioner, tests: CaptionDataset, drawn: list[Image.Image]
) -> dict[str, float]:
    told = captioner.caption(drawn, preset="greedy")
    captions = {i: caption.text for i, caption in zip(tests.ids, told, strict=True)}
    table = evaluate_dataset(captions, tests, ("cider", "scenes")).table
    return {**table.loc["CIDEr", ["score", "low", "high"]], "true": table.loc["true", "score"]}
