"""One trainer for every stage: transformers' own, with a measure and complete checkpoints."""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from qvision_lab.captioning import Captioner
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset, ImageId
from qvision_lab.evaluation import EvaluationReport, evaluate_dataset
from qvision_lab.interpretation.collapse import mean_cosine, measure_queries
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.model.qformer import QFormerOutput
from qvision_lab.training import gpu
from qvision_lab.training.optimizers import MuonAdamW
from qvision_lab.training.recipe import Optimisation

WATCHED = 32  # validation images on which the queries are measured


@dataclass
class Validation:
    """Scores of greedy captions of held-out images, made as a user would get them.

    The Captioner gets images only; transformers' `predict_with_generate` would prompt with the
    reference. Processes share the work.
    """

    images: CaptionDataset
    captioner: Captioner  # one for all evaluations, since it keeps buffers and graphs

    def captions(self) -> dict[ImageId, str]:
        """A greedy caption of each image."""
        with PartialState().split_between_processes(list(self.images)) as mine:
            pictures = (image.picture for image in mine)
            captions = self.captioner.caption(pictures, preset="greedy") if mine else []
        texts = gather_object([caption.text for caption in captions])
        return dict(zip(self.images.ids, texts, strict=True))

    def report(self) -> EvaluationReport:
        """CIDEr-D of the captions, and the rates of the data set's judge if any."""
        judge = self.images.judge
        metrics = ("cider", judge.name) if judge else ("cider",)
        return evaluate_dataset(self.captions(), self.images, metrics, resamples=1)

    def __call__(self) -> dict[str, float]:
        """Scores of the report, CIDEr-D times 100, and `measure_queries`."""
        scores = {name.replace(" ", "_"): score for name, score in self.report().scores.items()}
        measures = measure_queries(self.captioner, self.images[:WATCHED])
        return {"cider": 100 * scores.pop("CIDEr"), **scores, **measures}


