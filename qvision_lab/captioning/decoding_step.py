"""One decoding step over buffers of fixed address, with few kernels and copies; int8 weights."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from qvision_lab.captioning.cached_attention import attend, attend_to_cache
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.decoder import Decoder, DecoderOutput

NO_SCORE = -1e9  # of a beam that holds nothing; as transformers' beam search has it
PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # oneDNN's, where torch has it
LARGE = 2**22  # multiplications from which it is faster, on an AMD EPYC
FEW = 8  # rows; of 16 oneDNN is faster at the published sizes


@dataclass
class BestBeams:
    """The n best captions of each image that a beam search has ended, the best first."""

    scores: Float[Tensor, "B n"]  # NO_SCORE until as many have ended
    ids: Int[Tensor, "R S+1"]
    logprobs: Float[Tensor, "R S"]
    logits: Float[Tensor, "R S K"]
    running: Float[Tensor, "B n"]  # summed log-probabilities of the beams that go on
    open: Bool[Tensor, "B 1"]  # whether one of them may still be better
    limit: Int[Tensor, " 1"]  # of new tokens

    @property
    def history(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.logprobs, self.logits

    @property
    def full(self) -> Bool[Tensor, "B 1"]:
        return self.scores[:, -1:] > NO_SCORE


@dataclass
class Buffers:
    """Tensors of fixed address that steps read and write; GPT-Neo has G heads, the bridge H.

    R rows are captions, or the n beams of B images, those of an image next to each other.
    """

    ids: Int[Tensor, "R S+1"]  # `<START>`, the tokens so far, and `<START>` again
    logprobs: Float[Tensor, "R S"]
    kept: Int[Tensor, " K"]  # tokens whose logits are kept
    logits: Float[Tensor, "R S K"]
    finished: Bool[Tensor, " R"]
    position: Int[Tensor, " 1"]  # of the token that is read next
    draws: Int[Tensor, "R 2"]  # keys of the random draws
    cache: list[Float[Tensor, "R 2 G S E"]]  # keys and values of each layer
    bridge: Float[Tensor, "2 R H N C"]  # the bridge's keys and values of the visual tokens
    best: BestBeams | None = None  # of a beam search

    @property
    def history(self) -> tuple[Tensor, Tensor, Tensor]:
        """What belongs to each row's caption so far."""
        return self.ids, self.logprobs, self.logits

    @classmethod
    def allocate(
        cls, model: QVisionForConditionalGeneration, rows: int, length: int, kept: int, beams: int
    ) -> "Buffers":
        config, text = model.config, model.config.text_config
        number = {"dtype": model.decoder.language_model.dtype, "device": model.device}
        width, heads = config.hidden_size, config.num_attention_heads
        tokens = len(config.visual_token_labels)
        layer = rows, 2, text.num_heads, length, width // text.num_heads
        buffers = cls(
            ids=torch.zeros(rows, length + 1, dtype=torch.long, device=model.device),
            logprobs=torch.zeros(rows, length, device=model.device),
            kept=torch.zeros(kept, dtype=torch.long, device=model.device),
            logits=torch.zeros(rows, length, kept, device=model.device),
            finished=torch.zeros(rows, dtype=torch.bool, device=model.device),
            position=torch.zeros(1, dtype=torch.long, device=model.device),
            draws=torch.zeros(rows, 2, dtype=torch.long, device=model.device),
            cache=[torch.zeros(layer, **number) for _ in range(text.num_layers)],
            bridge=torch.zeros(2, rows, heads, tokens, width // heads, **number),
        )
        if beams > 1:
            scores = torch.zeros(rows // beams, beams, device=model.device)
            history = map(torch.zeros_like, buffers.history)
            flags = scores.bool()[:, :1], buffers.position.clone()
            buffers.best = BestBeams(scores, *history, scores.clone(), *flags)
        return buffers

    def begin(
        self, start_token_id: int, used: int, steps: int, draws: Int[Tensor, "used 2"] | None
    ) -> None:
        """Reset for a batch whose first `used` rows are captions of at most `steps` tokens."""
        self.ids.fill_(start_token_id)
        if (best := self.best) is not None:
            best.scores.fill_(NO_SCORE)
            best.running.fill_(NO_SCORE)[:, 0] = 0  # the beams of an image begin as one
            best.open.fill_(True)[used // best.scores.shape[1] :] = False
            best.limit.fill_(steps)
        self.position.zero_()
        self.finished.zero_()
        self.finished[used:] = True
        if draws is not None:
            self.draws[:used].copy_(draws, non_blocking=True)


def score_next_token(
    decoder: Decoder, projections: list[list[nn.Module]], head: nn.Module, buffers: Buffers
) -> Float[Tensor, "R V"]:
    """Logits of the next token, after one more token is read and written to the cache.

    A layer's projections are one joined module or three; the head may have more rows.
    """
    text, bridge, position = decoder.language_model, decoder.bridge, buffers.position
    token = buffers.ids.index_select(1, position)[:, 0]
    states = text.wte(token) + text.wpe(position)  # [R,D]
    for block, parts, cache in zip(text.h, projections, buffers.cache, strict=True):
        attention, normed = block.attn.attention, block.ln_1(states)
        made = [product(normed, part) for part in parts]  # [R,3*D] or three [R,D]
        made = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        made = made.unflatten(-1, (3, attention.num_heads, -1))  # [R,3,G,E]
        local = attention.attention_type == "local"
        window = text.config.window_size if local else cache.shape[3]
        read = attend_to_cache(made, cache, position, window)
        states = states + product(read, attention.out_proj)
        inner = block.mlp.act(product(block.ln_2(states), block.mlp.c_fc))
        states = states + product(inner, block.mlp.c_proj)
    states = text.ln_f(states)
    attention, width = bridge.attention, states.shape[-1]
    weight, bias = attention.in_proj_weight[:width], attention.in_proj_bias[:width]
    query = multiply(bridge.attention_norm(states), weight, bias)
    query = query.unflatten(-1, (attention.num_heads, -1))  # [R,H,C]
    read = attend(query, *buffers.bridge, query.shape[-1] ** -0.5)
    states = states + bridge.scale * product(read, attention.out_proj)
    inner = bridge.ffn[1](product(bridge.ffn_norm(states), bridge.ffn[0]))
    states = states + product(inner, bridge.ffn[3])
    return product(states, head)[:, : text.config.vocab_size]  # [R,V]


def product(x: Float[Tensor, "R I"], linear: "nn.Linear | Int8Linear") -> Float[Tensor, "R O"]:
    """A linear layer applied by `multiply`."""
    return multiply(x, linear.weight, linear.bias, getattr(linear, "scale", None))


def multiply(
    x: Float[Tensor, "R I"], weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Float[Tensor, "R O"]:
    """Rows times the transpose of a matrix [O,I], by the fastest method.

    Compiled, a product with a single row is a sum, which inductor makes one pass over the matrix at
    memory bandwidth. In float32 on a CPU oneDNN takes half the time of MKL, which `F.linear` calls,
    for a large product, and up to five times as much for a small one. With a few rows, as of beams,
    the matrix times a few columns is faster than both.
    """
    compiling = torch.compiler.is_compiling()
    eager = not compiling and x.is_cpu and x.dtype == weight.dtype == torch.float32
    if len(x) == 1 and compiling:
        y = (weight.float() * x.float()[:, None]).sum(-1)
    elif eager and 1 < len(x) <= FEW:
        return (weight @ x.T if bias is None else torch.addmm(bias[:, None], weight, x.T)).T
    elif eager and PRODUCT and len(x) * weight.numel() >= LARGE:
        return PRODUCT(x, weight, bias, "none", [], "")
    elif scale is None:
        return F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight.to(x.dtype))
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).to(x.dtype)


def join(layers: list[nn.Linear], multiple: int = 1) -> nn.Linear:
    """Layers without biases as one with rows of zeros added, of which their matrices are views."""
    parts = [layer.weight for layer in layers]
    rows = -(-sum(map(len, parts)) // multiple) * multiple
    first, width = parts[0].detach(), parts[0].shape[1]
    where, size = first.data_ptr(), first.element_size()
    together = first.untyped_storage().nbytes() == rows * width * size
    for part in parts:
        together = together and part.data_ptr() == where
        where += part.numel() * size
    if together:
        matrix = first.as_strided((rows, width), (width, 1), 0)
    else:
        matrix, begin = first.new_zeros(rows, width), 0
        for part in parts:
            view = matrix[begin : begin + len(part)]
            part.data, begin = view.copy_(part.detach()), begin + len(part)
    linear = nn.Linear(width, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        y = multiply(x.flatten(0, -2), self.weight, self.bias, self.scale)
        return y.view(*x.shape[:-1], -1)


class Int8Decoder(Decoder):
    """A decoder with int8 matrices, the tied head among them; all else is float32."""

    def __init__(self, decoder: Decoder):
        nn.Module.__init__(self)
        decoder = copy.deepcopy(decoder).float()
        self.language_model, self.bridge = decoder.language_model, decoder.bridge
        self.lm_head, self.dropout = decoder.lm_head, decoder.dropout
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))

    def forward(self, input_ids: Tensor, visual_tokens: Tensor, **settings) -> DecoderOutput:
        return super().forward(input_ids, visual_tokens.float(), **settings)


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A copy whose modules can be replaced, with the parameters and buffers of the original."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
