"""Objects that captions name and pictures do not show: CHAIR (Rohrbach et al. 2018, section 2.1).

What counts as naming an object is a `Vocabulary`: a value, so that COCO and Scenes are scored by
the same code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import yaml

from qvision_lab.data.coco import some
from qvision_lab.scenes.layout import CATEGORIES

COLUMNS = "captions mentioned hallucinated has_hallucination objects recalled hallucinated_objects"

_TOKEN = re.compile(r"[^\W_]+|[.,;:!?]")  # a phrase may run over a hyphen, not over a comma

# "An orange cat" names no fruit: a color is a thing only where what follows cannot be a noun.
_COLORS = {"orange"}
_NO_NOUN = re.compile(
    r"$|[.;:!?]|(?:and|or|,) (?:an?|the|some|two)\b|(?:on|in|at|by|with|from|to|for|near|next|"
    r"beside|that|which|is|has|sits|cut|sitting|being|hanging|lying|laying|resting|growing)\b"
)


@dataclass(frozen=True)
class Mention:
    """An object as a caption names it."""

    category: str
    text: str
    span: tuple[int, int]  # caption[start:end] == text


@dataclass(frozen=True)
class Vocabulary:
    """What captions call things: lower-case phrases, plurals among them, to category names.

    A phrase of None names nothing, and keeps its words from being read one by one.
    """

    phrases: Mapping[str, str | None]

    @cached_property
    def categories(self) -> frozenset[str]:
        return frozenset(filter(None, self.phrases.values()))

    @cached_property
    def _longest(self) -> int:
        return max(len(phrase.split()) for phrase in self.phrases)

    def mentions(self, caption: str) -> list[Mention]:
        """The objects that a caption names, in order; every time that it names them.

        From left to right the longest phrase wins, so a hot dog is no dog. Two phrases of one
        category with only a space or hyphen between them are one mention ("tabby cat").
        """
        tokens = list(_TOKEN.finditer(caption))
        words = [token[0].lower() for token in tokens]
        found: list[Mention] = []
        i, last_end = 0, -1  # where the last mention ended, in words
        while i < len(words):
            ends = range(min(i + self._longest, len(words)), i, -1)
            end = next((e for e in ends if " ".join(words[i:e]) in self.phrases), i + 1)
            phrase = " ".join(words[i:end])
            category = self.phrases.get(phrase)
            if phrase in _COLORS and not _NO_NOUN.match(" ".join(words[end : end + 2])):
                category = None
            if category:
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
    phrases |= {form: name for name, said in words["objects"].items() for form in _forms(said)}
    for qualifiers, names in words["qualifiers"].items():
        phrases |= {
            f"{qualifier} {form}": name
            for name in names.split(", ")
            for form in _forms(words["objects"][name])
            for qualifier in qualifiers.split(", ")
        }
    return Vocabulary(phrases)


@cache
def scenes_vocabulary() -> Vocabulary:
    """The categories of Scenes by their noun and plural."""
    things = CATEGORIES.items()
    return Vocabulary({form: name for name, c in things for form in (c.noun, c.plural)})


def chair(
    predictions: Mapping[Hashable, str],
    objects: Mapping[Hashable, Collection[str]],
    vocabulary: Vocabulary | None = None,
    references: Mapping[Hashable, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Count the objects that captions name against those in the pictures.

    As in the paper's code, each mention counts, however often a category is named, and the truth
    is what is labelled together with what the references name, where they are given.

        CHAIR-i = sum(hallucinated) / sum(mentioned)
        CHAIR-s = sum(has_hallucination) / sum(captions)
        object recall = sum(recalled) / sum(objects)

    Args:
        predictions: image id -> caption.
        objects: image id -> names of the categories in the picture; may hold more images.
        vocabulary: by default COCO's.
        references: image id -> captions by people; may hold more images.

    Returns:
        A row for each prediction, in their order, the index being `image_id`. Integers: `captions`
        (1), `mentioned` and `hallucinated` (mentions), `has_hallucination` (0 or 1), `objects`
        (categories in the truth) and `recalled` (those of them that are named). Beside them
        `hallucinated_objects`: a tuple of category names, one for each hallucinated mention.

    Raises:
        ValueError: an image has no objects (an empty set is fine) or no references, or a
            category is not in the vocabulary.
    """
    vocabulary = vocabulary or coco_vocabulary()
    for name, known in (("objects", objects), ("references", references)):
        if known is not None and (without := [i for i in predictions if i not in known]):
            said = some("prediction", without)
            raise ValueError(f"{said} without {name}; leave out what has none, or give them.")
    for name in sorted(set().union(*(objects[i] for i in predictions)) - vocabulary.categories):
        near = get_close_matches(name, vocabulary.categories, n=1, cutoff=0)[0]
        raise ValueError(f"{name!r} is no category of this vocabulary; the nearest is {near!r}.")

    def named(caption: str) -> list[str]:
        return [mention.category for mention in vocabulary.mentions(caption)]

    rows = {}
    for image_id, caption in predictions.items():
        told = named(caption)
        several = references[image_id] if references else ()
        truth = set(objects[image_id]).union(*map(named, several))
        wrong = tuple(name for name in told if name not in truth)
        recalled = len(truth.intersection(told))
        rows[image_id] = 1, len(told), len(wrong), int(bool(wrong)), len(truth), recalled, wrong
    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS.split())
    return table.rename_axis("image_id")


def _forms(said: str) -> Iterable[str]:
    """Singulars and plurals of "cup, knife/knives"."""
    for entry in said.split(", "):
        noun, _, plural = entry.partition("/")
        stem = re.sub("(?<![aeiou])y$", "ie", re.sub("(s|x|z|ch|sh)$", r"\1e", noun))
        yield from (noun, plural or f"{stem}s")
