"""Sizes of the model's parts, counted without allocating them, and the digest of its weights."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig

PUBLISHED_TOTAL = 509_190_401  # what captioning needs of the published model


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model. `group` is the row of the model card that counts it."""

    group: str
    part: str
    total: int
    trained: int  # in the published run
    used: bool = True  # False: published, but not needed to caption


def parameter_table(config: QVisionConfig) -> list[PartSize]:
    """Sizes of all parts; for the published sizes also of those that captioning does not need.

    The sums are the model card's: CLIP's text tower (with both projections and the temperature)
    and `query_proj` count. Trained were the Q-Former, the bridge and the upper 60% of GPT-Neo.
    """
    with torch.device("meta"):
        model = QVisionForConditionalGeneration(config)
    vision, text = model.vision, model.decoder.language_model
    qformer, bridge = map(count_parameters, (model.qformer, model.decoder.bridge))
    upper = nn.ModuleList([*text.h[int(0.4 * len(text.h)) :], text.ln_f, text.wte])
    table = [
        PartSize("image encoder", "vision tower", count_parameters(vision.tower), 0),
        PartSize("image encoder", "image projection", count_parameters(vision.projection), 0),
        PartSize("GPT-Neo", "GPT-Neo", count_parameters(text), count_parameters(upper)),
        PartSize("Q-Former and bridge", "Q-Former", qformer, qformer),
        PartSize("Q-Former and bridge", "bridge", bridge, bridge),
    ]
    if sum(part.total for part in table) == PUBLISHED_TOTAL:
        with torch.device("meta"):
            clip = CLIPModel(CLIPConfig())  # ViT-B/32
            query_proj = count_parameters(nn.Linear(config.hidden_size, config.hidden_size))
        text_tower = count_parameters(clip) - count_parameters(clip.vision_model)
        table += [
            PartSize("image encoder", "CLIP text tower", text_tower, 0, used=False),
            PartSize("Q-Former and bridge", "query_proj", query_proj, query_proj, used=False),
        ]
    return table


def count_parameters(module: nn.Module) -> int:
    """All parameters of a module, trained or not; tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def fingerprint_weights(module: nn.Module) -> str:
    """Digest of all weights as they are in memory, at about 1 GB/s."""
    masks = torch.bool, torch.int64  # of attention, and positions: no weights
    buffers = ((name, b) for name, b in module.named_buffers() if b.dtype not in masks)
    digest = sha256()
    for name, weight in (*module.named_parameters(), *buffers):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
