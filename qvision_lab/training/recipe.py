"""Recipes: one YAML file says everything about a run, one command carries it out."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pandas as pd
import torch
import yaml
from accelerate import PartialState

from qvision_lab.captioning import load
from qvision_lab.data.atomic import write_atomic
from qvision_lab.model.captioner import QVisionForConditionalGeneration, generation_preset
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import Checkpoint, Provenance, save_checkpoint
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.scenes.captions import tell
from qvision_lab.scenes.layout import layout
from qvision_lab.training.caption_stage import learn_to_tell, train_tokenizer
from qvision_lab.training.card import scenes_card, score_on_scenes
from qvision_lab.training.vision_stage import learn_to_see

RECIPES = files("qvision_lab.training") / "recipes"
STAGES = ("vision", "captioner")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> dict:
    """Read a recipe by its name or path and change single values, given as `stage.key=value`.

    Raises:
        ValueError: for a recipe or a key that does not exist, naming those that do.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(Path(str(file)).stem for file in RECIPES.iterdir()))
        raise ValueError(f"no recipe {name!r}: give a YAML file, or one of {known}.")
    recipe = yaml.safe_load(path.read_text())
    for override in overrides:
        key, equals, value = override.partition("=")
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place.get(section, {}) if isinstance(place, dict) else {}
        if not equals or not isinstance(place, dict) or last not in place:
            keys = ", ".join(place) if isinstance(place, dict) and place else ", ".join(recipe)
            raise ValueError(f"cannot set {override!r}: write key=value, with a key among {keys}.")
        place[last] = _number(yaml.safe_load(value))
    return recipe


def run_recipe(name: str, output: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Carry out a recipe; run again, it resumes where it stopped.

    A recipe of `kind: finetune` tunes a checkpoint (see `run_finetune`); the others train a
    captioner on Scenes from random weights.

    Returns:
        The folder of the finished checkpoint, which `qvision_lab.load` takes.

    Raises:
        ValueError: if `output` holds a run of another recipe.
    """
    recipe = load_recipe(name, overrides)
    if recipe.get("kind") == "finetune":
        from qvision_lab.training.finetune import run_finetune  # which records runs as this does

        return run_finetune(recipe, output)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        record_run(output, recipe)
    captions = (
        caption
        for index in range(recipe["tokenizer"]["pictures"])
        for caption in tell(layout("train", 0, index))
    )
    tokenizer = train_tokenizer(captions, recipe["tokenizer"]["vocab_size"])
    sizes = recipe["model"]
    config = QVisionConfig(
        **{**sizes, "text_config": {**sizes["text_config"], "vocab_size": len(tokenizer)}},
        start_token_id=tokenizer.bos_token_id,
        end_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    seed = recipe["seed"]
    tower = learn_to_see(config.vision_config, recipe["vision"], seed, output / "vision")
    model = learn_to_tell(tower, config, tokenizer, recipe["captioner"], seed, output / "captioner")
    model.generation_config = generation_preset("greedy", config)
    if PartialState().is_main_process:
        _ship(model, QVisionProcessor.from_config(config, tokenizer), recipe, output)
    PartialState().wait_for_everyone()
    return output / "checkpoint"


def _ship(
    model: QVisionForConditionalGeneration, processor: QVisionProcessor, recipe: dict, output: Path
) -> None:
    """Write the checkpoint in half precision; score what was written; tell it all in its card."""
    made_by = Provenance(f"the recipe {recipe['name']}", "native", None, {}, "float16")
    dest = save_checkpoint(Checkpoint(model.half(), processor, made_by), output / "checkpoint")
    captioner = load(dest)
    scores = {split: score_on_scenes(captioner, split, n) for split, n in recipe["scores"].items()}
    run = (output / "run.yaml").read_text()
    companions = {
        "run.yaml": run,
        "scores.json": json.dumps(scores, indent=1),
        "README.md": scenes_card(yaml.safe_load(run), scores, model.num_parameters()),
        **{f"{stage}.csv": (output / stage / "curve.csv").read_text() for stage in STAGES},
    }
    for name, text in companions.items():
        write_atomic(dest / name, text)


def record_run(output: Path, recipe: dict, data: dict[str, str] | None = None) -> None:
    """Keep a recipe beside its run, with the data's fingerprints and what it ran on.

    Raises:
        ValueError: if `output` holds a run of another recipe or other data, naming the difference.
    """
    path = output / "run.yaml"
    if path.exists():
        run = yaml.safe_load(path.read_text())
        then, now = (
            pd.json_normalize({"recipe": of, "data": from_data}).to_dict("records")[0]
            for of, from_data in ((run["recipe"], run.get("data")), (recipe, data))
        )
        changed = [
            f"{key.removeprefix('recipe.')} ({then.get(key)}, not {now.get(key)})"
            for key in {**then, **now}
            if then.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run with other settings of {', '.join(changed)}; choose another "
                "output folder, or delete this one."
            )
        return
    run = {
        "recipe": recipe,
        **({"data": data} if data else {}),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("qvision-lab", "torch", "transformers", "pillow")
        },
    }
    write_atomic(path, yaml.safe_dump(run, sort_keys=False))


def _commit() -> str | None:
    """The git commit of the code, where it lies in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text; people mean a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
