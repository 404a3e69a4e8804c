"""Whether the queries of a Q-Former have collapsed: measures of them, and a verdict.

Collapse is defined apart from the measures, by an intervention: with all queries muted but one,
hardly a caption changes. `diagnose` gives both, so that thresholds of the measures can be tested;
`measure_queries` is cheap enough for training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import open_image
from qvision_lab.data.coco import CaptionedImage
from qvision_lab.interpretation.interventions import mute, stack
from qvision_lab.model.captioner import QVisionForConditionalGeneration, generation_preset
from qvision_lab.model.config import QVisionConfig

TOLERANCE = 1 / 16  # captions: fewer queries also shift attention to the global token
BATCH = 16  # images
ROWS = 256  # captions that are generated at once with muted tokens
# By measure: whether collapsed models lie above the threshold (1) or below it (-1), and that; by
# `fit_thresholds` from seeds 0 to 4 of the base of the study `collapse`.
THRESHOLDS = {"effective_rank": (-1, 2.04), "query_cosine": (1, 0.944), "same_peak": (1, 0.874)}
MEASURES = {  # and what is printed of them
    "effective_rank": "effective rank of the visual tokens",
    "query_cosine": "mean cosine between them",
    "attention_entropy": "entropy of their attention, share of log P",
    "same_peak": "words that peak on the most frequent patch, share",
    "sink": "attention on the most attended patch of all pictures",
    "retrieval": "mirrored pictures found by their tokens, share",
    "bridge_scale": "norm that the bridge adds, share of the text's",
    "changed": "captions changed by muting all queries but one",
    "distinct": "distinct captions, share",
}


@dataclass(frozen=True)
class Diagnosis:
    """Measures of a model's queries; None for one that is undefined for its architecture."""

    pictures: int
    tokens: int  # visual tokens, N
    muted: int  # pictures of `changed` and `distinct`
    lacks: tuple[str, ...]  # why some are undefined: "Q-Former", "second visual token", "bridge"
    effective_rank: float | None = None  # this and the next six: by `measure_queries`
    query_cosine: float | None = None
    attention_entropy: float | None = None
    same_peak: float | None = None
    sink: float | None = None
    bridge_scale: float | None = None
    retrieval: float | None = None  # at 1; chance is 1 / `pictures`
    changed: float | None = None  # captions that differ where only the best query is left
    distinct: float | None = None  # captions; if all are equal, muting will hardly change one

    @property
    def symptoms(self) -> dict[str, bool]:
        """Whether a measure is beyond its threshold, for each that has one."""
        values = {name: getattr(self, name) for name in THRESHOLDS}
        return {
            name: sign * values[name] > sign * limit
            for name, (sign, limit) in THRESHOLDS.items()
            if values[name] is not None
        }

    @property
    def collapsed(self) -> bool | None:
        """Whether most measures are beyond their thresholds; None without queries to compare."""
        beyond = self.symptoms.values()
        return None if {*self.lacks} - {"bridge"} else 2 * sum(beyond) > len(beyond)

    @property
    def verdict(self) -> str:
        """A sentence: what the measures say, and whether muting agrees."""
        if self.collapsed is None:
            return f"No verdict: without a {self.lacks[0]} there are no queries to compare."
        said = "Collapsed" if self.collapsed else "Not collapsed"
        beyond = sum(self.symptoms.values())
        said += f": {beyond} of {len(self.symptoms)} measures are beyond their thresholds"
        if self.changed is None:
            return f"{said}. Muting is undefined without a bridge or a second query."
        agree = "and" if self.collapsed == (self.changed <= TOLERANCE) else "but"
        share = f"{self.changed:.0%} of" if self.changed else "none of"
        return f"{said}, {agree} muting all queries but one changes {share} {self.muted} captions."

    def __str__(self) -> str:
        lines = [f"{self.pictures} pictures, {self.tokens} visual tokens each"]
        for name, text in MEASURES.items():
            value, (sign, limit) = getattr(self, name), THRESHOLDS.get(name, (0, 0))
            shown = "undefined" if value is None else f"{value:.3f}"
            side = f"   collapsed {'above' if sign > 0 else 'below'} {limit:g}" if sign else ""
            lines.append(f"  {text:<48}{shown:>9}{side}")
        return "\n".join([*lines, self.verdict])


@torch.no_grad()
def diagnose(captioner: Captioner, dataset: Sequence[CaptionedImage], muted: int = 16) -> Diagnosis:
    """Measure on a data set whether the queries of a model have collapsed.

    To `measure_queries` it adds collapse by its definition: the first `muted` pictures are
    captioned (greedy search) with each query alone, all others muted; reported is the share of
    captions that differ from those of all queries, for the query that changes the fewest.

    ValueError for less than two pictures, or one that cannot be read.
    """
    if len(dataset) < 2 or muted < 1:
        raise ValueError(f"{len(dataset)} pictures, {muted} of them muted: take at least 2 and 1.")
    model, found = captioner.model, measure_queries(captioner, dataset)
    lacks = lacking_parts(model.config)
    if not lacks and model.config.num_query_tokens > 1:
        batches = open_batches(captioner, dataset[:muted])
        image_tokens = torch.cat([model.encode(pixels)[0] for _, pixels in batches])
        muted = len(image_tokens)
        captions, changed = _caption_muted(model, image_tokens)
        found["changed"] = changed.float().mean(1).min().item()
        found["distinct"] = len(set(captions)) / muted
    tokens = len(model.config.visual_token_labels)
    return Diagnosis(len(dataset), tokens, muted, lacks, **found)


