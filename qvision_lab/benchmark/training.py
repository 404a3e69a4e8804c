"""How fast captions are learned: our way in turn with the original's, at the published sizes."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss

from qvision_lab.benchmark.harness import Result, Spread, process_bytes, take_turns
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.training import freezing
from qvision_lab.training.caption_stage import CaptionCollator

IMAGES = 8  # of a step, in both ways
CAPTIONS = {"original": 1, "ours": 5, "ours_bf16": 5}  # of each of them
LENGTH = 20  # tokens to which the original pads and cuts
COCO_LENGTH = 14.5, 3.0  # mean and deviation of its captions' tokens, <START>, space and <END> too


@dataclass(frozen=True, kw_only=True)
class TrainingRate(Result):
    """What each way learns in a second, by its name, and the memory that its process needed."""

    ratio: float  # captions a second, ours over the original's: median over the rounds
    bf16_ratio: float  # the same, ours in the trainer's bfloat16, the original's in float32
    captions_per_second: dict[str, float]
    images_per_second: dict[str, float]
    peak_gigabytes: dict[str, float]  # of a process; one takes our steps of both precisions
    seconds: dict[str, list[float]]  # of steps, round by round

    def __str__(self) -> str:
        lines = [f"training: {self.ratio:.3g} times as many captions a second as the original's"]
        lines[0] += f", {self.bf16_ratio:.3g} times in bfloat16"
        lines += [
            f"  {way}: {self.captions_per_second[way]:.3g} captions and "
            f"{self.images_per_second[way]:.3g} images a second"
            for way in CAPTIONS
        ]
        lines += [f"  peak of {way}: {peak:.3g} GB" for way, peak in self.peak_gigabytes.items()]
        return "\n".join(lines)


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[TrainingRate]:
    """Compare training steps of two processes, with random weights, on the CPU.

    The original's way: pixels through CLIP at each step, one caption an image, padded to 20 tokens.
    Ours: CLIP's states as a cache holds them, five captions an image, padded to the longest. Both
    take 8 images a step, and AdamW trains what the published run trained, in float32; ours also
    under the trainer's autocast to bfloat16.

    Args:
        captioner: of its sizes `quick` takes some steps, instead of the published ones.
    """
    config = captioner.model.config if quick else QVisionConfig()
    with _process("original", config) as original, _process("ours", config) as ours:
        ways = {"original": original, "ours": ours, "ours_bf16": partial(ours, True)}
        seconds = take_turns(ways, 10, quick)
        peaks = {"original": original() / 1e9, "ours": ours() / 1e9}
    images = {way: IMAGES * len(taken) / sum(taken) for way, taken in seconds.items()}
    ratios = {
        way: Spread.ratio(seconds["original"], seconds[way]).median * CAPTIONS[way]
        for way in ("ours", "ours_bf16")
    }
    settings = {"images": IMAGES, "captions": CAPTIONS, "policy": "published"}
    yield TrainingRate(
        name="training",
        settings={**settings, "coco_length": COCO_LENGTH},
        quick=quick,
        ratio=ratios["ours"],
        bf16_ratio=ratios["ours_bf16"],
        captions_per_second={way: rate * CAPTIONS[way] for way, rate in images.items()},
        images_per_second=images,
        peak_gigabytes=peaks,
        seconds=seconds,
    )


@contextmanager
def _process(way: str, config: QVisionConfig) -> Iterator[Callable[..., int]]:
    """A process of its own, so that its peak is its own; a call takes one step and tells it."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_train, args=(there, way, config), daemon=True)
    process.start()
    there.close()  # so that a process that dies is noticed

    def step(bf16: bool = False) -> int:
        here.send(bf16)
        return here.recv()

    yield step
    process.terminate()


def _train(asked: Connection, way: str, config: QVisionConfig) -> None:
    """Take a step whenever asked, and answer with the largest memory until now, in bytes."""
    torch.manual_seed(0)
    model = QVisionForConditionalGeneration(config).train()
    freezing.apply(model, "published")
    if way == "original":
        for block in model.decoder.language_model.h:
            block.mlp.act = NewGELUActivation()  # ours is the same in one kernel
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    while True:
        bf16 = asked.recv()
        batch = random_batch(way, config)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = _original_loss(model, **batch) if way == "original" else model(**batch).loss
        loss.backward()
        clip_grad_norm_(trained, 5.0)
        optimizer.step()
        # What getrusage tells begins on Linux at the parent's peak; on macOS it is in bytes.
        usage = resource.getrusage(resource.RUSAGE_SELF)
        asked.send(process_bytes("status", "VmHWM") or usage.ru_maxrss)


def _original_loss(
    model: QVisionForConditionalGeneration, labels: Int[Tensor, "R T"], **batch: Tensor
) -> Float[Tensor, ""]:
    """The loss as the original took it: of the logits of all positions, padding too."""
    return ForCausalLMLoss(model(**batch).logits, labels, model.config.vocab_size)


def random_batch(way: str, config: QVisionConfig) -> dict[str, Tensor]:
    """Random pictures with random captions as long as COCO's, in the form that a way has them."""
    mean, deviation = COCO_LENGTH
    lengths = torch.normal(mean, deviation, (IMAGES, CAPTIONS[way])).round().clamp(9, 40).int()
    above = config.vocab_size - 3  # special tokens are the first or the last three
    words = [[torch.randint(3, above, (n,)) for n in few] for few in lengths.tolist()]
    vision = config.vision_config
    if way == "ours":
        patches = math.prod(config.patch_grid)
        states = torch.randn(IMAGES, patches, vision.hidden_size).bfloat16()  # [B,P,C]
        samples = zip(states, words, strict=True)
        collate = CaptionCollator(config.pad_token_id)
        return collate([{"vision_states": seen, "captions": told} for seen, told in samples])
    ids = torch.full((IMAGES, LENGTH), config.pad_token_id)
    for row, (told,) in zip(ids, words, strict=True):
        row[: len(told)] = told[:LENGTH]
    return {
        "pixel_values": torch.randn(IMAGES, 3, vision.image_size, vision.image_size),
        "input_ids": ids,
        "attention_mask": (ids != config.pad_token_id).long(),
        "labels": ids.masked_fill(ids == config.pad_token_id, IGNORED_LABEL),
    }
