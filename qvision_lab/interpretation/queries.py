"""What each query does: where it attends, which words it raises, and which fall without it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.sparse.csgraph import connected_components
from scipy.special import entr
from scipy.stats import rankdata
from torch.nn import functional as F

from qvision_lab.evaluation.bootstrap import paired_difference
from qvision_lab.interpretation.interventions import sweep
from qvision_lab.interpretation.maps import PatchMap
from qvision_lab.interpretation.trace import Trace

REDUNDANT = 0.9  # correlation of two queries' maps from which on they are one cluster
TOP = 5  # words and traces that are listed for each query


@dataclass(frozen=True, eq=False)
class QueryProfile:
    """One visual token over a set of traces; `label` is "global token" or "query 3".

    `raises` and `falls` are means of each word of the captions (in small letters), less the mean
    over the visual tokens: many words fall whichever of them is muted.
    """

    label: str
    map: PatchMap  # its attention: mean over images, blocks and heads
    spread: float  # mean distance of its map in an image to that mean: total variation, 0 to 1
    entropy: float  # of its map in an image, in nats; at most log P
    attention: float  # share of the bridge's attention that it gets, over all words
    words: tuple[str, ...]  # that read it most, relative to other words
    traces: tuple[int, ...]  # indices of those in which it gets most of the bridge's attention
    cluster: int  # tokens of one number attend to the same places
    cost: float  # fall of the words' log-probability (nats a caption) when it is muted
    raises: pd.Series  # logits, by `direct_contributions`
    falls: pd.Series  # of the word's log-probability (nats) when it is muted


def profile_queries(traces: Iterable[Trace]) -> list[QueryProfile]:
    """Profile every visual token, in their order; ValueError for a trace without its captioner."""
    if not (traces := list(traces)):
        raise ValueError("no trace to profile; pass at least one.")
    maps = np.stack([trace.qformer_cross_attentions.mean((0, 1)) for trace in traces])  # [I,N,P]
    means = maps.mean(0)
    spread = np.abs(maps - means).sum(-1).mean(0) / 2
    entropy = entr(maps).sum(-1).mean(0)
    alike = np.corrcoef(maps.swapaxes(0, 1).reshape(len(means), -1)) > REDUNDANT  # [N,N]
    clusters = connected_components(alike)[1]

    read, raised, falls = [], [], []  # of each of M words: [N]
    for trace in traces:
        spelled, added = [list(word.tokens) for word in trace.words], direct_contributions(trace)
        read += [trace.bridge_attentions[:, tokens].mean((0, 1)) for tokens in spelled]
        raised += [added[tokens].sum(0) for tokens in spelled]
        falls += [*-np.transpose([effect.change for effect in sweep(trace, "queries")])]
    attention, costs = np.mean(read, axis=0), np.sum(falls, axis=0) / len(traces)  # [N] each
    origin = np.repeat(range(len(traces)), [len(trace.words) for trace in traces])
    by_trace = pd.DataFrame(read).groupby(origin).mean()
    texts = [word.text.lower() for trace in traces for word in trace.words]
    read, raised, falls = (pd.DataFrame(x).groupby(texts).mean() for x in (read, raised, falls))
    raised, falls = (x.sub(x.mean(axis=1), axis=0) for x in (raised, falls))
    spoken = [word for word in read.index if any(map(str.isalnum, word))] or read.index
    return [
        QueryProfile(
            label=label,
            map=PatchMap(means[i].reshape(traces[0].patch_grid), label, "mean attention"),
            spread=float(spread[i]),
            entropy=float(entropy[i]),
            attention=float(attention[i]),
            words=tuple((read.loc[spoken, i] / attention[i]).nlargest(TOP).index),
            traces=tuple(by_trace[i].nlargest(TOP).index),
            cluster=int(clusters[i]),
            cost=float(costs[i]),
            raises=raised[i],
            falls=falls[i],
        )
        for i, label in enumerate(traces[0].visual_token_labels)
    ]


@torch.no_grad()
def direct_contributions(trace: Trace) -> Float[np.ndarray, "T N"]:
    """What each visual token adds to the logit of each token of the caption, by the direct path.

    Direct logit attribution (Elhage et al. 2021, transformer-circuits.pub/2021/framework): value,
    attention, output projection, scale and head. No norm follows on this path; that through the
    bridge's FFN is left out.
    """
    decoder = trace.model.decoder
    bridge, weights = decoder.bridge, decoder.lm_head.weight[trace.token_ids]  # [T,D]
    attention, split = bridge.attention, (bridge.attention.num_heads, -1)
    weight, bias = (x.chunk(3)[2] for x in (attention.in_proj_weight, attention.in_proj_bias))
    value = F.linear(trace.to_tensor(trace.visual_tokens), weight, bias).unflatten(-1, split)
    targets = (bridge.scale * weights @ attention.out_proj.weight).unflatten(-1, split)  # [T,H,E]
    read = trace.to_tensor(trace.bridge_attentions)  # [H,T,N]
    return torch.einsum("htn,nhe,the->tn", read, value, targets).float().cpu().numpy()


@dataclass(frozen=True)
class Prediction:
    """Whether the words that a query raises are those that fall without it.

    `own` is their rank correlation, the mean over queries; `other` that of the words one query
    raises with those that fall without another. `low` to `high` is a 95% interval of the difference
    over queries, as if they were independent, `p_value` that of `paired_difference`.
    """

    own: float
    other: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"rank correlation {self.own:.2f}, of shuffled queries {self.other:.2f}: difference "
            f"{self.own - self.other:+.2f} [{self.low:+.2f}, {self.high:+.2f}], p = "
            f"{self.p_value:.2g}"
        )


def compare_raised_and_fallen(profiles: Sequence[QueryProfile]) -> Prediction:
    """Test `QueryProfile.raises` as a prediction of `falls`; ValueError for a single query."""
    if (count := len(profiles)) < 2:
        raise ValueError(f"{count} queries cannot be shuffled; pass at least 2 profiles.")
    ranks = [rankdata([getattr(p, n) for p in profiles], axis=1) for n in ("raises", "falls")]
    with np.errstate(invalid="ignore"):  # the words of a query may all be equal
        correlations = np.nan_to_num(np.corrcoef(*ranks)[:count, count:])  # [N,N]
    own = correlations.diagonal()
    other = (correlations.sum(1) - own) / (count - 1)
    pairs = own[:, None], other[:, None]
    _, interval, p = paired_difference(*pairs, lambda sums: sums / count)
    return Prediction(own.mean(), other.mean(), *interval[:, 0], p.item())
