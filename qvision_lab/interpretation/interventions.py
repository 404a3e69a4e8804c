"""Interventions: parts of a model muted, or replaced by the activations of another image.

    with mute(captioner.model, queries=[3], heads=[(0, 5)]):
        captioner.caption("beach.jpg")

Blocks nest. After one the model is what it was before, also where an exception left it.
"""

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
from qvision_lab.interpretation.trace import Trace, Word
from qvision_lab.model.attention import MultiHeadAttention
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.qformer import QFormerBlock
from qvision_lab.model.variants import require_parts

__all__ = ["Effect", "Intervention", "blank_image", "effects", "mute", "mute_each", "patch"]
__all__ += ["stack", "sweep"]
__dir__ = __all__.copy  # for completion

Change = Callable[..., Tensor]  # of an activation; the model continues with the result
Site = Callable[[nn.Module, Change], RemovableHandle]  # where in a module that is


def _input(module: nn.Module, change: Change) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))


def _output(module: nn.Module, change: Change) -> RemovableHandle:
    return module.register_forward_hook(lambda _, args, out: (change(out[0]), *out[1:]))


def _skipped(block: nn.Module, change: Change) -> RemovableHandle:
    """The output of a block, to be replaced by its input."""
    return block.register_forward_hook(lambda _, args, out: (change(out[0], args[0]), *out[1:]))


def _heads(attention: MultiHeadAttention, change: Change) -> RemovableHandle:
    """The output of each head [B,T,H,D/H], before the output projection."""
    split = (attention.num_heads, -1)
    return _input(attention.out_proj, lambda x: change(x.unflatten(-1, split)).flatten(-2))


def _mask(attention: MultiHeadAttention, change: Change) -> RemovableHandle:
    """The attention mask [B,1,1,S]."""

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

    def __enter__(self) -> "Intervention":
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
    """Ablate parts of a model; ValueError for one that it does not have.

    Args:
        queries: from 0 to Q - 1. A muted one is masked out of every attention, as if it did not
            exist (attention knockout, Geva et al. 2023, arXiv:2304.14767); were its token set to
            zero, its key would still draw attention. ValueError in the forward pass if none is left
        heads: (block, head) of the Q-Former's cross-attention; its output is set to zero.
        self_heads: likewise, of its self-attention; and `bridge_heads` of the bridge.
        blocks: of the Q-Former; the queries leave such a block unchanged.
        bridge: its attention adds nothing, so the text alone is left.
    """
    require_parts(model.config, "Q-Former", "bridge")
    tokens, num_heads = model.config.visual_token_labels, model.config.num_attention_heads
    reader = model.decoder.bridge.attention
    readers = [*(block.self_attention for block in model.qformer.blocks), reader]
    labels: list[str] = []
    edits: list[Edit] = []

    def add(label: str, site: Site, where: Tensor, *modules: nn.Module) -> None:
        labels.append(label)
        edits.extend(Edit(module, site, where, torch.zeros_like(where)) for module in modules)

    def block(index: int) -> QFormerBlock:
        _mark([index], len(model.qformer.blocks), "block")
        return model.qformer.blocks[index]

    def head(index: int) -> Bool[Tensor, "1 1 H 1"]:
        return _mark([index], num_heads, "head")[None]

    for token in [*["global token"] * global_token, *(f"query {q}" for q in queries)]:
        if token not in tokens:
            raise ValueError(f"{token} does not exist; choose from {tokens[0]} to {tokens[-1]}.")
        add(token, _mask, _mark([tokens.index(token)], len(tokens)).mT[None], *readers)
    for b, h in heads:
        add(f"block {b}, head {h}", _heads, head(h), block(b).cross_attention)
    for b, h in self_heads:
        add(f"block {b}, self head {h}", _heads, head(h), block(b).self_attention)
    for h in bridge_heads:
        add(f"bridge, head {h}", _heads, head(h), reader)
    for b in blocks:
        add(f"block {b}", _skipped, _mark([0], 1), block(b))
    if bridge:
        add("bridge", _output, _mark([0], 1), reader)
    return Intervention(model, " + ".join(labels) or "nothing", tuple(edits))


def blank_image(model: QVisionForConditionalGeneration) -> Intervention:
    """Set all image tokens to zero, as the original with `use_image=False`."""
    blank = Edit(model.qformer, _input, _mark([0], 1), torch.zeros(1, 1, 1))
    return Intervention(model, "blank image", (blank,))


