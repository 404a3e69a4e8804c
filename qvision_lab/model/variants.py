"""Replacements of stages for ablations; the published model uses none of them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GPTNeoModel

from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.decoder import Bridge, Decoder, DecoderOutput
from qvision_lab.model.qformer import QFormer, QFormerOutput

GLOBAL_WEIGHT = 0.2  # of the global token where it is added to the text, as in the original code


def build_variant(config: QVisionConfig) -> tuple[nn.Module, Decoder] | None:
    """Q-Former and decoder of an ablation; None where the configuration asks for none."""
    fields = config.global_token, config.bridge, config.bridge_reads
    if fields == ("token", "cross_attention", "visual_tokens"):
        return None
    has_qformer = config.bridge_reads == "visual_tokens"
    qformer = QFormer(config) if has_qformer else WithoutQFormer(config)
    if has_qformer and config.global_token == "none":
        qformer.global_token = nn.Parameter(torch.empty(1, 0, config.hidden_size))
    language_model = GPTNeoWithImage._from_config(config.text_config)
    language_model.prefix = config.bridge == "prefix"
    language_model.global_weight = GLOBAL_WEIGHT if config.global_token == "added" else 0.0
    bridge = WithoutBridge() if language_model.prefix else Bridge(config)
    return qformer, DecoderWithImage(language_model, bridge, config)


def require_parts(config: QVisionConfig, *parts: str) -> None:
    """Raise ValueError for a variant of the model without its "bridge" or "Q-Former"."""
    settings = {"bridge": "bridge", "Q-Former": "bridge_reads"}
    published = {"bridge": "cross_attention", "bridge_reads": "visual_tokens"}
    for part, name in ((part, settings[part]) for part in parts):
        if (value := getattr(config, name)) != published[name]:
            raise ValueError(f"this model has no {part} ({name}={value!r}); choose one with it.")


class WithoutQFormer(nn.Module):
    """The image tokens, or their mean, as visual tokens; one-hot or uniform maps."""

    def __init__(self, config: QVisionConfig):
        super().__init__()
        self.blocks, self.num_heads = (), config.num_attention_heads
        self.mean = config.bridge_reads == "mean_image_token"

    def forward(
        self, image_tokens: Float[Tensor, "B P D"], output_attentions: bool = False
    ) -> QFormerOutput:
        patches = torch.eye(image_tokens.shape[1]).to(image_tokens)  # [P,P]
        weights = patches.mean(0, keepdim=True) if self.mean else patches  # [N,P]
        maps = (torch.eye(len(weights)).to(weights), weights) if output_attentions else ()
        maps = ((x.expand(len(image_tokens), self.num_heads, -1, -1),) for x in maps)  # [B,H,N,·]
        return QFormerOutput(weights @ image_tokens, *maps)


class WithoutBridge(nn.Module):
    """Unchanged text states, and no map: a prefix is read inside GPT-Neo."""

    def forward(self, text_states: Tensor, visual_tokens: Tensor, output_attentions: bool = False):
        return text_states, None


class GPTNeoWithImage(GPTNeoModel):
    """GPT-Neo that reads visual tokens too: the global one added to each word, or all as a prefix.

    The prefix is that of ClipCap (Mokady et al. 2021, arXiv:2111.09734).
    """

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        image: Float[Tensor, "B N D"],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **settings,
    ):
        if self.global_weight:
            inputs_embeds = inputs_embeds + self.global_weight * image[:, :1]
        if self.prefix:
            settings["position_ids"] = None  # counted from the prefix on, with a cache too
            if past_key_values is None or not past_key_values.get_seq_length():
                inputs_embeds = torch.cat([image, inputs_embeds], dim=1)  # [B,N+T,D]
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (image.shape[1], 0), value=1)
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        return super().forward(**inputs, past_key_values=past_key_values, **settings)


class DecoderWithImage(Decoder):
    """A decoder that passes the visual tokens to its language model too."""

    def forward(self, input_ids: Tensor, visual_tokens: Tensor, **settings) -> DecoderOutput:
        return super().forward(input_ids, visual_tokens, image=visual_tokens, **settings)
