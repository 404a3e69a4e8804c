"""Which patches a word came from, or a query looks at: one signature, six ways to tell.

A method takes a trace and words of it, and gives each word a value per patch. Attention methods
read the trace alone; the others run the Q-Former, the bridge and the head again (GPT-Neo's part is
in the trace). Attention is read where a token is predicted, not where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from qvision_lab.interpretation.trace import Trace, Word
    from qvision_lab.model.captioner import QVisionForConditionalGeneration

DEFAULT_METHOD = "agreement"  # points best: `qvision bench maps`
IG_STEPS = (32, 64, 128, 256, 512)  # of integrated gradients, as many as it takes


@dataclass(frozen=True, eq=False)
class PatchMap:
    """A value for every patch of the picture."""

    values: Float[np.ndarray, "rows columns"]
    label: str  # the word, or the query
    method: str

    @property
    def peak(self) -> tuple[int, int]:
        """Row and column of the largest value."""
        row, column = np.unravel_index(self.values.argmax(), self.values.shape)
        return int(row), int(column)


def word_maps(
    trace: Trace, method: str = DEFAULT_METHOD, words: Sequence[Word] | None = None, **options
) -> list[PatchMap]:
    """A map for each word (by default all of the caption).

    Args:
        method: a key of `METHODS`.
        options: of the method, such as `block=0` of `composition`.

    Raises:
        ValueError: if there is no such method or block, or the trace came from a file without the
            captioner that the method needs.
    """
    words = trace.words if words is None else words
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; choose one of {', '.join(METHODS)}.")
    values = METHODS[method](trace, words, **options) if words else ()
    return [
        PatchMap(of_word.reshape(trace.patch_grid), word.text, method)
        for word, of_word in zip(words, values, strict=True)
    ]


def query_maps(trace: Trace, block: int | None = None, head: int | None = None) -> list[PatchMap]:
    """Where each visual token looks, in their order; None takes the mean of all."""
    maps = _choose(_choose(trace.qformer_cross_attentions, block, "block"), head, "head")  # [N,P]
    return [
        PatchMap(values.reshape(trace.patch_grid), label, "attention")
        for label, values in zip(trace.visual_token_labels, maps, strict=True)
    ]


def require_parts(model: QVisionForConditionalGeneration, *parts: str) -> None:
    """Refuse a variant of the model that was made without "bridge" or "Q-Former".

    Raises:
        ValueError: it lacks one of them, naming the setting that says so.
    """
    config = model.config
    lacking = {
        "bridge": config.bridge == "prefix" and f"bridge={config.bridge!r}",
        "Q-Former": config.bridge_reads != "visual_tokens"
        and f"bridge_reads={config.bridge_reads!r}",
    }
    for part in parts:
        if setting := lacking[part]:
            raise ValueError(
                f"this model has no {part} to look into ({setting}); choose one that has it."
            )


def composition(
    trace: Trace, words: Sequence[Word], block: int | None = None
) -> Float[np.ndarray, "W P"]:
    """Bridge attention times the cross-attention of a block (None: the mean of all); sums to 1."""
    cross = _choose(trace.qformer_cross_attentions, block, "block").mean(0)  # [N,P]
    return _bridge(trace, words) @ cross


def rollout(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Attention rolled out through the Q-Former, residuals included; sums to 1.

    After Abnar and Zuidema 2020 (arXiv:2005.00928): every attention and the residual beside it
    count half, so a visual token is a mixture of patches and of the learned queries it began as.
    What came from the queries is no part of the picture and is divided out.
    """
    patches = rolled_out(trace)[:, len(trace.visual_tokens) :]  # [N,P]
    values = _bridge(trace, words) @ patches
    return values / values.sum(1, keepdims=True)