@torch.no_grad()
def measure_queries(captioner: Captioner, images: Sequence[CaptionedImage]) -> dict[str, float]:
    """The measures of `Diagnosis` that two forward passes give, where the model defines them.

    Visual tokens are compared by what differs between pictures, each less its own mean over them: a
    constant part would make them look alike, or different. Words are tokens of the first reference,
    and their maps are bridge times cross-attention; attention is the mean of blocks and heads.
    `bridge_scale` is the norm of what the bridge's attention adds to a word, divided by its own.
    `retrieval` says whether the tokens identify a picture, found by its mirror image: the nearest
    by the cosine of their mean visual tokens (less the average over pictures).
    """
    model, encode = captioner.model.eval(), captioner.processor.encode
    config, bridge, lacks = model.config, model.decoder.bridge, lacking_parts(model.config)
    longest = config.text_config.max_position_embeddings
    ends = torch.tensor([config.end_token_id, config.pad_token_id], device=model.device)
    tokens, mirrored, maps, scales, peaks = [], [], [], [], []
    for part, pixels in open_batches(captioner, images):
        visual = model.encode(pixels, output_attentions=True)[1]
        tokens.append(visual.visual_tokens.float())  # [B,N,D]
        mirrored.append(model.encode(pixels.flip(-1))[1].visual_tokens.float().mean(1))  # [B,D]
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
    tokens, mirrored, maps = torch.cat(tokens), torch.cat(mirrored), torch.cat(maps)
    mirrored, tokens = mirrored - tokens.mean((0, 1)), tokens - tokens.mean(0)
    if not (tokens.isfinite().all() and maps.isfinite().all()):  # training has diverged
        return {}
    measures = {"retrieval": retrieval(mirrored, tokens.mean(1))}
    if tokens.shape[1] > 1:
        measures |= {"effective_rank": effective_rank(tokens), "query_cosine": mean_cosine(tokens)}
        measures |= {"same_peak": same_peak(peaks)} if scales else {}
    if "Q-Former" not in lacks:
        measures |= {"attention_entropy": attention_entropy(maps), "sink": sink_share(maps)}
    if scales:
        measures["bridge_scale"] = torch.cat(scales).mean()
    return {name: float(x) for name, x in measures.items() if np.isfinite(float(x))}


def retrieval(probes: Float[Tensor, "I D"], keys: Float[Tensor, "I D"]) -> Float[Tensor, ""]:
    """Share of probes of which the nearest key, by the cosine, is their own."""
    nearest = (F.normalize(probes, dim=-1) @ F.normalize(keys, dim=-1).T).argmax(1)
    return (nearest == torch.arange(len(keys), device=keys.device)).float().mean()


def effective_rank(rows: Float[Tensor, "I N D"]) -> Float[Tensor, ""]:
    """Exponential of the entropy of the singular values, as shares of their sum: 1 to N.

    Roy and Vetterli 2007 (EUSIPCO). The mean of I matrices.
    """
    shares = F.normalize(torch.linalg.svdvals(rows), p=1, dim=-1)
    return torch.special.entr(shares).sum(-1).exp().mean()


def mean_cosine(rows: Float[Tensor, "I N D"]) -> Float[Tensor, ""]:
    """Mean cosine of two different rows of a matrix."""
    units, count = F.normalize(rows, dim=-1), rows.shape[1]
    squares = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return (squares / (count * (count - 1))).mean()


def attention_entropy(maps: Float[Tensor, "I N P"]) -> Float[Tensor, ""]:
    """Mean entropy of maps as a share of log P, its maximum; not a number for a single patch."""
    return torch.special.entr(maps).sum(-1).mean() / np.log(maps.shape[-1])


def sink_share(maps: Float[Tensor, "I N P"]) -> Float[Tensor, ""]:
    """The largest share of attention that a patch gets, over all maps; at least 1 / P."""
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


def fit_thresholds(runs: pd.DataFrame) -> dict[str, tuple[int, float]]:
    """`THRESHOLDS` that divide runs best: columns are these measures, and `collapsed` (bool).

    Of the middles between neighbouring values, the one with the highest balanced accuracy.
    """
    fitted, truth = {}, runs["collapsed"].astype(bool)
    for name, (sign, _) in THRESHOLDS.items():
        values = np.unique(runs[name])
        middles = (values[1:] + values[:-1]) / 2
        says = [sign * runs[name] > sign * middle for middle in middles]
        right = [each[truth].mean() + (~each[~truth]).mean() for each in says]
        fitted[name] = sign, float(middles[np.argmax(right)])
    return fitted


def _caption_muted(
    model: QVisionForConditionalGeneration, image_tokens: Float[Tensor, "I P D"]
) -> tuple[list[tuple[int, ...]], Bool[Tensor, "Q I"]]:
    """Ids of greedy captions, and whether those of each query alone differ from them."""
    config, greedy = model.config, generation_preset("greedy", model.config)
    queries = {*range(config.num_query_tokens)}
    alone = [mute(model, queries=queries - {i}) for i in queries]
    captions, changed = [], []
    with stack([mute(model), *alone]):
        for part in image_tokens.split(max(1, ROWS // (1 + len(alone)))):
            rows = part.repeat(1 + len(alone), 1, 1)  # [(1+Q)*B,P,D]
            ids = model.generate(image_tokens=rows, generation_config=greedy)
            whole, *others = ids.unflatten(0, (-1, len(part)))  # 1+Q times [B,T]
            changed.append(torch.stack([(ids != whole).any(1) for ids in others]))  # [Q,B]
            captions += [tuple(row[row != config.pad_token_id].tolist()) for row in whole]
    return captions, torch.cat(changed, dim=1)
