"""How long captions take: the original's method, transformers', ours, compiled, in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch._inductor import config as inductor

from qvision_lab.benchmark.harness import Spread, Table, growing_table, take_turns
from qvision_lab.benchmark.original import generate_the_original_way
from qvision_lab.captioning import Captioner
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.decoding_step import Int8Decoder, copy_sharing_weights
from qvision_lab.captioning.sampling import Choice
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.decoder import Decoder
from qvision_lab.model.loading.checkpoint import EMBEDDED

TOKENS = 20  # generated for every picture, whatever it shows
BATCH = 16
BATCHES = {"cpu": (1, BATCH), "cuda": (1, BATCH, 64, 256)}  # images at once
COMPILED = {"cpu": (1,), "cuda": (1, 256)}  # on CUDA in bfloat16 alone
CHECKED = 4  # pictures whose tokens are compared with the original's
ROUNDS = 5
LENGTH = {"max_new_tokens": TOKENS, "min_length": TOKENS + 1}  # and <START>
GREEDY = {**LENGTH, "do_sample": False, "repetition_penalty": 1.0}
CHOICE = Choice(repetition_penalty=1.0, min_length=LENGTH["min_length"], sampling=None)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class LatencyRow:
    """One method, timed in turn with the original's in the same dtype."""

    mode: str  # original, generate (transformers'), default or compiled
    dtype: str  # of the weights
    batch: int
    seconds_per_image: Spread
    ratio_to_original: float  # how many times as fast, per image: median over the rounds
    ratio: Spread
    times_the_limit: float  # seconds a batch, over those it takes to read the weights per token
    images_per_second: float
    same_tokens: float  # share of the new tokens that the original's method finds too
    compile_seconds: float | None
    pays_after: float | None  # captions until compiling has paid
    peak_device_gigabytes: float | None  # on CUDA
    seconds: list[float]  # of a batch, round by round


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all methods in both precisions, 20 new tokens each, on random pixels."""
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
        for dtype in (torch.bfloat16, torch.float32)
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
    """Time methods in turn with the original's, in the dtype of the model.

    One image and several at once; compiled too, on a CPU in bfloat16 with int8 weights as well.

    Args:
        bandwidth: bytes a second that can be read, from which the limit follows.
    """
    device, dtype = model.device.type, DTYPES[model.dtype]
    sizes = BATCHES["cpu" if quick else device]
    size = model.config.vision_config.image_size
    pixels = torch.randn(max(sizes), 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.device, model.dtype)
    originally = partial(generate_the_original_way, model, **LENGTH)
    expected = torch.cat([originally(image[None]) for image in pixels[:CHECKED]])[:, 1:]  # [4,20]
    default = FastDecoding(model)
    decodings = {("default", dtype, batch): default for batch in sizes}
    with inductor.patch(force_disable_caches=True):  # or what an earlier run compiled is found
        compiled = COMPILED["cpu" if quick else device]
        for batch in compiled if device == "cpu" or dtype == "bf16" else ():
            decodings["compiled", dtype, batch] = FastDecoding(model, batch)
        if dtype == "bf16" and device == "cpu":
            rounded = copy_sharing_weights(model)
            rounded.decoder = Int8Decoder(model.decoder)
            decodings["compiled", "int8", 1] = FastDecoding(rounded, 1)
    methods = {
        ("original", dtype, 1): lambda: originally(pixels[:1])[:, 1:].cpu(),
        ("generate", dtype, 1): lambda: model.generate(pixel_values=pixels[:1], **GREEDY)[:, 1:],
    }
    for key, decoding in decodings.items():
        methods[key] = partial(_ids, decoding, pixels[: key[2]])
    seconds = take_turns(methods, ROUNDS, quick)
    baseline = seconds["original", dtype, 1]
    for (mode, weights, batch), samples in seconds.items():
        decoding = decodings.get((mode, weights, batch), default)
        same, peak = _check(methods[mode, weights, batch], expected[:batch], model.device)
        per_image = [taken / batch for taken in samples]
        spread, ratio = Spread.of(per_image), Spread.ratio(baseline, per_image)
        limit = TOKENS * _bytes_per_token(decoding.model.decoder) / bandwidth
        compiling = decoding.compile_seconds
        uncompiled = seconds.get(("default", dtype, batch), samples)
        saved = Spread.of(uncompiled).median / batch - spread.median
        yield LatencyRow(
            mode,
            weights,
            batch,
            spread,
            ratio_to_original=ratio.median,
            ratio=ratio,
            times_the_limit=spread.median * batch / limit,
            images_per_second=1 / spread.median,
            same_tokens=same,
            compile_seconds=compiling,
            pays_after=compiling / saved if compiling and saved > 0 else None,
            peak_device_gigabytes=peak,
            seconds=samples,
        )


def _ids(decoding: FastDecoding, pixels: torch.Tensor) -> torch.Tensor:
    return decoding.run(CHOICE, TOKENS, pixel_values=pixels)[0]


def _check(
    caption: Callable[[], torch.Tensor], expected: torch.Tensor, device: torch.device
) -> tuple[float, float | None]:
    """Share of a method's tokens that are the expected ones, and its peak of memory on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    same = caption()[: len(expected)].cpu() == expected.cpu()
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
