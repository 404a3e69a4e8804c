"""What looking inside costs: a trace beside a plain pass, a sweep beside its parts one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from qvision_lab.benchmark.harness import Comparison, compare
from qvision_lab.captioning import Captioner
from qvision_lab.data import scenes
from qvision_lab.interpretation.interventions import effect, mute, sweep
from qvision_lab.interpretation.trace import trace


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Comparison]:
    """Compare a forward pass with `trace`, and `effect` of each Q-Former head with one `sweep`.

    Both times of one scene and one of its captions, from the picture on. The pass returns its
    attention maps and hidden states, as a trace needs them.
    """
    scene = next(scenes.generate(1, split="test"))
    image, caption = scene.image, scene.captions[0]
    model = captioner.model.eval()
    heads = list(product(range(len(model.qformer.blocks)), range(model.config.num_attention_heads)))
    settings = {
        "caption": caption,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype),
        "device": model.device.type,
    }

    @torch.no_grad()
    def plain_pass() -> None:
        inputs = captioner.processor(images=[image], text=[caption]).to(model.device)
        model(**inputs, output_attentions=True, output_hidden_states=True)

    yield compare(
        plain_pass,
        lambda: trace(captioner, image, caption),
        name="forward vs trace",
        rounds=50,
        quick=quick,
        settings=settings,
    )
    yield compare(
        lambda: [effect(captioner, image, caption, mute(model, heads=[head])) for head in heads],
        lambda: sweep(captioner, image, caption, "heads"),
        name="effect by effect vs sweep",
        quick=quick,
        settings={**settings, "effects": len(heads)},
    )
