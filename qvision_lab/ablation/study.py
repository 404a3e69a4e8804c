"""A study: variants of one base recipe, each with the same seeds, run anywhere, into one table."""

import json
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from functools import cached_property, partial
from importlib.resources import files
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Strict
from tqdm.auto import tqdm

from qvision_lab.ablation.arm import Run, carry_out
from qvision_lab.captioning import load
from qvision_lab.data.atomic import locked, write_atomic
from qvision_lab.data.coco import open_dataset
from qvision_lab.data.identity import fingerprint
from qvision_lab.model.parameters import fingerprint_weights
from qvision_lab.training.features import FeatureCache
from qvision_lab.training.recipe import (
    RECIPES,
    Count,
    Recipe,
    Settings,
    find_settings,
    override,
    read_yaml,
)
from qvision_lab.training.results import record_run
from qvision_lab.training.train import changed_config, open_data

STUDIES = files("qvision_lab.ablation") / "studies"
BASE = "base"
CONTROL_SEEDS = 10_000  # between the seeds of a control and those of the next arm


class Study(Settings):
    """Variants of a base recipe, and the seeds that each is trained with.

    Each run is one training by the recipe, and is trained on as many captions as every other run.
    The variant `{"control": True}` changes nothing and uses other random numbers: it shows how
    large differences get by chance.
    """

    name: str
    variants: dict[str, dict[str, Any]]  # changes of the recipe, as in `qvision train --set`
    seeds: Annotated[tuple[int, ...], Strict(False)]  # of every arm; runs of one seed are pairs
    base: dict[str, Any] = {}  # changes of the recipe by all arms
    recipe: str = "ablation"  # name or path
    scored: Count = 500  # test scenes that every run captions
    pointed: Count = 50  # of those, for the maps
    threads: Count = 1  # of each run

    @classmethod
    def read(cls, source: str | os.PathLike) -> "Study":
        """Read a YAML file, or one of the package's own by its name; ValueError as `parse`."""
        return cls.parse(read_yaml(find_settings(str(source), STUDIES, "study")), str(source))

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, the base's first; ValueError for variants that cannot be compared."""
        values = override(read_yaml(find_settings(self.recipe, RECIPES, "recipe")), self.base)
        base = Recipe.parse(values, BASE)
        tower = load(base.checkpoint, base.revision, device="cpu").model
        drawn = fingerprint(open_dataset("scenes:test", n=20))  # they stand for all
        origin = fingerprint_weights(tower.vision.tower) + drawn
        sizes = self.scored, self.pointed, self.threads, origin
        arms: dict[str, Recipe] = {}
        runs: list[Run] = []
        for name, changes in [(BASE, {}), *self.variants.items()]:
            is_control = changes.get("control", False)
            if is_control and len(changes) > 1:
                raise ValueError(f"{name} is a control, so it changes nothing; not {changes}.")
            recipe = base if is_control else Recipe.parse(override(values, changes), name)
            if recipe.features is None:
                raise ValueError(f"{name}: features is null, but a study needs them: leave it out.")
            duplicate = next((other for other in arms if arms[other] == recipe), None)
            if name in arms or (duplicate and not is_control):
                raise ValueError(
                    f"{name} is the same configuration as {duplicate or BASE}: change something, "
                    "or declare `control: true`, to measure the effect of chance."
                )
            ours, theirs = (_trained_captions(each) for each in (recipe, base))
            if ours != theirs:
                raise ValueError(
                    f"{name} is trained on {ours:,} captions and the base on {theirs:,}: keep the "
                    "product of steps, batch_size, accumulation and captions_per_image."
                )
            try:
                changed_config(tower.config, recipe.model.model_dump(exclude_none=True))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            first = CONTROL_SEEDS * len(arms) if is_control else 0
            arms[name] = recipe
            for seed in self.seeds:
                seeded = recipe.model_copy(update={"seed": first + seed})
                runs.append(Run(name, seed, seeded, *sizes))
        return runs

    def run(
        self,
        folder: str | os.PathLike | None = None,
        executor: Executor | None = None,
        processes: int | None = None,
    ) -> pd.DataFrame:
        """Do the runs that are missing, write `table.csv` and `curves.csv`, and return the `table`.

        Args:
            folder: of the results, by default `runs/NAME`; a later call resumes or extends them.
            executor: any of `concurrent.futures`, such as dask's `client.get_executor()`, whose
                workers share `folder` and do one run at a time; by default `processes` that are
                spawned, one per core, so a script needs its `if __name__ == "__main__":`.

        Raises:
            ValueError: as `runs`; other results, or another command, are in `folder`.
        """
        folder = Path(folder or f"runs/{self.name}").absolute()
        base = self.runs[0].recipe.model_dump(mode="json", exclude={"seed"})
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            record_run(folder, {"base": base}, {"scenes and tower": self.runs[0].origin})
            todo = [run for run in self.runs if not (run.folder(folder) / "row.json").exists()]
            processes = processes or os.cpu_count()
            if todo:
                _fill_cache(folder / "features", [run.recipe for run in todo], processes)
            self._carry_out(todo, folder, executor, processes)
            table, curves = self.table(folder), self.curves(folder)
            write_atomic(folder / "table.csv", table.to_csv(index=False))
            write_atomic(folder / "curves.csv", curves.to_csv(index=False, float_format="%.6g"))
        return table

    def _carry_out(
        self, todo: list[Run], folder: Path, executor: Executor | None, processes: int
    ) -> None:
        total = len(self.runs)
        # No smoothing: the remaining time comes from the mean of all runs so far.
        bar = tqdm(None, self.name, total, initial=total - len(todo), unit="run", smoothing=0)
        spawn, others = get_context("spawn"), set(active_children())
        pool = nullcontext(executor) if executor else ProcessPoolExecutor(processes, spawn)
        with bar, pool as workers:
            try:
                for _ in workers.map(partial(carry_out, study=folder), todo):
                    bar.update()
            except KeyboardInterrupt:
                for process in set(active_children()) - others:
                    process.terminate()  # else the pool would wait for their runs
                print(f"interrupted: {bar.n} of {total} runs are in {folder}; run again to resume")
                raise

    def table(self, folder: str | os.PathLike) -> pd.DataFrame:
        """One row per finished run, in the order of `runs`: `variant`, `seed` and its measures.

        `failed` has the reason why a run has no scores; `seconds` (of training) is missing after an
        interruption, and `pointing` where an arm has no maps. Scores are those of
        `EvaluationReport`, on the test split, CIDEr times 100; `latency` is in seconds per caption.
        """
        rows = [
            {"variant": run.variant, "seed": run.seed, **json.loads(path.read_text())}
            for run in self.runs
            if (path := run.folder(folder) / "row.json").exists()
        ]
        table = pd.DataFrame(rows)
        return table.assign(CIDEr=100 * table["CIDEr"]) if "CIDEr" in table else table

    def curves(self, folder: str | os.PathLike) -> pd.DataFrame:
        """The log of every run that has begun: `variant`, `seed`, `step`, `loss` and measures."""
        logs = pd.concat(
            pd.read_csv(log).assign(variant=run.variant, seed=run.seed)
            for run in self.runs
            if (log := run.folder(folder) / "phase-1" / "curve.csv").exists()
        )
        return logs.filter(regex="^(variant|seed|step|loss|eval_(?!runtime|.*_per_second).*)$")


def _fill_cache(folder: Path, recipes: list[Recipe], workers: int) -> None:
    """Encode the images of all runs once, before they start."""
    captioner = load(recipes[0].checkpoint, recipes[0].revision, device="cpu")
    cache = FeatureCache(folder, captioner.model, recipes[0].features.dtype)
    for data in dict.fromkeys(recipe.data for recipe in recipes):
        for images in open_data(data).values():
            several = workers if len(images) > 1000 else 0
            cache.encode(images, captioner.model, captioner.processor, workers=several)


def _trained_captions(recipe: Recipe) -> int:
    training = recipe.training
    if not all(phase.steps for phase in training.phases):
        raise ValueError("a study needs phases with steps, so that all arms get as many captions.")
    steps = sum(phase.steps for phase in training.phases)
    return steps * training.batch_size * training.accumulation * training.captions_per_image
