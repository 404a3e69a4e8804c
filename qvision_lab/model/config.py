"""QVisionConfig: the sizes of every part of the model."""

from math import prod
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GPTNeoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from qvision_lab.model.towers import check_tower, tower_config

# GPT-Neo 350M; its vocabulary is GPT-2's 50,257 entries with <START> and <END> added.
PUBLISHED_TEXT_CONFIG = {"vocab_size": 50259, "hidden_size": 1024, "num_layers": 24}


@strict
class QVisionConfig(PreTrainedConfig):
    """Sizes of a QVision captioner; the defaults are the published model.

    Args:
        vision_config: the tower, CLIP's or another of `towers.TOWERS`; its grid gives P tokens.
        text_config: GPT-Neo; its hidden size D is also the width of the Q-Former.
        num_query_tokens: Q, the learned queries, not counting the global token.
        num_qformer_blocks: Q-Former blocks, each of self-attention, FFN, cross-attention, FFN.
        num_attention_heads: heads of every attention in the Q-Former and of the bridge; divides D.
        dropout: rate in the Q-Former, the bridge and on the text embeddings.
        global_token: of the Q-Former: "token", "none", or "added" to the text embeddings as well.
        bridge: "cross_attention" after GPT-Neo, or "prefix": visual tokens in front of the text.
        bridge_reads: "visual_tokens", or without a Q-Former "image_tokens" or "mean_image_token".
        start_token_id: first token of every caption.
        end_token_id: last token of every caption.
        pad_token_id: never a target of the loss.
    """

    model_type = "qvision"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(model_type="clip_vision_model", config_class=AutoConfig),
        "text_config": GPTNeoConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 64
    num_qformer_blocks: int = 2
    num_attention_heads: int = 8
    dropout: float = 0.1
    global_token: Literal["token", "none", "added"] = "token"
    bridge: Literal["cross_attention", "prefix"] = "cross_attention"
    bridge_reads: Literal["visual_tokens", "image_tokens", "mean_image_token"] = "visual_tokens"
    start_token_id: int = 50257
    end_token_id: int = 50258
    pad_token_id: int = 50256
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = PUBLISHED_TEXT_CONFIG
        if isinstance(self.text_config, dict):
            ends = {"bos_token_id": self.start_token_id, "eos_token_id": self.end_token_id}
            self.text_config = {**self.text_config, **ends}
        self.vision_config = tower_config(self.vision_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Reject sizes that do not fit together (called by transformers' `@strict`)."""
        check_tower(self.vision_config)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide the width "
                f"text_config.hidden_size={self.hidden_size}; choose a divisor of it."
            )
        if self.num_query_tokens < 1 or self.num_qformer_blocks < 1 or not all(self.patch_grid):
            raise ValueError(
                f"num_query_tokens={self.num_query_tokens}, num_qformer_blocks="
                f"{self.num_qformer_blocks} and image_size // patch_size must be at least 1."
            )
        for name in ("start_token_id", "end_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size} "
                    "entries (text_config.vocab_size); set the id of a token that exists."
                )

    @property
    def hidden_size(self) -> int:
        """Width D of image tokens, visual tokens and text."""
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, V."""
        return self.text_config.vocab_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid; their product is P."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def visual_token_labels(self) -> tuple[str, ...]:
        """Names of the visual tokens, in their order."""
        if self.bridge_reads == "mean_image_token":
            return ("mean image token",)
        if self.bridge_reads == "image_tokens":
            return tuple(f"image token {i}" for i in range(prod(self.patch_grid)))
        first = () if self.global_token == "none" else ("global token",)
        return (*first, *(f"query {i}" for i in range(self.num_query_tokens)))


AutoConfig.register(QVisionConfig.model_type, QVisionConfig)
