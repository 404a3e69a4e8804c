"""What a run writes: `run.yaml` at its start; at its end a checkpoint, scores and a card."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from tqdm.auto import tqdm
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qvision_lab.captioning import Captioner
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset
from qvision_lab.data.identity import identify
from qvision_lab.evaluation.report import COCO_METRICS, evaluate_dataset
from qvision_lab.model.captioner import generation_preset
from qvision_lab.model.familiarity import Familiarity
from qvision_lab.model.loading.checkpoint import Checkpoint, Provenance, save_checkpoint
from qvision_lab.scenes.captions import caption_scene
from qvision_lab.scenes.checker import RATES
from qvision_lab.training.confidence import calibrate
from qvision_lab.training.recipe import Recipe, read_yaml
from qvision_lab.training.samples import CaptionSamples

CARDS = files("qvision_lab.training") / "cards"
UNDETERMINING = ("features.folder", "workers")  # ends of settings that change no result
FAMILIAR = 10_000
CAPTIONER, SIXTH = "captioner", "a sixth caption"  # sources of scored captions


def record_run(
    output: Path, recipe: Mapping[str, Any], data: Mapping[str, str], model: str | None = None
) -> None:
    """Keep a recipe in `run.yaml`, with the identity of its data and of the model it starts from.

    ValueError, with the difference, if `output` holds a run of another recipe, data or model.
    """
    path = output / "run.yaml"
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run = {"recipe": recipe, "started": started, **identify(model, data)}
    if path.exists():
        earlier = read_yaml(path)
        compared = [n for n in ("recipe", "data", "model") if n in earlier]  # older: no model
        then, now = (
            pd.json_normalize({name: each[name] for name in compared}).to_dict("records")[0]
            for each in (earlier, run)
        )
        changed = [
            f"{key.removeprefix('recipe.')} ({then.get(key)}, not {now.get(key)})"
            for key in {**then, **now}
            if then.get(key) != now.get(key) and not key.endswith(UNDETERMINING)
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run with other settings of {', '.join(changed)}; choose another "
                "output folder, or delete this one."
            )
        return
    write_atomic(path, yaml.safe_dump(run, sort_keys=False))


def describe(images: CaptionDataset) -> str:
    captions = sum(len(image.references) for image in images)
    return f"{images.name}: {len(images):,} images, {captions:,} captions"


def save_result(
    recipe: Recipe,
    checkpoint: Checkpoint,
    samples: Mapping[str, CaptionSamples],
    tests: Mapping[str, CaptionDataset],
    calibration: CaptionDataset | None,
    best: Path,
    output: Path,
) -> None:
    """Write the checkpoint with its card, recipe, scores and curves; upload it if asked."""
    made_by = Provenance(f"the recipe {recipe.name}", "native", None, {}, recipe.dtype)
    familiarity = None  # without cached states
    if recipe.features is not None:
        parts = samples["train"], samples["validation"]
        familiarity = Familiarity.fit(*(p.features.means(p.images.ids[:FAMILIAR]) for p in parts))
    checkpoint = replace(checkpoint, provenance=made_by, familiarity=familiarity)
    dtype = getattr(torch, recipe.dtype)
    rounded = checkpoint.model.to(dtype).float()  # what is scored is what is saved
    rounded.generation_config = generation_preset("greedy", rounded.config)
    rounded.generation_config.update(**recipe.generation.model_dump())
    captioner = Captioner(rounded, checkpoint.processor)
    if calibration is not None:
        checkpoint = replace(checkpoint, confidence=calibrate(captioner, calibration))
    scores = {name: score_captioner(captioner, test) for name, test in tests.items()}
    log = TrainerState.load_from_json(str(best / TRAINER_STATE_NAME)).log_history
    measured = next(row for row in reversed(log) if "eval_cider" in row)
    validation = {"CIDEr": measured["eval_cider"], "loss": measured["eval_loss"]}
    validation |= {"step": measured["step"], "images": len(samples["validation"])}
    curves, phases = [], []
    for n, phase in enumerate(recipe.training.phases, start=1):
        curves.append(pd.read_csv(output / f"phase-{n}/curve.csv").assign(phase=n))
        length = f"{phase.steps} steps" if phase.steps else f"{phase.epochs:g} epochs"
        rate = phase.learning_rate or recipe.training.learning_rate
        phases.append(f"{n}. {length} of `{phase.policy}`, learning rate {rate:g}")
    origin = recipe.checkpoint or "the embedded checkpoint of `qvision_lab`"
    card = "scenes" if recipe.tower else "photos" if recipe.imagenet else "finetune"
    text = (CARDS / f"{card}.md").read_text(encoding="utf-8")
    companions = {
        "README.md": text.format(
            recipe=recipe,
            parameters=checkpoint.model.num_parameters() / 1e6,
            table=scores_table(scores) if scores else "",
            origin=f"{origin} ({recipe.revision})" if recipe.revision else origin,
            data={name: describe(part.images) for name, part in samples.items()},
            phases="\n".join(phases),
            reinitialised=", ".join(recipe.reinitialise) or "nothing",
            scores=validation,
        ),
        "run.yaml": (output / "run.yaml").read_text(encoding="utf-8"),
        "scores.json": json.dumps({"validation": validation, **scores}, indent=1),
        "captioner.csv": pd.concat(curves).to_csv(index=False),
    }
    if recipe.tower is not None:
        companions["vision.csv"] = (output / "vision/curve.csv").read_text(encoding="utf-8")
    checkpoint.model.to(dtype)
    save_checkpoint(checkpoint, output / "checkpoint", companions, recipe.push_to)


def score_captioner(captioner: Captioner, dataset: CaptionDataset) -> dict[str, dict]:
    """Score captions of held-out images: rows of `EvaluationReport.table`, by source and score.

    Sources are the captioner and, for Scenes, a sixth caption by the grammar that wrote the five
    references, which shows how far true captions differ.
    """
    pictures = (image.picture for image in tqdm(dataset, f"captioning {dataset.name}"))
    texts = [caption.text for caption in captioner.caption(pictures, batch_size=50)]
    judged = (dataset.judge.name,) if dataset.judge else ()
    sources = {CAPTIONER: (texts, (*judged, *COCO_METRICS))}
    if judged:
        sixth = [caption_scene(image.drawing.layout, 6)[5] for image in dataset]
        sources[SIXTH] = sixth, COCO_METRICS
    scores = {}
    for source, (texts, metrics) in sources.items():
        captions = dict(zip(dataset.ids, texts, strict=True))
        table = evaluate_dataset(captions, dataset, metrics).table
        scores[source] = json.loads(table.to_json(orient="index", double_precision=6))
    return scores


def scores_table(scores: Mapping[str, dict[str, dict]]) -> str:
    """Markdown table of the scores of each data set, times 100, with intervals."""
    first = next(iter(scores.values()))
    labels = {name: f"{name}, of {RATES[name]}" for name in RATES}
    lines = [["", *scores], ["---", *["---:"] * len(scores)]]
    for source, name in ((source, name) for source, rows in first.items() for name in rows):
        label = labels.get(name, name) + ("" if source == CAPTIONER else f", {source}")
        cells = (interval_cell(rows[source][name], "of") for rows in scores.values())
        lines.append([label, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval_cell(row: Mapping[str, Any], of: str | None = None) -> str:
    """A score or value times 100 with its interval, and the number of its cases, named by `of`."""
    score = row.get("value", row.get("score"))
    if score is None:
        return "no case"
    number = f" of {row[of]:,}" if of else ""
    return f"{100 * score:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]{number}"
