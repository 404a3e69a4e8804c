"""How the next word is chosen: penalties, what narrows the choice, and batch-invariant sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from qvision_lab.model.captioner import PLAIN

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
# What a `Choice` knows how to do; any other setting that is not off needs transformers' `generate`.
KNOWN = {"do_sample", "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p"}
KNOWN |= {"min_length", "max_length", "max_new_tokens", "transformers_version", "length_penalty"}
KNOWN |= {"bos_token_id", "eos_token_id", "pad_token_id", "return_dict_in_generate", "use_cache"}

_LOW = 0xFFFFFFFF  # the lower 32 bits


def _mix(x: Int[Tensor, "R K"]) -> Int[Tensor, "R K"]:
    """Scramble 32-bit numbers (lowbias32, https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_LOW)
    x ^= x >> 15
    x = x.mul_(0x846CA68B).bitwise_and_(_LOW)
    return x.bitwise_xor_(x >> 16)


def random_integers(
    keys: Int[Tensor, "R 2"], step: Int[Tensor, " 1"] | int, words: Int[Tensor, "#R K"]
) -> Int[Tensor, "R K"]:
    """Random numbers of 32 bits that depend on row key, step and word alone (counter-based).

    The same integers on every device, whatever the other rows and words are (Salmon et al. 2011,
    doi:10.1145/2063384.2063405).

    Args:
        keys: two numbers of 32 bits a row, as `row_keys` makes them.
        step: tokens so far, `<START>` included.
    """
    first, second = _mix((keys + step * 0x9E3779B9) & _LOW).split(1, dim=1)  # [R,1] each
    return _mix(_mix((words * 0x85EBCA6B + first) & _LOW) ^ second)


def gumbel_noise(
    keys: Int[Tensor, "R 2"], step: Int[Tensor, " 1"] | int, words: Int[Tensor, "#R K"]
) -> Float[Tensor, "R K"]:
    """Gumbel noise from `random_integers`; all of it is finite."""
    # 23 bits and a half are exact in float32, so that none becomes 0 or 1.
    uniform = ((random_integers(keys, step, words) >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def row_keys(names: Sequence[str]) -> Int[Tensor, "R 2"]:
    """What the draws of each row depend on, the same in every process."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    halves = [[int.from_bytes(d[:4], "big"), int.from_bytes(d[4:], "big")] for d in digests]
    return torch.tensor(halves, dtype=torch.int64).reshape(-1, 2)


class Sampling:
    """Batch-invariant sampling: the draws of a row depend on its key, whatever the other rows are.

    The largest of the logits plus Gumbel noise is a draw from their softmax (the Gumbel-max trick;
    Maddison et al. 2014, arXiv:1411.0030). Temperature and all that narrows the choice come first,
    by transformers' own warpers and in their order; of more words than `top_k` with equal scores,
    `top_k` are kept.

    Args:
        settings: by their names in `WARPERS`; those that are off may be left out.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, settings: dict[str, float | None]):
        made = {
            name: warper(settings[name])
            for name, (warper, off) in WARPERS.items()
            if settings.get(name) not in (None, off)
        }
        narrowed = made.pop("top_k", None)
        self.top_k = narrowed and narrowed.top_k
        first = ("temperature", "top_h")  # what comes before top_k
        self.before = LogitsProcessorList(w for name, w in made.items() if name in first)
        self.behind = LogitsProcessorList(w for name, w in made.items() if name not in first)

    @classmethod
    def from_config(cls, config: GenerationConfig) -> Sampling:
        """What a configuration says of sampling."""
        return cls({name: getattr(config, name) for name in WARPERS})

    def words(
        self,
        ids: Int[Tensor, "R T"],
        scores: Float[Tensor, "R V"],
        keys: Int[Tensor, "R 2"],
        step: Int[Tensor, " 1"] | int,
    ) -> Int[Tensor, " R"]:
        """Draw a word for each row; `keys` and `step` as `random_integers` takes them."""
        scores = self.before(ids, scores)
        words = torch.arange(scores.shape[1], device=scores.device)[None]  # [1,V]
        if self.top_k and self.top_k < scores.shape[1]:
            scores, words = scores.topk(self.top_k)  # [R,K] each: so few need noise
        scores = self.behind(ids, scores) + gumbel_noise(keys, step, words)
        return words.expand_as(scores).gather(1, scores.argmax(-1, keepdim=True))[:, 0]


class SeededSampling(LogitsProcessor):
    """`Sampling` inside transformers' `generate`: a greedy search over these scores samples."""

    def __init__(self, sampling: Sampling, keys: Int[Tensor, "R 2"]):
        self.sampling, self.keys = sampling, keys

    def __call__(
        self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]
    ) -> Float[Tensor, "R V"]:
        keys, step = self.keys.to(scores.device), input_ids.shape[1]
        words = self.sampling.words(input_ids, scores.float(), keys, step)
        return torch.full_like(scores, -torch.inf).scatter(1, words[:, None], 0)


@dataclass(frozen=True)
class Choice:
    """How the next word is chosen from scores: greedily, or sampled.

    Args:
        min_length: tokens, `<START>` included, before which no caption ends.
        sampling: temperature, top_k and top_p; None where nothing is sampled.
    """

    repetition_penalty: float
    min_length: int
    sampling: tuple[tuple[str, float | None], ...] | None

    @classmethod
    def from_config(cls, config: GenerationConfig) -> Choice | None:
        """What the settings of a search say; None where they say more than a `Choice` knows."""
        off = {name: value for name, (_, value) in WARPERS.items()} | PLAIN
        said = {k: v for k, v in config.to_diff_dict().items() if not k.startswith("_")}
        if any(name not in KNOWN and v not in (None, off.get(name)) for name, v in said.items()):
            return None
        if not config.do_sample and (config.num_return_sequences or 1) > 1:
            return None  # `generate` says what is wrong with it
        names = ("temperature", "top_k", "top_p")
        sampling = tuple((name, getattr(config, name)) for name in names)
        return cls(
            repetition_penalty=config.repetition_penalty or 1.0,
            min_length=config.min_length or 0,
            sampling=sampling if config.do_sample else None,
        )

    @cached_property
    def _parts(self) -> tuple[LogitsProcessorList, Sampling]:
        penalty = logits_process.RepetitionPenaltyLogitsProcessor
        penalties = [penalty(self.repetition_penalty)] if self.repetition_penalty != 1 else []
        return LogitsProcessorList(penalties), Sampling(dict(self.sampling or ()))

    def words(
        self,
        logits: Float[Tensor, "R V"],
        ids: Int[Tensor, "R S"],
        length: Int[Tensor, " 1"],
        end_token_id: int,
        keys: Int[Tensor, "R 2"],
    ) -> Int[Tensor, " R"]:
        """The next word of each row.

        Args:
            ids: tokens so far, then `<START>`, which every row begins with anyway.
            length: tokens so far.
            keys: of the rows' draws.
        """
        penalties, sampling = self._parts
        scores = penalties(ids, logits)
        if self.min_length > 1:
            ends = torch.arange(scores.shape[1], device=scores.device) == end_token_id  # [V]
            scores = scores.masked_fill(ends & (length < self.min_length), -torch.inf)
        if self.sampling is None:
            return scores.argmax(-1)
        return sampling.words(ids, scores, keys, length)
