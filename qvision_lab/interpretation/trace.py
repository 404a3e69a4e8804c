"""One forward pass, recorded: what every part of the model read to predict each word."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from html import escape
from itertools import islice, repeat
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import Picture, open_image, picture_name
from qvision_lab.data.atomic import atomic
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.variants import require_parts

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]+|_+")  # "it's", "x-ray"; punctuation


@dataclass(frozen=True)
class Word:
    """A word of a caption and the tokens that spell it."""

    text: str
    span: tuple[int, int]  # caption[start:end] == text
    tokens: tuple[int, ...]  # indices into `Trace.tokens`


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded forward pass of one image and one caption.

    `tokens` are what the model had to predict: the caption's, without <START>, with <END>. What was
    read to predict token i is at index i, so text position i holds the token before it.
    L Q-Former blocks, H heads, N = 1 + Q visual tokens, P patches, T tokens.
    """

    source: str  # path or URL of the image, else "picture"
    caption: str
    words: tuple[Word, ...]
    tokens: tuple[str, ...]
    patch_grid: tuple[int, int]  # rows, columns; their product is P
    visual_token_labels: tuple[str, ...]
    norms: dict[str, list[float]]  # of the residual stream after each stage, one for each token
    image: UInt8[np.ndarray, "height width 3"]
    token_ids: Int[np.ndarray, " T"]
    logprobs: Float[np.ndarray, " T"]  # nats, at most 0
    image_tokens: Float[np.ndarray, "P D"]
    visual_tokens: Float[np.ndarray, "N D"]
    text_states: Float[np.ndarray, "T D"]  # GPT-Neo's output, before the bridge
    qformer_self_attentions: Float[np.ndarray, "L H N N"]
    qformer_cross_attentions: Float[np.ndarray, "L H N P"]
    bridge_attentions: Float[np.ndarray, "H T N"]
    captioner: Captioner | None = field(repr=False)  # not saved
    to_html: ClassVar[Callable[["Trace", str | Path], Path]]  # `page.write_page`

    @property
    def model(self) -> QVisionForConditionalGeneration:
        """The recorded model; ValueError if the trace was loaded without its captioner."""
        if self.captioner is None:
            raise ValueError(
                "this trace was read from a file and has no model to run: pass its captioner to "
                "Trace.load(path, captioner), or choose composition or rollout."
            )
        return self.captioner.model

    @property
    def probabilities(self) -> Float[np.ndarray, " W"]:
        """Of each word, given those before it."""
        return np.exp([self.logprobs[list(word.tokens)].sum() for word in self.words])

    def to_tensor(self, values: np.ndarray) -> Tensor:
        """An array of the trace with the model's device and dtype."""
        return torch.from_numpy(values).to(self.model.device, self.model.dtype)

    def word_logprobs(
        self, words: Sequence[Word], image_tokens: Float[Tensor, "R P D"]
    ) -> Float[Tensor, "R W"]:
        """Log-probabilities (nats) of words, given other image tokens and the same text."""
        return self.read_words(words, self.model.qformer(image_tokens).visual_tokens)[0]

    def read_words(
        self,
        words: Sequence[Word],
        visual_tokens: Float[Tensor, "R N D"],
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "R W"], Float[Tensor, "R H t N"] | None]:
        """Log-probabilities of words, and the bridge's map where their t tokens are predicted."""
        decoder, positions = self.model.decoder, [i for word in words for i in word.tokens]
        states = self.to_tensor(self.text_states[positions]).expand(len(visual_tokens), -1, -1)
        states, bridge_map = decoder.bridge(states, visual_tokens, output_attentions)  # [R,t,D]
        logprobs = decoder.lm_head(states).float().log_softmax(-1)  # [R,t,V]
        by_token = logprobs[:, range(len(positions)), self.token_ids[positions]]  # [R,t]
        by_word = by_token.split([len(word.tokens) for word in words], dim=1)
        return torch.stack([tokens.sum(1) for tokens in by_word], dim=1), bridge_map

    def __repr__(self) -> str:
        blocks, heads, tokens, patches = self.qformer_cross_attentions.shape
        pairs = zip(self.words, self.probabilities, strict=True)
        likely = (f"{word.text} {probability:.0%}" for word, probability in pairs)
        return (
            f"Trace of {self.source}: {self.caption!r}\n  words: {', '.join(likely)}\n"
            f"  {blocks} blocks, {heads} heads, {tokens} visual tokens, {patches} patches"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    def save(self, path: str | Path) -> None:
        """Write all but the captioner to one safetensors file."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "captioner"}
        arrays = {name: rest.pop(name) for name in [*rest] if isinstance(rest[name], np.ndarray)}
        with atomic(Path(path)) as partial:
            save_file(arrays, partial, {"trace": json.dumps(rest, default=vars)})

    @classmethod
    def load(cls, path: str | Path, captioner: Captioner | None = None) -> "Trace":
        """Read what `save` wrote; whatever runs the model again needs the captioner."""
        with safe_open(path, "numpy") as file:
            rest = json.loads(file.metadata()["trace"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = (Word(w["text"], tuple(w["span"]), tuple(w["tokens"])) for w in rest.pop("words"))
        rest = {name: tuple(x) if isinstance(x, list) else x for name, x in rest.items()}
        return cls(words=tuple(words), **rest, **arrays, captioner=captioner)


def trace(captioner: Captioner, image: Picture, caption: str | None = None) -> Trace:
    """Record one forward pass: the attention, norms and probabilities behind a caption.

    The image is preprocessed as in training: stretched to a square, so that the patch grid covers
    all of it. The model is left in evaluation mode. `trace_all` takes several images.

    Args:
        captioner: as `qvision_lab.load` returns it.
        image: a path, a URL, bytes, a PIL image, an array or a tensor.
        caption: what is read; None for the caption that greedy search finds.

    Raises:
        ValueError: if the image is invalid, the model has no bridge, or gives no attention maps.
    """
    return next(trace_all(captioner, [image], None if caption is None else [caption]))


def trace_all(
    captioner: Captioner,
    images: Iterable[Picture],
    captions: Iterable[str | None] | None = None,
    batch_size: int = 16,
) -> Iterator[Trace]:
    """`trace` for many images, each with a caption or None, in batches."""
    given = repeat(None) if captions is None else captions
    pairs = zip(images, given, strict=captions is not None)
    opened = (  # one by one: an iterator may overwrite its image
        (open_image(image), picture_name(image) or "picture", caption) for image, caption in pairs
    )
    while batch := list(islice(opened, batch_size)):
        yield from _trace_batch(captioner, *map(list, zip(*batch, strict=True)))


@torch.no_grad()
def _trace_batch(
    captioner: Captioner, opened: list[Image.Image], sources: list[str], captions: list[str | None]
) -> list[Trace]:
    model, processor = captioner.model.eval(), captioner.processor
    require_parts(model.config, "bridge")
    if None in captions:
        greedy = captioner.caption(opened, preset="greedy")
        captions = [g.text if c is None else c for c, g in zip(captions, greedy, strict=True)]
    inputs = processor(images=opened, text=captions).to(model.device)
    ids = inputs["input_ids"]  # [B,1+T]
    if ids.shape[1] > 1 + (most := model.config.text_config.max_position_embeddings):
        raise ValueError(f"a caption has {ids.shape[1]} tokens, the model {most} positions.")
    vision_states = model.vision.encode(inputs["pixel_values"])  # [B,P,C]
    outputs: dict[str, Tensor] = {}
    blocks = {f"Q-Former block {i}": block for i, block in enumerate(model.qformer.blocks)}
    with ExitStack() as hooks:
        for name, module in {**blocks, "bridge": model.decoder.bridge}.items():

            def keep(module, args, output, name=name):
                outputs[name] = output[0]

            hooks.enter_context(module.register_forward_hook(keep))
        everything = {"output_attentions": True, "output_hidden_states": True}
        output = model(input_ids=ids[:, :-1], vision_states=vision_states, **everything)
    logprobs = output.logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B,T]
    bridge_attentions = _stack("bridge", (output.decoder_cross_attentions,))[:, 0]  # [B,H,T,N]
    of_image = {
        "image_tokens": output.image_tokens,
        "visual_tokens": output.visual_tokens,
        "qformer_self_attentions": _stack("Q-Former self", output.qformer_self_attentions),
        "qformer_cross_attentions": _stack("Q-Former cross", output.qformer_cross_attentions),
    }
    text_stages = {f"text layer {i}": states for i, states in enumerate(output.hidden_states)}
    text_stages["bridge"] = outputs.pop("bridge")
    image_stages = {"vision": vision_states, "image tokens": output.image_tokens, **outputs}

    traces = []
    for row, caption in enumerate(captions):
        length = int(inputs["attention_mask"][row].sum()) - 1
        token_ids = ids[row, 1 : 1 + length].tolist()
        stages = {name: states[row] for name, states in image_stages.items()}
        stages |= {name: states[row, :length] for name, states in text_stages.items()}
        traces.append(
            Trace(
                source=sources[row],
                caption=caption,
                words=_words(caption, processor.tokenizer.convert_ids_to_tokens(token_ids)),
                tokens=tuple(processor.tokenizer.decode([i]) for i in token_ids),
                patch_grid=model.config.patch_grid,
                visual_token_labels=model.config.visual_token_labels,
                norms={name: x.float().norm(dim=-1).tolist() for name, x in stages.items()},
                image=np.array(opened[row]),
                token_ids=np.array(token_ids),
                logprobs=_array(logprobs[row, :length]),
                text_states=_array(output.hidden_states[-1][row, :length]),
                bridge_attentions=_array(bridge_attentions[row, :, :length]),
                **{name: _array(values[row]) for name, values in of_image.items()},
                captioner=captioner,
            )
        )
    return traces


def _stack(name: str, maps: tuple[Tensor | None, ...] | None) -> Float[Tensor, "B L H T S"]:
    if not maps or any(layer is None for layer in maps):
        raise ValueError(f"the model gave no map of its {name} attention; use eager attention.")
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
