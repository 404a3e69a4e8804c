"""One trainer for every stage: transformers' own, with Muon, measured by what the stage is for."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from qvision_lab.data.atomic import write_atomic


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, which on a GPU takes all matrices of one shape at once: in few launches.

    Its numbers differ from torch's as far as products in bfloat16 round; its state is the same.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        alike = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[number, weight.shape].append(weight)
        if not all(weights[0].is_cuda for weights in alike.values()):
            return super().step(closure)
        return self.step_batched(alike)

    @torch.no_grad()
    def step_batched(self, alike: dict[tuple[int, torch.Size], list[nn.Parameter]]) -> None:
        """Step the weights [r,c] of each group and shape by products of [n,r,c]."""
        for (number, (rows, columns)), weights in alike.items():
            group, states = self.param_groups[number], [self.state[weight] for weight in weights]
            for state, weight in zip(states, weights, strict=True):
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
            gradients = [weight.grad for weight in weights]
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
            x = torch.stack(updates).bfloat16()  # [n,r,c]
            x = x.mT if rows > columns else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            a, b, c = group["ns_coefficients"]
            for _ in range(group["ns_steps"]):
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = x.mT if rows > columns else x
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, (x.float() * -rate).contiguous().unbind())


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of a network and AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is meant for hidden
    matrices; embeddings, heads, biases and norms stay with AdamW, as its authors advise.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        matrix_learning_rate: float,
        weight_decay: float,
    ):
        modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
        embeddings = {id(module.weight) for module in modules}
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            hidden = parameter.ndim == 2 and "head" not in name and id(parameter) not in embeddings
            if parameter.requires_grad:
                (matrices if hidden else others).append(parameter)
        self.muon = BatchedMuon(
            matrices, lr=matrix_learning_rate, weight_decay=weight_decay, momentum=0.95
        )
        self.adamw = torch.optim.AdamW(
            others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
        )
        super().__init__(self.muon.param_groups + self.adamw.param_groups, defaults={})
        self._share_groups()

    def _share_groups(self) -> None:
        """The schedule writes learning rates into `param_groups`: they must be the parts' own."""
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()


class WholeCheckpoints:
    """Mixed into a trainer: a checkpoint that could not be written to its end is none."""

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch, safetensors and the file system raise their own
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            raise OSError(
                f"step {step} could not be saved in {folder} ({error}). What was saved before is "
                "whole: make room, and run the same command again."
            ) from error


class StageTrainer(WholeCheckpoints, Trainer):
    """A Trainer whose evaluation is the stage's own measure.

    Args:
        measure: gets the model in evaluation mode, returns numbers to be logged.
    """

    def __init__(self, *args, measure: Callable[[nn.Module], dict[str, float]], **kwargs):
        super().__init__(*args, **kwargs)
        self.measure = measure

    def evaluate(self, *_args, **_kwargs) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            metrics = {f"eval_{name}": value for name, value in self.measure(self.model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class CurveWriter(TrainerCallback):
    """Keeps a stage's log as a CSV, one row a logged step, whole after every write."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_atomic(self.path, pd.DataFrame(state.log_history).to_csv(index=False))


def run_stage(
    model: nn.Module,
    stage: dict,
    seed: int,
    folder: Path,
    measure: Callable[[nn.Module], dict[str, float]],
    data_collator: Callable[[list], dict[str, torch.Tensor]],
    dataset: Dataset,
    callbacks: Sequence[TrainerCallback] = (),
) -> StageTrainer:
    """Train what a recipe's stage says, or take it up where it stopped; the log is `curve.csv`."""
    steps = stage["steps"]
    arguments = training_arguments(
        folder,
        seed,
        batch_size=stage["batch_size"],
        max_steps=steps,
        gradient_accumulation_steps=stage.get("accumulation", 1),
        learning_rate=stage["learning_rate"],
        weight_decay=stage["weight_decay"],
        warmup_steps=min(stage["warmup_steps"], steps // 4),
        max_grad_norm=1.0,
        bf16=stage.get("bf16", True),
        logging_steps=max(1, min(50, steps // 10)),
        eval_steps=max(1, steps // stage.get("measurements", 8)),
        save_steps=max(1, steps // 8),
        save_total_limit=1,
    )
    rates = stage["learning_rate"], stage["matrix_learning_rate"], stage["weight_decay"]
    trainer = StageTrainer(
        model,
        arguments,
        data_collator=data_collator,
        train_dataset=dataset,
        eval_dataset=dataset,  # never read: the measure has its own
        callbacks=[CurveWriter(folder / "curve.csv"), *callbacks],
        optimizers=(MuonAdamW(model, *rates), None),
        measure=measure,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return trainer


def training_arguments(
    folder: Path, seed: int, *, batch_size: int, name: str = "batch_size", **settings
) -> Seq2SeqTrainingArguments:
    """Trainer settings that all runs share: one cosine, checkpoints, batches shared by processes.

    Args:
        batch_size: over all processes; `name` is what the recipe calls it.
        settings: further ones, by the names that the Trainer has for them.

    Raises:
        ValueError: if a batch cannot be shared out evenly.
    """
    share = batch_share(batch_size, name)
    return Seq2SeqTrainingArguments(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # copies to the device
        **{"report_to": [], **settings},
    )


def batch_share(batch_size: int, name: str) -> int:
    """What each process gets of a batch; `name` is what a recipe calls it.

    Raises:
        ValueError: if it cannot be shared out evenly.
    """
    share, rest = divmod(batch_size, PartialState().num_processes)
    if rest:
        raise ValueError(
            f"{name}={batch_size} cannot be shared by {PartialState().num_processes} processes; "
            "choose a multiple of them."
        )
    return share


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a run that was written to its end; None where there is none.

    The Trainer writes `trainer_state.json` last, so a folder in which it parses is whole.
    """
    whole = []
    for state in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):
            whole.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return max(whole)[1] if whole else None
