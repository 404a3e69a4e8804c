"""Confidence in what a caption claims: in each object, color, count and relation, calibrated."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LIMIT, MOST = 14.0, 500  # of log-odds, beyond which float32 is not exact; of words
Weight = Annotated[float, Field(gt=-1000, lt=1000)]
Word = Annotated[str, Field(max_length=40)]


class Kind(BaseModel, strict=True, extra="forbid"):
    words: dict[str, list[Word]]  # spellings of each value, inside a caption
    before: list[str]  # kinds one of which follows immediately; none: its words are nouns
    weights: Annotated[list[Weight], Field(min_length=4, max_length=4)]  # bias, own, noun, least


class Calibration(BaseModel, strict=True, extra="forbid"):
    """What a checkpoint keeps: kinds by name, and the weights of a whole caption."""

    kinds: dict[str, Kind]
    caption: Annotated[list[Weight], Field(min_length=2, max_length=2)]  # bias, `all_right`


class Claim(NamedTuple):
    """One claim of a caption, and the probability that it is right."""

    kind: str  # as its checkpoint names it: "object", "color", "count", "relation"
    text: str
    tokens: tuple[int, int]  # index of its first token in the caption, and of the one after it
    own: float  # log-odds of what it says among all that its kind could say there
    noun: float  # least log-odds of the nouns next to it: what is said of a wrong one is wrong
    least: float  # of all claims of the caption
    confidence: float


class Confidence:
    """Confidence in claims, by their probability among their alternatives, and calibrated.

    A word competes with the words of its kind alone, "red" with the other colors, and spellings of
    one value count together: a caption that could be phrased otherwise is not less sure for that.
    A logistic regression on captions of known truth (Platt 1999) makes probabilities of these
    log-odds. ValueError for too many words.
    """

    def __init__(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase):
        self.calibration, self._decode = calibration, tokenizer.decode
        self._words: dict[tuple[int, ...], tuple[str, list]] = {}
        at: dict[int, int] = {}  # index of a token among `tokens`
        kinds = calibration.kinds.items()
        if sum(len(words) for _, kind in kinds for words in kind.words.values()) > MOST:
            raise ValueError(f"more than {MOST} words")
        for name, kind in kinds:
            spelled = {
                tuple(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]): value
                for value, words in kind.words.items()
                for word in words
            }
            for ids, value in spelled.items():
                steps = []  # against the words that begin as it does so far
                for n in range(len(ids)):
                    after = [(x[n], v) for x, v in spelled.items() if x[:n] == ids[:n] != x]
                    same = {token for token, v in after if v == value}
                    rest = {token for token, _ in after} - same
                    steps.append([[at.setdefault(i, len(at)) for i in x] for x in (same, rest)])
                self._words[ids] = name, steps
        self._longest = max(map(len, self._words), default=0)
        self.tokens = torch.tensor([*at], dtype=torch.long)  # [K], whose logits are read

    def judge(
        self, ids: Sequence[int], logits: Float[Tensor, "T K"]
    ) -> tuple[tuple[Claim, ...], float | None]:
        """Claims of a caption of T tokens, in order, and the confidence that all are right.

        `logits` are the model's of `tokens`, where it chose each token. None without a claim.
        """
        likely = logits.double().softmax(-1).tolist()
        kinds, claims, found, start = self.calibration.kinds, [], [], 0
        while start < len(ids):  # of several words at a token the longest
            stops = range(min(start + self._longest, len(ids)), start, -1)
            stop = next((n for n in stops if tuple(ids[start:n]) in self._words), None)
            found += [(start, stop)] if stop else []
            start = stop or start + 1
        phrases: list[list[tuple]] = []  # claims next to each other, the last first
        for start, stop in reversed(found):
            name, steps = self._words[tuple(ids[start:stop])]
            near = phrases[-1] if phrases and phrases[-1][-1][1] == stop else []
            before = kinds[name].before
            if not before or (near and near[-1][0] in before):
                phrases += [] if near else [near]
                near.append((name, start, stop, _compete(steps, likely[start:stop])))
        least = min((own for phrase in phrases for *_, own in phrase), default=0.0)
        for phrase in phrases:
            noun = min(own for name, *_, own in phrase if not kinds[name].before)
            for name, start, stop, own in phrase:
                confidence = claim_probability(kinds[name].weights, own, noun, least)
                text = self._decode(ids[start:stop]).strip()
                claims.append(Claim(name, text, (start, stop), own, noun, least, confidence))
        whole = probability(self.calibration.caption, all_right(claims)) if claims else None
        return tuple(claims[::-1]), whole


def all_right(claims: Sequence[Claim]) -> float:
    """Log-odds that all claims are right, if they were independent."""
    product = math.prod(claim.confidence for claim in claims)
    return _log_odds(product, 1 - product)


def _log_odds(right: float, wrong: float) -> float:
    return min(LIMIT, max(-LIMIT, math.log(max(right, 1e-300)) - math.log(max(wrong, 1e-300))))


def _compete(steps: list[list[list[int]]], likely: list[list[float]]) -> float:
    """Log-odds of a word among those of its kind, from weights of all K tokens at its places."""
    right, wrong = 1.0, 0.0
    for (same, rest), weights in zip(steps, likely, strict=True):
        ours, theirs = (sum(weights[i] for i in x) for x in (same, rest))
        right *= ours / (ours + theirs or 1)
        wrong += theirs / (ours + theirs or 1)
    return _log_odds(right, wrong)


def claim_probability(weights: Sequence[float], own: float, noun: float, least: float) -> float:
    """Of a claim: where the model prefers another word, at most what it gives to this one."""
    fitted, worst = probability(weights, own, noun, least), min(own, noun)
    return fitted if worst >= 0 else min(fitted, probability((0.0, 1.0), worst))


def probability(weights: Sequence[float], *evidence: float) -> float:
    """Logistic regression: of a bias, and a weight for each log-odds."""
    odds = sum(weight * x for weight, x in zip(weights, (1.0, *evidence), strict=True))
    return 1 / (1 + math.exp(-min(2 * LIMIT, max(-2 * LIMIT, odds))))
