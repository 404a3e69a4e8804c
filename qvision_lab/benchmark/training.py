"""Training speed: our step and the original's, at the published sizes."""

from __future__ import annotations

import gc
import math
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss

from qvision_lab.benchmark.harness import Table, clock, growing_table, interleave, process_bytes
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.training import freezing, gpu
from qvision_lab.training.memory import estimate_memory
from qvision_lab.training.recipe import Phase, Training
from qvision_lab.training.samples import CaptionCollator

IMAGES = 8, 64  # per step; a CPU takes the first
CAPTIONS = {"original": 1, "ours": 5}  # per image
PRECISIONS = ("float32", "tf32", "bfloat16")  # the last by autocast; a CPU has no tf32
ROUNDS = 10
PHASES = (Phase(policy="published", epochs=1),)
LENGTH = 20  # tokens to which the original pads and cuts
COCO_LENGTH = 14.5, 3.0  # mean and deviation of its captions' tokens, <START>, space and <END> too


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Compare training steps with random weights, on the captioner's device.

    The original encodes pixels with CLIP at each step, one caption per image, padded to 20 tokens.
    Ours takes CLIP's states as a cache holds them, five captions per image, padded to the longest.
    In both AdamW trains what the published run trained.

    On a CPU each method is a process, and a step makes its batch; they take turns. On a GPU the
    batch is there; ours is captured in graphs, holds frozen matrices in bfloat16 where it computes
    in bfloat16, and is compiled too in the last row.

    `quick` takes a few steps of the captioner's sizes, instead of the published ones.
    """
    config = captioner.model.config if quick else QVisionConfig()
    device = captioner.model.device
    rows = _on_gpu(config, device, quick) if device.type == "cuda" else _on_cpu(config, quick)
    settings = {"captions": CAPTIONS, "policy": "published", "coco_length": COCO_LENGTH}
    return growing_table("training", rows, quick=quick, settings=settings)


def _on_cpu(config: QVisionConfig, quick: bool) -> Iterator[dict]:
    start = partial(ProcessPoolExecutor, 1, get_context("spawn"), _start_learner)
    with start(("original", config)) as original, start(("ours", config)) as ours:
        pools = {"original": original, "ours": ours}

        def step(precision: str, way: str) -> int:
            return pools[way].submit(_step, precision).result()

        keys = product(("float32", "bfloat16"), pools)
        seconds = interleave({key: partial(step, *key) for key in keys}, ROUNDS, quick)
        peaks = {("float32", way): step("float32", way) for way in pools}
    for (precision, way), samples in seconds.items():
        yield _row(way, precision, IMAGES[0], samples, peaks.get((precision, way)))


def _on_gpu(config: QVisionConfig, device: torch.device, quick: bool) -> Iterator[dict]:
    for way in CAPTIONS:
        learner = Learner(way, config, device)
        for images, precision in product(IMAGES, PRECISIONS):
            yield _time_steps(learner, images, precision, quick)
        if way == "ours":
            with gpu.compiled_blocks(learner.model):
                learner.captured = gpu.CapturedLoss(learner.model)
                yield _time_steps(learner, IMAGES[-1], "bfloat16", quick, compiled=True)
        del learner
        gc.collect()


def _row(
    way: str, precision: str, images: int, seconds: list[float], peak: int | None, **more: float
) -> dict:
    rate = images * len(seconds) / sum(seconds)
    return {
        "way": way,
        "precision": precision,
        "images": images,  # per step
        "captions_per_second": rate * CAPTIONS[way.partition(",")[0]],
        "images_per_second": rate,
        "seconds": seconds,  # per step; on a CPU those of all methods were taken in turn
        "peak_gigabytes": peak and peak / 1e9,  # of a GPU, or of a process in its first row
        **more,
    }


def _time_steps(
    learner: Learner, images: int, precision: str, quick: bool, compiled: bool = False
) -> dict:
    """Measure steps of one kind on a GPU; the first of those that are compiled takes longer."""
    model, way = learner.model, learner.way
    batch = random_batch(way, model.config, images, packed=learner.captured is not None)
    kept = "bfloat16" if precision == "bfloat16" else "float32"
    settings = Training(phases=PHASES, learning_rate=1e-4, precision=kept)
    lengths = (batch["labels"] != IGNORED_LABEL).sum(1) + 1  # <START> too
    estimate = estimate_memory(model, settings, images, lengths.tolist()).peak / 1e9
    batch = {name: values.to(model.device) for name, values in batch.items()}
    frozen = gpu.frozen_matrices(model) if (way, kept) == ("ours", "bfloat16") else []
    with gpu.holding(frozen, [weight.data.bfloat16() for weight in frozen]):
        step, start = partial(learner.step, batch, precision), clock()
        step()
        first = clock() - start
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = interleave({way: step}, ROUNDS, quick)[way]
    peak = torch.cuda.max_memory_reserved()  # graphs keep what a step frees
    ours = {"estimated_gigabytes": estimate} if way == "ours" else {}
    ours |= {"compile_seconds": first} if compiled else {}
    name = f"{way}, compiled" if compiled else way
    return _row(name, precision, images, seconds, peak, **ours)


class Learner:
    """A captioner with random weights, trained by one method as the published run trained."""

    def __init__(self, way: str, config: QVisionConfig, device: torch.device | str = "cpu"):
        torch.manual_seed(0)
        with torch.device(device):
            self.model = QVisionForConditionalGeneration(config).train()
        self.way = way
        freezing.apply(self.model, "published")
        if way == "original":
            for block in self.model.decoder.language_model.h:
                block.mlp.act = NewGELUActivation()  # ours is the same in one kernel
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, fused=True)
        captures = way == "ours" and self.model.device.type == "cuda"
        self.captured = gpu.CapturedLoss(self.model) if captures else None

    def step(self, batch: dict[str, Tensor], precision: str) -> None:
        model, bf16 = self.model, precision == "bfloat16"
        self.optimizer.zero_grad()
        with nullcontext() if precision == "float32" else gpu.tf32_products():
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                if self.way == "original":  # the loss of the logits of all positions, padding too
                    logits = model(**batch | {"labels": None}).logits
                    loss = ForCausalLMLoss(logits, batch["labels"], model.config.vocab_size)
                else:
                    loss = self.captured(**batch) if self.captured else model(**batch).loss
            loss.backward()
        clip_grad_norm_(self.trained, 5.0)
        self.optimizer.step()


def _start_learner(way: str, config: QVisionConfig) -> None:
    global _learner  # of this process
    _learner = Learner(way, config)


def _step(precision: str) -> int:
    """Take a step in this process; return its peak bytes."""
    _learner.step(random_batch(_learner.way, _learner.model.config), precision)
    # On Linux getrusage begins at the parent's peak; on macOS it counts bytes.
    return process_bytes("status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def random_batch(
    way: str, config: QVisionConfig, images: int = IMAGES[0], packed: bool = False
) -> dict[str, Tensor]:
    """Random images with random captions as long as COCO's, in the form that a method takes."""
    mean, deviation = COCO_LENGTH
    lengths = torch.normal(mean, deviation, (images, CAPTIONS[way])).round().clamp(9, 40).int()
    above = config.vocab_size - 3  # special tokens are the first or the last three
    words = partial(torch.randint, 3, above)
    vision = config.vision_config
    if way == "ours":
        patches = math.prod(config.patch_grid)
        states = torch.randn(images, patches, vision.hidden_size).bfloat16()  # [B,P,C]
        pairs = zip(states, lengths.tolist(), strict=True)
        samples = [{"vision_states": s, "captions": [words((n,)) for n in few]} for s, few in pairs]
        return CaptionCollator(config.pad_token_id, packed)(samples)
    ids = words((images, LENGTH)).where(torch.arange(LENGTH) < lengths, config.pad_token_id)
    return {
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size),
        "input_ids": ids,
        "attention_mask": (ids != config.pad_token_id).long(),
        "labels": ids.masked_fill(ids == config.pad_token_id, IGNORED_LABEL),
    }
