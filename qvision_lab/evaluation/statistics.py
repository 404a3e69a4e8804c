"""Length, diversity and novelty of captions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of captions; words are lower-case, without punctuation.

    Shares are from 0 to 1; those of words are nan without any word.
    """

    captions: int
    mean_length: float  # in words
    vocabulary: int  # distinct words
    distinct_1: float  # distinct words, as a share of all words
    distinct_2: float  # distinct pairs of neighbours, as a share of all words
    unique: float  # distinct captions, as a share of all captions
    in_training: float | None  # share of captions that are also training captions


def caption_statistics(
    captions: Collection[str], training: Iterable[str] | None = None
) -> CaptionStatistics:
    """Describe a set of captions (ValueError if empty), and its overlap with `training` captions.

    Distinct-1 and distinct-2 (Li et al. 2016, arXiv:1510.03055) are both divided by the number of
    words. They fall as captions are added: compare sets of one size.
    """
    if not captions:
        raise ValueError("no captions: there is nothing to describe.")
    texts = [_words(caption) for caption in captions]
    total = sum(map(len, texts))
    vocabulary = {word for words in texts for word in words}
    pairs = {pair for words in texts for pair in pairwise(words)}
    known = {_words(caption) for caption in training or ()}
    return CaptionStatistics(
        captions=len(texts),
        mean_length=total / len(texts),
        vocabulary=len(vocabulary),
        distinct_1=len(vocabulary) / total if total else float("nan"),
        distinct_2=len(pairs) / total if total else float("nan"),
        unique=len(set(texts)) / len(texts),
        in_training=None if training is None else sum(w in known for w in texts) / len(texts),
    )


def _words(caption: str) -> tuple[str, ...]:
    """Its words; "o'clock" is one, "black-and-white" three."""
    return tuple(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", caption.lower()))
