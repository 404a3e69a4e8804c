"""Attribution maps: which patches a word came from (six methods); maps of queries.

A method takes a trace and words of it, and gives each word a value per patch. Attention methods
use the trace alone; the others run the Q-Former, the bridge and the head again (GPT-Neo's part is
in the trace). Attention is read where a token is predicted, not where it stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qvision_lab.interpretation.trace import Trace, Word
from qvision_lab.model.variants import require_parts

DEFAULT_METHOD = "agreement"  # points best: `qvision bench maps`
Method = Callable[[Trace, Sequence[Word]], Float[np.ndarray, "W P"]]
IG_STEPS = (32, 64, 128, 256, 512)  # of integrated gradients, until they are complete


@dataclass(frozen=True, eq=False)
class PatchMap:
    """A value for every patch of the image."""

    values: Float[np.ndarray, "rows columns"]
    label: str  # the word, or the query
    method: str

    @property
    def peak(self) -> tuple[int, int]:
        """Row and column of the largest value."""
        return divmod(int(self.values.argmax()), self.values.shape[1])


def word_maps(
    trace: Trace, method: str = DEFAULT_METHOD, words: Sequence[Word] | None = None
) -> list[PatchMap]:
    """A map for each word (by default all of the caption), by one of `METHODS`.

    All but `composition` and `rollout` run the model again: ValueError in a trace without it.
    """
    words = trace.words if words is None else words
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; choose one of {', '.join(METHODS)}.")
    with torch.inference_mode(False):  # some need gradients
        values = METHODS[method](trace, words) if words else ()
    pairs = zip(words, values, strict=True)
    return [PatchMap(x.reshape(trace.patch_grid), word.text, method) for word, x in pairs]


def query_maps(trace: Trace, block: int | None = None, head: int | None = None) -> list[PatchMap]:
    """Cross-attention of each visual token, in their order; None takes the mean of all."""
    maps = _choose(_choose(trace.qformer_cross_attentions, block, "block"), head, "head")  # [N,P]
    return [
        PatchMap(values.reshape(trace.patch_grid), label, "attention")
        for label, values in zip(trace.visual_token_labels, maps, strict=True)
    ]


def composition(
    trace: Trace, words: Sequence[Word], block: int | None = None
) -> Float[np.ndarray, "W P"]:
    """Bridge attention times the cross-attention of a block (None: the mean of all); sums to 1."""
    cross = _choose(trace.qformer_cross_attentions, block, "block").mean(0)  # [N,P]
    return _bridge(trace, words) @ cross


def rollout(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Attention rollout through the Q-Former, residuals included; sums to 1.

    After Abnar and Zuidema 2020 (arXiv:2005.00928): an attention and the residual around it count
    half each, so a visual token is a mixture of patches and of the learned queries. The share of
    the queries does not depend on the image and is divided out.
    """
    values = _bridge(trace, words) @ rolled_out(trace)[:, len(trace.visual_tokens) :]
    return values / values.sum(1, keepdims=True)


def rolled_out(trace: Trace) -> Float[np.ndarray, "N N+P"]:
    """Shares of the learned queries, then of the patches, in each visual token; rows sum to 1."""
    self_maps = trace.qformer_self_attentions.mean(1)  # [L,N,N]
    cross_maps = trace.qformer_cross_attentions.mean(1)  # [L,N,P]
    tokens, patches = cross_maps[0].shape
    shares = np.eye(tokens, tokens + patches)
    for self_map, cross_map in zip(self_maps, cross_maps, strict=True):
        shares = 0.25 * (shares + self_map @ shares)
        shares[:, tokens:] += 0.5 * cross_map
    return shares


