"""The model as a list of stages, of any configuration: what a diagram or a table needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.parameters import count_parameters


@dataclass(frozen=True)
class Stage:
    """A part of the model, or an input of it (without a file)."""

    name: str  # of parts with parameters: as in `freezing.apply` and `parameter_table`
    output: str  # with its shape for one image
    reads: tuple[str, ...] = ()  # names of the stages whose output is its input
    file: str | None = None
    parameters: int = 0


def architecture(config: QVisionConfig) -> tuple[Stage, ...]:
    """Stages of a model, each after those that it reads; no memory is allocated for weights.

    T is the number of words so far, the start token included.
    """
    with torch.device("meta"):
        model = QVisionForConditionalGeneration(config)
    vision, decoder = model.vision, model.decoder
    width, vocab_size, side = config.hidden_size, config.vocab_size, config.vision_config.image_size
    patches, tokens = prod(config.patch_grid), len(config.visual_token_labels)
    image = f"image tokens [{patches}, {width}]"
    visual = f"visual tokens [{tokens}, {width}]"
    states = f"vision states [{patches}, {vision.projection.in_features}]"
    text = f"text states [T, {width}]"
    has_qformer, prefix = config.bridge_reads == "visual_tokens", config.bridge == "prefix"
    reader = "Q-Former" if has_qformer else "mean" if "mean" in config.bridge_reads else None
    connector = reader or "image projection"  # whose output the decoder reads
    to_text = prefix or config.global_token == "added"

    def stage(name, output, reads, file, module) -> Stage:
        return Stage(name, output, reads, f"{file}.py", count_parameters(module))

    stages = [
        Stage("image", f"pixels [3, {side}, {side}]"),
        stage("vision tower", states, ("image",), "vision", vision.tower),
        stage("image projection", image, ("vision tower",), "vision", vision.projection),
    ]
    if reader:
        file = "qformer" if has_qformer else "variants"
        stages.append(stage(reader, visual, ("image projection",), file, model.qformer))
    stages.append(Stage("words so far", "ids [T]"))
    inputs = ("words so far", connector) if to_text else ("words so far",)
    stages.append(stage("GPT-Neo", text, inputs, "decoder", decoder.language_model))
    if not prefix:
        inputs = (connector, "GPT-Neo")
        stages.append(stage("bridge", text, inputs, "decoder", decoder.bridge))
    logits = f"next word [{vocab_size:,}]"  # the head is GPT-Neo's embedding
    return (*stages, Stage("head", logits, (stages[-1].name,), "decoder.py"))
