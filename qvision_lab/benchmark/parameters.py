"""How many parameters each part has, down to the last one, without allocating any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from qvision_lab.benchmark.harness import Table, growing_table, machine
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.training import freezing

PUBLISHED_TOTAL = 509_190_401  # what captioning needs of the published model
GROUPS = {  # rows of the published table, part by part
    "CLIP vision tower": "image encoder",
    "image projection": "image encoder",
    "GPT-Neo": "GPT-Neo",
    "Q-Former": "Q-Former and bridge",
    "bridge": "Q-Former and bridge",
}


@dataclass(frozen=True)
class PartSize:
    """One part of the model. `group` is the row of the published table that counts it."""

    group: str
    part: str
    total: int
    trained: int  # in the published run
    used: bool = True  # False: published, though no caption needs it


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Count the published model's parts; no captioner takes part, and nothing is quicker."""
    parts = parameter_table(QVisionConfig())
    return growing_table("parameters", parts, quick=quick, machine=machine(gpu=False))


def parameter_table(config: QVisionConfig) -> list[PartSize]:
    """Sizes of all parts, counted on the meta device.

    For the published sizes two parts that captioning does without are listed too, so that the sums
    are those of the model card: CLIP's text tower with both projections and the temperature, and
    the layer `query_proj`. What the published run trained is the freezing policy "published".
    """
    with torch.device("meta"):
        model = QVisionForConditionalGeneration(config)
    published = freezing.apply(model, "published")
    counts = {count.part: count for count in published.parts}
    table = [
        PartSize(group, part, counts[part].total, counts[part].trained)
        for part, group in GROUPS.items()
    ]
    if published.total != PUBLISHED_TOTAL:
        return table
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())  # ViT-B/32
        query_proj = nn.Linear(config.hidden_size, config.hidden_size)
    text_tower = count_parameters(clip) - count_parameters(clip.vision_model)
    unused = count_parameters(query_proj)
    return [
        *table,
        PartSize("image encoder", "CLIP text tower", text_tower, 0, used=False),
        PartSize("Q-Former and bridge", "query_proj", unused, unused, used=False),
    ]


def count_parameters(module: nn.Module) -> int:
    """All of a module, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
