"""What is in a scene: the whole truth of a picture, before anything is drawn or told.

Pure Python and `random.Random` seeded by text, so a layout is the same on every machine and
needs neither numpy nor Pillow. Pixels count from the upper left corner.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

PICTURE = 224  # side of the square picture in pixels
MARGIN = 2  # pixels between a box and the picture's edge
SMALLEST, LARGEST = 26, 130  # shorter side of a box in pixels

SPLITS = ("train", "val", "test", "compose", "crowd")
SIZES = ("small", "medium", "large")
SIZE_STEPS = (40, 68)  # shorter sides in pixels at which medium and large begin
SKIES = ("sun", "moon")
PREDICATES = ("left of", "right of", "above", "below")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 40),
    "orange": (246, 134, 24),
    "yellow": (252, 226, 44),
    "green": (34, 160, 66),
    "blue": (36, 92, 222),
    "purple": (142, 52, 178),
    "white": (244, 244, 246),
    "black": (38, 38, 44),
}
BACKGROUNDS = ("beach", "field", "street", "room", "snow", "lake", "night")

Box = tuple[int, int, int, int]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Category:
    """A kind of object: its COCO name and id (from 1001 up: ours), and what captions call it."""

    name: str
    noun: str
    plural: str
    coco_id: int
    aspect: float  # width / height
    zone: str  # 'air': its centre is in the upper 60%; 'ground': its foot is in the lower 60%


CATEGORIES: dict[str, Category] = {
    name: Category(name, noun, plural, coco_id, aspect, zone)
    for name, noun, plural, coco_id, aspect, zone in (
        ("car", "car", "cars", 3, 1.75, "ground"),
        ("bus", "bus", "buses", 6, 1.55, "ground"),
        ("train", "train", "trains", 7, 1.5, "ground"),
        ("boat", "boat", "boats", 9, 1.1, "ground"),
        ("airplane", "airplane", "airplanes", 5, 1.8, "air"),
        ("cat", "cat", "cats", 17, 0.95, "ground"),
        ("dog", "dog", "dogs", 18, 1.25, "ground"),
        ("bird", "bird", "birds", 16, 1.3, "air"),
        ("sports ball", "ball", "balls", 37, 1.0, "ground"),
        ("kite", "kite", "kites", 38, 0.72, "air"),
        ("umbrella", "umbrella", "umbrellas", 28, 1.0, "ground"),
        ("cup", "cup", "cups", 47, 1.1, "ground"),
        ("apple", "apple", "apples", 53, 0.92, "ground"),
        ("book", "book", "books", 84, 1.4, "ground"),
        ("clock", "clock", "clocks", 85, 1.0, "ground"),
        ("chair", "chair", "chairs", 62, 0.72, "ground"),
        ("tree", "tree", "trees", 1001, 0.82, "ground"),
        ("house", "house", "houses", 1002, 1.1, "ground"),
        ("flower", "flower", "flowers", 1003, 0.72, "ground"),
        ("fish", "fish", "fish", 1004, 1.6, "ground"),
    )
}

# One colour of every category, two or three categories of every colour: only `compose` has them.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (name, tuple(COLORS)[(3 * i + 1) % len(COLORS)]) for i, name in enumerate(CATEGORIES)
)

# How often a picture has n objects, and how these fall into groups of one category and colour.
NUMBERS = {1: 0.30, 2: 0.40, 3: 0.20, 4: 0.10}
GROUPINGS: dict[int, dict[tuple[int, ...], float]] = {
    1: {(1,): 1.0},
    2: {(2,): 0.45, (1, 1): 0.55},
    3: {(3,): 0.3, (2, 1): 0.4, (1, 1, 1): 0.3},
    4: {(4,): 0.25, (3, 1): 0.25, (2, 2): 0.2, (2, 1, 1): 0.15, (1, 1, 1, 1): 0.15},
}


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing; it fills `box` (x, y, width, height in pixels)."""

    category: str  # a key of CATEGORIES
    color: str  # a key of COLORS
    size: str  # one of SIZES, by the box's shorter side
    box: Box
    pose: int  # seed of what is drawn but not told: flip, hue, details

    @property
    def center(self) -> tuple[float, float]:
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True)
class Relation:
    """`subject` is `predicate` `object`: two indices into the objects, one of PREDICATES."""

    subject: int
    predicate: str
    object: int


