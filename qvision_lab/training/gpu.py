"""Fast training steps on a GPU: TF32, frozen weights cast once, packed captions, CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock

from qvision_lab.model.attention import MultiHeadAttention
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.decoder import Bridge
from qvision_lab.model.qformer import QFormerBlock

COMPILED_KINDS = (GPTNeoBlock, QFormerBlock, Bridge)
CODE_VERSIONS = 64  # that compiled blocks may have: by kind, by what is frozen, by length
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv2d, MultiHeadAttention)


@contextmanager
def tf32_products() -> Iterator[None]:
    """A context with float32 matrix products in TF32 on a GPU (torch's precision "high")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def frozen_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Frozen weights that autocast casts at every step: all but those of embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        weight
        for module in model.modules()
        if isinstance(module, CAST_BY_AUTOCAST)
        for weight in module.parameters(recurse=False)
        if not weight.requires_grad and id(weight) not in embeddings
    ]


@contextmanager
def holding(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Replace the values of weights, also by another dtype, and restore them at the end.

    The original tensors keep their addresses, so graphs captured with them can be replayed after.
    """
    before = [weight.data for weight in weights]
    try:
        for weight, value in zip(weights, values, strict=True):
            weight.data = value
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data = value


@contextmanager
def compiled_blocks(
    model: QVisionForConditionalGeneration, backend: str = "inductor"
) -> Iterator[None]:
    """Compile the blocks of GPT-Neo, of the Q-Former and the bridge; those of a kind share code."""
    blocks = [module for module in model.modules() if isinstance(module, COMPILED_KINDS)]
    for block in blocks:
        block.compile(backend=backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=CODE_VERSIONS):
            yield
    finally:
        uncompile(model)


def uncompile(model: nn.Module) -> None:
    """Undo `compiled_blocks`."""
    for module in model.modules():
        if isinstance(module, COMPILED_KINDS):
            module._compiled_call_impl = None


class TextStates(nn.Module):
    """Cached vision states and packed captions -> what the head scores, without padding.

    All layers but attention compute each word alone, so the words of all captions are one sequence
    [1,K,D] there, and lie in the padded batch [R,T] only where they attend. GPT-Neo's attention is
    PyTorch's fused kernel, where transformers' makes masks and scores.
    """

    def __init__(self, model: QVisionForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        vision_states: Float[Tensor, "B P C"],
        input_ids: Int[Tensor, "R T"],
        places: Int[Tensor, " K"],
    ) -> Float[Tensor, "K D"]:
        decoder, text = self.model.decoder, self.model.decoder.language_model
        visual_tokens = self.model.encode(vision_states=vision_states)[1].visual_tokens
        packing = Packing(input_ids.shape, places)
        ids, positions = packing.pack(input_ids.flatten()), places % input_ids.shape[1]
        states = (decoder.dropout(text.wte(ids)) + text.wpe(positions))[None]  # [1,K,D]
        with packed_attention(text, packing):
            for block in text.h:
                states, _ = block(states)
        states = packing.unpack(text.ln_f(states)[0])  # [R*T,D]
        by_image = states.unflatten(0, (len(visual_tokens), -1))  # [B,k*T,D]
        return packing.pack(decoder.bridge(by_image, visual_tokens)[0].flatten(0, 1))


class Packing:
    """K words in a batch of R rows with T cells each, as `CaptionCollator.places` gives them.

    The last words are none, and stand for all pads, as the last pad stands for all of them. None of
    these is read by a word or scored, so their gradients are zero, and reading by index is its own
    gradient with the other index.
    """

    def __init__(self, shape: torch.Size, places: Int[Tensor, " K"]):
        words = torch.arange(len(places), device=places.device)
        self.shape, self.places = shape, places
        self.words = torch.full_like(places[:1], len(places) - 1).repeat(shape.numel())
        self.words[places[:-1]] = words[:-1]  # [R*T]

    def pack(self, cells: Shaped[Tensor, "cells ..."]) -> Shaped[Tensor, "words ..."]:
        """Of cells, those of words."""
        return _Rearranged.apply(cells, self.places, self.words)

    def unpack(self, words: Shaped[Tensor, "words ..."]) -> Shaped[Tensor, "cells ..."]:
        """Words in their cells."""
        return _Rearranged.apply(words, self.words, self.places)


class _Rearranged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, source: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return values.index_select(0, source)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


@contextmanager
def packed_attention(text: nn.Module, packing: Packing) -> Iterator[None]:
    """Let words of GPT-Neo's layers attend to those before them in their own rows."""
    layers = [block.attn.attention for block in text.h]
    for layer in layers:
        layer._attn = partial(_attend_to_past, layer, packing)
    try:
        yield
    finally:
        for layer in layers:
            del layer._attn


def _attend_to_past(
    layer: nn.Module, packing: Packing, *inputs: Float[Tensor, "1 G K E"] | None
) -> tuple[Float[Tensor, "1 G K E"], None]:
    length, mask = packing.shape[1], None
    query, key, value = (
        packing.unpack(x[0].transpose(0, 1)).unflatten(0, packing.shape).transpose(1, 2)
        for x in inputs[:3]  # the last is a mask, None
    )  # [R,G,T,E]
    if layer.attention_type == "local" and layer.config.window_size < length:
        past = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = past & ~past.tril(-layer.config.window_size)
    rate, causal = layer.attn_dropout.p if layer.training else 0.0, mask is None
    read = F.scaled_dot_product_attention(query, key, value, mask, rate, causal, scale=1.0)
    words = packing.pack(read.transpose(1, 2).flatten(0, 1))  # [K,G,E]
    return words.transpose(0, 1)[None], None


class CapturedLoss:
    """The loss of a packed batch; passes through the model are CUDA graphs, by shape and precision.

    Launching a step's kernels takes longer than they run; replaying them takes no launches. Graphs
    read weights by address, and are captured again where weights have moved.
    """

    def __init__(self, model: QVisionForConditionalGeneration):
        self.model = model
        self.graphs: dict[tuple, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
        self.addresses: list[int] = []  # of the weights

    def __call__(
        self,
        vision_states: Float[Tensor, "B P C"],
        input_ids: Int[Tensor, "R T"],
        labels: Int[Tensor, "R T"],
        places: Int[Tensor, " K"],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """As the model's own loss, inside autocast or not; ValueError if it cannot be captured."""
        addresses = [weight.data_ptr() for weight in self.model.parameters()]
        if addresses != self.addresses:
            self.graphs.clear()
            self.pool = torch.cuda.graph_pool_handle()  # the old one is freed with its graphs
            self.addresses = addresses
        numbers = torch.is_autocast_enabled("cuda"), torch.get_float32_matmul_precision()
        inputs = vision_states, input_ids, places
        key = *(values.shape for values in inputs), *numbers
        if key not in self.graphs:
            self.graphs[key] = self._capture(*inputs)
        return head_loss(self.model, self.graphs[key](*inputs), labels, places, num_items_in_batch)

    def _capture(self, *inputs: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        module = TextStates(self.model).train()
        with (
            torch.random.fork_rng(devices=[inputs[0].device]),  # a resumed run captures again
            torch.autocast("cuda", dtype, enabled=on, cache_enabled=False),
        ):
            try:
                return torch.cuda.make_graphed_callables(
                    module, inputs, allow_unused_input=True, pool=self.pool
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(
                    f"CUDA could not capture a training step ({error}): set training.capture to "
                    "false, in another output folder."
                ) from error


def head_loss(
    model: QVisionForConditionalGeneration,
    states: Float[Tensor, "K D"],
    labels: Int[Tensor, "R T"],
    places: Int[Tensor, " K"],
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the labelled next words, by a matrix product with aligned sizes.

    An odd vocabulary keeps it from the fast kernels.
    """
    weight, vocab_size = model.decoder.lm_head.weight, model.config.vocab_size
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()[places]  # [K]
    targets = targets.masked_fill(targets == model.config.pad_token_id, IGNORED_LABEL)
    logits = F.linear(states, F.pad(weight, (0, 0, 0, -vocab_size % 64)))[:, :vocab_size]
    return fixed_cross_entropy(logits.float(), targets, num_items_in_batch)