def gradient(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Attention weighted by the gradient of the word's log-probability; never negative.

    Chefer, Gur and Wolf 2021 (arXiv:2103.15679), equations 5 to 11.
    """
    qformer, tokens = trace.model.qformer, trace.to_tensor(trace.image_tokens)
    require_parts(trace.model.config, "Q-Former")

    def track(block: nn.Module, inputs: tuple) -> tuple:  # frozen weights have no gradients
        return inputs[0].detach().requires_grad_(), *inputs[1:]

    with torch.enable_grad(), qformer.blocks[0].register_forward_pre_hook(track):
        output = qformer(tokens[None], output_attentions=True)
        logprobs, bridge_map = trace.read_words(words, output.visual_tokens, output_attentions=True)
        maps = (*output.self_attentions, *output.cross_attentions, bridge_map)
        gradients = [torch.autograd.grad(x, maps, retain_graph=True) for x in logprobs[0]]
    sizes, half = [len(word.tokens) for word in words], len(qformer.blocks)
    results = []
    for i, of_word in enumerate(gradients):
        pairs = zip(of_word, maps, strict=True)
        *relevance, bridge = ((g * x)[0].clamp(min=0).mean(0).float() for g, x in pairs)
        by_query = identity = torch.eye(len(relevance[0]), device=tokens.device)  # [N,N]
        by_patch = torch.zeros_like(relevance[-1])  # [N,P]
        for self_map, cross_map in zip(relevance[:half], relevance[half:], strict=True):
            by_query, by_patch = by_query + self_map @ by_query, by_patch + self_map @ by_patch
            others = F.normalize(by_query - identity, p=1, dim=1) + identity
            by_patch = by_patch + others.T @ cross_map
        results.append(bridge.split(sizes)[i].sum(0) @ by_patch)
    return torch.stack(results).detach().cpu().numpy()


@torch.no_grad()
def occlusion(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Fall of the word's log-probability (nats) when one image token is left out.

    After Zeiler and Fergus 2014 (arXiv:1311.2901). CLIP has already mixed it into its neighbours.
    """
    tokens, patches = trace.to_tensor(trace.image_tokens), np.arange(len(trace.image_tokens))
    others = np.stack([np.delete(patches, patch) for patch in patches])  # [P,P-1]
    whole = trace.word_logprobs(words, tokens[None])  # [1,W]
    return (whole - trace.word_logprobs(words, tokens[others])).T.cpu().numpy()


def integrated_gradients(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Share of each patch in the word's log-probability (nats) against that without an image.

    Sundararajan et al. 2017 (arXiv:1703.01365), on a straight line from image tokens that are all
    zero, the original's blank image. The values of a word sum to the difference within 1% or 0.001
    nats (more in half precision); words that miss it are integrated again in smaller steps.
    """
    tokens = trace.to_tensor(trace.image_tokens)
    with torch.no_grad():
        blank, whole = trace.word_logprobs(words, torch.stack([0 * tokens, tokens]))
    differences, slack = (whole - blank).cpu().numpy(), 1e-3 + 10 * torch.finfo(tokens.dtype).eps
    values = np.zeros((len(words), len(tokens)), np.float32)
    todo = np.arange(len(words))
    for steps in IG_STEPS:
        values[todo] = _integrate(trace, [words[i] for i in todo], tokens, steps)
        close = np.isclose(values.sum(1), differences, rtol=0.01, atol=slack)
        if not (todo := np.flatnonzero(~close)).size:
            break
    return values


def agreement(
    trace: Trace, words: Sequence[Word], dependence: Method = integrated_gradients
) -> Float[np.ndarray, "W P"]:
    """`composition` of block 0 times `integrated_gradients`: attended to, and depended on."""
    return composition(trace, words, block=0) * dependence(trace, words)


def _integrate(
    trace: Trace, words: Sequence[Word], tokens: Float[Tensor, "P D"], steps: int
) -> Float[np.ndarray, "W P"]:
    """Gradient times input along the line, by Gauss-Legendre quadrature."""
    nodes, weights = (trace.to_tensor(x / 2) for x in np.polynomial.legendre.leggauss(steps))
    with torch.enable_grad():
        path = ((nodes + 0.5)[:, None, None] * tokens).requires_grad_()  # [S,P,D]
        totals = trace.word_logprobs(words, path).sum(0)  # [W]
        gradients = [torch.autograd.grad(x, path, retain_graph=True)[0] for x in totals]
    slopes = torch.stack([(x.float() * tokens.float()).sum(-1) for x in gradients])  # [W,S,P]
    return torch.einsum("wsp,s->wp", slopes, weights.float()).cpu().numpy()


METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (composition, rollout, gradient, occlusion, integrated_gradients, agreement)
}


def shared_methods() -> dict[str, Method]:
    """`METHODS` to be compared: the integrated gradients that two of them use are computed once."""
    cached = lru_cache(1)(integrated_gradients)

    def once(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
        return cached(trace, tuple(words))

    return METHODS | {
        "integrated_gradients": once,
        "agreement": partial(agreement, dependence=once),
    }


def _bridge(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W N"]:
    """Attention of each word to each visual token: the mean of its tokens and of all heads."""
    by_token = trace.bridge_attentions.mean(0)  # [T,N]
    return np.stack([by_token[list(word.tokens)].mean(0) for word in words])


def _choose(maps: np.ndarray, index: int | None, name: str) -> np.ndarray:
    """One of the first axis, or the mean of all."""
    if index is None:
        return maps.mean(0)
    if not 0 <= index < len(maps):
        raise ValueError(f"no {name} {index}; choose one of 0 to {len(maps) - 1}, or None for all.")
    return maps[index]
