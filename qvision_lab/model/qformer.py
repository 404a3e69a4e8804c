"""Stage 2: image tokens [B,P,D] -> visual tokens [B,1+Q,D]."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvision_lab.model.attention import FeedForward, MultiHeadAttention
from qvision_lab.model.config import QVisionConfig

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class QFormerOutput:
    """Visual tokens (index 0 is the global token) and, on request, one map per block."""

    visual_tokens: Float[Tensor, "B N D"]
    self_attentions: tuple[Float[Tensor, "B H N N"], ...] | None = None
    cross_attentions: tuple[Float[Tensor, "B H N P"], ...] | None = None


class QFormerBlock(nn.Module):
    """Self-attention among the queries, cross-attention to the image; an FFN after each."""

    def __init__(self, config: QVisionConfig):
        super().__init__()
        width, heads, dropout = config.hidden_size, config.num_attention_heads, config.dropout
        self.self_attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.self_attention = MultiHeadAttention(width, heads, dropout)
        self.self_ffn_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.self_ffn = FeedForward(width, dropout)
        self.cross_attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.cross_attention = MultiHeadAttention(width, heads, dropout)
        self.cross_ffn_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.cross_ffn = FeedForward(width, dropout)

    def forward(
        self,
        queries: Float[Tensor, "B N D"],
        key: Float[Tensor, "B P D"],
        value: Float[Tensor, "B P D"],
        output_attentions: bool = False,
    ) -> tuple[
        Float[Tensor, "B N D"], Float[Tensor, "B H N N"] | None, Float[Tensor, "B H N P"] | None
    ]:
        normed = self.self_attention_norm(queries)
        attended, self_map = self.self_attention(normed, normed, normed, output_attentions)
        queries = queries + attended
        queries = queries + self.self_ffn(self.self_ffn_norm(queries))
        attended, cross_map = self.cross_attention(
            self.cross_attention_norm(queries), key, value, output_attentions
        )
        queries = queries + attended
        queries = queries + self.cross_ffn(self.cross_ffn_norm(queries))
        return queries, self_map, cross_map


class QFormer(nn.Module):
    """Learned queries that attend to an image (after BLIP-2, Li et al. 2023, arXiv:2301.12597).

    The queries are a learned global token and Q learned query tokens. Keys and values are computed
    from the image tokens once, and all blocks share them. The text is no input.
    """

    def __init__(self, config: QVisionConfig):
        super().__init__()
        width, blocks = config.hidden_size, config.num_qformer_blocks
        self.global_token = nn.Parameter(torch.empty(1, 1, width))
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.key_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(QFormerBlock(config) for _ in range(blocks))

    def forward(
        self, image_tokens: Float[Tensor, "B P D"], output_attentions: bool = False
    ) -> QFormerOutput:
        queries = torch.cat([self.global_token, self.query_tokens], dim=1)  # [1,1+Q,D]
        queries = queries.expand(image_tokens.shape[0], -1, -1)  # [B,1+Q,D]
        key, value = self.key_proj(image_tokens), self.value_proj(image_tokens)  # [B,P,D] each
        maps = []
        for block in self.blocks:
            queries, *block_maps = block(queries, key, value, output_attentions)
            maps.append(block_maps)
        maps = zip(*maps, strict=True) if output_attentions else ()  # self maps, cross maps
        return QFormerOutput(queries, *maps)
