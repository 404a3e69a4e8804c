"""What the learned queries do: where they look, which words read them, and which are spare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from qvision_lab.interpretation.interventions import sweep
from qvision_lab.interpretation.maps import PatchMap
from qvision_lab.interpretation.trace import Trace

REDUNDANT = 0.9  # correlation of two queries' maps from which on they are one cluster
SERVED = 5  # words listed for each query


@dataclass(frozen=True, eq=False)
class Similarities:
    """Cosines between the tokens of one picture, -1 to 1, as the original measures them."""

    global_to_query: Float[np.ndarray, " Q"]
    global_to_image: Float[np.ndarray, " P"]
    query_to_image: Float[np.ndarray, " P"]  # mean over queries

    @property
    def discriminative_power(self) -> float:
        """The original's: deviation of `global_to_query` over its mean."""
        return float(self.global_to_query.std(ddof=1) / self.global_to_query.mean())


@dataclass(frozen=True, eq=False)
class QueryProfile:
    """What one visual token does over a set of traces; `label` is "global token" or "query 3"."""

    label: str
    map: PatchMap  # where it looks: mean over pictures, blocks and heads
    spread: float  # how far its map in a picture is from that mean: total variation, 0 to 1
    entropy: float  # of its map in a picture, in nats; at most log P
    attention: float  # share of the bridge's attention that it gets, over all words
    words: tuple[str, ...]  # that read it most, against how much other words do
    cluster: int  # tokens of one number look at the same places
    cost: float  # fall of the words' log-probability (nats a caption) when it is muted


def similarities(
    image_tokens: Float[np.ndarray, "P D"], visual_tokens: Float[np.ndarray, "N D"]
) -> Similarities:
    """Compare the global token, the queries and the image tokens of one picture."""
    patches, tokens = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image_tokens, visual_tokens)
    )
    whole, queries = tokens[:1], tokens[1:]
    return Similarities(
        global_to_query=(queries @ whole.T)[:, 0],
        global_to_image=(patches @ whole.T)[:, 0],
        query_to_image=(queries @ patches.T).mean(0),
    )


def profile_queries(traces: Iterable[Trace]) -> list[QueryProfile]:
    """Profile every visual token, in their order, over the traces of a set of pictures.

    Raises:
        ValueError: if there is no trace, or one was read from a file without its captioner.
    """
    traces = list(traces)
    if not traces or any(trace.captioner is None for trace in traces):
        raise ValueError(
            "pass at least one trace, and those from files with their captioner: "
            "Trace.load(path, captioner)."
        )
    maps = np.stack([trace.qformer_cross_attentions.mean((0, 1)) for trace in traces])  # [I,N,P]
    means = maps.mean(0)
    spread = np.abs(maps - means).sum(-1).mean(0) / 2
    entropy = -(maps * np.log(maps.clip(np.finfo(maps.dtype).tiny))).sum(-1).mean(0)
    alike = np.corrcoef(maps.swapaxes(0, 1).reshape(len(means), -1)) > REDUNDANT  # [N,N]
    linked = np.linalg.matrix_power(alike.astype(float), len(means)) > 0  # over others, too
    clusters = np.unique(linked.argmax(1), return_inverse=True)[1]

    words = [(trace, word) for trace in traces for word in trace.words]
    read = [trace.bridge_attentions[:, list(word.tokens)].mean((0, 1)) for trace, word in words]
    attention = np.mean(read, axis=0)  # [N]
    by_word = pd.DataFrame(read).groupby([word.text.lower() for _, word in words]).mean()
    served = (by_word / attention).to_numpy().argsort(0)[: -SERVED - 1 : -1].T  # [N,SERVED]
    effects = [sweep(trace.captioner, trace.image, trace.caption, "queries") for trace in traces]
    costs = -np.mean([[effect.change.sum() for effect in row] for row in effects], axis=0)  # [N]
    return [
        QueryProfile(
            label=label,
            map=PatchMap(means[i].reshape(traces[0].patch_grid), label, "mean attention"),
            spread=float(spread[i]),
            entropy=float(entropy[i]),
            attention=float(attention[i]),
            words=tuple(by_word.index[served[i]]),
            cluster=int(clusters[i]),
            cost=float(costs[i]),
        )
        for i, label in enumerate(traces[0].visual_token_labels)
    ]
