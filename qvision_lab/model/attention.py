"""Attention that can show its map: the one kind in the Q-Former and the bridge."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over H heads (Vaswani et al. 2017, arXiv:1706.03762).

    Its parameters are those of `torch.nn.MultiheadAttention`, which the published weights were made
    with. Without maps it runs PyTorch's fused kernel; with maps it computes them openly: a fused
    kernel has none to give.
    """

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        query: Float[Tensor, "B T D"],
        key: Float[Tensor, "B S D"],
        value: Float[Tensor, "B S D"],
        output_attentions: bool = False,
        mask: Bool[Tensor, "B #H #T S"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T S"] | None]:
        """Return what each query position read, and on request the map that says from where.

        Where the mask is False nothing is read, and the other positions share the attention.
        """
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        query, key, value = (
            F.linear(x, weight, bias)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # [B,H,T,D/H]
            for x, (weight, bias) in zip((query, key, value), projections, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        attention = None
        if output_attentions or _fused_gradient_is_slow(query):
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # [B,H,T,S]
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            attention = scores.softmax(-1)
            read = F.dropout(attention, dropout) @ value  # [B,H,T,D/H]
        else:
            read = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        read = self.out_proj(read.transpose(1, 2).flatten(2))  # [B,T,D]
        return read, attention if output_attentions else None


def _fused_gradient_is_slow(query: Tensor) -> bool:
    """A CPU's fused kernel takes 3 to 10 times as long for it in bfloat16 as the open way."""
    return query.requires_grad and query.is_cpu and query.dtype == torch.bfloat16


class FeedForward(nn.Sequential):
    """Two linear layers, four times the width between them, with the exact GELU."""

    def __init__(self, width: int, dropout: float):
        super().__init__(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
