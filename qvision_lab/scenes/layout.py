"""Layout of a scene: the whole truth of an image, before it is drawn or captioned.

Pure Python and `random.Random` seeded by text, so a layout is the same on every machine. Pixels
count from the upper left corner.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import yaml

PICTURE = 224  # side of the square image in pixels
MARGIN = 2  # pixels between a box and the image's edge
SMALLEST, LARGEST = 26, 130  # shorter side of a box in pixels

SPLITS = ("train", "val", "test", "compose", "crowd")
SIZES = ("small", "medium", "large")
SIZE_STEPS = (40, 68)  # shorter sides in pixels at which medium and large begin
# Colours, categories and wordings; everything of the world that is not drawn.
WORLD = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
BACKGROUNDS, SKIES, PREDICATES = (tuple(WORLD[part]) for part in ("places", "skies", "relations"))
COLORS: dict[str, tuple[int, int, int]] = {n: tuple(rgb) for n, rgb in WORLD["colors"].items()}

Point = tuple[float, float]  # x, y in pixels
Box = tuple[int, int, int, int]  # x, y, width, height in pixels


class Category(NamedTuple):
    """A kind of object, as `world.yaml` describes it."""

    name: str
    noun: str
    plural: str
    coco_id: int
    aspect: float  # width / height
    zone: str  # "ground" or "air"


CATEGORIES = {name: Category(name, *fields) for name, fields in WORLD["categories"].items()}

# One colour of every category, two or three categories of every colour: only `compose` has them.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (name, tuple(COLORS)[(3 * i + 1) % len(COLORS)]) for i, name in enumerate(CATEGORIES)
)

# Probabilities of n objects in an image, and of their groups of one category and colour.
NUMBERS = {1: 0.30, 2: 0.40, 3: 0.20, 4: 0.10}
GROUPINGS: dict[int, dict[tuple[int, ...], float]] = {
    1: {(1,): 1.0},
    2: {(2,): 0.45, (1, 1): 0.55},
    3: {(3,): 0.3, (2, 1): 0.4, (1, 1, 1): 0.3},
    4: {(4,): 0.25, (3, 1): 0.25, (2, 2): 0.2, (2, 1, 1): 0.15, (1, 1, 1, 1): 0.15},
}


@dataclass(frozen=True)
class SceneObject:
    """A drawn object, which fills its box."""

    category: str  # a key of CATEGORIES
    color: str  # a key of COLORS
    size: str  # one of SIZES, by the box's shorter side
    box: Box
    pose: int  # seed of what captions leave out: flip, hue, details

    @property
    def center(self) -> Point:
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True)
class Group:
    """All objects of one category, and so of one colour, in a scene."""

    category: str
    color: str
    members: tuple[int, ...]  # indices into the objects
    center: Point  # the mean of theirs

    @property
    def count(self) -> int:
        return len(self.members)


@dataclass(frozen=True)
class Layout:
    """The truth of an image, which split, seed and index identify; see `layout`."""

    split: str
    seed: int
    index: int
    background: str
    sky: str | None  # 'sun' or 'moon', which are part of the background and no objects
    sky_box: Box | None  # no object covers it
    objects: tuple[SceneObject, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups in reading order: from left to right, or the upper of two above each other."""
        members = defaultdict(list)
        for i, thing in enumerate(self.objects):
            members[thing.category, thing.color].append(i)
        groups = []
        for (category, color), indices in members.items():
            xs, ys = zip(*(self.objects[i].center for i in indices), strict=True)
            center = sum(xs) / len(xs), sum(ys) / len(ys)
            groups.append(Group(category, color, tuple(indices), center))
        axis = 0
        if len(groups) == 2:
            (ax, ay), (bx, by) = (group.center for group in groups)
            axis = int(abs(by - ay) > abs(bx - ax))
        return tuple(sorted(groups, key=lambda group: group.center[axis]))

    @cached_property
    def relations(self) -> tuple[tuple[int, str, int], ...]:
        """All relations (subject, predicate, object), by index of object; two on a diagonal."""
        return tuple(
            (a, predicate, b)
            for (a, one), (b, other) in permutations(enumerate(self.objects), 2)
            for predicate in PREDICATES
            if holds(predicate, one.center, other.center)
        )


def holds(predicate: str, a: Point, b: Point) -> bool:
    """Whether `a` is `predicate` `b`: centres 20 pixels apart, at most 55° off the axis."""
    if predicate in ("right of", "below"):
        a, b = b, a
    across, down = b[0] - a[0], b[1] - a[1]
    along, off = (across, down) if predicate in ("left of", "right of") else (down, across)
    return along >= 20 and along >= 0.7 * abs(off)


