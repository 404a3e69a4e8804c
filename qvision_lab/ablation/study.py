"""A study: variants of one base, each with the same seeds, carried out anywhere, into one table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property, partial
from importlib.resources import files
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm

from qvision_lab import scenes
from qvision_lab.ablation.arm import MODEL_FIELDS, Run, arm_config, carry_out
from qvision_lab.captioning import load
from qvision_lab.data.atomic import write_atomic
from qvision_lab.training.caption_stage import see_scenes
from qvision_lab.training.features import fingerprint_weights
from qvision_lab.training.recipe import load_recipe, record_run

STUDIES = files("qvision_lab.ablation") / "studies"
BASE = "base"
CAPTIONS = ("steps", "batch_size", "captions_per_visit")  # whose product a run sees
RUN_SETTINGS = {  # beside those of the captioner stage of the recipe `scenes`
    "captions_per_picture": 5,
    "measurements": 4,  # of the held-out scenes, while it learns
    "bf16": True,
    "threads": 1,
    "scored": 500,  # scenes of the test split that are captioned
    "pointed": 50,  # of those, for the maps
}
CONTROL_DRAWS = 10_000  # from the seeds of a control to those of the next arm


@dataclass(frozen=True)
class Study:
    """What is compared, and by how many seeds.

    Each run trains all that stands behind the frozen tower of a checkpoint from random weights, as
    the captioner stage of the recipe `scenes` does, and sees as many captions as every other run.

    Args:
        variants: by name, what each changes: fields of `QVisionConfig` (`MODEL_FIELDS`), settings
            of the stage, and `RUN_SETTINGS`. `{"control": True}` changes nothing and draws other
            random numbers: it shows how large differences get by chance.
        seeds: of every arm; runs of one seed are compared in pairs.
        base: what all arms change of the checkpoint's configuration and of the recipe.
        checkpoint: folder or Hub id; None is the embedded one.
    """

    name: str
    variants: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    base: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None

    @classmethod
    def read(cls, source: str | os.PathLike) -> Study:
        """Read a YAML file, or one of the package's own by its name.

        Raises:
            ValueError: there is no such study, or it says something that there is not.
        """
        path = Path(source) if Path(source).suffix else STUDIES / f"{source}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(Path(str(file)).stem for file in STUDIES.iterdir()))
            raise ValueError(f"no study {str(source)!r}: give a YAML file, or one of {known}.")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        _refuse_unknown(values, [field.name for field in fields(cls)], str(path))
        return cls(**values)

    @cached_property
    def runs(self) -> list[Run]:
        """All of them, the base's first.

        Raises:
            ValueError: a variant names a field that there is not, changes nothing, is another's
                twin, does not fit together, or sees more captions than the base.
        """
        model = load(self.checkpoint, device="cpu").model
        recipe = load_recipe("scenes")["captioner"]
        sizes = model.config.to_dict()
        known = {name: sizes[name] for name in MODEL_FIELDS} | recipe | RUN_SETTINGS
        del known["workers"]  # which changes no result
        base = _change(known, self.base, BASE)
        arms, draws = {}, {}
        for name, changes in [(BASE, {}), *self.variants.items()]:
            changes = dict(changes or {})
            is_control = changes.pop("control", False)
            settings = _change(base, changes, name)
            twin = next((other for other in arms if arms[other] == settings), None)
            if name in arms or (twin and not is_control):
                raise ValueError(
                    f"{name} is the same configuration as {twin or BASE}: change something, or "
                    "declare `control: true`, to see what chance does."
                )
            if is_control and settings != base:
                raise ValueError(f"{name} is a control, so it changes nothing; not {changes}.")
            ours, theirs = (prod(each[name] for name in CAPTIONS) for each in (settings, base))
            if ours != theirs:
                raise ValueError(
                    f"{name} sees {ours:,} captions and the base {theirs:,}: keep the product of "
                    f"{', '.join(CAPTIONS)}."
                )
            try:
                arm_config(model.config, settings)
            except StrictDataclassError as error:
                raise ValueError(f"{name} is no model: {error}") from error
            draws[name] = CONTROL_DRAWS * len(arms) if is_control else 0
            arms[name] = settings
        data = _fingerprint(model.vision.tower)
        return [
            Run(name, seed, seed + draws[name], settings, self.checkpoint, data)
            for name, settings in arms.items()
            for seed in self.seeds
        ]

    def run(
        self,
        folder: str | os.PathLike | None = None,
        executor: Executor | None = None,
        processes: int | None = None,
    ) -> pd.DataFrame:
        """Carry out what is not done yet and give the `table`; stopped, the next call goes on.

        It is kept as `table.csv` in the folder, with `curves.csv` beside it.

        Args:
            folder: of the results, by default `runs/NAME`. More variants and seeds may come.
            executor: any of `concurrent.futures`, such as dask's `client.get_executor()`, whose
                workers see `folder` and do one run at a time; by default spawned processes, so a
                script that calls this needs its `if __name__ == "__main__":`.
            processes: of those, and to draw scenes with; by default one for every core.

        Raises:
            ValueError: as `runs`, or `folder` has results of another base, naming the difference.
            OSError: no room on the disk; finished runs are kept.
        """
        folder = Path(folder or f"runs/{self.name}").absolute()
        base = {"base": self.runs[0].settings, "checkpoint": self.checkpoint}
        folder.mkdir(parents=True, exist_ok=True)
        record_run(folder, json.loads(json.dumps(base)), {"scenes and tower": self.runs[0].data})
        todo = [run for run in self.runs if not run.row(folder).exists()]
        processes = processes or os.cpu_count()
        tower = load(self.checkpoint, device="cpu").model.vision.tower
        parts = {"train": "pictures", "val": "held_out", "test": "scored"}
        needed = {(part, run.settings[name]) for run in todo for part, name in parts.items()}
        for part, n in sorted(needed):  # drawn and looked at once, before the runs start
            see_scenes(tower, folder / "states", n, part, 0, processes if n > 1000 else 0)
        done, total = len(self.runs) - len(todo), len(self.runs)
        # No smoothing: the time that is left is told by the mean of all runs so far.
        bar = tqdm(total=total, initial=done, desc=self.name, unit="run", smoothing=0)
        spawn = get_context("spawn")
        pool = nullcontext(executor) if executor else ProcessPoolExecutor(processes, spawn)
        with bar, pool as workers:
            for _ in workers.map(partial(carry_out, folder=folder), todo):
                bar.update()
        table = self.table(folder)
        write_atomic(folder / "table.csv", table.to_csv(index=False))
        curves = self.curves(folder).to_csv(index=False, float_format="%.6g")
        write_atomic(folder / "curves.csv", curves)
        return table

    def table(self, folder: str | os.PathLike) -> pd.DataFrame:
        """One row a finished run, in the order of `runs`: `variant`, `seed` and what it measured.

        `failed` says why a run has no scores; `seconds` (of training) is missing where it was
        interrupted, and `pointing` where an arm has no maps. Scores are those of
        `EvaluationReport`, on the test split; `latency` is seconds a caption.
        """
        rows = [
            {"variant": run.variant, "seed": run.seed, **json.loads(path.read_text())}
            for run in self.runs
            if (path := run.row(folder)).exists()
        ]
        return pd.DataFrame(rows)

    def curves(self, folder: str | os.PathLike) -> pd.DataFrame:
        """The log of every run that has begun: `variant`, `seed`, `step`, `loss` and measures."""
        logs = pd.concat(
            pd.read_csv(log).assign(variant=run.variant, seed=run.seed)
            for run in self.runs
            if (log := run.row(folder).with_name("curve.csv")).exists()
        )
        return logs.filter(regex="^(variant|seed|step|loss|eval_.*)$")


def _change(settings: dict[str, Any], changes: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """Settings with changes; those of `text_config` leave what they do not name."""
    _refuse_unknown(changes, settings, arm)
    text = {**settings["text_config"], **changes.get("text_config", {})}
    changed = {**settings, **changes, "text_config": text}
    rates = [name for name, value in settings.items() if isinstance(value, float)]
    return changed | {name: float(changed[name]) for name in rates}  # YAML 1.1 reads 1e-4 as text


def _refuse_unknown(named: Collection[str], known: Collection[str], where: str) -> None:
    for name in named:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: there is no field {name!r}; did you mean {near!r}?")


def _fingerprint(tower: Any) -> str:
    """A digest of the tower's weights, and of how scenes are drawn and told."""
    digest = hashlib.sha256(fingerprint_weights(tower).encode())
    for scene in scenes.generate(20):  # which stand for all
        digest.update(np.asarray(scene.image))
        digest.update(json.dumps(scene.captions).encode())
    return digest.hexdigest()[:16]
