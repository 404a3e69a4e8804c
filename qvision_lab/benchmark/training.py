"""How fast captions are learned: our way beside the original's, at the published sizes."""

from __future__ import annotations

import gc
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss

from qvision_lab.benchmark.harness import Table, growing_table, process_bytes, take_turns
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.training import freezing, gpu
from qvision_lab.training.caption_stage import CaptionCollator
from qvision_lab.training.finetune import estimate_memory
from qvision_lab.training.finetune_recipe import Phase, Training

IMAGES = 8, 64  # of a step; a CPU takes the first
CAPTIONS = {"original": 1, "ours": 5}  # of each of them
PRECISIONS = ("float32", "tf32", "bfloat16")  # the last by autocast; a CPU knows no tf32
ROUNDS = 10
LENGTH = 20  # tokens to which the original pads and cuts
COCO_LENGTH = 14.5, 3.0  # mean and deviation of its captions' tokens, <START>, space and <END> too


@dataclass(frozen=True)
class TrainingRow:
    """What one way learns in a second, and the memory that it needs."""

    way: str
    precision: str
    images: int  # of a step
    captions_per_second: float
    images_per_second: float
    seconds: list[float]  # of steps; on a CPU those of all ways were taken in turn
    peak_gigabytes: float | None  # of a GPU's memory, or of a process: in the way's first row
    estimated_gigabytes: float | None = None  # by `estimate_memory`, for a GPU
    compile_seconds: float | None = None

    @classmethod
    def of(
        cls, way: str, precision: str, images: int, seconds: list[float], peak: int | None, **more
    ) -> TrainingRow:
        rate = images * len(seconds) / sum(seconds)
        captions = rate * CAPTIONS[way.partition(",")[0]]
        peak_gigabytes = None if peak is None else peak / 1e9
        return cls(way, precision, images, captions, rate, seconds, peak_gigabytes, **more)


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Compare training steps with random weights, on the captioner's device.

    The original's way: pixels through CLIP at each step, one caption an image, padded to 20 tokens.
    Ours: CLIP's states as a cache holds them, five captions an image, padded to the longest. In
    both AdamW trains what the published run trained.

    On a CPU each way is a process, and a step makes its batch; they take turns. On a GPU the batch
    is there; ours is captured in graphs, holds frozen matrices in bfloat16 where it computes in
    bfloat16, and is compiled instead of captured in the last row.

    Args:
        captioner: of its sizes `quick` takes some steps, instead of the published ones.
    """
    config = captioner.model.config if quick else QVisionConfig()
    device = captioner.model.device
    rows = _on_gpu(config, device, quick) if device.type == "cuda" else _on_cpu(config, quick)
    settings = {"captions": CAPTIONS, "policy": "published", "coco_length": COCO_LENGTH}
    return growing_table("training", rows, quick=quick, settings=settings)


def _on_cpu(config: QVisionConfig, quick: bool) -> Iterator[TrainingRow]:
    with _process("original", config) as original, _process("ours", config) as ours:
        ways = {
            (name, precision): partial(process, precision)
            for precision in ("float32", "bfloat16")
            for name, process in (("original", original), ("ours", ours))
        }
        seconds = take_turns(ways, ROUNDS, quick)
        peaks = {("original", "float32"): original("float32"), ("ours", "float32"): ours("float32")}
    for way, taken in seconds.items():
        yield TrainingRow.of(*way, IMAGES[0], taken, peaks.get(way))


def _on_gpu(config: QVisionConfig, device: torch.device, quick: bool) -> Iterator[TrainingRow]:
    for way in CAPTIONS:
        learner = Learner(way, config, device)
        for images, precision in product(IMAGES, PRECISIONS):
            yield _row(learner, images, precision, quick)
        if way == "ours":
            learner.captured = None
            with gpu.compiled_blocks(learner.model):
                yield _row(learner, IMAGES[-1], "bfloat16", quick, compiled=True)
        del learner
        gc.collect()


def _row(
    learner: Learner, images: int, precision: str, quick: bool, compiled: bool = False
) -> TrainingRow:
    """Measure steps of one kind on a GPU; the first of those that are compiled takes longer."""
    model, way = learner.model, learner.way
    multiple = gpu.LENGTHS if way == "ours" else 1
    batch = random_batch(way, model.config, images, multiple)
    kept = "bfloat16" if precision == "bfloat16" else "float32"
    settings = Training((Phase("published", 1),), 1e-4, precision=kept)
    lengths = (batch["labels"] != IGNORED_LABEL).sum(1) + 1  # <START> too
    estimate = estimate_memory(model, settings, images, lengths.tolist()).peak / 1e9
    batch = {name: values.to(model.device) for name, values in batch.items()}
    frozen = gpu.frozen_matrices(model) if way == "ours" and precision == "bfloat16" else []
    with gpu.holding(frozen, [weight.data.bfloat16() for weight in frozen]):
        start = perf_counter()
        learner.step(batch, precision)
        torch.cuda.synchronize()
        first = perf_counter() - start
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = partial(learner.step, batch, precision)
        seconds = take_turns({way: step}, ROUNDS, quick)[way]
    peak = torch.cuda.max_memory_reserved()  # graphs keep what a step frees
    ours = {"estimated_gigabytes": estimate} if way == "ours" else {}
    ours |= {"compile_seconds": first} if compiled else {}
    name = f"{way}, compiled" if compiled else way
    return TrainingRow.of(name, precision, images, seconds, peak, **ours)


class Learner:
    """A captioner with random weights, trained one way as the published run trained."""

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
        self.captured = None
        if way == "ours" and self.model.device.type == "cuda":
            self.captured = gpu.CapturedLoss(self.model)

    def step(self, batch: dict[str, Tensor], precision: str) -> None:
        model, bf16 = self.model, precision == "bfloat16"
        self.optimizer.zero_grad()
        with nullcontext() if precision == "float32" else gpu.tf32_products():
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                if self.way == "original":
                    loss = _original_loss(model, **batch)
                else:
                    loss = self.captured(**batch) if self.captured else model(**batch).loss
            loss.backward()
        clip_grad_norm_(self.trained, 5.0)
        self.optimizer.step()


@contextmanager
def _process(way: str, config: QVisionConfig) -> Iterator[Callable[[str], int]]:
    """A process of its own, so that its peak is its own; a call takes one step and returns it."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_train, args=(there, way, config), daemon=True)
    process.start()
    there.close()  # so that a process that dies is noticed

    def step(precision: str) -> int:
        here.send(precision)
        return here.recv()

    yield step
    process.terminate()


