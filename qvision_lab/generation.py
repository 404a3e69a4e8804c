"""How to look for a caption: a preset and settings on top of it, and sampling that batches keep."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qvision_lab.model.captioner import QVisionForConditionalGeneration, generation_preset

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # what this module's sampling knows
NOT_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
# generate fills what is unset from the model's own settings, but a preset means what it says.
PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
}
LIVE_SETTINGS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}


class SeededSampling(LogitsProcessor):
    """Sampling whose draws belong to a row of the batch, whatever stands in the other rows.

    The largest of the logits plus Gumbel noise is a draw from their softmax (the Gumbel-max trick;
    Maddison et al. 2014, arXiv:1411.0030), so a greedy search over these scores samples. Each row
    has its own generator on the CPU, where `torch.multinomial` has one for the whole batch.
    Temperature, top-k, top-p and min-p come first, as in transformers; what is None is off.
    """

    def __init__(self, config: GenerationConfig, keys: list[str]):
        warpers = {
            "temperature": TemperatureLogitsWarper,
            "top_k": TopKLogitsWarper,
            "top_p": TopPLogitsWarper,
            "min_p": MinPLogitsWarper,
        }
        self.warpers = LogitsProcessorList(
            warpers[name](value)
            for name, value in ((name, getattr(config, name)) for name in SAMPLING)
            if value is not None and (name, value) != ("top_k", 0)  # both mean: off
        )
        self.generators = [torch.Generator().manual_seed(_hash(key)) for key in keys]

    def __call__(
        self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]
    ) -> Float[Tensor, "R V"]:
        scores = self.warpers(input_ids, scores.float())
        exponential = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        )
        return scores - exponential.log().to(scores.device)  # -log of an exponential is Gumbel


def _hash(key: str) -> int:
    """A seed of 64 bits that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Search:
    """Settings of `generate`, checked and complete, and the seed of what is drawn."""

    config: GenerationConfig
    live: dict  # objects that take part, such as a streamer
    seed: int

    @classmethod
    def from_settings(
        cls, model: QVisionForConditionalGeneration, preset: str | None, seed: int, settings: dict
    ) -> Search:
        """Put settings on top of a preset, or of the model's own settings.

        Raises:
            ValueError: if a setting does not exist or does not fit the others.
        """
        if preset is None:
            config = copy.deepcopy(model.generation_config)
        else:
            config = generation_preset(preset, model.config)
            config.update(defaults_only=True, **PLAIN)
        live = {name: settings[name] for name in LIVE_SETTINGS if settings.get(name) is not None}
        settings = {name: value for name, value in settings.items() if name not in LIVE_SETTINGS}
        if "do_sample" not in settings:
            if any(settings.get(name) is not None for name in SAMPLING):
                settings["do_sample"] = True
            elif (settings.get("num_beams") or 1) > 1:
                settings["do_sample"] = False
        if unknown := config.update(**settings, return_dict_in_generate=False):
            raise ValueError(
                f"no generation setting {', '.join(map(repr, unknown))}; see transformers' "
                "GenerationConfig for those there are."
            )
        if config.do_sample and (config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={config.num_beams} and sampling: choose one of them (num_beams=1 or "
                "do_sample=False), or call model.generate, which knows beam sampling."
            )
        if config.do_sample:
            SeededSampling(config, keys=[])  # a value out of range is found now, not in a batch
        else:
            config.update(**NOT_SAMPLING)  # what the preset says of sampling would be warned about
        return cls(config, live, seed)

    @property
    def captions_per_image(self) -> int:
        return self.config.num_return_sequences or 1

    @property
    def drawn_seed(self) -> int | None:
        """The seed, or None where nothing is drawn."""
        return self.seed if self.config.do_sample else None

    def describe(self) -> dict:
        """Settings that are not the plain ones, as far as JSON can say them."""
        hidden = {"transformers_version", "return_dict_in_generate", *SPECIAL_TOKENS}
        hidden |= set() if self.config.do_sample else set(SAMPLING)
        said = {
            name: value
            for name, value in self.config.to_diff_dict().items()
            if name not in hidden and value != PLAIN.get(name) and not name.startswith("_")
        }
        return said | {name: type(value).__name__ for name, value in self.live.items()}

    def run(
        self,
        model: QVisionForConditionalGeneration,
        visual_tokens: Float[Tensor, "B N D"],
        keys: list[str],
    ) -> Int[Tensor, "R T"]:
        """Ids of R = B * `captions_per_image` captions, an image's together, `<START>` first.

        Args:
            keys: one an image; its draws depend on its key and the seed alone.
        """
        k = self.captions_per_image
        config, live, rows = copy.deepcopy(self.config), dict(self.live), len(keys)
        if config.do_sample:
            row_keys = [f"{self.seed}/{key}/{n}" for key in keys for n in range(k)]
            sampling = SeededSampling(config, row_keys)
            live["logits_processor"] = [*live.get("logits_processor", ()), sampling]
            config.update(**NOT_SAMPLING, num_return_sequences=1)
            rows = len(row_keys)
        start = torch.full((rows, 1), model.config.start_token_id, device=visual_tokens.device)
        return model.generate(start, visual_tokens=visual_tokens, generation_config=config, **live)
