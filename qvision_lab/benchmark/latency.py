"""How long captions take: what the KV cache saves, and what batches save."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from qvision_lab.benchmark.harness import Comparison, compare
from qvision_lab.captioning import Captioner
from qvision_lab.data import scenes

TOKENS = 20  # generated for every picture, whatever it shows
BATCH = 16


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Comparison]:
    """Compare generation without and with a cache, and pictures one by one and in a batch.

    Pictures are Scenes; each gets a greedy caption of exactly 20 tokens. Opening and preprocessing
    count in the second comparison, as they do in use.
    """
    pictures = [scene.image for scene in scenes.generate(BATCH, split="test")]
    pixel_values = captioner.processor(images=pictures[:1])["pixel_values"]
    fixed = {"do_sample": False, "max_new_tokens": TOKENS, "min_length": TOKENS + 1}  # and <START>
    model = captioner.model
    settings = {
        **fixed,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype),
        "device": model.device.type,
    }
    generate = partial(model.generate, pixel_values=pixel_values.to(model.device), **fixed)
    yield compare(
        partial(generate, use_cache=False),
        partial(generate, use_cache=True),
        name="no cache vs cache",
        quick=quick,
        settings={**settings, "pictures": 1},
    )
    caption = partial(captioner.caption, pictures, **fixed)
    yield compare(
        partial(caption, batch_size=1),
        partial(caption, batch_size=BATCH),
        name="one by one vs batch of 16",
        quick=quick,
        settings={**settings, "pictures": BATCH},
    )
