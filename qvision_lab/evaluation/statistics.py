"""How long, how varied and how new captions are: what no comparison with references tells."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class CaptionStatistics:
    """Numbers of a set of captions; words are lower-cased and without punctuation.

    Shares are from 0 to 1; those of words are nan where there is no word at all.
    """

    captions: int
    mean_length: float  # in words
    vocabulary: int  # distinct words
    distinct_1: float  # distinct words, as a share of all words
    distinct_2: float  # distinct pairs of neighbours, as a share of all words
    unique: float  # distinct captions, as a share of all captions
    seen: float | None  # share of captions that are, word for word, among the training captions


def caption_statistics(
    captions: Collection[str], training: Iterable[str] | None = None
) -> CaptionStatistics:
    """Describe a set of captions.

    Distinct-1 and distinct-2 are those of Li et al. 2016 (arXiv:1510.03055), who
    scale both by the number of words. They fall as captions are added: compare sets of one size.

    Args:
        training: captions that the model learned from; without them `seen` is None.

    Raises:
        ValueError: there is no caption.
    """
    if not captions:
        raise ValueError("no captions: there is nothing to describe.")
    told = [_words(caption) for caption in captions]
    total = sum(map(len, told))
    vocabulary = {word for words in told for word in words}
    pairs = {pair for words in told for pair in pairwise(words)}
    known = {_words(caption) for caption in training or ()}
    return CaptionStatistics(
        captions=len(told),
        mean_length=total / len(told),
        vocabulary=len(vocabulary),
        distinct_1=len(vocabulary) / total if total else float("nan"),
        distinct_2=len(pairs) / total if total else float("nan"),
        unique=len(set(told)) / len(told),
        seen=None if training is None else sum(words in known for words in told) / len(told),
    )


def _words(caption: str) -> tuple[str, ...]:
    """Its words; "o'clock" is one, "black-and-white" three."""
    return tuple(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", caption.lower()))