def _train(asked: Connection, way: str, config: QVisionConfig) -> None:
    """Take a step whenever asked, and answer with the largest memory until now, in bytes."""
    learner = Learner(way, config)
    while True:
        precision = asked.recv()
        learner.step(random_batch(way, config), precision)
        # What getrusage tells begins on Linux at the parent's peak; on macOS it is in bytes.
        usage = resource.getrusage(resource.RUSAGE_SELF)
        asked.send(process_bytes("status", "VmHWM") or usage.ru_maxrss)


def _original_loss(
    model: QVisionForConditionalGeneration, labels: Int[Tensor, "R T"], **batch: Tensor
) -> Float[Tensor, ""]:
    """The loss as the original took it: of the logits of all positions, padding too."""
    return ForCausalLMLoss(model(**batch).logits, labels, model.config.vocab_size)


def random_batch(
    way: str, config: QVisionConfig, images: int = IMAGES[0], multiple: int = 1
) -> dict[str, Tensor]:
    """Random pictures with random captions as long as COCO's, in the form that a way has them."""
    mean, deviation = COCO_LENGTH
    lengths = torch.normal(mean, deviation, (images, CAPTIONS[way])).round().clamp(9, 40).int()
    above = config.vocab_size - 3  # special tokens are the first or the last three
    words = [[torch.randint(3, above, (n,)) for n in few] for few in lengths.tolist()]
    vision = config.vision_config
    if way == "ours":
        patches = math.prod(config.patch_grid)
        states = torch.randn(images, patches, vision.hidden_size).bfloat16()  # [B,P,C]
        samples = zip(states, words, strict=True)
        collate = CaptionCollator(config.pad_token_id, multiple)
        return collate([{"vision_states": seen, "captions": told} for seen, told in samples])
    ids = torch.full((images, LENGTH), config.pad_token_id)
    for row, (told,) in zip(ids, words, strict=True):
        row[: len(told)] = told[:LENGTH]
    return {
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size),
        "input_ids": ids,
        "attention_mask": (ids != config.pad_token_id).long(),
        "labels": ids.masked_fill(ids == config.pad_token_id, IGNORED_LABEL),
    }
