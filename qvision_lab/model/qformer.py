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
    """The queries talk to each other, then look at the image; an FFN after each."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.self_attention = MultiHeadAttention(width, num_heads, dropout)
        self.self_ffn_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.self_ffn = FeedForward(width, dropout)
        self.cross_attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.cross_attention = MultiHeadAttention(width, num_heads, dropout)
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
        talked, self_map = self.self_attention(normed, normed, normed, output_attentions)
        queries = queries + talked
        queries = queries + self.self_ffn(self.self_ffn_norm(queries))
        seen, cross_map = self.cross_attention(
            self.cross_attention_norm(queries), key, value, output_attentions
        )
        queries = queries + seen
        queries = queries + self.cross_ffn(self.cross_ffn_norm(queries))
        return queries, self_map, cross_map


class QFormer(nn.Module):
    """Learned queries that read an image (after BLIP-2, Li et al. 2023, arXiv:2301.12597).

    One learned global token (or none) stands in front of Q learned query tokens. Keys and values
    are made from the image tokens once and shared by all blocks. The text plays no part.
    """

    def __init__(self, config: QVisionConfig):
        super().__init__()
        width, heads, dropout = config.hidden_size, config.num_attention_heads, config.dropout
        self.global_token = nn.Parameter(torch.empty(1, int(config.global_token != "none"), width))
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.key_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            QFormerBlock(width, heads, dropout) for _ in range(config.num_qformer_blocks)
        )

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
        maps = zip(*maps, strict=True) if output_attentions else ()  # all self, all cross
        return QFormerOutput(queries, *maps)


class WithoutQFormer(nn.Module):
    """The image tokens, or their mean, as visual tokens: what is the Q-Former worth?"""

    def __init__(self, config: QVisionConfig):
        super().__init__()
        self.blocks, self.num_heads = (), config.num_attention_heads
        self.mean = config.bridge_reads == "mean_image_token"

    def forward(
        self, image_tokens: Float[Tensor, "B P D"], output_attentions: bool = False
    ) -> QFormerOutput:
        patches = torch.eye(image_tokens.shape[1]).to(image_tokens)  # [P,P]
        shares = patches.mean(0, keepdim=True) if self.mean else patches  # [N,P]
        maps = (torch.eye(len(shares)).to(shares), shares) if output_attentions else ()
        maps = ((x.expand(len(image_tokens), self.num_heads, -1, -1),) for x in maps)  # [B,H,N,·]
        return QFormerOutput(shares @ image_tokens, *maps)
