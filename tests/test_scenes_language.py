"""Captions of scenes are true, and the checker finds every false claim."""

import random
import re
from pathlib import Path

import pytest
import yaml

from qvision_lab.scenes.captions import PLACES, caption_scene
from qvision_lab.scenes.checker import NOUNS, RATES, Rate, check, score
from qvision_lab.scenes.layout import CATEGORIES, COLORS, SPLITS, Layout, SceneObject, layout

CASES = yaml.safe_load(Path(__file__).with_name("scene_captions.yaml").read_text())


def scene(*things: tuple[str, str, int, int], background: str = "beach", sky=None) -> Layout:
    """A layout by hand: (colour, category, x, y) of 40-pixel things."""
    objects = (SceneObject(category, c, "small", (x, y, 40, 40), 0) for c, category, x, y in things)
    return Layout("test", 0, 0, background, sky, None, tuple(objects))


DOGS = ("blue", "dog", 80, 100), ("blue", "dog", 140, 110)
CAR_AND_DOGS = scene(("red", "car", 10, 100), *DOGS, sky="sun")
CAT_AND_CUP = scene(("black", "cat", 20, 90), ("orange", "cup", 120, 100), background="room")


def captioned(split: str, n: int = 300) -> list[tuple[Layout, str]]:
    layouts = [layout(split, 0, index) for index in range(n)]
    return [(truth, caption) for truth in layouts for caption in caption_scene(truth, 6)]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_complete(split):
    judged = [check(caption, truth) for truth, caption in captioned(split)]
    assert [c for c in judged if not c.true] == []
    rates = score(judged)
    for name in ("pairs right", "object recall", "count stated", "count right"):
        assert rates[name].value == 1, name


def test_captions_read_like_captions():
    captions = [caption for split in SPLITS for _, caption in captioned(split)]
    words = {word for caption in captions for word in re.findall(r"\w+", caption.lower())}
    assert len(words) < 120
    assert max(len(caption.split()) for caption in captions) <= 26
    assert all(re.fullmatch(r"[A-Z][a-z]*(,? [a-z]+)*\.", caption) for caption in captions)
    assert not [c for c in captions if re.search(r"\ba [aeiou]|\ban [^aeiou]", c.lower())]


def test_captions_are_deterministic_distinct_and_a_prefix_of_more():
    for index in range(100):
        truth = layout("val", 1, index)
        assert caption_scene(truth) == caption_scene(truth, 12)[:5]
        assert len(set(caption_scene(truth, 12))) == 12
    with pytest.raises(ValueError, match="13"):
        caption_scene(truth, 13)


@pytest.mark.parametrize(
    ("a", "b", "stated"),
    [
        ((20, 100), (120, 100), "A red car to the left of a blue dog"),
        ((120, 100), (20, 100), "A blue dog to the left of a red car"),
        ((50, 20), (60, 120), "A red car above a blue dog"),
        ((20, 20), (100, 100), None),  # on the diagonal
        ((20, 100), (38, 100), None),  # too close
    ],
)
def test_a_relation_is_stated_only_where_it_is_clear(a, b, stated):
    captions = caption_scene(scene(("red", "car", *a), ("blue", "dog", *b)), 12)
    joined = {c for c in captions if re.search("left of|above", c)}
    assert bool(joined) == (stated is not None)
    assert all(stated.lower() in caption.lower() for caption in joined)


@pytest.mark.parametrize("caption", CASES["true"])
def test_the_language_is_wider_than_the_grammar(caption):
    assert check(caption, CAT_AND_CUP if "cup" in caption else CAR_AND_DOGS).true


@pytest.mark.parametrize("caption", CASES["wrong"])
def test_a_false_claim_is_wrong(caption):
    judged = check(caption, CAR_AND_DOGS)
    kind, text = CASES["wrong"][caption]
    wrong = [claim for claim in judged.claims if not claim.right and claim.kind == kind]
    assert [claim.text for claim in wrong] == [text]
    assert all(caption[slice(*claim.span)] == claim.text for claim in judged.claims)
    assert judged.outside == ()
    assert not judged.true


