"""How many parameters each part has, down to the last one, without allocating any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig

PUBLISHED_TOTAL = 509_190_401  # what captioning needs of the published model
PUBLISHED_FREEZE_RATIO = 0.4  # share of GPT-Neo's blocks that the published run left as they were


@dataclass(frozen=True)
class PartSize:
    """One part of the model. `group` is the row of the published table that counts it."""

    group: str
    part: str
    total: int
    trained: int  # in the published run
    used: bool = True  # False: published, though no caption needs it


def parameter_table(config: QVisionConfig) -> list[PartSize]:
    """Sizes of all parts, counted on the meta device.

    For the published sizes two parts that captioning does without are listed too, so that the sums
    are those of the model card: CLIP's text tower with both projections and the temperature, and
    the layer `query_proj`. The published run trained the Q-Former, the bridge, and of GPT-Neo the
    upper blocks, the final norm and the tied token embedding; its image projection stayed random.
    """
    with torch.device("meta"):
        model = QVisionForConditionalGeneration(config)
    vision, text = model.vision, model.decoder.language_model
    frozen = int(PUBLISHED_FREEZE_RATIO * len(text.h))
    qformer, bridge = _count(model.qformer), _count(model.decoder.bridge)
    table = [
        PartSize("image encoder", "CLIP vision tower", _count(vision.tower), 0),
        PartSize("image encoder", "image projection", _count(vision.projection), 0),
        PartSize("GPT-Neo", "GPT-Neo", _count(text), _count(text.h[frozen:], text.ln_f, text.wte)),
        PartSize("Q-Former and bridge", "Q-Former", qformer, qformer),
        PartSize("Q-Former and bridge", "bridge", bridge, bridge),
    ]
    if _count(model) != PUBLISHED_TOTAL:
        return table
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())  # ViT-B/32
        query_proj = nn.Linear(config.hidden_size, config.hidden_size)
    text_tower, unused = _count(clip) - _count(clip.vision_model), _count(query_proj)
    return [
        *table,
        PartSize("image encoder", "CLIP text tower", text_tower, 0, used=False),
        PartSize("Q-Former and bridge", "query_proj", unused, unused, used=False),
    ]


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
