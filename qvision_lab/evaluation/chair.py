"""CHAIR, object hallucination (Rohrbach et al. 2018, section 2.1), with any `Vocabulary`."""

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from qvision_lab.data.coco import some

COLUMNS = "captions mentioned hallucinated has_hallucination objects recalled hallucinated_objects"

_TOKEN = re.compile(r"[^\W_]+|[.,;:!?]")  # phrases cross hyphens, not commas

# "An orange cat" names no fruit: a color is an object only by fruit or where no noun can follow.
_COLORS = {"orange"}
_NO_NOUN = re.compile(
    r"$|[.;:!?]|(?:and|or|,) (?:an?|the|some|two|(?:apple|banana|carrot|grape|lemon|pear)s?)\b|"
    r"(?:on|in|at|by|with|from|to|for|near|next|beside|that|which|is|has|sits|cut|while|sitting|"
    r"being|hanging|lying|laying|resting|growing)\b"
)

# What is negated ends at such a word: "no dogs or cats", but "no dogs and a cat".
_NEGATIONS = {"no", "not", "without", "isn", "aren"}
_NEGATION_ENDS = re.compile(r"\W|(?:and|but|with|on|in|at|by|near|is|are|has|that|while)$")


class Mention(NamedTuple):
    """An object named in a caption."""

    category: str
    text: str
    span: tuple[int, int]  # caption[start:end] == text


@dataclass(frozen=True)
class Vocabulary:
    """Lower-case phrases, with plurals, to category names; None for phrases that name no object.

    `family` words after "its" name no person if none is named before. Words of `animals` name no
    object in captions with a word of the first set and none of the second.
    """

    phrases: Mapping[str, str | None]
    family: Collection[str] = ()
    animals: Mapping[str, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)

    @cached_property
    def categories(self) -> frozenset[str]:
        return frozenset(filter(None, self.phrases.values()))

    @cached_property
    def _longest(self) -> int:
        return max(len(phrase.split()) for phrase in self.phrases)

    def mentions(self, caption: str) -> list[Mention]:
        """All objects named in a caption, in order.

        From left to right the longest phrase wins, so a hot dog is no dog. Adjacent phrases of one
        category, without punctuation between, are one mention ("tabby cat"); "no dog" has none.
        """
        tokens = list(_TOKEN.finditer(caption))
        words = [token[0].lower() for token in tokens]
        found: list[Mention] = []
        i, last_end, negated = 0, -1, False  # `last_end` is of the last mention, in words
        while i < len(words):
            ends = range(min(i + self._longest, len(words)), i, -1)
            end = next((e for e in ends if " ".join(words[i:e]) in self.phrases), i + 1)
            phrase = " ".join(words[i:end])
            category = self.phrases.get(phrase)
            if phrase in _COLORS and not _NO_NOUN.match(" ".join(words[end : end + 2])):
                category = None
            if phrase in self.animals:
                signs, others = self.animals[phrase]
                if signs.intersection(words) and others.isdisjoint(words):
                    category = None
            of_animal = found and words[i - 1] in ("its", "their", "her", "his")
            if phrase in self.family and of_animal and "person" not in {m.category for m in found}:
                category = None
            negated = phrase in _NEGATIONS or (negated and not _NEGATION_ENDS.match(phrase))
            if category and not negated:
                start = tokens[i].start()
                if last_end == i and found[-1].category == category:
                    start = found.pop().span[0]
                span = start, tokens[end - 1].end()
                found.append(Mention(category, caption[slice(*span)], span))
                last_end = end
            i = end
        return found


@cache
def coco_vocabulary() -> Vocabulary:
    """COCO's 80 categories with their synonyms, plurals and compounds: `coco_words.yaml`."""
    words = yaml.safe_load(Path(__file__).with_name("coco_words.yaml").read_text(encoding="utf-8"))
    phrases: dict[str, str | None] = dict.fromkeys(_forms(words["nothing"]))
    phrases |= {form: name for name, row in words["objects"].items() for form in _forms(row)}
    for qualifiers, names in words["qualifiers"].items():
        phrases |= {
            f"{qualifier} {form}": name
            for name in names.split(", ")
            for form in _forms(words["objects"][name])
            for qualifier in qualifiers.split(", ")
        }
    animals = {
        form: tuple(frozenset(_forms(signs)) for signs in both)
        for noun, both in words["animals"].items()
        for form in _forms(noun)
    }
    return Vocabulary(phrases, frozenset(_forms(words["family"])), animals)


def chair(
    predictions: Mapping[Hashable, str],
    objects: Mapping[Hashable, Collection[str]],
    vocabulary: Vocabulary | None = None,
    references: Mapping[Hashable, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Count the objects that captions name against those in the images, by their ids.

    As in the paper's code, repeated mentions count each time, and the truth is the labelled
    objects together with those that the references name, if given. The vocabulary is COCO's by
    default. A prediction's row, by `image_id`, has the integers `captions` (1), `mentioned` and
    `hallucinated` (mentions), `has_hallucination` (0 or 1), `objects` (categories in the truth) and
    `recalled` (those that are named), and the categories of the `hallucinated_objects`, a tuple.

        CHAIR-i = sum(hallucinated) / sum(mentioned)
        CHAIR-s = sum(has_hallucination) / sum(captions)
        object recall = sum(recalled) / sum(objects)

    ValueError for a prediction without objects (a set may be empty) or references, or a category
    that is not in the vocabulary.
    """
    vocabulary = vocabulary or coco_vocabulary()
    for name, known in (("objects", objects), ("references", references)):
        lacking = [i for i in predictions if known is not None and i not in known]
        if without := some("prediction", lacking):
            raise ValueError(f"{without} without {name}; give them, or leave these out.")
    for name in sorted(set().union(*(objects[i] for i in predictions)) - vocabulary.categories):
        near = get_close_matches(name, vocabulary.categories, n=1, cutoff=0)[0]
        raise ValueError(f"{name!r} is no category of this vocabulary; the nearest is {near!r}.")
    rows = {}
    for image_id, caption in predictions.items():
        named, *others = (
            [mention.category for mention in vocabulary.mentions(text)]
            for text in (caption, *(references[image_id] if references else ()))
        )
        truth = set(objects[image_id]).union(*others)
        wrong = tuple(name for name in named if name not in truth)
        recalled = len(truth.intersection(named))
        rows[image_id] = 1, len(named), len(wrong), int(bool(wrong)), len(truth), recalled, wrong
    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS.split())
    return table.rename_axis("image_id")


def _forms(entries: str) -> Iterable[str]:
    """Singulars and plurals of "cup, knife/knives"."""
    for entry in entries.split(", "):
        noun, _, plural = entry.partition("/")
        stem = re.sub("(?<![aeiou])y$", "ie", re.sub("(s|x|z|ch|sh)$", r"\1e", noun))
        yield from (noun, plural or f"{stem}s")
