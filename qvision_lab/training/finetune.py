"""Fine-tuning: a checkpoint, captioned pictures and one recipe in, a better checkpoint out."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from math import ceil
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import Seq2SeqTrainingArguments, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.loading.checkpoint import (
    Checkpoint,
    Provenance,
    load_checkpoint,
    save_checkpoint,
)
from qvision_lab.training import freezing, gpu
from qvision_lab.training.caption_stage import CaptionCollator
from qvision_lab.training.caption_trainer import (
    CaptionedPictures,
    CaptionTrainer,
    Pace,
    Validation,
    is_exhausted,
)
from qvision_lab.training.features import FeatureCache
from qvision_lab.training.finetune_recipe import FinetuneRecipe, Phase, Training
from qvision_lab.training.recipe import record_run
from qvision_lab.training.trainer import (
    CurveWriter,
    MuonAdamW,
    batch_share,
    last_checkpoint,
    training_arguments,
)

CARD = (files("qvision_lab.training") / "cards/finetune.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs on each device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        """Gradients come as activations go, so the larger of the two counts."""
        return self.weights + self.optimizer + max(self.gradients, self.activations)

    def __str__(self) -> str:
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(self).items())
        return f"about {self.peak / 1e9:.1f} GB of memory at once, of {told}"


def estimate_memory(
    model: QVisionForConditionalGeneration,
    settings: Training,
    pictures: int,
    lengths: Sequence[int] | None = None,
) -> MemoryEstimate:
    """Estimate a step's memory, `pictures` a batch on one device.

    Measured peaks of steps that were not captured are within 25%; of captured ones, whose graphs
    keep the memory of every length of captions, none was measured.

    Weights, gradients and AdamW's two moments are 4 bytes a parameter. What a transformer layer
    keeps for its gradient are 34 + 5 * heads * length / width bytes a value in half precision and
    twice that in single (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2); the logits of the words
    to be scored are held three times in single precision. In half precision a step also holds the
    weights behind the tower cast to it. GPT-Neo's layers keep nothing where none of it is trained,
    since pictures come in behind it.

    Args:
        lengths: tokens of captions as they are trained on, some or all of them; None: all are as
            long as they may be.
    """
    config, text = model.config, model.decoder.language_model
    lengths = lengths or [settings.max_tokens]
    rows, length = pictures * settings.captions_per_image, max(lengths)
    words = rows * (sum(lengths) / len(lengths) - 1)  # <START> is never scored
    width, heads = config.hidden_size, config.num_attention_heads
    half = settings.precision != "float32"

    def layer(sequences: int, length: int, heads: int) -> float:
        return sequences * length * (34 * width + 5 * heads * length) * (1 if half else 2)

    reads = len(text.h) if text.num_parameters(only_trainable=True) else 0
    layers = reads * layer(rows, length, config.text_config.num_heads)
    looks = 2 * config.num_qformer_blocks * layer(pictures, 1 + config.num_query_tokens, heads)
    logits = 3 * 4 * words * config.vocab_size
    trained, all_of_it = model.num_parameters(only_trainable=True), model.num_parameters()
    cast = 2 * (all_of_it - model.vision.tower.num_parameters()) if half else 0
    activations = int(layers + looks + layer(rows, length, heads) + logits + cast)
    return MemoryEstimate(4 * all_of_it, 4 * trained, 8 * trained, activations)


def run_finetune(values: dict, output: str | Path) -> Path:
    """Fine-tune as a recipe says; run again, it goes on where it stopped, to the same weights.

    Args:
        values: of a `FinetuneRecipe`, as a YAML file holds them.
        output: folder of the run. Each phase has its own inside, with a CSV of its log.

    Returns:
        The folder of the finished checkpoint, which `qvision_lab.load` takes.

    Raises:
        ValueError: for a recipe that says something that there is not, an `output` with a run of
            another recipe or other data, pictures that cannot be read, a loss that is no number.
        OSError: if there is no room on the disk; what was saved before stays whole.
    """
    recipe, output = FinetuneRecipe.parse(values), Path(output)
    state = PartialState(cpu=not torch.cuda.is_available())
    settings = recipe.training
    if settings.precision == "float16" and state.device.type == "cpu":
        raise ValueError("training.precision='float16' needs a GPU; use bfloat16 or float32.")
    batch_share(settings.batch_size, "training.batch_size")  # refused before the work, if at all
    data = _open(recipe)
    output.mkdir(parents=True, exist_ok=True)
    with state.main_process_first():
        fingerprints = {name: fingerprint(images) for name, images in data.items()}
        record_run(output, json.loads(json.dumps(asdict(recipe))), fingerprints)
    checkpoint = load_checkpoint(recipe.checkpoint, recipe.revision, device=state.device)
    reinitialise(checkpoint.model, recipe.reinitialise, recipe.seed)
    pictures = _prepare(recipe, checkpoint, data, output)
    for number, phase in enumerate(settings.phases, start=1):
        seed, folder = recipe.seed + number, output / f"phase-{number}"
        best = _run_phase(settings, phase, seed, checkpoint, pictures, folder)
        checkpoint = load_checkpoint(best, device=state.device)
    if state.is_main_process:
        _ship(recipe, checkpoint, pictures, best, output)
    state.wait_for_everyone()
    return output / "checkpoint"


def _open(recipe: FinetuneRecipe) -> dict[str, CaptionDataset]:
    """The pictures to learn from and those to be judged by, which are never the same."""
    train, validation = (
        open_dataset(**asdict(source)) for source in (recipe.data.train, recipe.data.validation)
    )
    if len(validation) < 2:
        raise ValueError(f"{validation.name} has one picture; CIDEr needs two to validate on.")
    judged = {image.image or image.scene for image in validation}
    left = tuple(image for image in train if (image.image or image.scene) not in judged)
    return {"train": CaptionDataset(train.name, left), "validation": validation}


def fingerprint(images: CaptionDataset) -> str:
    """A digest of ids, captions, and names and sizes of the files."""
    digest = hashlib.sha256()
    for image in images:
        size = image.image.stat().st_size if image.image and image.image.exists() else None
        name = image.image and image.image.name
        digest.update(json.dumps([image.image_id, name, size, image.references]).encode())
    return digest.hexdigest()[:16]


def _describe(images: CaptionDataset) -> str:
    captions = sum(len(image.references) for image in images)
    return f"{images.name}: {len(images):,} pictures, {captions:,} captions"


def reinitialise(
    model: QVisionForConditionalGeneration, modules: tuple[str, ...], seed: int
) -> None:
    """Give modules of these names new random weights, as the model's own start has them.

    Raises:
        ValueError: for a name that is none, naming the nearest.
    """
    known = dict(model.named_modules())
    set_seed(seed)
    for name in modules:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"reinitialise: no module {name!r}; did you mean {near!r}?")
        known[name].apply(model._init_weights)


def _prepare(
    recipe: FinetuneRecipe, checkpoint: Checkpoint, data: dict[str, CaptionDataset], output: Path
) -> dict[str, CaptionedPictures]:
    """The samples of both data sets, of pictures that can be read; the cache is filled."""
    model, processor, settings = checkpoint.model, checkpoint.processor, recipe.training
    positions = model.config.text_config.max_position_embeddings
    if not 3 <= settings.max_tokens <= positions:
        raise ValueError(
            f"training.max_tokens={settings.max_tokens} must be from 3 to {positions}."
        )
    prepared = {}
    for name, images in data.items():
        seen, failed = None, dict.fromkeys(images.missing(), "there is no such file")
        if recipe.features is not None:
            with PartialState().main_process_first():
                folder = recipe.features.folder or output / "features"
                cache = FeatureCache(folder, model, recipe.features.dtype)
                seen = cache.see(images, model, processor, workers=recipe.features.workers)
            failed = seen.failed
        if failed:
            listed = "; ".join(f"{key}: {why}" for key, why in list(failed.items())[:5])
            told = f"{len(failed):,} of {_describe(images)}, cannot be read ({listed})"
            if not recipe.data.skip_bad:
                raise ValueError(f"{told}: mend them, or set data.skip_bad to leave them out.")
            warnings.warn(f"{told}: left out", stacklevel=2)
            readable = tuple(image for image in images if image.image_id not in failed)
            images = CaptionDataset(f"{images.name}, what can be read of it", readable)
        if name == "train" and len(images) < settings.batch_size:
            raise ValueError(
                f"{_describe(images)}: less than training.batch_size={settings.batch_size}."
            )
        captions = min(settings.captions_per_image, max(len(i.references) for i in images))
        prepared[name] = CaptionedPictures(
            images, processor, captions, settings.max_tokens, recipe.seed, seen
        )
    return prepared


def _run_phase(
    settings: Training,
    phase: Phase,
    seed: int,
    checkpoint: Checkpoint,
    pictures: dict[str, CaptionedPictures],
    folder: Path,
) -> Path:
    """Train one phase, or what is left of it; returns the folder of its best checkpoint."""
    model, processor = checkpoint.model, checkpoint.processor
    report = freezing.apply(model, phase.policy, thaw_projection=phase.thaw_projection)
    last = last_checkpoint(folder)
    state = TrainerState.load_from_json(f"{last}/{TRAINER_STATE_NAME}") if last else None
    if not state or not (state.global_step >= state.max_steps or is_exhausted(state, settings)):
        train, validation = replace(pictures["train"], seed=seed), pictures["validation"]
        arguments = _arguments(settings, phase, seed, len(train), folder)
        share, rate = arguments.per_device_train_batch_size, settings.matrix_learning_rate
        muon = rate and MuonAdamW(model, arguments.learning_rate, rate, settings.weight_decay)
        if PartialState().is_main_process:
            print(f"{report}\n{estimate_memory(model, settings, share, train.lengths())}")
        positions = model.config.text_config.max_position_embeddings
        on_gpu = arguments.device.type == "cuda"
        few = settings.compile or on_gpu  # lengths to compile or to capture
        multiple = gpu.LENGTHS if few and positions % gpu.LENGTHS == 0 else 1
        trainer = CaptionTrainer(
            model,
            arguments,
            data_collator=CaptionCollator(model.config.pad_token_id, multiple),
            train_dataset=train,
            eval_dataset=validation,
            callbacks=[Pace(settings), CurveWriter(folder / "curve.csv")],
            optimizers=(muon, None),
            validation=Validation(validation.images, processor, share),
            compiled=settings.compile,
            captured=settings.capture and not settings.compile and on_gpu,
        )
        trainer.train(resume_from_checkpoint=last)
        state = trainer.state
    return folder / Path(state.best_model_checkpoint).name


def _arguments(
    settings: Training, phase: Phase, seed: int, pictures: int, folder: Path
) -> Seq2SeqTrainingArguments:
    epoch = ceil(pictures // settings.batch_size / settings.accumulation)
    steps = max(1, round(phase.epochs * epoch))
    every = ceil(steps / settings.evaluations)
    workers = settings.workers
    if workers is None:
        workers = 4 if torch.cuda.is_available() else 0
    arguments = training_arguments(
        folder,
        seed,
        batch_size=settings.batch_size,
        name="training.batch_size",
        max_steps=steps,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=phase.learning_rate or settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        logging_steps=max(1, min(50, steps // 20)),
        logging_nan_inf_filter=False,
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,  # the best, and the last
        metric_for_best_model=settings.best_by,
        greater_is_better=settings.best_by == "cider",
        dataloader_num_workers=workers,
        dataloader_drop_last=True,  # else processes share out an epoch's last batch unevenly
        report_to=["tensorboard"] if settings.tensorboard else [],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more GPUs are for more processes
    return arguments


def _ship(
    recipe: FinetuneRecipe,
    checkpoint: Checkpoint,
    pictures: dict[str, CaptionedPictures],
    best: Path,
    output: Path,
) -> None:
    """Write the checkpoint with its card, recipe, scores and curve, and upload it where asked."""
    log = TrainerState.load_from_json(str(best / TRAINER_STATE_NAME)).log_history
    measured = next(row for row in reversed(log) if "eval_cider" in row)
    scores = {
        "CIDEr": measured["eval_cider"],
        "loss": measured["eval_loss"],
        "step": measured["step"],
        "images": len(pictures["validation"]),
    }
    phases = dict(enumerate(recipe.training.phases, start=1))
    curves = [pd.read_csv(output / f"phase-{n}/curve.csv").assign(phase=n) for n in phases]
    origin = recipe.checkpoint or "the embedded checkpoint of `qvision_lab`"
    companions = {
        "README.md": CARD.format(
            recipe=recipe,
            origin=f"{origin} ({recipe.revision})" if recipe.revision else origin,
            data={name: _describe(samples.images) for name, samples in pictures.items()},
            phases="\n".join(
                f"{n}. {phase.epochs:g} epochs of `{phase.policy}`, learning rate "
                f"{phase.learning_rate or recipe.training.learning_rate:g}"
                for n, phase in phases.items()
            ),
            reinitialised=", ".join(recipe.reinitialise) or "nothing",
            scores=scores,
        ),
        "run.yaml": (output / "run.yaml").read_text(encoding="utf-8"),
        "scores.json": json.dumps(scores, indent=1),
        "captioner.csv": pd.concat(curves).to_csv(index=False),
    }
    made_by = Provenance(f"the recipe {recipe.name}", "native", None, {}, "float32")
    dest = output / "checkpoint"
    save_checkpoint(replace(checkpoint, provenance=made_by), dest, companions=companions)
    if recipe.push_to is not None:
        HfApi().create_repo(recipe.push_to, exist_ok=True)
        HfApi().upload_folder(repo_id=recipe.push_to, folder_path=dest)
