"""Attention of one new token over its KV cache: a single Triton kernel on CUDA, else PyTorch."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

try:  # comes with PyTorch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LONGEST = 128  # positions that one program of the kernel holds


def attend_to_cache(
    made: Float[Tensor, "R 3 G E"],
    cache: Float[Tensor, "R 2 G S E"],
    position: Int[Tensor, " 1"],
    window: int,
) -> Float[Tensor, "R D"]:
    """Causal self-attention of one token; `made` is its query, key and value, which join the cache.

    Unscaled, as in GPT-Neo, to at most `window` tokens, that at `position` included.
    """
    if triton is not None and made.is_cuda and cache.shape[3] <= LONGEST:
        return launch(made.contiguous(), cache, position, window)
    if made.is_cpu and not torch.compiler.is_compiling():  # slices in place of a mask
        here = int(position)
        cache[:, :, :, here] = made[:, 1:]
        keys, values = cache[:, :, :, max(0, here + 1 - window) : here + 1].unbind(1)
        return attend(made[:, 0], keys, values, 1.0)
    cache.index_copy_(3, position, made[:, 1:, :, None])
    places = torch.arange(cache.shape[3], device=made.device)  # [S]
    mask = (places <= position) & (places > position - window)
    return attend(made[:, 0], cache[:, 0], cache[:, 1], 1.0, mask)


def attend(
    query: Float[Tensor, "R H C"],
    keys: Float[Tensor, "R H S C"],
    values: Float[Tensor, "R H S C"],
    scale: float,
    mask: Bool[Tensor, " S"] | None = None,
) -> Float[Tensor, "R D"]:
    """Attention of one query; compiled, as sums over the cache, which is not copied to float32."""
    if not torch.compiler.is_compiling():
        mask = mask if mask is None else mask.expand(len(query), 1, 1, -1)
        parts = query[:, :, None], keys, values  # on a CPU half the time in float32
        parts = [part.float() for part in parts] if query.is_cpu else parts
        read = F.scaled_dot_product_attention(*parts, mask, scale=scale)  # [R,H,1,C]
        return read.to(query.dtype).flatten(1)
    scores = (query[:, :, None].float() * keys.float()).sum(-1) * scale  # [R,H,S]
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    shares = scores.softmax(-1).to(values.dtype)
    return (shares[..., None].float() * values.float()).sum(-2).to(values.dtype).flatten(1)


if triton is not None:

    @triton.jit
    def _attend(
        made, cache, position, read, window, heads, length, width, s: tl.constexpr, e: tl.constexpr
    ):
        row, head = tl.program_id(0), tl.program_id(1)
        here = tl.load(position)
        place, part = tl.arange(0, s), tl.arange(0, e)
        inside = part < width
        mine = made + (row * 3 * heads + head) * width + part
        query = tl.load(mine, mask=inside, other=0).to(tl.float32)
        key = tl.load(mine + heads * width, mask=inside, other=0)
        value = tl.load(mine + 2 * heads * width, mask=inside, other=0)
        keys = cache + (row * 2 * heads + head) * length * width
        values = keys + heads * length * width
        tl.store(keys + here * width + part, key, mask=inside)
        tl.store(values + here * width + part, value, mask=inside)
        # Its own key and value are read from registers, the others from the cache.
        past = (place < here) & (place > here - window)
        tile = place[:, None] * width + part[None, :]
        held = past[:, None] & inside[None, :]
        others = tl.load(keys + tile, mask=held, other=0).to(tl.float32)
        theirs = tl.load(values + tile, mask=held, other=0).to(tl.float32)  # while scores are made
        scores = tl.sum(others * query[None, :], 1)
        scores = tl.where(past, scores, -float("inf"))
        own = tl.sum(query * key.to(tl.float32), 0)
        top = tl.maximum(tl.max(scores, 0), own)
        shares, own = tl.exp(scores - top), tl.exp(own - top)
        total = tl.sum(shares[:, None] * theirs, 0) + own * value.to(tl.float32)
        total = total / (tl.sum(shares, 0) + own)
        tl.store(read + (row * heads + head) * width + part, total, mask=inside)


def launch(
    made: Float[Tensor, "R 3 G E"],
    cache: Float[Tensor, "R 2 G S E"],
    position: Int[Tensor, " 1"],
    window: int,
) -> Float[Tensor, "R D"]:
    """Run the kernel, a program for each row and head."""
    rows, _, heads, width = made.shape
    length = cache.shape[3]
    read = torch.empty(rows, heads * width, dtype=made.dtype, device=made.device)
    padded = 1 << (length - 1).bit_length(), 1 << (width - 1).bit_length()
    sizes = window, heads, length, width, *padded
    _attend[(rows, heads)](made, cache, position, read, *sizes, num_warps=1)
    return read