@pytest.mark.parametrize("caption", CASES["outside"])
def test_nonsense_is_outside_the_language(caption):
    judged = check(caption, CAR_AND_DOGS)
    assert list(judged.outside) == CASES["outside"][caption]
    assert not judged.true


@pytest.mark.parametrize("caption", CASES["counted"])
def test_parts_outside_the_language_claim_nothing(caption):
    kinds = [claim.kind for claim in check(caption, CAR_AND_DOGS).claims]
    assert kinds == CASES["counted"][caption]


def test_no_caption_breaks_the_checker():
    rng = random.Random(0)
    odd = "\u017f \u212a \u0130 \u0131 \u00e9 \u00bd \u00b3 🚗 3 ' - ! . ,"
    words = [*NOUNS, *COLORS, "a", "the", "no", "and", "with", "there", "", *odd.split(" ")]
    letters = {"s": "\u017f", "k": "\u212a", "i": "\u0131"}  # of another case, to `re`
    for _ in range(1000):
        text = rng.choice([" ", "", "\t", "\u00a0"]).join(rng.choices(words, k=rng.randrange(9)))
        text = "".join(letters.get(c, c) if rng.random() < 0.2 else c for c in text)
        judged = check(text, CAR_AND_DOGS)
        assert all(text[slice(*claim.span)] == claim.text for claim in judged.claims)
    assert len(check("dogs no " * 50_000, CAR_AND_DOGS).outside) == 50_000  # in linear time


def swaps(caption: str) -> list[str]:
    """The caption with one word of meaning replaced, for every pair of a fixed list."""
    nouns = [category.noun for category in CATEGORIES.values()]
    plurals = [category.plural for category in CATEGORIES.values()]
    places = [wordings[0] for wordings in PLACES.values()]
    cycles = [list(COLORS), nouns, plurals, places, ["two", "three", "four", "five", "six"]]
    pairs = [(old, new) for ring in cycles for old, new in zip(ring, ring[1:] + ring, strict=False)]
    pairs += [("to the left of", "to the right of"), ("above", "below"), ("sun", "moon")]
    pairs += [("moon", "sun"), ("moonlight", "sun")]
    return [
        re.sub(rf"\b{old}\b", new, caption, count=1)
        for old, new in pairs
        if new != old and re.search(rf"\b{old}\b", caption)
    ]


@pytest.mark.parametrize("split", ["test", "crowd"])
def test_a_word_swapped_in_a_true_caption_makes_it_untrue(split):
    swapped = [(truth, text) for truth, caption in captioned(split, 100) for text in swaps(caption)]
    assert len(swapped) > 1000
    assert [text for truth, text in swapped if check(text, truth).true] == []


def test_every_rate_on_counted_examples():
    judged = [
        # All right, and the relation stated in a scene of two single things.
        check("A black cat to the left of an orange cup in a room.", CAT_AND_CUP),
        # A wrong relation, place and colour: the cup that is named is not there.
        check("A black cat above a red cup on a beach.", CAT_AND_CUP),
        # Dogs forgotten, a tree made up, the wrong sky.
        check("A red car and a green tree under the moon.", CAR_AND_DOGS),
        # A part with a word from outside is not counted.
        check("A red car and three happy blue dogs in the sun.", CAR_AND_DOGS),
        # A plural without a number states no count; and the car is left out.
        check("Blue dogs.", CAR_AND_DOGS),
        # A wrong count, in the wrong order: only the count is held against it.
        check("Three blue dogs and a red car.", CAR_AND_DOGS),
    ]
    assert score(judged) == {name: Rate(*counts) for name, counts in CASES["rates"].items()}
    assert list(score([])) == list(RATES)
    assert str(Rate(1904, 2000)) == "95.2% (1904/2000)"
    assert str(score([])["true"]) == "no case"
