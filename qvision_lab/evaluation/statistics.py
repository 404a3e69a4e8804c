"""Length, diversity and novelty of captions."""

import re
from collections.abc import Collection, Iterable
from itertools import pairwise


def caption_statistics(
    captions: Collection[str], training: Iterable[str] | None = None
) -> dict[str, float | None]:
    """Describe a set of captions (ValueError if empty), and its overlap with `training` captions.

    Shares are from 0 to 1, those of words nan without any word. Distinct-1 and distinct-2 (Li et
    al. 2016, arXiv:1510.03055) fall as captions are added: compare sets of one size.
    """
    if not captions:
        raise ValueError("no captions: there is nothing to describe.")
    texts = [_words(caption) for caption in captions]
    total = sum(map(len, texts))
    vocabulary = {word for words in texts for word in words}
    pairs = {pair for words in texts for pair in pairwise(words)}
    known = {_words(caption) for caption in training or ()}
    return {
        "captions": len(texts),
        "mean_length": total / len(texts),  # in words
        "vocabulary": len(vocabulary),  # distinct words
        "distinct_1": len(vocabulary) / total if total else float("nan"),
        "distinct_2": len(pairs) / total if total else float("nan"),  # pairs of neighbours
        "unique": len(set(texts)) / len(texts),  # share of distinct captions
        "in_training": None if training is None else sum(w in known for w in texts) / len(texts),
    }


def _words(caption: str) -> tuple[str, ...]:
    """Its words; "o'clock" is one, "black-and-white" three."""
    return tuple(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", caption.lower()))
