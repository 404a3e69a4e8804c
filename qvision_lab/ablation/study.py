"""A study: variants of one base recipe, each with the same seeds, run anywhere, into one table."""

import os
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from functools import cached_property, partial
from importlib.resources import files
from math import inf
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import yaml
from pydantic import Strict
from tqdm.auto import tqdm

from qvision_lab.ablation.arm import SCENES, Arm, Run, carry_out, with_rates, with_steps
from qvision_lab.captioning import load
from qvision_lab.data.atomic import locked, write_atomic
from qvision_lab.data.identity import fingerprint
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.parameters import fingerprint_weights
from qvision_lab.training.features import FeatureCache
from qvision_lab.training.recipe import (
    RECIPES,
    Count,
    DataSource,
    Positive,
    Recipe,
    Settings,
    find_settings,
    override,
    read_yaml,
)
from qvision_lab.training.results import record_run
from qvision_lab.training.train import changed_config, open_data, open_source

STUDIES = files("qvision_lab.ablation") / "studies"
BASE = "base"
CONTROL_SEEDS = 10_000  # between the seeds of a control and those of the next arm
TUNING_SEED = 9_999
SETTINGS = "settings.yaml"  # a study, next to its tables


class Study(Settings):
    """Variants of a base recipe, and the seeds that each is trained with.

    Each run is one training by the recipe, and is trained on as many captions as every other run.
    The variant `{"control": True}` changes nothing and uses other random numbers: it shows how
    large differences get by chance. With `lengths`, each variant is trained for each of them; with
    `costs`, some also as long as the base's steps would take; with `rates`, the learning rates of
    each such arm are tuned on the validation images, and it is trained with and without that.
    """

    name: str
    variants: dict[str, dict[str, Any]]  # changes of the recipe, as in `qvision train --set`
    seeds: Annotated[tuple[int, ...], Strict(False)]  # of every arm; runs of one seed are pairs
    base: dict[str, Any] = {}  # changes of the recipe by all arms
    recipe: str = "ablation"  # name or path
    lengths: Annotated[tuple[Count, ...], Strict(False)] = ()  # in steps; none: the recipe's
    costs: dict[str, Positive] = {}  # of a step, in those of the base, for arms of equal compute
    rates: Annotated[tuple[Positive, ...], Strict(False)] = (1.0,)  # factors of the learning rates
    margin: Positive | None = None  # of CIDEr x 100: an arm within it counts as equal to the base
    test: DataSource = SCENES
    scored: Count = 500  # of its images, which every run captions
    pointed: Count = 50  # of those, for the maps and `collapse.diagnose`
    threads: Count = 1  # of each run

    @classmethod
    def read(cls, source: str | os.PathLike) -> "Study":
        """Read a YAML file, or one of the package's own by its name; ValueError as `parse`."""
        return cls.parse(read_yaml(find_settings(str(source), STUDIES, "study")), str(source))

    @cached_property
    def _base(self) -> tuple[dict[str, Any], Recipe]:
        values = override(read_yaml(find_settings(self.recipe, RECIPES, "recipe")), self.base)
        return values, Recipe.parse(values, BASE)

    @cached_property
    def _model(self) -> QVisionForConditionalGeneration:
        """What all runs start from; its tower is theirs."""
        _, base = self._base
        return load(base.checkpoint, base.revision, device="cpu").model

    @cached_property
    def arms(self) -> list[Arm]:
        """Every variant at every length, the base first; ValueError if they cannot be compared."""
        values, base = self._base
        recipes: dict[str, Recipe] = {}
        arms: list[Arm] = []
        for name, changes in [(BASE, {}), *self.variants.items()]:
            is_control = changes.get("control", False)
            if is_control and len(changes) > 1:
                raise ValueError(f"{name} is a control, so it changes nothing; not {changes}.")
            recipe = base if is_control else Recipe.parse(override(values, changes), name)
            if recipe.features is None:
                raise ValueError(f"{name}: features is null, but a study needs them: leave it out.")
            duplicate = next((other for other in recipes if recipes[other] == recipe), None)
            if name in recipes or (duplicate and not is_control):
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
                changed_config(self._model.config, recipe.model.model_dump(exclude_none=True))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            first = CONTROL_SEEDS * len(recipes) if is_control else 0
            recipes[name] = recipe
            arms += [
                Arm({"variant": name} | columns, with_steps(recipe, columns.get("steps")), first)
                for columns in self._lengths(name)
            ]
        if unknown := ", ".join(self.costs.keys() - recipes):
            raise ValueError(f"costs of {unknown}: they are of {', '.join(recipes)}.")
        return arms

    def _lengths(self, variant: str) -> list[dict[str, Any]]:
        """Columns that a length adds; an arm of equal compute takes as long as the base's steps."""
        cost = self.costs.get(variant, 1)
        compared = {"steps": 1, "compute": cost} if cost != 1 else {"steps": 1}
        return [
            {"length": length, "equal": name, "steps": round(length / share)}
            for name, share in compared.items()
            for length in self.lengths
        ] or [{}]

    @cached_property
    def origin(self) -> str:
        """Digest of the tower and of the test images and captions; twenty stand for all."""
        images = open_source(self.test.model_copy(update={"n": 20}))
        return fingerprint_weights(self._model.vision.tower) + fingerprint(images)

    @cached_property
    def runs(self) -> list[Run]:
        """The runs with the recipe's learning rates, the base's first; ValueError as `arms`."""
        return [self._run(arm, seed) for arm in self.arms for seed in self.seeds]

    def _run(self, arm: Arm, seed: int, rate: float = 1, tuned: bool = False, **changed) -> Run:
        tuning = {"tuned": tuned, "rate": rate} if len(self.rates) > 1 else {}
        names = "test", "scored", "pointed", "threads"
        sizes = {name: getattr(self, name) for name in names} | changed
        recipe = with_rates(arm.recipe, rate).model_copy(update={"seed": arm.first_seed + seed})
        return Run(arm.columns | tuning, seed, recipe, origin=self.origin, **sizes)

    def tuning(self, arm: Arm) -> list[Run]:
        """Runs that the learning rates of an arm are chosen by; their seed is in no comparison."""
        rates = self.rates if len(self.rates) > 1 else ()
        return [self._run(arm, TUNING_SEED, rate, scored=0) for rate in rates]

    def tuned_runs(self, folder: str | os.PathLike) -> list[Run]:
        """Runs with the rates of the best CIDEr on validation images, of arms tuned so far.

        Where all rates fail, the first is taken: the arm is reported as failed.
        """
        runs = []
        for arm in self.arms:
            rows = {run.columns["rate"]: run.row(folder) for run in self.tuning(arm)}
            if rows and all(rows.values()):
                scores = {
                    r: -inf if row["failed"] else row["validation"] for r, row in rows.items()
                }
                best = max(scores, key=scores.get)
                runs += [self._run(arm, seed, best, tuned=True) for seed in self.seeds]
        return runs

    def run(
        self,
        folder: str | os.PathLike | None = None,
        executor: Executor | None = None,
        processes: int | None = None,
    ) -> pd.DataFrame:
        """Do the runs that are missing, write their tables as CSV, and return the `table`.

        Written are `table.csv`, `curves.csv`, `tuning.csv` if any, and the study, `settings.yaml`.

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
            record_run(folder, {"base": base}, {"test images and tower": self.origin})
            described = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
            write_atomic(folder / SETTINGS, described)
            for length in self.lengths or (None,):  # each is a result without the next
                arms = [arm for arm in self.arms if arm.columns.get("length") == length]
                tuning = [run for arm in arms for run in self.tuning(arm)]
                self._carry_out(tuning, folder, executor, processes)
                runs = [*self.runs, *self.tuned_runs(folder)]
                runs = [run for run in runs if run.columns.get("length") == length]
                self._carry_out(runs, folder, executor, processes)
            table, curves, tuning = (
                self.table(folder),
                self.curves(folder),
                self.tuning_table(folder),
            )
            write_atomic(folder / "table.csv", table.to_csv(index=False))
            if len(tuning):
                write_atomic(folder / "tuning.csv", tuning.to_csv(index=False))
            write_atomic(folder / "curves.csv", curves.to_csv(index=False, float_format="%.6g"))
        return table

    def _carry_out(
        self, runs: list[Run], folder: Path, executor: Executor | None, processes: int | None
    ) -> None:
        runs = list({run.key: run for run in runs}.values())  # a tuned rate may be the recipe's
        todo = sorted((run for run in runs if run.row(folder) is None), key=lambda run: run.seed)
        if not todo:
            return
        processes = processes or os.cpu_count()
        _fill_cache(folder / "features", [run.recipe for run in todo], processes)
        # No smoothing: the remaining time comes from the mean of all runs so far.
        bar = tqdm(
            None, self.name, len(runs), initial=len(runs) - len(todo), unit="run", smoothing=0
        )
        spawn, others = get_context("spawn"), set(active_children())
        pool = nullcontext(executor) if executor else ProcessPoolExecutor(processes, spawn)
        with bar, pool as workers:
            try:
                for _ in workers.map(partial(carry_out, study=folder), todo):
                    bar.update()
            except KeyboardInterrupt:
                for process in set(active_children()) - others:
                    process.terminate()  # else the pool would wait for their runs
                print(
                    f"interrupted: {bar.n} of {len(runs)} runs are in {folder}; run again to resume"
                )
                raise

    def table(self, folder: str | os.PathLike) -> pd.DataFrame:
        """One row per finished run, in the order of `runs`: its arm, `seed`, measures and key.

        `failed` has the reason why a run has no scores; `seconds` (of training) is missing after an
        interruption, and `pointing` where an arm has no maps. Scores are those of
        `EvaluationReport`, on the test images, CIDEr times 100; of scenes, `true_scenes` has y or n
        for each. `validation` is the CIDEr that the checkpoint was chosen by, `latency` is in
        seconds, `code` names the commit.
        """
        table = _rows(self.runs + self.tuned_runs(folder), folder)
        return table.assign(CIDEr=100 * table["CIDEr"]) if "CIDEr" in table else table

    def tuning_table(self, folder: str | os.PathLike) -> pd.DataFrame:
        """What learning rates were chosen by: `validation` of each rate tried so far, by arm."""
        runs = [run for arm in self.arms for run in self.tuning(arm)]
        return _rows(runs, folder).drop(columns="tuned", errors="ignore")

    def curves(self, folder: str | os.PathLike) -> pd.DataFrame:
        """The log of every run that has begun: its columns, `seed`, `step`, `loss`, measures."""
        logs = []
        for run in self.runs + self.tuned_runs(folder):
            before = 0  # steps of earlier phases
            for n, phase in enumerate(run.recipe.training.phases, start=1):
                if (log := run.folder(folder) / f"phase-{n}" / "curve.csv").exists():
                    rows = pd.read_csv(log).assign(**run.columns, seed=run.seed)
                    logs.append(rows.assign(step=rows["step"] + before))
                before += phase.steps
        shown = (
            f"^({'|'.join(self.runs[0].columns)}|seed|step|loss|eval_(?!runtime|.*_per_second).*)$"
        )
        return pd.concat(logs).filter(regex=shown)


def _rows(runs: list[Run], folder: str | os.PathLike) -> pd.DataFrame:
    """A row for each finished run."""
    rows = ((run, run.row(folder)) for run in runs)
    return pd.DataFrame(
        {**run.columns, "seed": run.seed, **row, "run": run.key} for run, row in rows if row
    )


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
