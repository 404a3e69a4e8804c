"""What breaks without it: parts of a model muted, or replaced by what another image gave.

An `Intervention` says where, and in which rows of a batch, an activation is replaced. Forward hooks
do it, in a `with` block and in the one batch of `effects` alike:

    with mute(captioner.model, queries=[3], heads=[(0, 5)]):
        captioner.caption("beach.jpg")

Blocks nest. Behind one the model is what it was before, also where an exception left it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import Picture, open_image
from qvision_lab.interpretation.maps import require_parts, to_model, word_logprobs
from qvision_lab.interpretation.trace import Word, trace
from qvision_lab.model.attention import MultiHeadAttention
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.qformer import QFormerBlock

# A site hands an activation of a module to `change`, and the model goes on with what comes back.
Change = Callable[..., Tensor]
Site = Callable[[nn.Module, Change], RemovableHandle]


def _input(module: nn.Module, change: Change) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))


def _output(module: nn.Module, change: Change) -> RemovableHandle:
    return module.register_forward_hook(lambda _, args, out: (change(out[0]), *out[1:]))


def _residuals(block: nn.Module, change: Change) -> RemovableHandle:
    """What leaves a block, to be replaced by what came in."""
    return block.register_forward_hook(lambda _, args, out: (change(out[0], args[0]), *out[1:]))


def _heads(attention: MultiHeadAttention, change: Change) -> RemovableHandle:
    """What each head read [B,T,H,D/H], before the output projection mixes it."""

    def hook(_, args):
        return change(args[0].unflatten(-1, (attention.num_heads, -1))).flatten(-2)

    return attention.out_proj.register_forward_pre_hook(hook)


def _readable(attention: MultiHeadAttention, change: Change) -> RemovableHandle:
    """The mask of what can be read [B,1,1,S]."""

    def hook(_, args, kwargs):
        rows, positions, _ = args[1].shape
        everything = torch.ones(rows, 1, 1, positions, dtype=torch.bool, device=args[1].device)
        mask = change(kwargs.get("mask", everything))
        if not mask.any(-1).all():
            raise ValueError("no visual token is left; mute fewer, or mute the bridge instead.")
        return args, {**kwargs, "mask": mask}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


@dataclass(frozen=True)
class Edit:
    """At a site of a module, `value` in place of the activation wherever `where` is True.

    Both, kept on the CPU, have R rows: one for the whole batch, or one for each image in it, whose
    captions, beams or returned sequences stand next to each other in the batch of the decoder.
    """

    module: nn.Module
    site: Site
    where: Bool[Tensor, "R ..."]
    value: Tensor  # [R,...]

    def change(self, x: Tensor, instead: Tensor | None = None) -> Tensor:
        value = self._fit(self.value, x).to(x.dtype) if instead is None else instead
        return torch.where(self._fit(self.where, x), value, x)

    def _fit(self, mine: Tensor, x: Tensor) -> Tensor:
        times, remainder = divmod(len(x), len(mine))
        sizes = zip(mine.shape[1:], x.shape[1:], strict=False)
        if remainder or mine.ndim != x.ndim or any(size not in (1, of) for size, of in sizes):
            raise ValueError(
                f"an intervention of shape {list(mine.shape)} does not fit an activation of shape "
                f"{list(x.shape)}: it takes one row or one an image, and the same tokens."
            )
        mine = mine.to(x.device)
        return mine if len(mine) == 1 else mine.repeat_interleave(times, dim=0)


@dataclass(frozen=True)
class Intervention:
    """Edits that are in force inside a `with` block, or in a row of `effects`."""

    model: QVisionForConditionalGeneration
    label: str
    edits: tuple[Edit, ...]
    _entered: list[ExitStack] = field(default_factory=list, init=False, repr=False, compare=False)

    def __enter__(self) -> Intervention:
        self._entered.append(ExitStack())
        for edit in self.edits:
            self._entered[-1].enter_context(edit.site(edit.module, edit.change))
        return self

    def __exit__(self, *exception) -> None:
        self._entered.pop().close()


def mute(
    model: QVisionForConditionalGeneration,
    *,
    queries: Iterable[int] = (),
    global_token: bool = False,
    heads: Iterable[tuple[int, int]] = (),
    self_heads: Iterable[tuple[int, int]] = (),
    bridge_heads: Iterable[int] = (),
    blocks: Iterable[int] = (),
    bridge: bool = False,
) -> Intervention:
    """Silence parts of a model.

    A muted query is masked out of every attention, as if it had never been learned: neither the
    bridge nor another query reads it, and those that are left share the attention (attention
    knockout, Geva et al. 2023, arXiv:2304.14767). Were its token set to zero instead, its key would
    go on drawing attention, and another share of it than before. Where visual tokens are handed to
    the model the Q-Former does not run, so that only the bridge is masked.

    Args:
        queries: from 0 to Q - 1; the global token is not counted.
        heads: (block, head) of the Q-Former's cross-attention; what it reads is set to zero.
        self_heads: likewise, of its self-attention.
        bridge_heads: likewise, of the bridge.
        blocks: of the Q-Former; the queries leave such a block as they came.
        bridge: its attention adds nothing, and the text is alone.

    Raises:
        ValueError: if one does not exist, or the model has no Q-Former or no bridge; in the forward
            pass, if no visual token is left.
    """
    require_parts(model, "Q-Former", "bridge")
    tokens, num_heads = model.config.visual_token_labels, model.config.num_attention_heads
    reader = model.decoder.bridge.attention
    readers = [*(block.self_attention for block in model.qformer.blocks), reader]
    labels: list[str] = []
    edits: list[Edit] = []

    def silence(label: str, site: Site, where: Tensor, *modules: nn.Module) -> None:
        labels.append(label)
        edits.extend(Edit(module, site, where, torch.zeros_like(where)) for module in modules)

    def block(index: int) -> QFormerBlock:
        return model.qformer.blocks[_existing("block", index, len(model.qformer.blocks))]

    def head(index: int) -> Bool[Tensor, "1 1 H 1"]:
        return _mark([_existing("head", index, num_heads)], num_heads)[None]

    for token in [*["global token"] * global_token, *(f"query {q}" for q in queries)]:
        if token not in tokens:
            raise ValueError(f"{token} does not exist; choose from {tokens[0]} to {tokens[-1]}.")
        silence(token, _readable, _mark([tokens.index(token)], len(tokens)).mT[None], *readers)
    for b, h in heads:
        silence(f"block {b}, head {h}", _heads, head(h), block(b).cross_attention)
    for b, h in self_heads:
        silence(f"block {b}, self head {h}", _heads, head(h), block(b).self_attention)
    for h in bridge_heads:
        silence(f"bridge, head {h}", _heads, head(h), reader)
    for b in blocks:
        silence(f"block {b}", _residuals, _mark([0], 1), block(b))
    if bridge:
        silence("bridge", _output, _mark([0], 1), reader)
    return Intervention(model, " + ".join(labels) or "nothing", tuple(edits))


def blank_image(model: QVisionForConditionalGeneration) -> Intervention:
    """Set all image tokens to zero, as the original code does with `use_image=False`.

    The Q-Former still runs, and makes visual tokens of its biases. Visual tokens that are handed to
    the model stay as they are.
    """
    blank = Edit(model.qformer, _input, _mark([0], 1), torch.zeros(1, 1, 1))
    return Intervention(model, "blank image", (blank,))


@torch.no_grad()
def patch(
    captioner: Captioner, image: Picture, stage: str, positions: Iterable[int] | None = None
) -> Intervention:
    """Put in, at one stage, what another image gives there (activation patching).

    Args:
        image: the other image.
        stage: "image_tokens", with all of which the model looks at the other image (CLIP's output
            is a projection away, and needs no stage of its own); "block 0" and on, what leaves a
            block of the Q-Former; or "visual_tokens", all that the bridge knows of an image.
        positions: these alone, be they patches or visual tokens, of which 0 is the global one.

    Raises:
        ImageError, TypeError: if `image` is no picture, or several.
        ValueError: if the stage or a position does not exist, or the model has no Q-Former.
    """
    model = captioner.model.eval()
    require_parts(model, "Q-Former")
    blocks = [(block, _output) for block in model.qformer.blocks]
    stages = {"image_tokens": (model.qformer, _input), "visual_tokens": blocks[-1]}
    stages |= {f"block {i}": place for i, place in enumerate(blocks)}
    if stage not in stages:
        raise ValueError(f"no stage {stage!r}; choose one of {', '.join(stages)}.")
    module, site = stages[stage]
    seen: list[Tensor] = []
    with site(module, lambda x: seen.append(x) or x):
        model.encode(captioner.processor(images=open_image(image))["pixel_values"].to(model.device))
    count = seen[0].shape[1]
    chosen = range(count) if positions is None else positions
    where = _mark([_existing(f"position of {stage}", i, count) for i in chosen], count)
    return Intervention(model, f"{stage} patched", (Edit(module, site, where, seen[0].cpu()),))


def stack(interventions: Sequence[Intervention]) -> Intervention:
    """One intervention for a batch of images, of which the i-th gets the i-th of these.

    Raises:
        ValueError: if they are of different models, or one has rows for several images already.
    """
    edits: dict[tuple[nn.Module, Site], Edit] = {}
    for row, intervention in enumerate(interventions):
        if intervention.model is not interventions[0].model:
            raise ValueError(f"{intervention.label!r} is an intervention in another model.")
        for edit in intervention.edits:
            if len(edit.where) > 1 or len(edit.value) > 1:
                raise ValueError(f"{intervention.label!r} is for several images; stack one by one.")
            where = edit.where.new_zeros(len(interventions), *edit.where.shape[1:])
            where[row], value = edit.where[0], edit.value
            if other := edits.get((edit.module, edit.site)):  # one hook for all rows is faster
                value = torch.where(where, value, other.value)
                where = where | other.where
            edits[edit.module, edit.site] = replace(edit, where=where, value=value)
    label = " | ".join(intervention.label for intervention in interventions)
    return Intervention(interventions[0].model, label, tuple(edits.values()))


@dataclass(frozen=True, eq=False)
class Effect:
    """What an intervention does to each word of a caption; log-probabilities are in nats.

    A word's is the sum over its tokens, given the picture and the words before it.
    """

    label: str
    words: tuple[Word, ...]
    tokens: tuple[str, ...]
    before: Float[np.ndarray, " W"]
    after: Float[np.ndarray, " W"]

    @property
    def change(self) -> Float[np.ndarray, " W"]:
        """Negative where the word became less likely."""
        return self.after - self.before


def effect(
    captioner: Captioner, image: Picture, caption: str | None, intervention: Intervention
) -> Effect:
    """`effects` of a single intervention."""
    return effects(captioner, image, caption, [intervention])[0]


def sweep(captioner: Captioner, image: Picture, caption: str | None, over: str) -> list[Effect]:
    """`effects` of muting every part of a kind, each by itself.

    Args:
        over: "queries" (all visual tokens, in their order), "heads" or "self_heads" (each L * H,
            block by block), "bridge_heads" (H) or "blocks" (L); see `mute`.
    """
    model = captioner.model
    heads, blocks = range(model.config.num_attention_heads), range(len(model.qformer.blocks))
    parts = {
        "queries": range(model.config.num_query_tokens),
        "heads": product(blocks, heads),
        "self_heads": product(blocks, heads),
        "bridge_heads": heads,
        "blocks": blocks,
    }
    if over not in parts:
        raise ValueError(f"no sweep over {over!r}; choose one of {', '.join(parts)}.")
    has_global = model.config.global_token != "none"
    first = [mute(model, global_token=True)] if over == "queries" and has_global else []
    mutes = [mute(model, **{over: [part]}) for part in parts[over]]
    return effects(captioner, image, caption, [*first, *mutes])


@torch.no_grad()
def effects(
    captioner: Captioner, image: Picture, caption: str | None, interventions: Sequence[Intervention]
) -> list[Effect]:
    """Give each intervention a row of one batch, and compare it with a row that has none.

    CLIP and GPT-Neo, which no intervention touches, run once for all rows. Inside the `with` block
    of another intervention, that one holds in every row.

    Args:
        caption: None for the one that greedy search finds.

    Raises:
        ImageError, TypeError: if `image` is no picture, or several.
        ValueError: if the caption has no word, or the interventions do not `stack`.
    """
    traced = trace(captioner, image, caption)
    if not traced.words:
        raise ValueError(f"there is no word in the caption {traced.caption!r}; write one.")
    model, rows = captioner.model, 1 + len(interventions)
    image_tokens = to_model(traced, traced.image_tokens)  # [P,D]
    with stack([mute(model), *interventions]):
        logprobs = word_logprobs(traced, traced.words, image_tokens.expand(rows, -1, -1))
    before, *after = logprobs.cpu().numpy()  # [1+V,W]
    return [
        Effect(intervention.label, traced.words, traced.tokens, before, row)
        for intervention, row in zip(interventions, after, strict=True)
    ]


def _existing(kind: str, index: int, count: int) -> int:
    if not 0 <= index < count:
        raise ValueError(f"{kind} {index} does not exist; choose from 0 to {count - 1}.")
    return index


def _mark(indices: Iterable[int], count: int) -> Bool[Tensor, "1 N 1"]:
    """True at the indices."""
    return torch.isin(torch.arange(count), torch.tensor([*indices]))[None, :, None]
