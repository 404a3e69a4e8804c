"""The original's way to caption, as the baseline that every faster way is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvision_lab.benchmark.harness import Comparison, Spread, compare
from qvision_lab.benchmark.latency import BATCH, TOKENS
from qvision_lab.compiled import CompiledQVision
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.decoder import Decoder

LENGTH = {"max_new_tokens": TOKENS, "min_length": TOKENS + 1}  # and <START>
GREEDY = {**LENGTH, "do_sample": False, "repetition_penalty": 1.0}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@torch.no_grad()
def generate_the_original_way(
    model: QVisionForConditionalGeneration,
    pixel_values: Float[Tensor, "1 3 H W"],
    *,
    max_new_tokens: int = 30,
    min_length: int = 5,
) -> Int[Tensor, "1 T"]:
    """Greedy ids of one image, found as often over as the published code finds them.

    CLIP runs once. Each step runs the Q-Former and all words so far again, and scores the next word
    of every one of them. The settings mean what they mean in `generate`.
    """
    image_tokens = model.vision(pixel_values)  # [1,P,D]
    ids = torch.full((1, 1), model.config.start_token_id, device=image_tokens.device)
    for length in range(1, 1 + max_new_tokens):
        logits = model(ids, image_tokens=image_tokens).logits[:, -1]  # [1,V]
        if length < min_length:
            logits[:, model.config.end_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == model.config.end_token_id:
            break
    return ids


@dataclass(frozen=True)
class LatencyRow:
    """One way to caption, timed in turn with the original's way in the same run."""

    mode: str  # eager or compiled
    dtype: str  # of the weights
    batch: int
    seconds_per_image: Spread
    ratio_to_original: float  # how many times as fast, per image: median over the rounds
    times_the_limit: float  # seconds a batch, over those it takes to read the weights per token
    gigabytes_per_second: float  # a plain sum's read bandwidth, which sets that limit
    same_ids: float  # share of the new tokens that the original's way finds too
    compile_seconds: float | None
    pays_after: float | None  # captions until compiling has paid
    comparison: Comparison

    def __str__(self) -> str:
        return (
            f"{self.mode} {self.dtype}, {self.batch} at once: {self.seconds_per_image} s an image, "
            f"{self.ratio_to_original:.3g} times as fast as the original's way, "
            f"{self.times_the_limit:.2g} times the limit, {self.same_ids:.0%} of its tokens"
        )


def random_published_model(dtype: torch.dtype) -> QVisionForConditionalGeneration:
    """The published sizes with random weights: neither time nor memory depend on their values."""
    return QVisionForConditionalGeneration._from_config(QVisionConfig(), dtype=dtype).eval()


def race_the_original(
    model: QVisionForConditionalGeneration, *, rounds: int = 15, quick: bool = False
) -> Iterator[LatencyRow]:
    """Time other ways to caption against the original's, 20 new tokens each, on random pixels.

    One image and 16 at once, eagerly; one image compiled; in bfloat16 with int8 weights too.
    """
    size, dtype = model.config.vision_config.image_size, DTYPES[model.dtype]
    pixels = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.device, model.dtype)
    originally = partial(generate_the_original_way, model, **LENGTH)
    expected = torch.cat([originally(image[None]) for image in pixels])  # [16,21]
    bandwidth = _read_bandwidth(model.device)
    ways = [("eager", dtype, 1, model), ("eager", dtype, BATCH, model)]
    ways.append(("compiled", dtype, 1, CompiledQVision(model)))
    if dtype == "bf16":
        ways.append(("compiled", "int8", 1, CompiledQVision(model, int8=True)))
    rows: list[LatencyRow] = []
    for mode, weights, batch, way in ways:
        caption = partial(way.generate, pixel_values=pixels[:batch], **GREEDY)
        start = perf_counter()
        same = caption() == expected[:batch]
        first = perf_counter() - start
        comparison = compare(
            partial(originally, pixels[:1]),
            caption,
            name=f"original vs {mode} {weights} {batch}",
            rounds=rounds,
            quick=quick,
            settings={**GREEDY, "device": model.device.type, "parameters": model.num_parameters()},
        )
        per_image = Spread.of([seconds / batch for seconds in comparison.candidate])
        limit = TOKENS * _bytes_per_token(way.decoder) / bandwidth
        compiling = first - per_image.median if mode == "compiled" else None
        saved = rows[0].seconds_per_image.median - per_image.median if compiling else 0
        rows.append(
            LatencyRow(
                mode,
                weights,
                batch,
                per_image,
                ratio_to_original=comparison.speedup.median * batch,
                times_the_limit=per_image.median * batch / limit,
                gigabytes_per_second=bandwidth / 1e9,
                same_ids=same[:, 1:].float().mean().item(),
                compile_seconds=compiling,
                pays_after=compiling / saved if saved > 0 else None,
                comparison=comparison,
            )
        )
        yield rows[-1]


def _bytes_per_token(decoder: Decoder) -> int:
    """Of the weights that each step reads: all but the embedding tables, it reads rows of."""
    text = decoder.language_model
    parts = (text.h, text.ln_f, decoder.bridge, decoder.lm_head)
    return sum(w.numel() * w.element_size() for part in parts for w in part.parameters())


def _read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain sum over a gigabyte reads, the best of five."""
    numbers = torch.ones(2**28, device=device)
    sums = compare(numbers.sum, numbers.sum, name="read bandwidth", rounds=5)
    return numbers.nbytes / min(sums.baseline)
