"""One run of a study: a captioner trained behind a frozen tower, its scores and its cost."""

import hashlib
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import nan
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from qvision_lab.captioning import Captioner, load
from qvision_lab.captioning.images import open_image
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset
from qvision_lab.data.identity import identify
from qvision_lab.interpretation.collapse import MEASURES, diagnose
from qvision_lab.interpretation.faithfulness import score_words, summarise
from qvision_lab.interpretation.maps import composition
from qvision_lab.model.captioner import generation_preset
from qvision_lab.training import freezing
from qvision_lab.training.recipe import DataSource, Phase, Recipe, Training
from qvision_lab.training.train import open_source, train_captioner
from qvision_lab.training.trainer import DivergedError, Validation, last_checkpoint

TOKENS, ROUNDS = 20, 5  # of the captions that are timed
SCENES = DataSource(source="scenes:test")


@dataclass(frozen=True, eq=False)
class Arm:
    """A variant at one length: what runs have in common that differ in seed and learning rate."""

    columns: dict[str, Any]  # in the table: `variant`, and `length`, `equal`, `steps` if any
    recipe: Recipe
    first_seed: int  # added to seeds: a control's are its own


@dataclass(frozen=True, eq=False)
class Run:
    """An arm with a seed and a learning rate, and everything that determines its result."""

    columns: dict[str, Any]  # of the arm, and `tuned`, `rate` if any
    seed: int  # runs of one seed are pairs
    recipe: Recipe
    test: DataSource
    scored: int  # test images; 0: validation only
    pointed: int  # of those, for the maps and `collapse.diagnose`
    threads: int
    origin: str  # digest of the tower and the test images

    @cached_property
    def key(self) -> str:
        """Hash of everything that determines the result; names and places excluded."""
        exclude = {"name": True, "features": {"folder"}}  # and None: settings that came later
        recipe = self.recipe.model_dump(mode="json", exclude=exclude, exclude_none=True)
        parts = [recipe, self.scored, self.pointed, self.threads, self.origin]
        parts += [] if self.test == SCENES else [self.test.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, study: str | os.PathLike) -> Path:
        """Folder of the run: `row.json` once it is finished, `phase-1/curve.csv`, `log.txt`."""
        return Path(study, "runs", self.key)

    def row(self, study: str | os.PathLike) -> dict[str, Any] | None:
        """Its measures, or None as long as it is not finished."""
        path = self.folder(study) / "row.json"
        return json.loads(path.read_text()) if path.exists() else None


def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe with another number of steps, shared by its phases as before."""
    phases = recipe.training.phases
    if steps is None:
        return recipe
    share = steps / sum(phase.steps for phase in phases)
    phases = tuple(p.model_copy(update={"steps": max(1, round(p.steps * share))}) for p in phases)
    training = recipe.training.model_copy(update={"phases": phases})
    return recipe.model_copy(update={"training": training})


def with_rates(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with its learning rates times a factor."""

    def scaled(settings: Training | Phase) -> dict[str, float]:
        names = {"learning_rate", "matrix_learning_rate"} & set(type(settings).model_fields)
        return {n: factor * rate for n in names if (rate := getattr(settings, n)) is not None}

    training = recipe.training
    phases = tuple(phase.model_copy(update=scaled(phase)) for phase in training.phases)
    training = training.model_copy(update={"phases": phases, **scaled(training)})
    return recipe.model_copy(update={"training": training})


def carry_out(run: Run, study: Path) -> None:
    """Execute or resume a run and write its row; what it prints goes to its log.

    One at a time in a process, since torch's threads and random numbers belong to the process.
    """
    folder, threads = run.folder(study), torch.get_num_threads()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), (folder / "log.txt").open("a") as log:
        if (folder / "row.json").exists():  # finished by a worker that survived a killed study
            return
        torch.set_num_threads(run.threads)
        try:
            with redirect_stdout(log), redirect_stderr(log):
                row = _measure(run, folder, study / "features")
        finally:
            torch.set_num_threads(threads)
        row["code"] = f"commit {identify()['commit']}"  # runs of a study may be of several
        write_atomic(folder / "row.json", json.dumps(row, indent=1))
        for checkpoint in (folder / "checkpoint", *folder.glob("phase-*/checkpoint-*")):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _measure(run: Run, folder: Path, features: Path) -> dict[str, float | str | None]:
    """Train, then score; a run that diverges has a reason in place of scores."""
    resumed = last_checkpoint(folder / "phase-1") is not None
    cache = run.recipe.features.model_copy(update={"folder": str(features), "workers": 0})
    recipe = run.recipe.model_copy(update={"features": cache})
    try:
        captioner = load(train_captioner(recipe, folder))
        freezing.apply(captioner.model, recipe.training.phases[-1].policy)
    except DivergedError as error:
        return {"failed": f"diverged: {error}"}
    curves = [pd.read_csv(path) for path in sorted(folder.glob("phase-*/curve.csv"))]
    row = {"failed": None, "validation": curves[-1]["eval_cider"].max()}
    if not run.scored:
        return row
    dataset = open_source(run.test.model_copy(update={"n": run.scored}))
    pointed = replace(dataset, images=dataset.images[: run.pointed])
    report = Validation(dataset, captioner).report()
    diagnosis = diagnose(captioner, pointed)
    if dataset.judge:
        row["true_scenes"] = "".join(np.where(report.per_image["true"] == 1, "y", "n"))
        row["pointing"] = _pointing(captioner, pointed)
    return row | {
        **report.scores,
        **{name: getattr(diagnosis, name) for name in MEASURES},
        "parameters": sum(p.numel() for p in captioner.model.parameters() if p.requires_grad),
        "seconds": nan if resumed else sum(curve["train_runtime"].max() for curve in curves),
        "latency": _latency(captioner, dataset),
    }


def _pointing(captioner: Captioner, dataset: CaptionDataset) -> float:
    """Share of words whose map peaks on the object they name, in captions that all arms share.

    nan without a bridge, and where the bridge reads a single mean: there is no map of words.
    """
    config = captioner.model.config
    if config.bridge == "prefix" or config.bridge_reads == "mean_image_token":
        return nan
    captions = [image.references[0] for image in dataset]
    words = score_words(captioner, dataset, {"attention": composition}, captions, removal=False)
    by_size = summarise(words).query("method == 'attention' and measure == 'pointing'")
    return float(np.average(by_size["value"], weights=by_size["words"]))


@torch.no_grad()
def _latency(captioner: Captioner, dataset: CaptionDataset) -> float:
    """Median seconds of a greedy caption of 20 tokens, after the tower that all arms share."""
    model = captioner.model
    picture = open_image(dataset[0].picture)
    pixels = captioner.processor(images=picture).pixel_values.to(model.device)
    states = model.vision.encode(pixels)  # [1,P,C]
    settings = generation_preset("greedy", model.config)
    settings.update(max_new_tokens=TOKENS, min_length=TOKENS + 1)  # and <START>
    caption = partial(model.generate, vision_states=states, generation_config=settings)
    return median(repeat(caption, number=1, repeat=ROUNDS))
