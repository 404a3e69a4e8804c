"""Generation of captions: complete, checked settings, and the search that they describe."""

import copy
import json
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from qvision_lab.captioning.compiled import FastDecoding, is_hooked
from qvision_lab.captioning.sampling import NOT_SAMPLING, UNRECORDED, WARPERS, Choice, row_keys
from qvision_lab.model.captioner import PLAIN, QVisionForConditionalGeneration, generation_preset
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import image_preset

LIVE_SETTINGS = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"}
LIVE_SETTINGS |= {"tokenizer"}  # that `stop_strings` needs
LIMITS = {"max_new_tokens": (1, 10**6), "max_length": (2, 10**6), "min_length": (0, 10**6)}
LIMITS |= {"num_beams": (1, 1000), "num_return_sequences": (1, 1000), "top_k": (0, 10**6)}
LIMITS |= {"seed": (-(2**63), 2**63), "batch_size": (1, 10**6), "length_penalty": (-1e6, 1e6)}
LIMITS |= {n: (0.0, 1e6) for n in (*WARPERS, "max_time") if n not in LIMITS}
LIMITS["repetition_penalty"] = (1e-6, 1e6)
TRIED: WeakKeyDictionary = WeakKeyDictionary()  # model -> settings that `try_out` accepted last


@dataclass(frozen=True)
class Search:
    """Settings of `generate`, checked and complete, and of the preprocessing."""

    config: GenerationConfig
    live: dict  # objects that take part, such as a streamer
    seed: int | None  # None where nothing is sampled
    preprocessing: str

    @classmethod
    def from_settings(
        cls,
        model: QVisionForConditionalGeneration,
        /,
        *,
        preset: str | None = None,
        preprocessing: str = "training",
        seed: int = 0,
        **settings,
    ) -> "Search":
        """Put settings on top of a preset, or of the model's own; ValueError if they do not fit."""
        image_preset(preprocessing, model.config.vision_config.image_size)  # raises if unknown
        seed = check_number("seed", seed)
        for name, value in settings.items():
            if name in LIMITS and value is not None:
                settings[name] = check_number(name, value)
            elif name in LIVE_SETTINGS and value is not None:
                settings[name] = check_live(name, value)
            elif isinstance(value, list | tuple):
                settings[name] = plain(value)
        if isinstance(bias := settings.get("sequence_bias"), dict):  # JSON has no tuples as keys
            settings["sequence_bias"] = plain([*bias.items()])
        if settings.get("max_length") is not None:  # it counts `<START>`
            if settings.get("max_new_tokens") is not None:
                raise ValueError("max_length and max_new_tokens exclude each other: leave one out.")
            settings["max_new_tokens"] = settings.pop("max_length") - 1
        own = model.generation_config
        config = copy.deepcopy(own) if preset is None else generation_preset(preset, model.config)
        samples = any(settings.get(name) is not None for name in WARPERS)
        if samples or (settings.get("num_beams") or 1) > 1:
            single = {"num_beams": 1} if samples and preset is None else {}  # not the model's own
            settings = {"do_sample": samples, **single, **settings}
        rest = config.update(**{**settings, "return_dict_in_generate": False})
        if unknown := sorted(rest.keys() - LIVE_SETTINGS):
            raise ValueError(
                f"no generation setting {', '.join(map(repr, unknown))}; see transformers' "
                "GenerationConfig for those that exist."
            )
        live = {name: value for name, value in rest.items() if value is not None}
        config.num_return_sequences = config.num_return_sequences or 1
        if config.do_sample and (config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={config.num_beams} and sampling: choose one of them (num_beams=1 or "
                "do_sample=False), or call model.generate, which supports beam sampling."
            )
        if config.do_sample:
            Choice.sampler(config).warpers()  # raises now, not in a batch
        else:
            config.update(**NOT_SAMPLING)  # transformers warns about a preset's sampling settings
        search = cls(config, live, seed if config.do_sample else None, preprocessing)
        positions = model.config.text_config.max_position_embeddings
        if not 1 <= (new := search.new_tokens) <= positions:
            raise ValueError(f"max_new_tokens={new}: the model has {positions:,} positions.")
        tried = not live and TRIED.get(model) == config
        if Choice.from_config(config) is None and not tried and not is_hooked(model):
            try:
                search.try_out(model)
                TRIED[model] = config
            except Exception as error:  # of many types
                problem = f"generate cannot use {settings} ({error})"
                raise ValueError(f"{problem}: change them, or leave some out.") from error
        return search

    def try_out(self, model: QVisionForConditionalGeneration) -> None:
        """Generate a token without an image: most settings are first read in `generate`."""
        config, shape = copy.deepcopy(self.config), model.config
        config.update(max_new_tokens=1, min_length=0, min_new_tokens=None)
        if config.do_sample:
            config.update(**NOT_SAMPLING, num_return_sequences=1)
        tokens = torch.zeros(1, len(shape.visual_token_labels), shape.hidden_size)
        how = {"generation_config": config, "tokenizer": self.live.get("tokenizer")}
        model.eval().generate(visual_tokens=tokens.to(model.device, model.dtype), **how)

    @property
    def new_tokens(self) -> int:
        """Maximum number of tokens of a caption, `<END>` included."""
        limit = self.config.max_new_tokens
        return limit if limit is not None else (self.config.max_length or 20) - 1

    def describe(self) -> dict:
        """The preprocessing, and the settings that differ from the defaults, for JSON."""
        hidden = UNRECORDED if self.config.do_sample else UNRECORDED | WARPERS.keys()
        changed = {
            name: value
            for name, value in self.config.to_diff_dict().items()
            if name not in hidden and value != PLAIN.get(name) and not name.startswith("_")
        }
        live = {name: type(value).__name__ for name, value in self.live.items()}
        return plain({"preprocessing": self.preprocessing, **changed, **live})

    def run(
        self,
        decoding: FastDecoding,
        keys: list[str],
        kept: Int[Tensor, " K"] | None = None,
        **image: Tensor,
    ) -> tuple[Int[Tensor, "R T"], Float[Tensor, "R T"], Float[Tensor, "R T K"]]:
        """Generate R = B * `num_return_sequences` captions, by `generate` where `decoding` cannot.

        `image` is one of the inputs of `encode`, on the model's device.
        Draws for an image depend on its key and the seed alone. Returns ids, without `<START>`,
        their log-probabilities (nats) and the logits of the tokens `kept`, under the model itself:
        before penalties, temperature and other processing of the logits.
        """
        model, k, draws = decoding.model, self.config.num_return_sequences, None
        if self.config.do_sample:
            draws = row_keys([f"{self.seed}/{key}/{n}" for key in keys for n in range(k)])
        choice = None if self.live else Choice.from_config(self.config)
        if choice is not None and decoding.can_run():
            return decoding.run(choice, self.new_tokens, draws, k, kept, **image)
        config, live = copy.deepcopy(self.config), dict(self.live)
        _, visual = model.encode(**image)
        visual_tokens = visual.visual_tokens  # [B,1+Q,D]
        if draws is not None:
            sampler, draws = Choice.sampler(config), draws.to(model.device)

            def sample(ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Tensor:
                end = model.config.end_token_id
                tokens = sampler.next_tokens(scores.float(), ids, ids.shape[1], end, draws)
                return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0)

            live["logits_processor"] = [*live.get("logits_processor", ()), sample]
            config.update(**NOT_SAMPLING, num_return_sequences=1)
            visual_tokens = visual_tokens.repeat_interleave(k, dim=0)  # [R,1+Q,D]
        config.update(return_dict_in_generate=True, output_logits=True)
        found = model.generate(visual_tokens=visual_tokens, generation_config=config, **live)
        scored = found.sequences, found.logits, found.get("beam_indices")
        logprobs = model.compute_transition_scores(*scored, normalize_logits=True)
        ids = found.sequences[:, 1:].cpu()
        kept = slice(0) if kept is None else kept
        logits = torch.stack([step[:, kept] for step in found.logits], dim=1).float().cpu()
        if (beams := found.get("beam_indices")) is not None:  # the row of each token
            places = torch.arange(ids.shape[1])
            logits = logits[beams[:, : len(places)].clamp(min=0).cpu(), places]
        return ids, logprobs.cpu(), logits


def without_padding(ids: list[int], config: QVisionConfig) -> list[int]:
    """Ids of a caption, `<END>` included, of a row of `Search.run`."""
    if config.end_token_id in ids:
        return ids[: ids.index(config.end_token_id) + 1]
    while len(ids) > 1 and ids[-1] == config.pad_token_id:  # a stopping criterion came first
        ids = ids[:-1]
    return ids


def check_number(name: str, value: object) -> int | float:
    """A number among `LIMITS`; ValueError for one out of range, and for text."""
    low, high = LIMITS[name]
    if type(value := plain(value)) not in (int, type(low)) or not low <= value <= high:
        kind = "whole number" if type(low) is int else "number"
        raise ValueError(f"{name}={value!r} must be a {kind} from {low:,} to {high:,}.")
    return type(low)(value)


def check_live(name: str, value: Any) -> Any:
    """An object that takes part in `generate`, a single processor or criterion in a list."""
    several = name in ("logits_processor", "stopping_criteria")
    parts = value if several and isinstance(value, list | tuple) else [value]
    needed = {"streamer": "put", "tokenizer": "decode"}.get(name, "__call__")
    if not all(hasattr(part, needed) for part in parts):
        raise ValueError(f"{name}={value!r:.100} cannot take part: it needs {needed!r}.")
    return parts if several else value


def plain(value: object) -> Any:
    """A value as JSON gives it back; numpy's numbers as Python's, other objects as their type."""
    convert = lambda x: x.tolist() if hasattr(x, "tolist") else type(x).__name__  # noqa: E731
    return json.loads(json.dumps(value, default=convert))
