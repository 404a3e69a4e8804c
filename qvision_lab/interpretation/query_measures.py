"""Measures of how far the queries of a model differ, cheap enough to be taken during training."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import open_image
from qvision_lab.data.coco import CaptionedImage
from qvision_lab.model.config import QVisionConfig

BATCH = 16  # images


@torch.no_grad()
def measure_queries(captioner: Captioner, images: Sequence[CaptionedImage]) -> dict[str, float]:
    """The measures of `Diagnosis` that one forward pass gives, where the model defines them.

    Visual tokens are compared by what differs between pictures: each less its own mean over them.
    As they are, a constant that all share makes any two look alike, and constants that differ make
    tokens of the same content look different. Words are the tokens of the first reference.

    - effective_rank (1 to N): `effective_rank` of the tokens of a picture; mean over pictures
    - query_cosine: mean cosine of two tokens of a picture
    - attention_entropy: of a query's attention to the patches (mean of blocks and heads), divided
      by log P, its maximum; mean over queries and pictures
    - same_peak: share of words whose map (bridge times cross-attention) peaks on the patch on which
      most of its caption do
    - sink: share of all queries' attention that one patch gets, over all pictures (at least 1 / P)
    - bridge_scale: norm of what the bridge's attention adds to a word, divided by the word's own
    """
    model, encode = captioner.model.eval(), captioner.processor.encode
    config, bridge, lacks = model.config, model.decoder.bridge, lacking_parts(model.config)
    longest = config.text_config.max_position_embeddings
    ends = torch.tensor([config.end_token_id, config.pad_token_id], device=model.device)
    tokens, maps, scales, peaks = [], [], [], []
    for part, pixels in open_batches(captioner, images):
        visual = model.encode(pixels, output_attentions=True)[1]
        tokens.append(visual.visual_tokens.float())  # [B,N,D]
        maps.append(torch.stack(visual.cross_attentions).float().mean((0, 2)))  # [B,N,P]
        if "bridge" not in lacks:
            rows = [encode(image.references[0], longest).to(model.device) for image in part]
            ids = pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id)
            how = {"output_hidden_states": True, "last_logit_only": True}
            states = model.decoder(ids[:, :-1], visual.visual_tokens, **how).hidden_states[-1]
            keys = visual.visual_tokens
            added, read = bridge.attention(bridge.attention_norm(states), keys, keys, True)
            words = ~torch.isin(ids[:, 1:], ends)  # [B,T]
            scales.append(((bridge.scale * added).norm(dim=-1) / states.norm(dim=-1))[words])
            found = (read.float().mean(1) @ maps[-1]).argmax(-1)  # [B,T]
            peaks += [row[said] for row, said in zip(found, words, strict=True)]
    tokens, maps = torch.cat(tokens), torch.cat(maps)
    tokens = tokens - tokens.mean(0)
    if not (tokens.isfinite().all() and maps.isfinite().all()):  # training has diverged
        return {}
    measures = {}
    if tokens.shape[1] > 1:
        measures = {"effective_rank": effective_rank(tokens), "query_cosine": mean_cosine(tokens)}
    if "Q-Former" not in lacks:
        measures |= {"attention_entropy": attention_entropy(maps), "sink": sink_share(maps)}
    if scales:
        measures["bridge_scale"] = torch.cat(scales).mean()
        if tokens.shape[1] > 1:
            measures["same_peak"] = same_peak(peaks)
    return {name: float(x) for name, x in measures.items() if np.isfinite(float(x))}


def effective_rank(rows: Float[Tensor, "I N D"]) -> Float[Tensor, ""]:
    """Exponential of the entropy of the singular values, as shares of their sum: 1 to N.

    Roy and Vetterli 2007 (EUSIPCO). The mean of I matrices.
    """
    return _entropy(F.normalize(torch.linalg.svdvals(rows), p=1, dim=-1)).exp().mean()


def mean_cosine(rows: Float[Tensor, "I N D"]) -> Float[Tensor, ""]:
    """Mean cosine of two different rows of a matrix."""
    units, count = F.normalize(rows, dim=-1), rows.shape[1]
    squares = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return (squares / (count * (count - 1))).mean()


def attention_entropy(maps: Float[Tensor, "I N P"]) -> Float[Tensor, ""]:
    """Mean entropy of maps as a share of log P; not a number for a single patch."""
    return _entropy(maps).mean() / np.log(maps.shape[-1])


def sink_share(maps: Float[Tensor, "I N P"]) -> Float[Tensor, ""]:
    """The largest share of attention that a patch gets, over all maps."""
    return maps.mean((0, 1)).max()


def same_peak(peaks: Sequence[Int[Tensor, " W"]]) -> float:
    """Share of words whose peak is the most frequent among the words of their caption."""
    return sum(row.bincount().max().item() for row in peaks if len(row)) / sum(map(len, peaks))


def open_batches(
    captioner: Captioner, images: Sequence[CaptionedImage]
) -> Iterator[tuple[Sequence[CaptionedImage], Float[Tensor, "B 3 H W"]]]:
    """Images and their pixel values, on the model's device."""
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        pixels = captioner.processor(images=[open_image(i.picture) for i in part])["pixel_values"]
        yield part, pixels.to(captioner.model.device)


def lacking_parts(config: QVisionConfig) -> tuple[str, ...]:
    """The parts without which some measures are undefined."""
    lacks = {
        "Q-Former": config.bridge_reads != "visual_tokens",
        "second visual token": len(config.visual_token_labels) == 1,
        "bridge": config.bridge == "prefix",
    }
    return tuple(name for name, missing in lacks.items() if missing)


def _entropy(shares: Float[Tensor, "... P"]) -> Float[Tensor, "..."]:
    """In nats."""
    return torch.special.entr(shares).sum(-1)
