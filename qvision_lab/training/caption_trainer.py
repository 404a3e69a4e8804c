"""How captions are learned from pictures: samples, steps that stop in time, and validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerState

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import open_image
from qvision_lab.data.coco import CaptionDataset, CaptionedImage, ImageId
from qvision_lab.evaluation import evaluate
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import gpu
from qvision_lab.training.features import SeenPictures
from qvision_lab.training.finetune_recipe import Training
from qvision_lab.training.trainer import WholeCheckpoints

TIMED_STEPS = 20  # after so many it is told how long the rest takes


@dataclass
class CaptionedPictures(Dataset):
    """Training samples: what is known of a picture, with some of its captions.

    Args:
        captions_per_image: rows of each sample. Of more captions, a choice by `seed`, `epoch` and
            place is made; of fewer, rows without a target fill up, so that all weigh the same.
        seen: the pictures' states; without them samples have pixels.
    """

    images: CaptionDataset
    processor: QVisionProcessor
    captions_per_image: int
    max_tokens: int
    seed: int
    seen: SeenPictures | None = None
    epoch: int = 0
    encoded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor | list[Tensor]]:
        image = self.images[index]
        draw = np.random.default_rng((self.seed, self.epoch, index))
        chosen = draw.permutation(image.references)[: self.captions_per_image].tolist()
        captions = [self._encode(caption) for caption in chosen]
        captions += [captions[0][:1]] * (self.captions_per_image - len(captions))
        return {**self._look(image), "captions": captions}

    def lengths(self, most: int = 1000) -> list[int]:
        """Tokens of the captions of the first pictures."""
        told = (caption for image in self.images for caption in image.references)
        return [len(self._encode(caption)) for caption in islice(told, most)]

    def _encode(self, caption: str) -> Tensor:
        if caption not in self.encoded:
            self.encoded[caption] = self.processor.encode(caption, self.max_tokens)
        return self.encoded[caption]

    def _look(self, image: CaptionedImage) -> dict[str, Tensor]:
        if self.seen is not None:
            return {"vision_states": self.seen[image.image_id]}  # [P,C]
        picture = open_image(image.picture)
        return {"pixel_values": self.processor(images=picture)["pixel_values"][0]}  # [3,H,W]


@dataclass
class Validation:
    """What captions of held-out pictures are worth, made as a user would get them.

    The captions come from the Captioner, which is shown pictures and nothing else; transformers'
    `predict_with_generate` would prompt with the reference. Processes share the work.
    """

    images: CaptionDataset
    processor: QVisionProcessor
    batch_size: int  # on a CPU; on a GPU the Captioner chooses
    captioner: Captioner | None = field(default=None, init=False, repr=False)

    def captioner_of(self, model: QVisionForConditionalGeneration) -> Captioner:
        """The one captioner of a model, since it keeps buffers and graphs."""
        if self.captioner is None or self.captioner.model is not model:
            self.captioner = Captioner(model, self.processor)
        return self.captioner

    def captions(self, model: QVisionForConditionalGeneration) -> dict[ImageId, str]:
        """A greedy caption of each picture."""
        captioner = self.captioner_of(model)
        batch_size = self.batch_size if model.device.type == "cpu" else None
        with PartialState().split_between_processes(list(self.images)) as mine:
            pictures = (image.picture for image in mine)
            settings = {"batch_size": batch_size, "preset": "greedy"}
            told = captioner.caption(pictures, **settings) if mine else []
        texts = gather_object([caption.text for caption in told])
        return dict(zip(self.images.ids, texts, strict=True))

    def __call__(self, model: QVisionForConditionalGeneration) -> float:
        """CIDEr-D of the captions, times 100."""
        report = evaluate(self.captions(model), self.images.references, metrics=("cider",))
        return 100 * report.scores["CIDEr"]


class CaptionTrainer(WholeCheckpoints, Seq2SeqTrainer):
    """transformers' trainer, which also scores captions, and saves nothing that is not whole.

    Evaluation leaves the random numbers of training alone, so that the number of evaluations
    changes no weight. On a GPU steps take products of float32 in TF32, and read frozen matrices in
    the bfloat16 that autocast would cast them to; what is evaluated and saved is all in float32.

    Args:
        compiled: compile the blocks; where that fails in the first step, go on without.
        captured: replay steps of cached features as CUDA graphs, where one GPU trains alone.
    """

    def __init__(
        self,
        *args,
        validation: Validation,
        compiled: bool = False,
        captured: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.validation, self.compiled, self.untried = validation, compiled, compiled
        if self.args.device.type == "cuda":
            self.validation.captioner_of(self.model).decoding.follow_weights()  # it may move them
        halved = self.args.bf16 and self.args.device.type == "cuda"
        self.frozen = gpu.frozen_matrices(self.model) if halved else []
        self.originals = [weight.data for weight in self.frozen]
        # Graphs write gradients to one place, which a second batch of a step would overwrite.
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        self.captured = gpu.CapturedLoss(self.model) if captured and alone else None
        self.losses: list[tuple[int, Tensor]] = []  # with their steps, not looked at yet

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """On one GPU, of cached features, by CUDA graphs; else as the model computes it."""
        if self.captured is None or return_outputs or "vision_states" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            return self.captured(**inputs, num_items_in_batch=num_items_in_batch)

    def train(self, *args, **kwargs):
        halves = [original.bfloat16() for original in self.originals]
        with gpu.holding(self.frozen, halves), ExitStack() as stack:
            if self.compiled:
                stack.enter_context(gpu.compiled_blocks(self.model))
            return super().train(*args, **kwargs)

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """Frozen weights as they were, and nothing compiled."""
        with gpu.holding(self.frozen, self.originals), ExitStack() as stack:
            if self.compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
            self.originals = [weight.data for weight in self.frozen]  # a Captioner may join them

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        self.args.dataloader_drop_last = False  # those of training are cut by now
        return super().get_eval_dataloader(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        with gpu.tf32_products():
            loss = self._compiled_step(*args, **kwargs)
        self.losses.append((self.state.global_step + 1, loss))
        if loss.device.type == "cpu":
            self._check_losses()
        return loss

    def _compiled_step(self, *args, **kwargs) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except Exception as error:  # a compiler's are many
            if not self.untried:
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            warnings.warn(f"not compiled ({problem}): training goes on without.", stacklevel=2)
            gpu.uncompile(self.model)
            self.model.zero_grad()
            loss, self.compiled = super().training_step(*args, **kwargs), False
        self.untried = False
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._check_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _check_losses(self) -> None:
        """Look at the losses since the last time, which waits for the device."""
        losses, self.losses = self.losses, []
        for step, loss in losses:
            if not math.isfinite(loss.item()):
                raise self._diverged(f"the loss is {loss.item()}", step)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._as_loaded():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics[f"{metric_key_prefix}_cider"] = self.validation(self.model)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise self._diverged("weights are no numbers any more", self.state.global_step)
        with self._as_loaded():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.validation.processor.save_pretrained(output_dir)  # so that `ql.load` takes it

    def _diverged(self, problem: str, step: int) -> ValueError:
        return ValueError(
            f"{problem} at step {step} of {self.args.output_dir}: training stops, and what was "
            "saved before stays. Lower the learning rate or `clip`, in another output folder."
        )


class Pace(TrainerCallback):
    """Draws the captions of each epoch, ends a phase that no longer improves, tells the time."""

    def __init__(self, settings: Training):
        self.settings = settings

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.begun = state.global_step, perf_counter()

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.epoch = int(state.epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first + TIMED_STEPS and state.is_world_process_zero:
            step = (perf_counter() - self.begun) / TIMED_STEPS
            left = step * (state.max_steps - state.global_step) / 60
            print(f"{step:.2f} s a step: {left:.0f} minutes to go, and those of validation")

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop |= is_exhausted(state, self.settings)


def is_exhausted(state: TrainerState, settings: Training) -> bool:
    """Whether the last `patience` evaluations brought nothing better than the one before them."""
    key, sign = f"eval_{settings.best_by}", 1 if settings.best_by == "cider" else -1
    scores = [sign * row[key] for row in state.log_history if key in row]
    since = len(scores) - 1 - int(np.argmax(scores)) if scores else 0
    return settings.patience is not None and since >= settings.patience
