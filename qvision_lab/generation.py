"""How to look for a caption: a preset and settings on top of it, and sampling that batches keep."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from qvision_lab.model.captioner import PLAIN, QVisionForConditionalGeneration, generation_preset

WARPERS = {  # settings of sampling, in transformers' order: what applies them, where they are off
    "temperature": (logits_process.TemperatureLogitsWarper, 1.0),
    "top_h": (logits_process.TopHLogitsWarper, None),
    "top_k": (logits_process.TopKLogitsWarper, 0),
    "top_p": (logits_process.TopPLogitsWarper, 1.0),
    "min_p": (logits_process.MinPLogitsWarper, None),
    "typical_p": (logits_process.TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (logits_process.EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (logits_process.EtaLogitsWarper, 0.0),
}
# Where nothing is sampled, transformers warns about any other value; off is 50 for its top_k.
NOT_SAMPLING = {name: off for name, (_, off) in WARPERS.items()} | {"top_k": 50, "do_sample": False}
LIVE_SETTINGS = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"}
UNSAID = {"transformers_version", "return_dict_in_generate"}
UNSAID |= {"bos_token_id", "eos_token_id", "pad_token_id"}


class SeededSampling(LogitsProcessor):
    """Sampling whose draws belong to a row of the batch, whatever stands in the other rows.

    The largest of the logits plus Gumbel noise is a draw from their softmax (the Gumbel-max trick;
    Maddison et al. 2014, arXiv:1411.0030), so a greedy search over these scores samples. Each row
    has its own generator on the CPU, where `torch.multinomial` has one for the whole batch.
    Temperature and all that narrows the choice come first, as in transformers.
    """

    def __init__(self, config: GenerationConfig, keys: list[str]):
        self.warpers = LogitsProcessorList(
            warper(value)
            for name, (warper, off) in WARPERS.items()
            if (value := getattr(config, name)) not in (None, off)
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
        hidden = UNSAID if self.config.do_sample else UNSAID | WARPERS.keys()
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
    ) -> tuple[Int[Tensor, "R T"], Float[Tensor, "R T"]]:
        """Tokens of R = B * `captions_per_image` captions, an image's together.

        Args:
            keys: one an image; its draws depend on its key and the seed alone.

        Returns:
            Ids, without `<START>`, and their log-probabilities (nats) before penalties,
            temperature and all else that a search puts on top of the model.
        """
        config, live, k = copy.deepcopy(self.config), dict(self.live), self.captions_per_image
        if config.do_sample:
            rows = [f"{self.seed}/{key}/{n}" for key in keys for n in range(k)]
            sampling = SeededSampling(config, rows)
            live["logits_processor"] = [*live.get("logits_processor", ()), sampling]
            config.update(**NOT_SAMPLING, num_return_sequences=1)
            visual_tokens = visual_tokens.repeat_interleave(k, dim=0)  # [R,1+Q,D]
        config.update(return_dict_in_generate=True, output_logits=True)
        found = model.generate(visual_tokens=visual_tokens, generation_config=config, **live)
        logprobs = model.compute_transition_scores(
            found.sequences, found.logits, found.get("beam_indices"), normalize_logits=True
        )
        return found.sequences[:, 1:], logprobs