def overlap(a: Box, b: Box) -> float:
    """Share of the smaller box, 0 to 1, inside the other."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def layout(split: str, seed: int, index: int) -> Layout:
    """The layout of image `index` of a split: a pure function of its three arguments."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in Scenes: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"scenes/{split}/{seed}/{index}")
    background = rng.choice(BACKGROUNDS)
    groups = _groups(rng, split)
    objects = None
    while objects is None:  # a crowd that does not fit is drawn again
        objects = _arrange(rng, groups, crowded=split == "crowd")
    sky, sky_box = _sky(rng, background, objects)
    return Layout(split, seed, index, background, sky, sky_box, objects)


def _groups(rng: random.Random, split: str) -> list[tuple[str, str, int]]:
    """Category, colour and count of each group; categories are distinct."""
    if split == "crowd":
        counts = [1] * rng.randint(2, 4)
        for _ in range(rng.randint(5, 8) - len(counts)):
            counts[rng.randrange(len(counts))] += 1
    else:
        groupings = GROUPINGS[rng.choices(tuple(NUMBERS), NUMBERS.values())[0]]
        counts = list(rng.choices(tuple(groupings), groupings.values())[0])
        rng.shuffle(counts)
    groups = []
    for category, count in zip(rng.sample(tuple(CATEGORIES), len(counts)), counts, strict=True):
        held_out = split == "compose" and not groups  # the first group is the new pair
        colors = [color for color in COLORS if ((category, color) in HELD_OUT) == held_out]
        groups.append((category, rng.choice(colors), count))
    return groups


def _arrange(
    rng: random.Random, groups: list[tuple[str, str, int]], crowded: bool
) -> tuple[SceneObject, ...] | None:
    """Place objects, shrinking those that do not fit; None if one never does."""
    typical, allowed = (40, 0.12) if crowded else (52, 0.05)
    objects: list[SceneObject] = []
    for category, color, count in groups:
        group_side = typical * rng.lognormvariate(0, 0.28)
        for _ in range(count):
            side = group_side * (rng.uniform(0.8, 1.2) if count > 1 else 1)
            for attempt in range(300):
                box = _box(rng, CATEGORIES[category], side)
                if all(overlap(box, other.box) <= allowed for other in objects):
                    break
                if attempt % 10 == 9:
                    side *= 0.9
            else:
                return None
            size = SIZES[sum(min(box[2:]) >= step for step in SIZE_STEPS)]
            objects.append(SceneObject(category, color, size, box, rng.getrandbits(32)))
    return tuple(objects)


def _box(rng: random.Random, category: Category, side: float) -> Box:
    """A random box in the category's zone, with its shape and about this shorter side."""
    room = PICTURE - 2 * MARGIN
    aspect = category.aspect
    side = min(max(side, SMALLEST), LARGEST, room * min(aspect, 1 / aspect))
    width, height = round(side * max(aspect, 1)), round(side * max(1 / aspect, 1))
    x = rng.randint(MARGIN, MARGIN + room - width)
    top, bottom = MARGIN, MARGIN + room - height
    if category.zone == "air":
        bottom = min(bottom, int(0.6 * PICTURE - height / 2))
    else:
        top = max(top, int(0.4 * PICTURE - height))
    return x, rng.randint(top, bottom), width, height


def _sky(
    rng: random.Random, background: str, objects: tuple[SceneObject, ...]
) -> tuple[str, Box] | tuple[None, None]:
    """Sun by day or moon by night, outdoors, where no object covers it; or neither."""
    tries = 0 if background == "room" or rng.random() < 0.55 else 20
    for _ in range(tries):
        side = rng.randint(30, 40)
        box = (rng.randint(4, PICTURE - side - 4), rng.randint(4, 24), side, side)
        if all(overlap(box, thing.box) == 0 for thing in objects):
            return ("moon" if background == "night" else "sun"), box
    return None, None


def describe(split: str, n: int = 2000, seed: int = 0) -> dict[str, float | dict[str, float]]:
    """Statistics of the first n layouts of a split: numbers, and shares (0 to 1) by name."""
    if n < 1:
        raise ValueError(f"a distribution needs at least one scene, got n={n}")
    layouts = [layout(split, seed, index) for index in range(n)]
    things = [thing for truth in layouts for thing in truth.objects]
    sides = [min(thing.box[2:]) for thing in things]
    values = {
        "number of objects": [len(truth.objects) for truth in layouts],
        "group size": [group.count for truth in layouts for group in truth.groups],
        **{key: [getattr(thing, key) for thing in things] for key in ("category", "color", "size")},
        "background": [truth.background for truth in layouts],
        "sky": [truth.sky or "neither" for truth in layouts],
    }
    counts = {title: sorted(Counter(found).items()) for title, found in values.items()}
    return {
        "objects per picture": len(things) / n,
        "shorter side, median px": median(sides),
        "shorter side under 34 px": mean(side < 34 for side in sides),
        **{t: {str(name): c / len(values[t]) for name, c in found} for t, found in counts.items()},
    }