def rolled_out(trace: Trace) -> Float[np.ndarray, "N N+P"]:
    """Shares of the learned queries, then of the patches, in each visual token; rows sum to 1."""
    self_maps = trace.qformer_self_attentions.mean(1)  # [L,N,N]
    cross_maps = trace.qformer_cross_attentions.mean(1)  # [L,N,P]
    queries, patches = np.eye(len(self_maps[0])), np.zeros(cross_maps[0].shape)
    for self_map, cross_map in zip(self_maps, cross_maps, strict=True):
        queries, patches = (0.5 * (x + self_map @ x) for x in (queries, patches))
        queries, patches = 0.5 * queries, 0.5 * (patches + cross_map)
    return np.hstack([queries, patches])


def gradient(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Attention weighted by the gradient of the word's log-probability; nothing is negative.

    Chefer, Gur and Wolf 2021 (arXiv:2103.15679), equations 5 to 11, through the blocks of the
    Q-Former and on through the bridge.
    """
    model, tokens = _model(trace), to_model(trace, trace.image_tokens)
    require_parts(model, "Q-Former")

    def watch(block: nn.Module, inputs: tuple) -> tuple:  # frozen weights know no gradients
        return inputs[0].detach().requires_grad_(), *inputs[1:]

    with torch.enable_grad(), model.qformer.blocks[0].register_forward_pre_hook(watch):
        seen = model.qformer(tokens[None], output_attentions=True)
        logprobs, bridge_map = read_words(trace, words, seen.visual_tokens, output_attentions=True)
        maps = (*seen.self_attentions, *seen.cross_attentions, bridge_map)
        gradients = [torch.autograd.grad(x, maps, retain_graph=True) for x in logprobs[0]]
    sizes = [len(word.tokens) for word in words]
    results = []
    for i, of_word in enumerate(gradients):
        pairs = zip(of_word, maps, strict=True)
        *relevance, bridge = ((g * x)[0].clamp(min=0).mean(0).float() for g, x in pairs)
        by_query = itself = torch.eye(len(relevance[0]), device=tokens.device)  # [N,N]
        by_patch = torch.zeros_like(relevance[-1])  # [N,P]
        half = len(relevance) // 2
        for self_map, cross_map in zip(relevance[:half], relevance[half:], strict=True):
            by_query, by_patch = by_query + self_map @ by_query, by_patch + self_map @ by_patch
            others = F.normalize(by_query - itself, p=1, dim=1) + itself
            by_patch = by_patch + others.T @ cross_map
        results.append(bridge.split(sizes)[i].sum(0) @ by_patch)
    return torch.stack(results).detach().cpu().numpy()


@torch.no_grad()
def occlusion(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """By how much the word's log-probability falls (nats) when the Q-Former loses one patch.

    The patch is taken out of the sequence, so nothing stands in its place: the Q-Former knows no
    positions. Its neighbours may still tell of it, since CLIP has let them talk.
    """
    tokens, patches = to_model(trace, trace.image_tokens), np.arange(len(trace.image_tokens))
    others = np.stack([np.delete(patches, patch) for patch in patches])  # [P,P-1]
    whole = word_logprobs(trace, words, tokens[None])  # [1,W]
    return (whole - word_logprobs(trace, words, tokens[others])).T.cpu().numpy()


def integrated_gradients(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Share of each patch in the word's log-probability (nats) against that without an image.

    Sundararajan et al. 2017 (arXiv:1703.01365), on a straight line from image tokens that are all
    zero, the original's blank image. The values of a word sum to the difference within 1% or 0.001
    nats (more in half precision); while they do not, its line is walked again in smaller steps.
    """
    tokens = to_model(trace, trace.image_tokens)
    with torch.no_grad():
        blank, whole = word_logprobs(trace, words, torch.stack([0 * tokens, tokens]))
    differences, slack = (whole - blank).cpu().numpy(), 1e-3 + 10 * torch.finfo(tokens.dtype).eps
    values = np.zeros((len(words), len(tokens)), np.float32)
    todo = np.arange(len(words))
    for steps in IG_STEPS:
        values[todo] = _integrate(trace, [words[i] for i in todo], tokens, steps)
        close = np.isclose(values.sum(1), differences, rtol=0.01, atol=slack)
        if not (todo := np.flatnonzero(~close)).size:
            break
    return values


def agreement(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W P"]:
    """Where attention and gradients agree: `composition` of block 0 times `integrated_gradients`.

    A patch must have been looked at, and the word must hang on it. The two err in different
    places: attention in what it reads and does not use, gradients in what words share.
    """
    return composition(trace, words, block=0) * integrated_gradients(trace, words)


def _integrate(
    trace: Trace, words: Sequence[Word], tokens: Float[Tensor, "P D"], steps: int
) -> Float[np.ndarray, "W P"]:
    """Gradient times input along the line, by Gauss-Legendre quadrature."""
    nodes, weights = (to_model(trace, x / 2) for x in np.polynomial.legendre.leggauss(steps))
    with torch.enable_grad():
        path = ((nodes + 0.5)[:, None, None] * tokens).requires_grad_()  # [S,P,D]
        totals = word_logprobs(trace, words, path).sum(0)  # [W]
        gradients = [torch.autograd.grad(x, path, retain_graph=True)[0] for x in totals]
    slopes = torch.stack([(x.float() * tokens.float()).sum(-1) for x in gradients])  # [W,S,P]
    return torch.einsum("wsp,s->wp", slopes, weights.float()).cpu().numpy()


Method = Callable[["Trace", Sequence["Word"]], Float[np.ndarray, "W P"]]
METHODS: dict[str, Method] = {
    "composition": composition,
    "rollout": rollout,
    "gradient": gradient,
    "occlusion": occlusion,
    "integrated_gradients": integrated_gradients,
    "agreement": agreement,
}


def word_logprobs(
    trace: Trace, words: Sequence[Word], image_tokens: Float[Tensor, "R P D"]
) -> Float[Tensor, "R W"]:
    """Log-probabilities (nats) of words of the trace, had the picture been these image tokens."""
    return read_words(trace, words, _model(trace).qformer(image_tokens).visual_tokens)[0]


def read_words(
    trace: Trace,
    words: Sequence[Word],
    visual_tokens: Float[Tensor, "R N D"],
    output_attentions: bool = False,
) -> tuple[Float[Tensor, "R W"], Float[Tensor, "R H t N"] | None]:
    """Log-probabilities of words, and the bridge's map at the places that predict their tokens."""
    decoder, places = _model(trace).decoder, [i for word in words for i in word.tokens]
    states = to_model(trace, trace.text_states[places]).expand(len(visual_tokens), -1, -1)
    states, bridge_map = decoder.bridge(states, visual_tokens, output_attentions)  # [R,t,D]
    logprobs = decoder.lm_head(states).float().log_softmax(-1)  # [R,t,V]
    by_token = logprobs[:, range(len(places)), trace.token_ids[places]]  # [R,t]
    by_word = by_token.split([len(word.tokens) for word in words], dim=1)
    return torch.stack([tokens.sum(1) for tokens in by_word], dim=1), bridge_map


def _model(trace: Trace) -> QVisionForConditionalGeneration:
    if trace.captioner is None:
        raise ValueError(
            "this trace was read from a file and has no model to run: pass its captioner to "
            "Trace.load(path, captioner), or choose composition or rollout."
        )
    return trace.captioner.model


def to_model(trace: Trace, values: np.ndarray) -> Tensor:
    """Values of a trace as its model takes them."""
    model = _model(trace)
    return torch.from_numpy(values).to(model.device, model.dtype)


def _bridge(trace: Trace, words: Sequence[Word]) -> Float[np.ndarray, "W N"]:
    """How much each word reads from each visual token: the mean of its tokens and of all heads."""
    by_token = trace.bridge_attentions.mean(0)  # [T,N]
    return np.stack([by_token[list(word.tokens)].mean(0) for word in words])


def _choose(maps: np.ndarray, index: int | None, name: str) -> np.ndarray:
    """One of the first axis, or the mean of all."""
    if index is None:
        return maps.mean(0)
    if not 0 <= index < len(maps):
        raise ValueError(f"no {name} {index}; choose one of 0 to {len(maps) - 1}, or None for all.")
    return maps[index]
