"""Whether the queries of a Q-Former have collapsed: measures of them, and a verdict.

Collapse is defined apart from the measures, by an intervention: with all queries muted but one,
hardly a caption changes. `diagnose` gives both, so that thresholds of the measures can be tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import CaptionedImage
from qvision_lab.interpretation.interventions import mute, stack
from qvision_lab.interpretation.query_measures import lacking_parts, measure_queries, open_batches
from qvision_lab.model.captioner import QVisionForConditionalGeneration, generation_preset

TOLERANCE = 1 / 16  # captions: fewer queries also shift attention to the global token
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
    effective_rank: float | None = None  # this and the next five: by `measure_queries`
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

    To `measure_queries` it adds the retrieval of each picture by its mirror image, among all, by
    the cosine of their mean visual tokens (less the average over pictures): whether the tokens
    identify a picture. And collapse by its definition: the first `muted` pictures are captioned
    (greedy search) with each query alone, all others muted; what is reported is the share of
    captions that differ from those of all queries, for the query that changes the fewest.

    ValueError for less than two pictures, or one that cannot be read.
    """
    if len(dataset) < 2 or muted < 1:
        raise ValueError(f"{len(dataset)} pictures, {muted} of them muted: take at least 2 and 1.")
    model, found = captioner.model, measure_queries(captioner, dataset)
    lacks, means, read = lacking_parts(model.config), [], []
    for _, pixels in open_batches(captioner, dataset):
        image_tokens, visual = model.encode(pixels)
        pair = visual, model.encode(pixels.flip(-1))[1]
        means.append(torch.stack([each.visual_tokens.float().mean(1) for each in pair]))  # [2,B,D]
        read += [image_tokens] if sum(map(len, read)) < muted else []
    original, mirrored = torch.cat(means, dim=1)  # [I,D] each
    mirrored, original = (F.normalize(x - original.mean(0)) for x in (mirrored, original))
    nearest = (mirrored @ original.T).argmax(1).cpu()
    found["retrieval"] = (nearest == torch.arange(len(dataset))).float().mean().item()
    if not lacks and model.config.num_query_tokens > 1:
        captions, changed = _caption_muted(model, torch.cat(read)[:muted])
        muted = len(captions)
        found["changed"] = changed.float().mean(1).min().item()
        found["distinct"] = len(set(captions)) / muted
    tokens = len(model.config.visual_token_labels)
    return Diagnosis(len(dataset), tokens, muted, lacks, **found)


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
