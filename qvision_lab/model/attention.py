"""Attention that can return its map, and the feed-forward layers of Q-Former and bridge."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over H heads (Vaswani et al. 2017, arXiv:1706.03762).

    Its parameters are named as in `torch.nn.MultiheadAttention`, which the original code uses.
    PyTorch's fused kernel returns no map, so with maps the steps are computed one by one.
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
        mask: Bool[Tensor, "B #H #T S"] | None = None,  # False where a query must not attend
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T S"] | None]:
        """Return the attended values, and on request the attention map; rows of it sum to 1."""
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        query, key, value = (
            F.linear(x, weight, bias)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # [B,H,T,D/H]
            for x, (weight, bias) in zip((query, key, value), projections, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        attention = None
        # On a CPU the fused backward pass takes 3 to 10 times as long in bfloat16.
        slow = query.requires_grad and query.is_cpu and query.dtype == torch.bfloat16
        if output_attentions or slow:
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # [B,H,T,S]
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            attention = scores.softmax(-1)
            attended = F.dropout(attention, dropout) @ value  # [B,H,T,D/H]
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))  # [B,T,D]
        return attended, attention if output_attentions else None


class FeedForward(nn.Sequential):
    """Two linear layers with the exact GELU; the hidden width is 4D."""

    def __init__(self, width: int, dropout: float):
        super().__init__(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
