"""The settings of a search for captions: a preset, what is put on top of it, and how it is run."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.sampling import (
    NOT_SAMPLING,
    WARPERS,
    Choice,
    Sampling,
    SeededSampling,
    row_keys,
)
from qvision_lab.model.captioner import PLAIN, QVisionForConditionalGeneration, generation_preset

LIVE_SETTINGS = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"}
UNSAID = {"transformers_version", "return_dict_in_generate"}
UNSAID |= {"bos_token_id", "eos_token_id", "pad_token_id"}


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
        own = model.generation_config
        config = copy.deepcopy(own) if preset is None else generation_preset(preset, model.config)
        draws = any(settings.get(name) is not None for name in WARPERS)
        if draws or (settings.get("num_beams") or 1) > 1:
            settings = {"do_sample": draws, **settings}
        rest = config.update(**settings, return_dict_in_generate=False)
        if unknown := sorted(rest.keys() - LIVE_SETTINGS):
            raise ValueError(
                f"no generation setting {', '.join(map(repr, unknown))}; see transformers' "
                "GenerationConfig for those there are."
            )
        live = {name: value for name, value in rest.items() if value is not None}
        if config.do_sample and (config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={config.num_beams} and sampling: choose one of them (num_beams=1 or "
                "do_sample=False), or call model.generate, which knows beam sampling."
            )
        if config.do_sample:
            Sampling.from_config(config)  # a value out of range is found now, not in a batch
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
        hidden = UNSAID if self.config.do_sample else UNSAID | WARPERS.keys()
        said = {
            name: value
            for name, value in self.config.to_diff_dict().items()
            if name not in hidden and value != PLAIN.get(name) and not name.startswith("_")
        }
        return said | {name: type(value).__name__ for name, value in self.live.items()}

    @property
    def new_tokens(self) -> int:
        """How many tokens a caption has at most, `<END>` included."""
        limit = self.config.max_new_tokens
        return limit if limit is not None else (self.config.max_length or 20) - 1

    def run(
        self,
        decoding: FastDecoding,
        pixel_values: Float[Tensor, "B 3 H W"],
        names: list[str],
    ) -> tuple[Int[Tensor, "R T"], Float[Tensor, "R T"]]:
        """Tokens of R = B * `captions_per_image` captions, an image's together.

        Args:
            decoding: the fast way; what it cannot run, transformers' `generate` does.
            names: one an image; its draws depend on its name and the seed alone.

        Returns:
            Ids, without `<START>`, and their log-probabilities (nats) before penalties,
            temperature and all else that a search puts on top of the model.
        """
        model, k, keys = decoding.model, self.captions_per_image, None
        if self.config.do_sample:
            keys = row_keys([f"{self.seed}/{name}/{n}" for name in names for n in range(k)])
        choice = None if self.live else Choice.from_config(self.config)
        if choice is not None and decoding.can_run(self.new_tokens):
            return decoding.run(choice, self.new_tokens, keys, k, pixel_values=pixel_values)
        config, live = copy.deepcopy(self.config), dict(self.live)
        _, visual = model.encode(pixel_values.to(model.device))
        visual_tokens = visual.visual_tokens  # [B,1+Q,D]
        if keys is not None:
            sampling = Sampling.from_config(config)
            processors = live.get("logits_processor", ())
            live["logits_processor"] = [*processors, SeededSampling(sampling, keys)]
            config.update(**NOT_SAMPLING, num_return_sequences=1)
            visual_tokens = visual_tokens.repeat_interleave(k, dim=0)  # [R,1+Q,D]
        config.update(return_dict_in_generate=True, output_logits=True)
        found = model.generate(visual_tokens=visual_tokens, generation_config=config, **live)
        logprobs = model.compute_transition_scores(
            found.sequences, found.logits, found.get("beam_indices"), normalize_logits=True
        )
        return found.sequences[:, 1:].cpu(), logprobs.cpu()