class StageTrainer(Trainer):
    """transformers' trainer, whose evaluation adds a measure of the stage; the log is `curve.csv`.

    A checkpoint whose write fails is deleted. Evaluation leaves the random numbers of training
    alone, so that the number of evaluations changes no weight. On a GPU, steps take float32
    products in TF32 and read frozen matrices in the bfloat16 that autocast would cast them to; what
    is evaluated and saved is float32. Where compiling fails in the first step, training continues
    without; graphs are captured where one GPU trains alone, without smoothing, `query_cosine` or
    `token_dropout`.
    """

    def __init__(
        self,
        *args,
        measure: Callable[[], dict[str, float]],  # to be logged; the model is in evaluation mode
        processor: QVisionProcessor | None = None,  # saved with each checkpoint, for `ql.load`
        patience: int | None = None,  # this and the others: of the settings `Training`
        compiled: bool = False,
        captured: bool = False,
        smoothing: float = 0.0,
        state_dropout: float = 0.0,
        query_cosine: float | None = None,
        token_dropout: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.measure, self.processor, self.patience = measure, processor, patience
        self.compiled, self.untried = compiled, compiled
        self.smoothing, self.state_dropout = smoothing, state_dropout
        self.query_cosine, self.token_dropout = query_cosine, token_dropout
        on_gpu = self.args.device.type == "cuda"
        if on_gpu and isinstance(measure, Validation):  # holding weights may move them
            measure.captioner.decoding.follow_weights()
        self.frozen = gpu.frozen_matrices(self.model) if self.args.bf16 and on_gpu else []
        self.originals = [weight.data for weight in self.frozen]
        # Graphs write gradients to one place, which a second batch of a step would overwrite.
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        captured &= alone and on_gpu and not (smoothing or query_cosine or token_dropout)
        self.captured = gpu.CapturedLoss(self.model) if captured else None
        self.losses: list[tuple[int, Tensor]] = []  # with their steps, not yet checked

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """From cached features on one GPU by CUDA graphs; else as the model computes it."""
        if model.training and self.state_dropout and "vision_states" in inputs:
            inputs["vision_states"] = F.dropout(inputs["vision_states"], self.state_dropout)
        packed = {"vision_states", "places"} <= inputs.keys()
        if self.captured is not None and packed and not return_outputs:
            with self.accelerator.autocast():
                return self.captured(**inputs, num_items_in_batch=num_items_in_batch)
        if not (model.training and (self.smoothing or self.query_cosine)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.smoothing:
            loss = smooth_loss(loss, output.logits, self.smoothing, num_items_in_batch)
        if self.query_cosine:  # a batch's mean, where the captions' losses may be summed over more
            tokens = output.visual_tokens.float()  # [B,N,D]
            share = self.query_cosine / self.args.gradient_accumulation_steps
            loss = loss + share * mean_cosine(tokens - tokens.mean(0))
        return loss

    def train(self, *args, **kwargs):
        halves = [original.bfloat16() for original in self.originals]
        compiled = gpu.compiled_blocks(self.model) if self.compiled else nullcontext()
        with gpu.holding(self.frozen, halves), compiled:
            return super().train(*args, **kwargs)

    def _drop_tokens(self, qformer: nn.Module, _, output: QFormerOutput) -> QFormerOutput:
        kept = F.dropout1d(output.visual_tokens, self.token_dropout, qformer.training)  # [B,N,D]
        return replace(output, visual_tokens=kept)

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """Frozen weights in their original dtype, and nothing compiled."""
        plain = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with gpu.holding(self.frozen, self.originals), plain:
            yield
            self.originals = [weight.data for weight in self.frozen]  # a Captioner may join them

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        self.args.dataloader_drop_last = False  # the training batches exist by now
        return super().get_eval_dataloader(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        dropping = nullcontext()
        if self.token_dropout:  # a hook in steps alone, since it would slow down evaluations
            dropping = self.model.qformer.register_forward_hook(self._drop_tokens)
        with dropping, gpu.tf32_products():
            loss = self._compiled_step(*args, **kwargs)
        self.losses.append((self.state.global_step + 1, loss))
        if loss.device.type == "cpu":
            self._check_losses()
        return loss

    def _compiled_step(self, *args, **kwargs) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except Exception as error:  # compilers raise many kinds
            if not self.untried:
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            warnings.warn(f"not compiled ({problem}): training continues without.", stacklevel=2)
            gpu.uncompile(self.model)
            self.model.zero_grad()
            loss, self.compiled = super().training_step(*args, **kwargs), False
        self.untried = False
        return loss

    def log(self, *args, **kwargs) -> None:  # also after each evaluation, before a checkpoint
        self._check_losses()
        super().log(*args, **kwargs)
        if self.is_world_process_zero():
            curve = pd.DataFrame(self.state.log_history).to_csv(index=False)
            write_atomic(Path(self.args.output_dir, "curve.csv"), curve)
        best_by = self.args.metric_for_best_model
        self.control.should_training_stop |= is_exhausted(self.state, best_by, self.patience)

    def _check_losses(self) -> None:
        """Check the losses since the last time, which waits for the device."""
        losses, self.losses = self.losses, []
        for step, loss in losses:
            if not math.isfinite(loss.item()):
                raise self._diverged(f"the loss is {loss.item()}", step)

    @torch.no_grad()
    def evaluation_loop(self, *args, **kwargs):
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._as_loaded():
            output = super().evaluation_loop(*args, **kwargs)  # leaves the model in evaluation mode
            output.metrics.update({f"eval_{name}": x for name, x in self.measure().items()})
        return output

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise self._diverged("weights are not finite", self.state.global_step)
        folder, step = Path(self.args.output_dir), self.state.global_step
        try:
            with self._as_loaded():
                super()._save_checkpoint(model, trial)
        except Exception as error:  # torch, safetensors and the file system raise their own
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            raise OSError(
                f"step {step} could not be saved in {folder} ({error}). Earlier checkpoints are "
                "complete: make room, and run the same command again."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.processor is not None:  # as `processing_class` it would change special tokens
            self.processor.save_pretrained(output_dir)

    def _diverged(self, problem: str, step: int) -> ValueError:
        return DivergedError(
            f"{problem} at step {step} of {self.args.output_dir}: training stops, and earlier "
            "checkpoints stay. Lower the learning rate or `clip`, in another output folder."
        )


def smooth_loss(
    loss: Float[Tensor, ""],
    logits: Float[Tensor, "K V"],
    smoothing: float,
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Label smoothing (Szegedy et al. 2016, arXiv:1512.00567) of a mean over all targets."""
    uniform = -logits.float().log_softmax(-1).mean(-1).sum()  # as if all words were targets
    divisor = len(logits) if num_items_in_batch is None else num_items_in_batch
    return (1 - smoothing) * loss + smoothing * uniform / divisor


class DivergedError(ValueError):
    """A loss or weight that is not finite."""


class EpochCallback(TrainerCallback):
    """Passes the epoch to the data set, which accelerate does in a single process only."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.epoch = int(state.epoch)


def is_exhausted(state: TrainerState, best_by: str | None, patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought no improvement."""
    key, sign = f"eval_{best_by}", -1 if best_by == "loss" else 1
    scores = [sign * row[key] for row in state.log_history if key in row]
    since = len(scores) - 1 - int(np.argmax(scores)) if scores else 0
    return patience is not None and since >= patience


def train_stage(
    model: nn.Module, settings: Optimisation, folder: Path, seed: int, steps: int, **parts: Any
) -> Path:
    """Train a stage by a `StageTrainer` of these parts, or resume it; a finished one is left alone.

    Returns the folder of the best checkpoint, or of the last where no score says which is best.
    ValueError if a batch cannot be shared by the processes, or training diverges; OSError if a
    checkpoint cannot be written.
    """
    last, arguments = last_checkpoint(folder), training_arguments(settings, folder, seed, steps)
    state = TrainerState.load_from_json(f"{last}/{TRAINER_STATE_NAME}") if last else TrainerState()
    exhausted = is_exhausted(state, arguments.metric_for_best_model, parts.get("patience"))
    if not exhausted and not (last and state.global_step >= state.max_steps):
        rates = settings.learning_rate, settings.matrix_learning_rate, settings.weight_decay
        rates = *rates, getattr(settings, "bridge_rate", None) or 1.0
        optimizer = MuonAdamW(model, *rates) if settings.matrix_learning_rate else None
        settled = {"optimizers": (optimizer, None), "callbacks": [EpochCallback()]}
        trainer = StageTrainer(model, arguments, **settled, **parts)
        trainer.train(resume_from_checkpoint=last)
        state = trainer.state
    return folder / Path(state.best_model_checkpoint or last_checkpoint(folder)).name


def training_arguments(
    settings: Optimisation, folder: Path, seed: int, steps: int
) -> TrainingArguments:
    """The Trainer's own settings for a stage: one cosine, checkpoints, batches shared evenly."""
    on_gpu, share = torch.cuda.is_available(), batch_share(settings.batch_size)
    every, best_by = math.ceil(steps / settings.evaluations), getattr(settings, "best_by", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bfloat16" and (on_gpu or has_bfloat16()),
        fp16=settings.precision == "float16",
        use_cpu=not on_gpu,
        logging_steps=max(1, min(50, steps // 20)),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,  # the best, and the last
        metric_for_best_model=best_by,
        greater_is_better=best_by and best_by != "loss",
        dataloader_num_workers=4 * on_gpu if settings.workers is None else settings.workers,
        dataloader_drop_last=True,  # else processes share an epoch's last batch unevenly
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        accelerator_config={"non_blocking": on_gpu},  # copies to the device
        report_to=["tensorboard"] if settings.tensorboard else [],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more GPUs are for more processes
    return arguments


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; emulated, products take 20 times as long."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def batch_share(batch_size: int) -> int:
    """The part of a batch for each process; ValueError if they cannot share it evenly."""
    share, rest = divmod(batch_size, PartialState().num_processes)
    if rest:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {PartialState().num_processes} processes;"
            " choose a multiple of them."
        )
    return share


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run, or None.

    The Trainer writes `trainer_state.json` last, so a folder in which it parses is complete.
    """
    complete = []
    for state in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):
            complete.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return max(complete)[1] if complete else None
