"""How long captions take: the original's way, ours, in batches, compiled, in fewer bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch._inductor import config as inductor

from qvision_lab.benchmark.harness import Spread, Table, growing_table, take_turns
from qvision_lab.benchmark.original import generate_the_original_way
from qvision_lab.captioning import Captioner
from qvision_lab.compiled import CompiledQVision
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.checkpoint import EMBEDDED
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.decoder import Decoder

TOKENS = 20  # generated for every picture, whatever it shows
BATCH = 16
CHECKED = 4  # pictures whose tokens are compared with the original's
ROUNDS = 5
LENGTH = {"max_new_tokens": TOKENS, "min_length": TOKENS + 1}  # and <START>
GREEDY = {**LENGTH, "do_sample": False, "repetition_penalty": 1.0}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class LatencyRow:
    """One way to caption, timed in turn with the original's way in the same dtype."""

    mode: str  # original, eager or compiled
    dtype: str  # of the weights
    batch: int
    seconds_per_image: Spread
    ratio_to_original: float  # how many times as fast, per image: median over the rounds
    ratio: Spread
    times_the_limit: float  # seconds a batch, over those it takes to read the weights per token
    same_tokens: float  # share of the new tokens that the original's way finds too
    compile_seconds: float | None
    pays_after: float | None  # captions until compiling has paid
    peak_device_gigabytes: float | None  # on CUDA
    seconds: list[float]  # of a batch, round by round


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all ways in float32, then in bfloat16, 20 new tokens each, on random pixels."""
    model = timed_model(captioner, quick)
    bandwidth = read_bandwidth(model.device, quick)
    settings = {
        **GREEDY,
        "rounds": ROUNDS,
        "parameters": model.num_parameters(),
        "device": model.device.type,
        "read_gigabytes_per_second": bandwidth / 1e9,
    }
    rows = (
        row
        for dtype in (torch.float32, torch.bfloat16)
        for row in race(copy.deepcopy(model).to(dtype), bandwidth, quick)
    )
    return growing_table("latency", rows, quick=quick, settings=settings)


def timed_model(captioner: Captioner, quick: bool) -> QVisionForConditionalGeneration:
    """The captioner's model, but random weights of the published sizes for the embedded one.

    Neither time nor memory depend on their values.
    """
    if quick or captioner.provenance.source != EMBEDDED:
        return captioner.model
    with torch.device(captioner.model.device):
        return QVisionForConditionalGeneration._from_config(QVisionConfig()).eval()


def race(
    model: QVisionForConditionalGeneration, bandwidth: float, quick: bool = False
) -> Iterator[LatencyRow]:
    """Time ways to caption in turn with the original's, in the dtype of the model.

    One image and 16 at once, eagerly; one image compiled; in bfloat16 with int8 weights too.

    Args:
        bandwidth: bytes a second that can be read, from which the limit follows.
    """
    size, dtype = model.config.vision_config.image_size, DTYPES[model.dtype]
    pixels = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.device, model.dtype)
    originally = partial(generate_the_original_way, model, **LENGTH)
    expected = torch.cat([originally(image[None]) for image in pixels[:CHECKED]])  # [4,21]
    models = {("eager", dtype, 1): model, ("eager", dtype, BATCH): model}
    with inductor.patch(force_disable_caches=True):  # or what an earlier run compiled is found
        models["compiled", dtype, 1] = CompiledQVision(model)
        if dtype == "bf16":
            models["compiled", "int8", 1] = CompiledQVision(model, int8=True)
    ways = {("original", dtype, 1): partial(originally, pixels[:1])}
    for way, timed in models.items():
        ways[way] = partial(timed.generate, pixel_values=pixels[: way[2]], **GREEDY)
    seconds = take_turns(ways, ROUNDS, quick)
    baseline, eager = seconds["original", dtype, 1], Spread.of(seconds["eager", dtype, 1]).median
    for (mode, weights, batch), samples in seconds.items():
        timed = models.get((mode, weights, batch), model)
        same, peak = _check(ways[mode, weights, batch], expected[:batch], model.device)
        per_image = [taken / batch for taken in samples]
        spread, ratio = Spread.of(per_image), Spread.ratio(baseline, per_image)
        limit = TOKENS * _bytes_per_token(timed.decoder) / bandwidth
        compiling = getattr(timed, "compile_seconds", None)
        saved = eager - spread.median
        yield LatencyRow(
            mode,
            weights,
            batch,
            spread,
            ratio_to_original=ratio.median,
            ratio=ratio,
            times_the_limit=spread.median * batch / limit,
            same_tokens=same,
            compile_seconds=compiling,
            pays_after=compiling / saved if compiling and saved > 0 else None,
            peak_device_gigabytes=peak,
            seconds=samples,
        )


def _check(
    caption: partial, expected: torch.Tensor, device: torch.device
) -> tuple[float, float | None]:
    """Share of a way's tokens that are the expected ones, and its peak of memory on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    same = caption()[: len(expected), 1:] == expected[:, 1:]
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return same.float().mean().item(), peak


def _bytes_per_token(decoder: Decoder) -> int:
    """Of the weights that each step reads: all but the embedding tables, it reads rows of."""
    text = decoder.language_model
    parts = (text.h, text.ln_f, decoder.bridge, decoder.lm_head)
    return sum(w.numel() * w.element_size() for part in parts for w in part.parameters())


def read_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Bytes a second that a plain sum over a gigabyte reads, the best of five."""
    numbers = torch.ones(2**20 if quick else 2**28, device=device)
    return numbers.nbytes / min(take_turns({"sum": numbers.sum}, 5)["sum"])
