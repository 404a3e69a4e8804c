"""Claims of a caption about a scene, each judged against the truth.

The language is wider than the grammar of `captions`: groups in any order, all four relations,
synonyms, "the", objects without colour or number. Case, runs of spaces and the end do not matter.
What is outside the language cannot be checked: its part of the caption, between commas and "and"s,
makes no claims, and the caption is never true.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate, product
from typing import NamedTuple

from qvision_lab.scenes.captions import NUMERALS, PLACES, RELATIONS, SCENERY, SKIES
from qvision_lab.scenes.layout import CATEGORIES, COLORS, Group, Layout

# Meanings of phrases.
_PLACE, _SKY, _RELATION = (
    {phrase: name for name, wordings in table.items() for phrase in wordings}
    for table in (PLACES, SKIES, RELATIONS)
)
_SCENERY = {phrase: name for name, phrase in SCENERY.items()}
_SINGULAR = {category.noun: name for name, category in CATEGORIES.items()}
_PLURAL = {category.plural: name for name, category in CATEGORIES.items()}
NOUNS = _SINGULAR | _PLURAL
_NUMBER = {"a": 1, "an": 1, "a pair of": 2} | {word: i for i, word in enumerate(NUMERALS, start=1)}
_NEGATION = re.compile(r"(?:no|not|none|nor|neither|never|nothing|without|\w+n['\u2019]t)\b", re.I)


def _any(phrases: Iterable[str]) -> str:
    """A pattern for any of the phrases, the longest first, with any white space in them."""
    return "|".join(p.replace(" ", r"\s+") for p in sorted(phrases, key=len, reverse=True))


_ARTICLE = r"an(?=\s+[aeiou])|a(?=\s+[^aeiou\s])"  # never "a orange cup"
_NUMERAL = rf"{_any(('a pair of', *NUMERALS))}|{_ARTICLE}|[1-9][0-9]?"
_CHUNK = re.compile(
    rf"""(?:
      (?P<place> {_any(_PLACE)} )
    | (?P<backdrop> {_any(_SCENERY)} )
    | (?P<sky> {_any(_SKY)} )
    | (?: (?:is|are) \s+ )? (?P<relation> {_any(_RELATION)} )
    | (?P<things> (?: the \s+ (?! an? \s ) )?
                  (?: (?P<number> {_NUMERAL} ) \s+ )?
                  (?: (?P<color> {_any(COLORS)} ) \s+ )?
                  (?P<noun> {_any(NOUNS)} ) )
    | (?P<lead> {_any(("there is", "there are", "a picture of", "a photo of"))} )
    | (?P<verb> {_any(("can be seen",))} )
    | (?P<and> (?: , \s* )? and )
    | (?P<with> with )
    ) (?! [\w'-] )
    | (?P<comma> , )
    | (?P<unknown> [^\s,]+ )""",
    re.VERBOSE | re.IGNORECASE,
)

# A sentence, as the initials of its chunks.
_LIST, _WHERE = "t(?:[rac]t)*", "(?:ps?|sp?)"
_SENTENCE = re.compile(f"l?{_LIST}v?{_WHERE}?|{_WHERE}c?l?{_LIST}|l?bs?w{_LIST}|l?bw{_LIST}s")


class Claim(NamedTuple):
    """One claim of a caption, and whether it is right."""

    kind: str  # 'object', 'color', 'count', 'relation', 'background' or 'sky'
    text: str
    span: tuple[int, int]  # caption[start:end] == text
    right: bool


class Mention(NamedTuple):
    """A group as a caption names it; None for what the caption leaves out."""

    category: str
    color: str | None
    count: int | None


class Check(NamedTuple):
    """A caption, parsed and judged."""

    caption: str
    claims: tuple[Claim, ...]  # of the parts inside the language, in the caption's order
    mentions: tuple[Mention, ...]  # groups named there
    groups: tuple[Group, ...]  # groups in the scene
    outside: tuple[str, ...]  # parts outside the language

    @property
    def true(self) -> bool:
        """It has claims, all are right, and nothing is outside the language."""
        return bool(self.claims) and not self.outside and all(c.right for c in self.claims)


class Rate(NamedTuple):
    """`hits` of `total`; its value is from 0 to 1, or nan where the total is 0."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.hits}/{self.total})" if self.total else "no case"


def check(caption: str, scene: Layout) -> Check:
    """Parse a caption into claims and judge each against the scene.

    - object: it is in the scene. Naming a group again claims another one and is wrong; a plural
      without a number needs two or more.
    - color: an object of this category has this colour.
    - count: exactly so many are in the scene ("a" is one): of the named colour, or of the category
      where none has that colour.
    - relation: it holds for all pairs of the objects named on its two sides, colours included.
    - background, sky: it is the scene's.

    `outside` has the words that are not in the language, or the whole caption where known words
    make no sentence, as in "A red car and and on a beach." Claims and mentions of the part of an
    outside word, and of a caption that is outside as a whole or negates something, are left out.
    """
    body = caption.rstrip().removesuffix(".").rstrip("!")
    # Beyond ASCII, no letter is in any phrase, though re.IGNORECASE lets some match an s, k or i.
    chunks = list(_CHUNK.finditer(re.sub(r"[^\W\x00-\x7f]", "_", body)))
    mentions: dict[int, Mention] = {}  # by index of their chunk
    outside: dict[int, str] = {}
    for i, chunk in enumerate(chunks):
        known = chunk.lastgroup != "unknown"
        if chunk.lastgroup == "things":
            number, color, noun = (s and s.lower() for s in chunk.group("number", "color", "noun"))
            number = " ".join((number or "").split())
            count = int(number) if number.isdecimal() else _NUMBER.get(number)
            mentions[i] = Mention(NOUNS[noun], color, count)
            known = not count or noun in (_SINGULAR if count == 1 else _PLURAL)  # not "two car"
        if not known:
            outside[i] = body[slice(*chunk.span())]
    parts = list(accumulate(chunk.lastgroup in ("comma", "and") for chunk in chunks))
    unjudged = {parts[i] for i in outside}
    if not outside and not _SENTENCE.fullmatch("".join(c.lastgroup[0] for c in chunks)):
        outside[-1], unjudged = caption, {*parts}
    elif any(map(_NEGATION.match, outside.values())):
        unjudged = {*parts}
    mentions = {i: mention for i, mention in mentions.items() if parts[i] not in unjudged}
    alike = {i: [g for g in scene.groups if g.category == m.category] for i, m in mentions.items()}
    fitting = {i: [g for g in alike[i] if m.color in (None, g.color)] for i, m in mentions.items()}
    claims: list[Claim] = []
    named: set[Group] = set()

    def claim(kind: str, span: tuple[int, int], right: bool) -> None:
        claims.append(Claim(kind, body[slice(*span)], span, right))

    for i, chunk in enumerate(chunks):
        if parts[i] in unjudged:
            continue
        words = " ".join(chunk[chunk.lastgroup].lower().split())
        match chunk.lastgroup:
            case "place" | "backdrop":
                claim("background", chunk.span(), (_PLACE | _SCENERY)[words] == scene.background)
            case "sky":
                claim("sky", chunk.span(), _SKY[words] == scene.sky)
            case "things":
                mention, groups, noun = mentions[i], fitting[i], chunk["noun"].lower()
                count = sum(group.count for group in groups or alike[i])
                least = 1 if mention.count or noun in _SINGULAR else 2
                repeated = bool(groups) and named.issuperset(groups)
                claim("object", chunk.span("noun"), count >= least and not repeated)
                if mention.color:
                    claim("color", (chunk.start("color"), chunk.end()), bool(groups))
                if mention.count:
                    claim("count", chunk.span(), count == mention.count)
                named.update(groups)
            case "relation" if i - 1 in mentions and i + 1 in mentions:
                sides = ([m for g in fitting[k] for m in g.members] for k in (i - 1, i + 1))
                pairs = {(a, _RELATION[words], b) for a, b in product(*sides)}
                span = chunks[i - 1].start(), chunks[i + 1].end()
                claim("relation", span, bool(pairs) and pairs <= set(scene.relations))
    parsed = tuple(claims), tuple(mentions.values()), scene.groups, tuple(outside.values())
    return Check(caption, *parsed)


# Rates of a set of captions, and the denominator of each.
RATES: dict[str, str] = {
    "pairs right": "captions; hit: names every group once with its colour, and no other",
    "object recall": "categories in the scenes; hit: named",
    "object precision": "categories named in a caption; hit: in the scene",
    "hallucination": "captions; hit: names a category that is not in the scene",
    "count stated": "groups of two or more; hit: a number or article stands before their noun",
    "count right": "groups of two or more whose count is stated; hit: it is the right one",
    "relation stated": "captions of scenes of exactly two single objects; hit: has a relation",
    "relation right": "relations stated, in any scene; hit: right",
    "background right": "backgrounds stated; hit: right",
    "sky right": "suns and moons stated; hit: right",
    "true": "captions; hit: all claims right and nothing outside the language",
    "outside": "captions; hit: some part is outside the language",
}


def score(checks: Iterable[Check]) -> dict[str, Rate]:
    """Rates over many captions, in the order of `RATES`."""
    cases: dict[str, list[bool]] = {name: [] for name in RATES}  # hit or not
    for judged in checks:
        named = Counter((mention.category, mention.color) for mention in judged.mentions)
        there = Counter((group.category, group.color) for group in judged.groups)
        categories_named, categories_there = ({c for c, _ in pairs} for pairs in (named, there))
        # By category alone, of which a scene has one group: the colour is counted in the pairs.
        stated = {m.category: m.count for m in reversed(judged.mentions) if m.count is not None}
        several = {group.category: group.count for group in judged.groups if group.count > 1}
        two_single = [group.count for group in judged.groups] == [1, 1]
        kinds = [claim.kind for claim in judged.claims]
        cases["pairs right"].append(named == there)
        cases["object recall"] += [c in categories_named for c in categories_there]
        cases["object precision"] += [c in categories_there for c in categories_named]
        cases["hallucination"].append(not categories_named <= categories_there)
        cases["count stated"] += [c in stated for c in several]
        cases["count right"] += [stated[c] == n for c, n in several.items() if c in stated]
        cases["relation stated"] += ["relation" in kinds] * two_single
        for claim in judged.claims:
            if claim.kind in ("relation", "background", "sky"):
                cases[f"{claim.kind} right"].append(claim.right)
        cases["true"].append(judged.true)
        cases["outside"].append(bool(judged.outside))
    return {name: Rate(sum(hits), len(hits)) for name, hits in cases.items()}
