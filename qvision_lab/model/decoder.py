"""Stage 3: visual tokens [B,1+Q,D] and the words so far [B,T] -> logits [B,T,V]."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GPTNeoModel

from qvision_lab.model.attention import FeedForward, MultiHeadAttention
from qvision_lab.model.config import QVisionConfig


@dataclass(frozen=True)
class DecoderOutput:
    """Logits of the next token at each position, the KV cache, and what was asked for."""

    logits: Float[Tensor, "B T V"] | Float[Tensor, "K V"]
    past_key_values: Cache | None = None
    hidden_states: tuple[Float[Tensor, "B _ D"], ...] | None = None  # a prefix's come first
    self_attentions: tuple[Float[Tensor, "B G _ S"], ...] | None = None
    cross_attentions: Float[Tensor, "B H T N"] | None = None


class Bridge(nn.Module):
    """The decoder's cross-attention: the only place where text meets image.

    It sits behind GPT-Neo's last layer, so the language model itself never sees the picture.
    """

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, num_heads, dropout)
        self.scale = nn.Parameter(torch.empty(1))
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        text_states: Float[Tensor, "B T D"],
        visual_tokens: Float[Tensor, "B N D"],
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T N"] | None]:
        seen, cross_map = self.attention(
            self.attention_norm(text_states), visual_tokens, visual_tokens, output_attentions
        )
        states = text_states + self.scale * seen
        states = states + self.ffn(self.ffn_norm(states))
        return self.dropout(states), cross_map


class Decoder(nn.Module):
    """GPT-Neo (Black et al. 2021, doi:10.5281/zenodo.5297715), the bridge, the tied head."""

    global_weight = 0.0  # of the global token in the text embeddings

    def __init__(self, language_model: GPTNeoModel, config: QVisionConfig):
        super().__init__()
        width, heads, dropout = config.hidden_size, config.num_attention_heads, config.dropout
        self.language_model = language_model
        if language_model.config.activation_function == "gelu_new":
            for block in language_model.h:
                block.mlp.act = nn.GELU("tanh")  # the same in one pass over memory, not in eight
        self.bridge = None if config.bridge == "prefix" else Bridge(width, heads, dropout)
        if config.global_token == "added":
            self.global_weight = 0.2  # as the original once tried
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        visual_tokens: Float[Tensor, "B N D"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        last_logit_only: bool = False,
        scored: Bool[Tensor, "B T"] | None = None,
    ) -> DecoderOutput:
        """Read the words with GPT-Neo, look at the image through the bridge, score every next word.

        Args:
            attention_mask: 1 for words, 0 for padding. Padding on the right needs none: attention
                is causal.
            last_logit_only: score the last position alone, as a generation step does.
            scored: score these K positions alone, as training does; the logits are then [K,V].
        """
        embeddings = self.dropout(self.language_model.wte(input_ids))  # [B,T,D]
        if self.global_weight:
            embeddings = embeddings + self.global_weight * visual_tokens[:, :1]
        if self.bridge is None:  # a prefix, as in ClipCap (Mokady et al. 2021, arXiv:2111.09734)
            position_ids = None  # counted from the prefix on, also behind a cache
            if past_key_values is None or not past_key_values.get_seq_length():
                embeddings = torch.cat([visual_tokens, embeddings], dim=1)  # [B,N+T,D]
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (visual_tokens.shape[1], 0), value=1)
        text = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        last = 1 if last_logit_only else input_ids.shape[1]
        states, cross_map = text.last_hidden_state[:, -last:], None  # [B,T,D]
        if self.bridge is not None:
            states, cross_map = self.bridge(states, visual_tokens, output_attentions)
        return DecoderOutput(
            logits=self.lm_head(states if scored is None else states[scored]),  # [...,V]
            past_key_values=text.past_key_values,
            hidden_states=text.hidden_states,
            self_attentions=text.attentions,
            cross_attentions=cross_map,
        )
