"""Profiles of the learned queries: where they attend, what reads them, and which are redundant."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from qvision_lab.interpretation.interventions import sweep
from qvision_lab.interpretation.maps import PatchMap
from qvision_lab.interpretation.trace import Trace

REDUNDANT = 0.9  # correlation of two queries' maps from which on they are one cluster
TOP_WORDS = 5  # listed for each query


@dataclass(frozen=True, eq=False)
class QueryProfile:
    """One visual token over a set of traces; `label` is "global token" or "query 3"."""

    label: str
    map: PatchMap  # its attention: mean over images, blocks and heads
    spread: float  # mean distance of its map in an image to that mean: total variation, 0 to 1
    entropy: float  # of its map in an image, in nats; at most log P
    attention: float  # share of the bridge's attention that it gets, over all words
    words: tuple[str, ...]  # that read it most, relative to other words
    cluster: int  # tokens of one number attend to the same places
    cost: float  # fall of the words' log-probability (nats a caption) when it is muted


def profile_queries(traces: Iterable[Trace]) -> list[QueryProfile]:
    """Profile every visual token, in their order; ValueError for a trace without its captioner."""
    if not (traces := list(traces)):
        raise ValueError("no trace to profile; pass at least one.")
    maps = np.stack([trace.qformer_cross_attentions.mean((0, 1)) for trace in traces])  # [I,N,P]
    means = maps.mean(0)
    spread = np.abs(maps - means).sum(-1).mean(0) / 2
    entropy = -(maps * np.log(maps.clip(np.finfo(maps.dtype).tiny))).sum(-1).mean(0)
    alike = np.corrcoef(maps.swapaxes(0, 1).reshape(len(means), -1)) > REDUNDANT  # [N,N]
    clusters = connected_components(alike)[1]

    words = [(trace, word) for trace in traces for word in trace.words]
    read = [trace.bridge_attentions[:, list(word.tokens)].mean((0, 1)) for trace, word in words]
    attention = np.mean(read, axis=0)  # [N]
    by_word = pd.DataFrame(read).groupby([word.text.lower() for _, word in words]).mean()
    top = (by_word / attention).to_numpy().argsort(0)[: -TOP_WORDS - 1 : -1].T  # [N,TOP_WORDS]
    sweeps = (sweep(trace, "queries") for trace in traces)
    costs = -np.mean([[effect.change.sum() for effect in row] for row in sweeps], axis=0)  # [N]
    return [
        QueryProfile(
            label=label,
            map=PatchMap(means[i].reshape(traces[0].patch_grid), label, "mean attention"),
            spread=float(spread[i]),
            entropy=float(entropy[i]),
            attention=float(attention[i]),
            words=tuple(by_word.index[top[i]]),
            cluster=int(clusters[i]),
            cost=float(costs[i]),
        )
        for i, label in enumerate(traces[0].visual_token_labels)
    ]
