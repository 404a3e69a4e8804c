"""The whole model: joins the stages, scores captions and generates them."""

from dataclasses import dataclass
from math import prod
from os import PathLike

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Cache,
    GenerationConfig,
    GenerationMixin,
    GPTNeoModel,
    PreTrainedModel,
    initialization,
)
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import ModelOutput

from qvision_lab.model.attention import MultiHeadAttention
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.decoder import Bridge, Decoder
from qvision_lab.model.qformer import QFormer, QFormerOutput
from qvision_lab.model.towers import build_tower
from qvision_lab.model.variants import build_variant
from qvision_lab.model.vision import VisionEncoder

IGNORED_LABEL = -100  # of transformers' collators: a position without a loss

# Complete, because `generate` takes what is missing from the model's own settings.
PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
}
_GREEDY = {**PLAIN, "do_sample": False, "max_new_tokens": 30}
_SAMPLING = {**_GREEDY, "do_sample": True, "top_k": 40, "top_p": 0.9, "min_length": 5}
GENERATION_PRESETS: dict[str, dict] = {  # the first two: the original code's and its card's
    "published": {**_SAMPLING, "temperature": 0.6, "repetition_penalty": 1.8},
    "model_card": {**_SAMPLING, "temperature": 0.7, "repetition_penalty": 1.5},
    "greedy": _GREEDY,
    "beam": {**_GREEDY, "num_beams": 3},
}


def generation_preset(name: str, config: QVisionConfig) -> GenerationConfig:
    """One of `GENERATION_PRESETS`, with the special tokens of a model."""
    if name not in GENERATION_PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(GENERATION_PRESETS)}.")
    return GenerationConfig(
        **GENERATION_PRESETS[name],
        bos_token_id=config.start_token_id,
        eos_token_id=config.end_token_id,
        pad_token_id=config.pad_token_id,
    )


@dataclass
class QVisionOutput(ModelOutput):
    """Output of one forward pass; the maps only with `output_attentions=True`.

    Shapes: B images, R rows of text (a multiple of B), T tokens, N = 1 + Q visual tokens.
    """

    loss: Float[Tensor, ""] | dict | None = None  # ModelOutput can be built from a dict
    logits: Float[Tensor, "*targets V"] | None = None  # [R,T,V]; of a training loss [K,V]
    past_key_values: Cache | None = None
    hidden_states: tuple[Float[Tensor, "R _ D"], ...] | None = None
    attentions: tuple[Float[Tensor, "R G _ S"], ...] | None = None  # GPT-Neo's self-attention
    image_tokens: Float[Tensor, "B P D"] | None = None
    visual_tokens: Float[Tensor, "B N D"] | None = None
    qformer_self_attentions: tuple[Float[Tensor, "B H N N"], ...] | None = None
    qformer_cross_attentions: tuple[Float[Tensor, "B H N P"], ...] | None = None
    decoder_cross_attentions: Float[Tensor, "R H T N"] | None = None


class QVisionForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Frozen CLIP -> Q-Former -> GPT-Neo with a bridge: an image captioner.

    `encode`, `forward` and `generate` take one of four inputs: `pixel_values` [B,3,H,W] or the
    output of a later stage, `vision_states` [B,P,C] (CLIP's output, as cached), `image_tokens`
    [B,P,D] or `visual_tokens` [B,1+Q,D], so that no stage runs twice.
    """

    config: QVisionConfig
    config_class = QVisionConfig
    main_input_name = "input_ids"  # what `generate` extends; the image stays the same
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "QFormerBlock", "GPTNeoBlock"]
    _supports_sdpa = True
    _tied_weights_keys = {"decoder.lm_head.weight": "decoder.language_model.wte.weight"}

    def __init__(self, config: QVisionConfig):
        super().__init__(config)
        config.text_config._attn_implementation = "eager"  # GPT-Neo has no fused attention
        tower = build_tower(config.vision_config)
        self.vision = VisionEncoder(tower, prod(config.patch_grid), config.hidden_size)
        self.qformer, self.decoder = build_variant(config) or (
            QFormer(config),
            Decoder(GPTNeoModel._from_config(config.text_config), Bridge(config), config),
        )
        self.generation_config = generation_preset("published", config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MultiHeadAttention):
            initialization.xavier_uniform_(module.in_proj_weight)
            initialization.zeros_(module.in_proj_bias)
        elif isinstance(module, QFormer):
            initialization.normal_(module.global_token, std=0.02)
            initialization.normal_(module.query_tokens, std=0.02)
        elif isinstance(module, Bridge):
            initialization.ones_(module.scale)

    def save_pretrained(self, save_directory: str | PathLike, **settings) -> None:
        """As transformers', with the names that the weights have here, also those of towers."""
        super().save_pretrained(save_directory, **{"save_original_format": False} | settings)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.language_model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.language_model.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.decoder.lm_head = value

    def encode(
        self,
        pixel_values: Float[Tensor, "B 3 H W"] | None = None,
        vision_states: Float[Tensor, "B P C"] | None = None,
        image_tokens: Float[Tensor, "B P D"] | None = None,
        visual_tokens: Float[Tensor, "B N D"] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B P D"] | None, QFormerOutput]:
        """Encode images, from the one input that is given (else ValueError) to the visual tokens.

        Returns:
            The image tokens (None where visual tokens were given) and the Q-Former's output.
        """
        inputs = {"pixel_values": pixel_values, "vision_states": vision_states}
        inputs |= {"image_tokens": image_tokens, "visual_tokens": visual_tokens}
        given = [name for name, value in inputs.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"pass exactly one of {', '.join(inputs)}; got {', '.join(given) or 'none'}."
            )
        if visual_tokens is not None:
            return None, QFormerOutput(visual_tokens)
        if pixel_values is not None:
            vision_states = self.vision.encode(pixel_values)  # [B,P,C]
        if vision_states is not None:
            image_tokens = self.vision.project(vision_states)  # [B,P,D]
        return image_tokens, self.qformer(image_tokens, output_attentions)

    def forward(
        self,
        input_ids: Int[Tensor, "R T"] | None = None,
        pixel_values: Float[Tensor, "B 3 H W"] | None = None,
        vision_states: Float[Tensor, "B P C"] | None = None,
        image_tokens: Float[Tensor, "B P D"] | None = None,
        visual_tokens: Float[Tensor, "B N D"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "R T"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> QVisionOutput:
        """Score every next word of captions, given their images.

        Args:
            input_ids: R = k * B rows, the k captions of an image next to each other; each image is
                encoded once. By default the start token alone.
            labels: targets, not yet shifted; pads and `IGNORED_LABEL` are no targets. In training
                mode only the K targets are scored: the logits are then [K,V].
            num_items_in_batch: divisor of the summed loss where the batch is one part of a larger
                one (the Trainer passes it, so that accumulation gives the same gradient).
            logits_to_keep: 0 for all positions, 1 for the last alone.

        Raises:
            ValueError: if not exactly one image input is given, or the rows do not divide evenly.
        """
        image_tokens, visual = self.encode(
            pixel_values, vision_states, image_tokens, visual_tokens, output_attentions
        )
        if input_ids is None:
            input_ids = self._start_tokens(visual.visual_tokens)
        captions_per_image, remainder = divmod(len(input_ids), len(visual.visual_tokens))
        if remainder:
            raise ValueError(
                f"{len(input_ids)} rows of input_ids for {len(visual.visual_tokens)} images: give "
                "every image the same number of captions, next to each other."
            )
        loss = scored = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # [R,T]
            scored = (targets != IGNORED_LABEL) & (targets != self.config.pad_token_id)
        only_loss = self.training and labels is not None
        text = self.decoder(
            input_ids,
            visual.visual_tokens.repeat_interleave(captions_per_image, dim=0),  # [R,1+Q,D]
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            last_logit_only=logits_to_keep == 1,
            scored=scored if only_loss else None,
        )
        if labels is not None:
            logits = text.logits if only_loss else text.logits[scored]  # [K,V]
            loss = fixed_cross_entropy(logits.float(), targets[scored], num_items_in_batch)
        return QVisionOutput(
            loss=loss,
            logits=text.logits,
            past_key_values=text.past_key_values,
            hidden_states=text.hidden_states,
            attentions=text.attentions,
            image_tokens=image_tokens,
            visual_tokens=visual.visual_tokens,
            qformer_self_attentions=visual.self_attentions,
            qformer_cross_attentions=visual.cross_attentions,
            decoder_cross_attentions=text.cross_attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Int[Tensor, "R T"] | None = None,
        *,
        pixel_values: Float[Tensor, "B 3 H W"] | None = None,
        vision_states: Float[Tensor, "B P C"] | None = None,
        image_tokens: Float[Tensor, "B P D"] | None = None,
        visual_tokens: Float[Tensor, "B N D"] | None = None,
        input_ids: Int[Tensor, "R T"] | None = None,
        **settings,
    ):
        """Caption images with transformers' `generate`; `settings` are any of its settings.

        Each image is encoded once, for any number of steps, beams or returned sequences.

        Args:
            input_ids: a prompt, which begins with the start token; by default that token alone.

        Returns:
            Ids [B * num_return_sequences, T], `<START>` first, or a `GenerateOutput` with
            `return_dict_in_generate=True`.
        """
        _, visual = self.encode(pixel_values, vision_states, image_tokens, visual_tokens)
        prompt = inputs if inputs is not None else input_ids
        if prompt is None:
            prompt = self._start_tokens(visual.visual_tokens)
        return super().generate(prompt, visual_tokens=visual.visual_tokens, **settings)

    def _start_tokens(self, visual_tokens: Float[Tensor, "B N D"]) -> Int[Tensor, "B 1"]:
        shape = (len(visual_tokens), 1)
        return torch.full(shape, self.config.start_token_id, device=visual_tokens.device)


AutoModelForImageTextToText.register(QVisionConfig, QVisionForConditionalGeneration)
