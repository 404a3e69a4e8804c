"""Captions from a compiled step: the same model and weights, one token at a time, faster."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache

from qvision_lab.model.attention import MultiHeadAttention
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.decoder import Decoder, DecoderOutput

Module = TypeVar("Module", bound=nn.Module)
INDUCTOR = {"realize_reads_threshold": 1}  # what a product reads for each row is made once


class CompiledQVision(QVisionForConditionalGeneration):
    """A captioner whose decoding step is compiled; it shares the weights of the one it is given.

    All settings of `generate` work as before.

    Args:
        rows: images times beams that the step is compiled for; others go the eager way.
        length: positions of the cache; a caption has at most so many tokens, `<START>` included.
        int8: round the decoder's matrices to 8 bits, with a scale a row: a token then reads half of
            what it reads in bfloat16, and words may change. All else of it is float32.

    Attributes:
        compile_seconds: what compiling took, half a minute or so at the published size.

    Raises:
        ValueError: for a model whose bridge is a prefix, or that adds its global token to the text.
    """

    def __init__(
        self,
        model: QVisionForConditionalGeneration,
        rows: int = 1,
        length: int = 64,
        int8: bool = False,
    ):
        config = model.config
        if config.bridge == "prefix" or config.global_token == "added":
            raise ValueError(
                f"the compiled step knows no bridge={config.bridge!r} with "
                f"global_token={config.global_token!r}; caption with the model as it is."
            )
        super(QVisionForConditionalGeneration, self).__init__(config)  # builds no parts
        self.vision, self.qformer = model.vision, model.qformer
        self.decoder = CompiledDecoder(model.decoder, rows, int8)
        self.generation_config, self.length = model.generation_config, length
        self.eval()
        start = perf_counter()
        shape = rows, len(config.visual_token_labels), config.hidden_size
        visual_tokens = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.generate(visual_tokens=visual_tokens, do_sample=False, min_length=0, max_new_tokens=2)
        self.compile_seconds = perf_counter() - start

    def generate(self, inputs: Int[Tensor, "R T"] | None = None, **settings):
        """As the eager model does.

        Raises:
            ValueError: if a caption outgrows the cache.
        """
        cache = StaticCache(self.config.text_config, max_cache_len=self.length)
        settings |= {"past_key_values": cache, "disable_compile": True}  # the step is compiled
        return super().generate(inputs, **settings)


class CompiledDecoder(Decoder):
    """A `Decoder` that goes one compiled step at a time where its cache is of fixed size.

    GPT-Neo in transformers cannot: its local layers cut their masks to the length of the cache.
    Here all positions have the same shapes, and the bridge's keys and values are made once a
    caption.
    """

    def __init__(self, decoder: Decoder, rows: int, int8: bool):
        nn.Module.__init__(self)
        decoder = streamed(decoder, int8)
        self.language_model, self.bridge = decoder.language_model, decoder.bridge
        self.lm_head, self.dropout, self.rows = decoder.lm_head, decoder.dropout, rows
        self.compiled = torch.compile(self.step, fullgraph=True, dynamic=False, options=INDUCTOR)

    def forward(
        self,
        input_ids: Int[Tensor, "R T"],
        visual_tokens: Float[Tensor, "R N D"],
        *,
        past_key_values: Cache | None = None,
        **settings,
    ) -> DecoderOutput:
        cache = past_key_values
        if isinstance(cache, StaticCache) and len(input_ids) != self.rows:
            cache = DynamicCache()
            settings["attention_mask"] = None  # made for a cache of fixed size; all is causal
        if not isinstance(cache, StaticCache):
            return super().forward(input_ids, visual_tokens, past_key_values=cache, **settings)
        if not cache.is_initialized:
            heads = self.language_model.config.num_heads
            width = visual_tokens.shape[-1] // heads
            visual_tokens = visual_tokens.to(self.language_model.dtype)  # float32 beside int8
            place = {"dtype": visual_tokens.dtype, "device": visual_tokens.device}
            cache.early_initialization(self.rows, heads, width, **place)
            attention = self.bridge.attention
            cache.seen = [_project(attention, visual_tokens, part) for part in (1, 2)]
        length = cache.layers[0].max_cache_len
        if cache.get_seq_length() + input_ids.shape[1] > length:
            raise ValueError(
                f"the caption outgrew its cache of {length} positions; compile with a "
                "larger length."
            )
        for ids in input_ids.split(1, dim=1):
            logits = self.compiled(ids, cache)
        return DecoderOutput(logits, past_key_values=cache)

    def step(self, input_ids: Int[Tensor, "R 1"], cache: StaticCache) -> Float[Tensor, "R 1 V"]:
        """Score the next word after one more word, which joins those in the cache."""
        text, bridge = self.language_model, self.bridge
        position = cache.layers[0].cumulative_length.clone()  # []
        places = torch.arange(cache.layers[0].max_cache_len, device=position.device)  # [S]
        past = places <= position
        masks = {"global": past, "local": past & (places > position - text.config.window_size)}
        states = text.wte(input_ids) + text.wpe(position)  # [R,1,D]
        for block, layer in zip(text.h, cache.layers, strict=True):
            attention, normed = block.attn.attention, block.ln_1(states)
            query, key, value = (
                _split(project(normed), attention.num_heads)  # [R,G,1,E]
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys, values = layer.update(key, value)  # [R,G,S,E] each
            scores = query.float() @ keys.float().mT  # [R,G,1,S]; GPT-Neo does not scale them
            scores = scores.masked_fill(~masks[attention.attention_type], -torch.inf)
            read = scores.softmax(-1).to(values.dtype) @ values  # [R,G,1,E]
            states = states + attention.out_proj(_join(read))
            states = states + block.mlp(block.ln_2(states))
        states = text.ln_f(states)
        query = _project(bridge.attention, bridge.attention_norm(states), 0)
        read = F.scaled_dot_product_attention(query, *cache.seen)  # [R,H,1,C]
        states = states + bridge.scale * bridge.attention.out_proj(_join(read))
        states = states + bridge.ffn(bridge.ffn_norm(states))
        return self.lm_head(states)


class StreamedLinear(nn.Module):
    """A linear layer whose matrix is read once a token, at the rate that memory gives.

    A product with a single row is a sum, which inductor compiles into one pass over the matrix; the
    matmul kernels of MKL and oneDNN reach about half of that rate. More rows go to those.

    Args:
        int8: round the matrix to whole numbers of 8 bits, with a scale for each row.
    """

    def __init__(self, linear: nn.Linear, int8: bool):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, None
        if int8:
            weight = linear.weight.detach().float()
            scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
            rounded = (weight / scale[:, None]).round().to(torch.int8)
            self.weight = nn.Parameter(rounded, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        if x.numel() == x.shape[-1] and torch.compiler.is_compiling():
            y = (self.weight.float() * x.float().unsqueeze(-2)).sum(-1)
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def streamed(decoder: Decoder, int8: bool) -> Decoder:
    """A decoder whose linear layers, the tied head among them, are streamed.

    It shares the weights of the one given; with int8 it has its own, and computes in float32.
    """
    decoder = copy.deepcopy(decoder) if int8 else copy_sharing_weights(decoder)
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, StreamedLinear(child, int8))
    return decoder.float() if int8 else decoder


def copy_sharing_weights(module: Module) -> Module:
    """A copy whose parts can be changed, with the very parameters and buffers of the original."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _project(attention: MultiHeadAttention, x: Float[Tensor, "R T D"], part: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of an attention with joint weights, [R,H,T,C]."""
    weight, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias.chunk(3)[part]
    return _split(F.linear(x, weight, bias), attention.num_heads)


def _split(x: Float[Tensor, "R T D"], num_heads: int) -> Float[Tensor, "R H T C"]:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join(x: Float[Tensor, "R H T C"]) -> Float[Tensor, "R T D"]:
    return x.transpose(1, 2).flatten(2)