@torch.no_grad()
def patch(
    captioner: Captioner, image: Picture, stage: str, positions: Iterable[int] | None = None
) -> Intervention:
    """Activation patching: replace one stage by its activations for another image.

    After Meng et al. 2022 (arXiv:2202.05262) and Zhang and Nanda 2024 (arXiv:2309.16042).

    Args:
        stage: "image_tokens"; "block 0" and so on, the output of a block of the Q-Former; or
            "visual_tokens", all that the bridge reads. ValueError for any other.
        positions: these patches or visual tokens alone; visual token 0 is the global one.
    """
    model = captioner.model.eval()
    require_parts(model.config, "Q-Former")
    blocks = {f"block {i}": (block, _output) for i, block in enumerate(model.qformer.blocks)}
    stages = {"image_tokens": (model.qformer, _input), **blocks}
    stages["visual_tokens"] = stages[f"block {len(blocks) - 1}"]
    if stage not in stages:
        raise ValueError(f"no stage {stage!r}; choose one of {', '.join(stages)}.")
    module, site = stages[stage]
    found: list[Tensor] = []
    with site(module, lambda x: found.append(x) or x):
        model.encode(captioner.processor(images=open_image(image))["pixel_values"].to(model.device))
    count = found[0].shape[1]
    chosen = range(count) if positions is None else positions
    where = _mark(chosen, count, f"position of {stage}")
    return Intervention(model, f"{stage} patched", (Edit(module, site, where, found[0].cpu()),))


def stack(interventions: Sequence[Intervention]) -> Intervention:
    """One intervention for a batch of images, of which the i-th gets the i-th of these.

    ValueError if they are of different models, or one has rows for several images already.
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
    """Log-probabilities (nats) of the W words of a caption, before and after an intervention."""

    label: str
    words: tuple[Word, ...]
    before: Float[np.ndarray, " W"]
    after: Float[np.ndarray, " W"]

    @property
    def change(self) -> Float[np.ndarray, " W"]:
        """Negative where the word became less likely."""
        return self.after - self.before


def mute_each(model: QVisionForConditionalGeneration, over: str) -> list[Intervention]:
    """Mutes of every part of a kind, each by itself.

    The kinds of `mute` are "queries" (all visual tokens, in their order), "heads" or "self_heads"
    (each L * H, block by block), "bridge_heads" (H) and "blocks" (L).
    """
    heads, blocks = range(model.config.num_attention_heads), range(len(model.qformer.blocks))
    queries = range(model.config.num_query_tokens)
    parts = {"queries": queries, "blocks": blocks, "bridge_heads": heads}
    parts |= {"heads": product(blocks, heads), "self_heads": product(blocks, heads)}
    if over not in parts:
        raise ValueError(f"no sweep over {over!r}; choose one of {', '.join(parts)}.")
    has_global = over == "queries" and model.config.global_token != "none"
    first = [mute(model, global_token=True)] if has_global else []
    return [*first, *(mute(model, **{over: [part]}) for part in parts[over])]


def sweep(trace: Trace, over: str) -> list[Effect]:
    """`effects` of `mute_each`."""
    return effects(trace, mute_each(trace.model, over))


@torch.no_grad()
def effects(trace: Trace, interventions: Sequence[Intervention]) -> list[Effect]:
    """Effects on each word of a caption, in a batch with a row for each intervention.

    ValueError for a caption without words. Image tokens and GPT-Neo's output are the trace's. In
    the `with` block of another intervention, that one holds in every row.
    """
    if not trace.words:
        raise ValueError(f"there is no word in the caption {trace.caption!r}; write one.")
    image_tokens = trace.to_tensor(trace.image_tokens)  # [P,D]
    with stack([mute(trace.model), *interventions]):
        rows = image_tokens.expand(1 + len(interventions), -1, -1)  # [1+V,P,D]
        before, *after = trace.word_logprobs(trace.words, rows).cpu().numpy()  # [1+V,W]
    pairs = zip(interventions, after, strict=True)
    return [Effect(each.label, trace.words, before, row) for each, row in pairs]


def _mark(indices: Iterable[int], count: int, kind: str = "part") -> Bool[Tensor, "1 N 1"]:
    """True at the indices; ValueError for one that does not exist."""
    where = torch.zeros(1, count, 1, dtype=torch.bool)
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"{kind} {index} does not exist; choose from 0 to {count - 1}.")
        where[:, index] = True
    return where
