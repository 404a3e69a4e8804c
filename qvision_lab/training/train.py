"""A training run: a checkpoint or new model, data and a recipe -> a trained checkpoint."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from qvision_lab.captioning import Captioner
from qvision_lab.data.atomic import locked
from qvision_lab.data.coco import CaptionDataset, CaptionedImage, ImageId, open_dataset, some
from qvision_lab.data.identity import fingerprint
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import Checkpoint, load_checkpoint
from qvision_lab.model.parameters import fingerprint_weights
from qvision_lab.training import freezing
from qvision_lab.training.features import FeatureCache
from qvision_lab.training.memory import estimate_memory
from qvision_lab.training.new_model import start_from_imagenet
from qvision_lab.training.recipe import Data, DataSource, Phase, Recipe, Training
from qvision_lab.training.results import describe, record_run, save_result
from qvision_lab.training.samples import PACKED_LENGTHS, CaptionCollator, CaptionSamples
from qvision_lab.training.tower import train_tower
from qvision_lab.training.trainer import Validation, batch_share, train_stage


def train_captioner(recipe: Recipe, output: str | Path) -> Path:
    """Train by a recipe; the same call resumes, with bitwise the same result.

    Returns the folder of the finished checkpoint, which `qvision_lab.load` takes, in `output`, that
    of the run. There each phase has a folder too, with a CSV of its log.

    Raises:
        ValueError: settings that do not fit the model, an `output` that another command writes to
            or that has another recipe's or data's run, unreadable images, a loss that is not finite
        OSError: the disk is full; what was saved before stays complete
    """
    output, state = Path(output), PartialState(cpu=not torch.cuda.is_available())
    settings = recipe.training
    if settings.precision == "float16" and state.device.type == "cpu":
        raise ValueError("training.precision='float16' needs a GPU; use bfloat16 or float32.")
    batch_share(settings.batch_size)  # an error before the work, if any
    data = open_data(recipe.data)
    tests = {name: open_source(source) for name, source in recipe.scores.items()}
    for test in tests.values():
        if learned := _find_common(test, data["train"]):
            raise ValueError(
                f"{test.name} is no test: {some('image', learned)} are trained on too."
            )
    calibration = recipe.calibration and open_source(recipe.calibration)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        weights = None  # a new model starts from random ones
        if recipe.tower is None and recipe.imagenet is None:
            checkpoint = load_checkpoint(recipe.checkpoint, recipe.revision, device=state.device)
            weights = fingerprint_weights(checkpoint.model)
        with state.main_process_first():
            fingerprints = {name: fingerprint(images) for name, images in data.items()}
            record_run(output, recipe.model_dump(mode="json"), fingerprints, weights)
        if recipe.tower is not None:
            start = train_tower(recipe.tower, recipe.seed, output / "vision")
        elif recipe.imagenet is not None:
            captions = (caption for image in data["train"] for caption in image.references)
            start = output / "start"
            with state.main_process_first():
                start_from_imagenet(recipe.imagenet, captions, recipe.seed, start)
        if weights is None:
            checkpoint = load_checkpoint(start, device=state.device)
        checkpoint = change_model(checkpoint, recipe)
        samples = prepare_samples(recipe, checkpoint, data, output)
        for number, phase in enumerate(settings.phases, start=1):
            seed, folder = recipe.seed + number, output / f"phase-{number}"
            best = train_phase(settings, phase, seed, checkpoint, samples, folder)
            checkpoint = load_checkpoint(best, device=state.device)
        if state.is_main_process:
            save_result(recipe, checkpoint, samples, tests, calibration, best, output)
        state.wait_for_everyone()
    return output / "checkpoint"


def open_data(data: Data) -> dict[str, CaptionDataset]:
    """Training and validation images; an image file or drawing in both is validation only."""
    train, validation = open_source(data.train), open_source(data.validation)
    if len(validation) < 2:
        raise ValueError(f"{validation.name} has one image; CIDEr needs two to validate on.")
    held_out = set(_find_common(train, validation))
    kept = tuple(image for image in train if image.image_id not in held_out)
    return {"train": replace(train, images=kept), "validation": validation}


def _find_common(dataset: CaptionDataset, other: CaptionDataset) -> list[ImageId]:
    """Ids of the images whose file or drawing is in the other data set too."""

    def source(image: CaptionedImage) -> Path | str:  # links and other spellings resolved
        return image.image.resolve() if image.image else image.drawing.name

    known = set(map(source, other))
    return [image.image_id for image in dataset if source(image) in known]


def open_source(source: DataSource) -> CaptionDataset:
    dataset = open_dataset(**source.model_dump(exclude={"captions", "as_sentences"}))
    change, most = as_sentence if source.as_sentences else str, source.captions
    images = (replace(i, references=tuple(map(change, i.references[:most]))) for i in dataset)
    return replace(dataset, images=tuple(images))


def as_sentence(caption: str) -> str:
    """ "a dog , running ." as "A dog, running."."""
    text = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(caption.split())).rstrip(" .,;:")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".")


def change_model(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """What training starts from: a model with changed sizes and reinitialised modules.

    ValueError as `reinitialise`, and for changed sizes that do not fit the weights that are kept.
    """
    model, changes = checkpoint.model, recipe.model.model_dump(exclude_none=True)
    if not changes:
        reinitialise(model, recipe.reinitialise, recipe.seed)
        return checkpoint
    set_seed(recipe.seed)  # of what is random in the end, a tower perhaps
    changed = QVisionForConditionalGeneration(changed_config(model.config, changes))
    changed.generation_config = model.generation_config
    reinitialise(changed, ("qformer", "decoder", "vision.projection"), recipe.seed)
    random = tuple(f"{module}." for module in recipe.reinitialise)
    kept = {name: x for name, x in model.state_dict().items() if not name.startswith(random)}
    try:
        unknown = changed.load_state_dict(kept, strict=False).unexpected_keys
    except RuntimeError as error:
        unknown = [str(error).splitlines()[-1].strip()]
    if unknown:
        raise ValueError(f"model does not fit kept weights ({unknown[0]}): reinitialise them.")
    return replace(checkpoint, model=changed.to(model.device).eval())


def reinitialise(model: QVisionForConditionalGeneration, modules: Sequence[str], seed: int) -> None:
    """Give modules new random weights, as a new model has them; ValueError for unknown names."""
    known = dict(model.named_modules())
    set_seed(seed)
    for name in modules:
        if name not in known:
            near = [module for module in known if module and module.count(".") < 2]
            hint = freezing.suggest(name, near)
            raise ValueError(f"reinitialise: there is no module {name!r}; {hint}")
        known[name].apply(model._init_weights)


def changed_config(config: QVisionConfig, changes: Mapping[str, Any]) -> QVisionConfig:
    """A configuration with changes (of `text_config` too); ValueError if the sizes do not fit."""
    before = config.to_dict()
    text = {**before["text_config"], **changes.get("text_config", {})}
    del text["attention_layers"]  # GPT-Neo's configuration derives it from attention_types
    try:
        return QVisionConfig.from_dict({**before, **changes, "text_config": text})
    except StrictDataclassError as error:
        raise ValueError(f"model: {error}") from error


def prepare_samples(
    recipe: Recipe, checkpoint: Checkpoint, data: dict[str, CaptionDataset], output: Path
) -> dict[str, CaptionSamples]:
    """The samples of both data sets, of images that can be read; fills the feature cache."""
    model, processor, settings = checkpoint.model, checkpoint.processor, recipe.training
    positions = model.config.text_config.max_position_embeddings
    if settings.max_tokens > positions:
        raise ValueError(
            f"training.max_tokens={settings.max_tokens} must be from 3 to {positions}."
        )
    samples = {}
    for name, images in data.items():
        features, failed = None, dict.fromkeys(images.missing(), "there is no such file")
        if recipe.features is not None:
            with PartialState().main_process_first():
                folder = recipe.features.folder or output / "features"
                cache = FeatureCache(folder, model, recipe.features.dtype)
                views = recipe.features.views if name == "train" else 1
                workers = recipe.features.workers
                features = cache.encode(images, model, processor, views=views, workers=workers)
            failed = features.failed
        if failed:
            listed = "; ".join(f"{key}: {why}" for key, why in list(failed.items())[:5])
            problem = f"{len(failed):,} of {describe(images)}, cannot be read ({listed})"
            if not recipe.data.skip_bad:
                raise ValueError(f"{problem}: repair them, or set data.skip_bad to leave them out.")
            warnings.warn(f"{problem}: left out", stacklevel=2)
            readable = tuple(image for image in images if image.image_id not in failed)
            images = replace(images, name=f"{images.name}, readable images", images=readable)
        if name == "train" and len(images) < settings.batch_size:
            raise ValueError(
                f"{describe(images)}: less than training.batch_size={settings.batch_size}."
            )
        most = min(settings.captions_per_image, max(len(i.references) for i in images))
        samples[name] = CaptionSamples(
            images, processor, most, settings.max_tokens, recipe.seed, features
        )
    return samples


def train_phase(
    settings: Training,
    phase: Phase,
    seed: int,
    checkpoint: Checkpoint,
    samples: dict[str, CaptionSamples],
    folder: Path,
) -> Path:
    """Train or resume one phase; returns the folder of its best checkpoint."""
    model, processor = checkpoint.model, checkpoint.processor
    counts = freezing.apply(model, phase.policy, thaw_projection=phase.thaw_projection)
    train, validation = replace(samples["train"], seed=seed), samples["validation"]
    if PartialState().is_main_process:
        share = batch_share(settings.batch_size)
        estimate = estimate_memory(model, settings, share, train.lengths())
        print(f"{counts.map('{:,}'.format)}\n{estimate}")
    epoch = ceil(len(train) // settings.batch_size / settings.accumulation)  # in steps
    positions = model.config.text_config.max_position_embeddings
    packed = model.device.type == "cuda" and settings.max_tokens + PACKED_LENGTHS <= positions
    rates = {"learning_rate": phase.learning_rate or settings.learning_rate}
    if matrix_rate := settings.matrix_learning_rate:
        scale = rates["learning_rate"] / settings.learning_rate
        rates["matrix_learning_rate"] = scale * matrix_rate
    return train_stage(
        model,
        settings.model_copy(update=rates),
        folder,
        seed,
        phase.steps or max(1, round(phase.epochs * epoch)),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(model.config.pad_token_id, packed),
        measure=Validation(validation.images, Captioner(model, processor)),
        processor=processor,
        patience=settings.patience,
        compiled=settings.compile,
        captured=settings.capture,
        smoothing=settings.label_smoothing,
        state_dropout=settings.state_dropout,
        query_cosine=settings.query_cosine,
        token_dropout=settings.token_dropout,
    )