@dataclass(frozen=True)
class Group:
    """All objects of one category (and so one colour) in a scene: what a caption counts."""

    category: str
    color: str
    members: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.members)


@dataclass(frozen=True)
class Layout:
    """The truth of one picture. Its name is (split, seed, index): see `layout`."""

    split: str
    seed: int
    index: int
    background: str
    sky: str | None  # 'sun', 'moon' or nothing; part of the background, never an object
    sky_box: Box | None  # where it stands; no object covers it
    objects: tuple[SceneObject, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups in reading order: left to right, but the upper of two that stand upright."""
        members: dict[tuple[str, str], list[int]] = {}
        for i, thing in enumerate(self.objects):
            members.setdefault((thing.category, thing.color), []).append(i)
        groups = [Group(*key, tuple(indices)) for key, indices in members.items()]
        centers = {group: self._center(group) for group in groups}
        axis = 0
        if len(groups) == 2:
            (ax, ay), (bx, by) = centers.values()
            axis = int(abs(by - ay) > abs(bx - ax))
        return tuple(sorted(groups, key=lambda group: centers[group][axis]))

    @cached_property
    def relations(self) -> tuple[Relation, ...]:
        """Every relation that holds between two objects; on a diagonal two hold."""
        return tuple(
            Relation(a, predicate, b)
            for a, one in enumerate(self.objects)
            for b, other in enumerate(self.objects)
            for predicate in PREDICATES
            if a != b and holds(predicate, one.center, other.center)
        )

    def _center(self, group: Group) -> tuple[float, float]:
        xs, ys = zip(*(self.objects[i].center for i in group.members), strict=True)
        return sum(xs) / len(xs), sum(ys) / len(ys)


def holds(predicate: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether `a` is `predicate` `b`, for centres in pixels: 20 apart, at most 55° off the axis."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[predicate]
    return along >= 20 and along >= 0.7 * abs(across)


def overlap(a: Box, b: Box) -> float:
    """The part of the smaller box, 0 to 1, that lies in the other."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def layout(split: str, seed: int, index: int) -> Layout:
    """The truth of picture `index` of a split: a pure function of its three arguments."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in Scenes: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"scenes/{split}/{seed}/{index}")
    background = rng.choice(BACKGROUNDS)
    groups = _groups(rng, split)
    objects = None
    while objects is None:  # a crowd that does not fit is thrown again
        objects = _arrange(rng, groups, crowded=split == "crowd")
    sky, sky_box = _sky(rng, background, objects)
    return Layout(split, seed, index, background, sky, sky_box, objects)


def _groups(rng: random.Random, split: str) -> list[tuple[str, str, int]]:
    """Category, colour and count of each group; no category comes twice."""
    if split == "crowd":
        counts = [1] * rng.randint(2, 4)
        for _ in range(rng.randint(5, 8) - len(counts)):
            counts[rng.randrange(len(counts))] += 1
    else:
        groupings = GROUPINGS[_choose(rng, NUMBERS)]
        counts = list(_choose(rng, groupings))
        rng.shuffle(counts)
    groups = []
    for category, count in zip(rng.sample(tuple(CATEGORIES), len(counts)), counts, strict=True):
        held_out = split == "compose" and not groups  # the first group is the one that is new
        colors = [color for color in COLORS if ((category, color) in HELD_OUT) == held_out]
        groups.append((category, rng.choice(colors), count))
    return groups


def _arrange(
    rng: random.Random, groups: list[tuple[str, str, int]], crowded: bool
) -> tuple[SceneObject, ...] | None:
    """Place every object where it fits, shrinking it until it does; None if one never does."""
    median, allowed = (40, 0.12) if crowded else (52, 0.05)
    objects: list[SceneObject] = []
    for category, color, count in groups:
        group_side = median * rng.lognormvariate(0, 0.28)
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
    """A box of the category's shape with about this shorter side, somewhere in its zone."""
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
    """Sun by day, moon by night, in the open and where no object hides it."""
    if background == "room" or rng.random() < 0.55:
        return None, None
    for _ in range(20):
        side = rng.randint(30, 40)
        box = (rng.randint(4, PICTURE - side - 4), rng.randint(4, 24), side, side)
        if all(overlap(box, thing.box) == 0 for thing in objects):
            return ("moon" if background == "night" else "sun"), box
    return None, None


def _choose(rng: random.Random, weights: dict) -> int | tuple[int, ...]:
    return rng.choices(tuple(weights), weights.values())[0]
