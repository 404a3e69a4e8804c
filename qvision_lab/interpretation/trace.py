"""One forward pass, recorded: what every part of the model read on the way to each word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import Picture, open_image, picture_name
from qvision_lab.data.atomic import write_atomic
from qvision_lab.interpretation.maps import (
    DEFAULT_METHOD,
    PatchMap,
    query_maps,
    require_parts,
    word_maps,
)

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]+|_+")  # "it's", "x-ray"; punctuation


@dataclass(frozen=True)
class Word:
    """A word of a caption and the tokens that spell it."""

    text: str
    span: tuple[int, int]  # where it stands: caption[start:end] == text
    tokens: tuple[int, ...]  # their places in `Trace.tokens`


@dataclass(frozen=True, eq=False)
class Trace:
    """A caption's way through the model under one picture.

    `tokens` are what the model had to predict: the caption's, without <START>, with <END>. All that
    was read to predict token i stands at index i, so text position i holds the token before it.
    L Q-Former blocks, H heads, N = 1 + Q visual tokens, P patches, G layers of GPT-Neo, T tokens.
    """

    source: str  # path or URL of the picture, else "picture"
    caption: str
    words: tuple[Word, ...]
    tokens: tuple[str, ...]
    patch_grid: tuple[int, int]  # rows, columns; their product is P
    visual_token_labels: tuple[str, ...]
    norms: dict[str, list[float]]  # lengths of the residual stream at each stage, per token of it
    image: UInt8[np.ndarray, "height width 3"]
    token_ids: Int[np.ndarray, " T"]
    logprobs: Float[np.ndarray, " T"]  # nats, at most 0
    image_tokens: Float[np.ndarray, "P D"]
    visual_tokens: Float[np.ndarray, "N D"]
    text_states: Float[np.ndarray, "T D"]  # GPT-Neo's output, which knows no picture yet
    qformer_self_attentions: Float[np.ndarray, "L H N N"]
    qformer_cross_attentions: Float[np.ndarray, "L H N P"]
    bridge_attentions: Float[np.ndarray, "H T N"]
    text_attentions: Float[np.ndarray, "G H T T"]
    captioner: Captioner | None = field(repr=False)  # what made it; no file holds it

    def word_maps(self, method: str = DEFAULT_METHOD, **options) -> list[PatchMap]:
        """A map for every word of the caption; `method` is a key of `maps.METHODS`.

        The default points best, but runs the model again; `composition` and `rollout` do not.
        """
        return word_maps(self, method, **options)

    def query_maps(self, block: int | None = None, head: int | None = None) -> list[PatchMap]:
        """A map for every visual token, in their order; None takes the mean."""
        return query_maps(self, block, head)

    def save(self, path: str | Path) -> None:
        """Write the arrays to `path` (safetensors) and the rest beside it, with suffix `.json`."""
        path = Path(path)
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "captioner"}
        arrays = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in content.items() if name not in arrays}
        partial = path.with_name(path.name + ".partial")
        save_file(arrays, partial)
        partial.replace(path)
        write_atomic(path.with_suffix(".json"), json.dumps(rest, default=vars, indent=1))

    @classmethod
    def load(cls, path: str | Path, captioner: Captioner | None = None) -> Trace:
        """Read what `save` wrote; methods that run the model again need the captioner."""
        rest = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
        rest["words"] = [
            Word(word["text"], tuple(word["span"]), tuple(word["tokens"])) for word in rest["words"]
        ]
        sequences = ("words", "tokens", "patch_grid", "visual_token_labels")
        rest |= {name: tuple(rest[name]) for name in sequences}
        return cls(**rest, **load_file(path), captioner=captioner)


def trace(captioner: Captioner, image: Picture, caption: str | None = None) -> Trace:
    """Record one forward pass; by default of the caption that greedy search finds.

    The picture is prepared as in training: stretched to a square, so that the patch grid covers it
    all. The model is left in evaluation mode.

    Raises:
        ImageError, TypeError: if `image` is no picture, or several (`trace_all` takes those).
        ValueError: if the model has no bridge, or gives no attention maps.
    """
    return next(trace_all(captioner, [image], None if caption is None else [caption]))


def trace_all(
    captioner: Captioner,
    images: Iterable[Picture],
    captions: Iterable[str | None] | None = None,
    batch_size: int = 16,
) -> Iterator[Trace]:
    """`trace` for many pictures, each with a caption or None, a batch at a time."""
    told = repeat(None) if captions is None else captions
    pairs = zip(images, told, strict=captions is not None)
    while batch := list(islice(pairs, batch_size)):
        yield from _trace_batch(captioner, *map(list, zip(*batch, strict=True)))


@torch.no_grad()
def _trace_batch(
    captioner: Captioner, pictures: list[Picture], captions: list[str | None]
) -> list[Trace]:
    model, processor = captioner.model.eval(), captioner.processor
    require_parts(model, "bridge")
    images = [open_image(picture) for picture in pictures]
    if None in captions:
        greedy = captioner.caption(images, preset="greedy")
        pairs = zip(captions, greedy, strict=True)
        captions = [found.text if caption is None else caption for caption, found in pairs]
    inputs = processor(images=images, text=captions).to(model.device)
    ids = inputs["input_ids"]  # [B,1+T]
    vision_states = model.vision.see(inputs["pixel_values"])  # [B,P,C]
    blocks = {f"Q-Former block {i}": block for i, block in enumerate(model.qformer.blocks)}
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in {**blocks, "bridge": model.decoder.bridge}.items():
            hooks.enter_context(module.register_forward_hook(partial(_keep, seen, name)))
        output = model(
            input_ids=ids[:, :-1],
            vision_states=vision_states,
            output_attentions=True,
            output_hidden_states=True,
        )
    logprobs = output.logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B,T]
    of_image = {
        "image_tokens": output.image_tokens,
        "visual_tokens": output.visual_tokens,
        "qformer_self_attentions": _stack("Q-Former self", output.qformer_self_attentions),
        "qformer_cross_attentions": _stack("Q-Former cross", output.qformer_cross_attentions),
    }
    bridge_attentions = _stack("bridge", (output.decoder_cross_attentions,))[:, 0]
    text_attentions = _stack("GPT-Neo's self", output.attentions)
    image_stages = {"vision": vision_states, "image tokens": output.image_tokens}
    image_stages |= {name: seen[name] for name in blocks}
    text_stages = {f"text layer {i}": states for i, states in enumerate(output.hidden_states)}
    text_stages["bridge"] = seen["bridge"]

    traces = []
    for row, caption in enumerate(captions):
        length = int(inputs["attention_mask"][row].sum()) - 1
        token_ids = ids[row, 1 : 1 + length].tolist()
        norms = {stage: states[row] for stage, states in image_stages.items()}
        norms |= {stage: states[row, :length] for stage, states in text_stages.items()}
        traces.append(
            Trace(
                source=picture_name(pictures[row]) or "picture",
                caption=caption,
                words=_words(caption, processor.tokenizer.convert_ids_to_tokens(token_ids)),
                tokens=tuple(processor.tokenizer.decode([i]) for i in token_ids),
                patch_grid=model.config.patch_grid,
                visual_token_labels=model.config.visual_token_labels,
                norms={stage: x.float().norm(dim=-1).tolist() for stage, x in norms.items()},
                image=np.array(images[row]),
                token_ids=np.array(token_ids),
                logprobs=_array(logprobs[row, :length]),
                text_states=_array(output.hidden_states[-1][row, :length]),
                bridge_attentions=_array(bridge_attentions[row, :, :length]),
                text_attentions=_array(text_attentions[row, ..., :length, :length]),
                **{name: _array(values[row]) for name, values in of_image.items()},
                captioner=captioner,
            )
        )
    return traces


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, inputs, outputs: tuple) -> None:
    """A forward hook, once its first two arguments are given."""
    seen[name] = outputs[0]


def _stack(name: str, maps: tuple[Tensor | None, ...] | None) -> Float[Tensor, "B L H T S"]:
    """Maps of all layers in one; a fused kernel has none to give, or something that is no map."""
    if not maps or any(layer is None or layer.ndim != 4 for layer in maps):
        raise ValueError(
            f"the model gave no map of its {name} attention; load it with eager attention "
            '(`text_config._attn_implementation = "eager"`), which has them.'
        )
    return torch.stack(maps, dim=1)


def _array(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.float().cpu().numpy())


def _words(caption: str, spelled: list[str]) -> tuple[Word, ...]:
    """Words and their tokens: a byte-level token has one character for each byte that it spells.

    A token belongs to the word that its last byte is in. The processor puts a space in front.
    """
    ends = np.cumsum([len(token) for token in spelled[:-1]]) - 1  # in bytes of the caption
    words = []
    for match in _WORD.finditer(caption):
        start, stop = (len(caption[:i].encode()) for i in match.span())
        tokens = np.flatnonzero((ends > start) & (ends <= stop))
        if tokens.size:
            words.append(Word(match[0], match.span(), tuple(tokens.tolist())))
    return tuple(words)
