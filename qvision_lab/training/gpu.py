"""Fast training steps on a GPU: TF32, frozen weights cast once, compiled blocks, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType

import torch
from jaxtyping import Float, Int
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
LENGTHS = 4  # captions of a batch are padded to multiples of it, so that graphs are few
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv2d, MultiHeadAttention)


@contextmanager
def tf32_products() -> Iterator[None]:
    """A context with float32 matrix products in TF32 on a GPU (torch's precision "high")."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
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
    """Cached vision states and captions -> what the head scores, without a wait for the device.

    GPT-Neo's attention is PyTorch's fused kernel here, where transformers' makes masks and scores.
    """

    def __init__(self, model: QVisionForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self, vision_states: Float[Tensor, "B P C"], input_ids: Int[Tensor, "R T"]
    ) -> Float[Tensor, "R T D"]:
        decoder, text = self.model.decoder, self.model.decoder.language_model
        visual_tokens = self.model.encode(vision_states=vision_states)[1].visual_tokens
        visual_tokens = visual_tokens.repeat_interleave(len(input_ids) // len(visual_tokens), dim=0)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
        states = decoder.dropout(text.wte(input_ids)) + text.wpe(places)
        with causal_attention(text):
            for block in text.h:
                states, _ = block(states)
        return decoder.bridge(text.ln_f(states), visual_tokens)[0]


@contextmanager
def causal_attention(text: nn.Module) -> Iterator[None]:
    """Use PyTorch's fused attention kernel in GPT-Neo's layers."""
    layers = [block.attn.attention for block in text.h]
    for layer in layers:
        layer._attn = MethodType(_attend_to_past, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer._attn


def _attend_to_past(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None = None
) -> tuple[Float[Tensor, "R G T E"], None]:
    length, mask = query.shape[2], None
    if layer.attention_type == "local" and layer.config.window_size < length:
        past = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = past & ~past.tril(-layer.config.window_size)
    rate, causal = layer.attn_dropout.p if layer.training else 0.0, mask is None
    read = F.scaled_dot_product_attention(query, key, value, mask, rate, causal, scale=1.0)
    return read, None


class CapturedLoss:
    """The loss of a batch; passes through the model are CUDA graphs, by shape and precision.

    Launching a step's kernels takes longer than they run; replaying them takes no launches. Graphs
    read weights by address, and are captured again where weights have moved.
    """

    def __init__(self, model: QVisionForConditionalGeneration):
        self.model = model
        self.graphs: dict[tuple, Callable[[Tensor, Tensor], Tensor]] = {}
        self.places: list[int] = []

    def __call__(
        self,
        vision_states: Float[Tensor, "B P C"],
        input_ids: Int[Tensor, "R T"],
        labels: Int[Tensor, "R T"],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """As the model's own loss, inside autocast or not.

        Raises:
            ValueError: if the step cannot be captured.
        """
        places = [weight.data_ptr() for weight in self.model.parameters()]
        if places != self.places:
            self.graphs.clear()
            self.pool = torch.cuda.graph_pool_handle()  # the old one is freed with its graphs
            self.places = places
        numbers = torch.is_autocast_enabled("cuda"), torch.get_float32_matmul_precision()
        key = vision_states.shape, input_ids.shape, *numbers
        if key not in self.graphs:
            self.graphs[key] = self._capture(vision_states, input_ids)
        states = self.graphs[key](vision_states, input_ids)
        return head_loss(self.model, states, labels, num_items_in_batch)

    def _capture(self, *inputs: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
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
    states: Float[Tensor, "R T D"],
    labels: Int[Tensor, "R T"],
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the labelled next words, by matrix products with aligned sizes.

    An odd vocabulary, or an odd number of words, keeps them from the fast kernels.
    """
    weight, vocab_size = model.decoder.lm_head.weight, model.config.vocab_size
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()  # [R*T]
    scored = (targets != IGNORED_LABEL) & (targets != model.config.pad_token_id)
    places = scored.nonzero()[:, 0]  # [K]
    missing = -len(places) % 64
    targets = F.pad(targets[places], (0, missing), value=IGNORED_LABEL)
    states = states.flatten(0, 1)[F.pad(places, (0, missing))]
    logits = F.linear(states, F.pad(weight, (0, 0, 0, -vocab_size % 64)))[:, :vocab_size]
    return fixed_cross_entropy(logits.float(), targets, num_items_in_batch)
