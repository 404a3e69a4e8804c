"""Choice of the next token: penalties, logits warpers and batch-invariant sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import logits_process

from qvision_lab.model.captioner import PLAIN

WARPERS = {  # settings of sampling, in transformers' order: their warper, and the value for "off"
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
# What a `Choice` supports; any other setting that is not off needs transformers' `generate`.
SUPPORTED = {"do_sample", "num_return_sequences", "temperature", "top_k", "top_p", "min_length"}
SUPPORTED |= {"repetition_penalty", "length_penalty", "max_length", "max_new_tokens", "use_cache"}
UNRECORDED = {"bos_token_id", "eos_token_id", "pad_token_id"}  # they are the model's own
UNRECORDED |= {"transformers_version", "return_dict_in_generate"}
SUPPORTED |= UNRECORDED
OF_BEAMS = {"num_beams", "early_stopping"}

_LOW = 0xFFFFFFFF  # the lower 32 bits
Keys: TypeAlias = Int[Tensor, "R 2"]  # two 32-bit numbers a row, from `row_keys`
Step: TypeAlias = Int[Tensor, " 1"] | int  # number of tokens so far, `<START>` included


def _mix(x: Int[Tensor, "R K"]) -> Int[Tensor, "R K"]:
    """Hash of 32-bit integers (lowbias32, https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_LOW)
    x ^= x >> 15
    x = x.mul_(0x846CA68B).bitwise_and_(_LOW)
    return x.bitwise_xor_(x >> 16)


def random_integers(keys: Keys, step: Step, tokens: Int[Tensor, "#R K"]) -> Int[Tensor, "R K"]:
    """Counter-based random 32-bit integers (Salmon et al. 2011, doi:10.1145/2063384.2063405).

    They depend on row key, step and token alone: not on the device, other rows or other tokens.
    """
    first, second = _mix((keys + step * 0x9E3779B9) & _LOW).split(1, dim=1)  # [R,1] each
    return _mix(_mix((tokens * 0x85EBCA6B + first) & _LOW) ^ second)


def row_keys(names: Sequence[str]) -> Keys:
    """Keys of the random draws of each row, hashed from names; the same in every process."""
    encoded = (name.encode("utf-8", "surrogatepass") for name in names)  # of any file name
    digests = b"".join(blake2b(name, digest_size=8).digest() for name in encoded)
    return torch.from_numpy(np.frombuffer(digests, ">u4").astype(np.int64)).reshape(-1, 2)


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: greedily, by beams, or by batch-invariant sampling.

    The largest of the logits plus Gumbel noise is a draw from their softmax (the Gumbel-max trick;
    Maddison et al. 2014, arXiv:1411.0030). Draws of a row depend on its key, not on other rows.
    transformers' warpers come first; of more than `top_k` tokens with equal scores, `top_k` are
    kept.
    """

    repetition_penalty: float = 1.0
    min_length: int = 0  # tokens, `<START>` included, before which no caption ends
    sampling: tuple[tuple[str, float | None], ...] | None = None  # values of the `WARPERS`
    beams: int = 1  # more than one: of a beam search, as are the following
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    @classmethod
    def from_config(cls, config: GenerationConfig) -> "Choice | None":
        """The choice that settings describe; None where they need transformers' `generate`."""
        off = {name: value for name, (_, value) in WARPERS.items()} | PLAIN
        beams = config.num_beams or 1
        supported = SUPPORTED | OF_BEAMS if beams > 1 else SUPPORTED
        beyond = any(
            value not in (None, off.get(name))
            for name, value in config.to_diff_dict().items()
            if name not in supported and not name.startswith("_")
        )
        if beyond or (not config.do_sample and (config.num_return_sequences or 1) > beams):
            return None  # of the latter `generate` raises the error
        penalty, length = config.repetition_penalty or 1.0, config.min_length or 0
        if beams > 1:
            by_length = 1.0 if config.length_penalty is None else config.length_penalty
            return cls(penalty, length, None, beams, by_length, config.early_stopping or False)
        return cls(penalty, length, cls.sampler(config).sampling if config.do_sample else None)

    @classmethod
    def sampler(cls, config: GenerationConfig) -> "Choice":
        """The choice that samples by the warpers of the settings alone."""
        return cls(sampling=tuple((name, getattr(config, name, None)) for name in WARPERS))

    def warpers(self) -> dict[str, LogitsProcessor]:
        """transformers' warpers of the settings; ValueError for a value out of range."""
        given = [(name, value, *WARPERS[name]) for name, value in self.sampling or ()]
        return {name: make(value) for name, value, make, off in given if value not in (None, off)}

    def penalise(
        self, scores: Float[Tensor, "R V"], ids: Int[Tensor, "R S"], length: Step, end_token_id: int
    ) -> Float[Tensor, "R V"]:
        """Scores after the penalty for repetition, and without `<END>` before `min_length`."""
        if self.repetition_penalty != 1:
            penalty = logits_process.RepetitionPenaltyLogitsProcessor(self.repetition_penalty)
            scores = penalty(ids, scores)
        if self.min_length > 1:
            tokens = torch.arange(scores.shape[1], device=scores.device)[None]  # [1,V]
            ends = (tokens == end_token_id) & (length < self.min_length)
            scores = scores.masked_fill(ends, -torch.inf)
        return scores

    def next_tokens(
        self,
        logits: Float[Tensor, "R V"],
        ids: Int[Tensor, "R S"],
        length: Step,
        end_token_id: int,
        keys: Keys,
    ) -> Int[Tensor, " R"]:
        """The next token of each row; `ids` are `length` tokens, then `<START>` as padding."""
        scores = self.penalise(logits, ids, length, end_token_id)
        if self.sampling is None:
            return scores.argmax(-1)
        tokens = torch.arange(scores.shape[1], device=scores.device)[None]  # [1,V]
        for name, warper in self.warpers().items():
            if name != "top_k":
                scores = warper(ids, scores)
            elif warper.top_k < scores.shape[1]:
                scores, tokens = scores.topk(warper.top_k)  # [R,K] each: only these need noise
        # 23 bits and a half are exact in float32, so that none rounds to 0 or 1.
        uniform = ((random_integers(keys, length, tokens) >> 9).float() + 0.5) * 2.0**-23
        scores = scores - torch.log(-torch.log(uniform))
        return tokens.expand_as(scores).gather(1, scores.argmax(-1, keepdim=True))[:, 0]
