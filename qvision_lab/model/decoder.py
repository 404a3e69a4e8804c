"""Stage 3: visual tokens [B,1+Q,D] and the words so far [B,T] -> logits [B,T,V]."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPTNeoModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions as DecoderOutput

from qvision_lab.model.attention import FeedForward, MultiHeadAttention
from qvision_lab.model.config import QVisionConfig


class Bridge(nn.Module):
    """The decoder's cross-attention, the only place where text meets image.

    It follows GPT-Neo's last layer, so the image is no input of the language model.
    """

    def __init__(self, config: QVisionConfig):
        super().__init__()
        width, heads, dropout = config.hidden_size, config.num_attention_heads, config.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads, dropout)
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
        attended, cross_map = self.attention(
            self.attention_norm(text_states), visual_tokens, visual_tokens, output_attentions
        )
        states = text_states + self.scale * attended
        states = states + self.ffn(self.ffn_norm(states))
        return self.dropout(states), cross_map


class Decoder(nn.Module):
    """GPT-Neo (Black et al. 2021, doi:10.5281/zenodo.5297715), the bridge, the tied head."""

    def __init__(self, language_model: GPTNeoModel, bridge: nn.Module, config: QVisionConfig):
        super().__init__()
        self.language_model = language_model
        if language_model.config.activation_function == "gelu_new":
            for block in language_model.h:
                block.mlp.act = nn.GELU("tanh")  # the same function as one kernel instead of eight
        self.bridge = bridge
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        visual_tokens: Float[Tensor, "B N D"],
        output_attentions: bool = False,
        last_logit_only: bool = False,
        scored: Bool[Tensor, "B T"] | None = None,
        **settings,
    ) -> DecoderOutput:
        """Run GPT-Neo over the words, attend to the image in the bridge, score every next word.

        Args:
            last_logit_only: score the last position alone, as a generation step does.
            scored: score these K positions alone, as training does; the logits are then [K,V].
            settings: of GPT-Neo, such as `past_key_values`. Padding on the right needs no
                `attention_mask`, since attention is causal.
        """
        embeddings = self.dropout(self.language_model.wte(input_ids))  # [B,T,D]
        text = self.language_model(
            inputs_embeds=embeddings, output_attentions=output_attentions, **settings
        )
        last = 1 if last_logit_only else input_ids.shape[1]
        states = text.last_hidden_state[:, -last:]  # [B,T,D]
        states, cross_map = self.bridge(states, visual_tokens, output_attentions)
        return DecoderOutput(
            logits=self.lm_head(states if scored is None else states[scored]),  # [B,T,V]
            past_key_values=text.past_key_values,
            hidden_states=text.hidden_states,
            attentions=text.attentions,
            cross_attentions=cross_map,  # [B,H,T,1+Q]
        )
