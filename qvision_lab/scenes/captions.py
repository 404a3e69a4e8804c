"""True captions of a scene in COCO's style, from a small grammar:

    caption  ->  {things} {place}.  |  There is {things} {place}.  |  ...         FRAMES
    things   ->  {group}, {group} and {group}  |  {group} {relation} {group}      RELATIONS
    group    ->  a red car  |  three blue dogs                                    NUMERALS
    place    ->  on a beach  |  by the sea under the sun  |  nothing              PLACES, SKIES

Every caption names every group with its exact number and its colour, in the layout's reading
order: in a random one, the same image would ask for "left" and "right" in turn.
"""

import random

from qvision_lab.scenes.layout import CATEGORIES, WORLD, Group, Layout

PARTS = "numerals", "frames", "places", "scenery", "skies", "relations"
NUMERALS, FRAMES, PLACES, SCENERY, SKIES, RELATIONS = (WORLD[part] for part in PARTS)
STATES_PLACE, STATES_SKY, STATES_RELATION = 0.85, 0.33, 0.7  # probabilities
MOST = 12  # distinct captions that the grammar has for any scene


def caption_scene(layout: Layout, n: int = 5) -> tuple[str, ...]:
    """The first `n` (1 to 12) captions of a scene: true, distinct, the same on every machine.

    At most 26 words each. The first five are the references; a sixth is a fair "human" baseline.
    """
    if not 1 <= n <= MOST:
        raise ValueError(f"a scene has 1 to {MOST} captions, not {n}")
    rng = random.Random(f"scenes/{layout.split}/{layout.seed}/{layout.index}/captions")
    captions: dict[str, None] = {}  # an ordered set
    while len(captions) < n:
        captions[_caption(rng, layout)] = None
    return tuple(captions)


def relation(layout: Layout) -> str | None:
    """The relation of the first group to the second that a caption may state.

    Only of two objects: the longer of their two distances is 20 pixels and 1.3 times the other.
    """
    if [group.count for group in layout.groups] != [1, 1]:
        return None
    (ax, ay), (bx, by) = (group.center for group in layout.groups)
    across, down = abs(bx - ax), abs(by - ay)
    if max(across, down) < max(20, 1.3 * min(across, down)):
        return None
    return "left of" if across > down else "above"


def phrase(group: Group) -> str:
    """A group in words: "an orange cup", "two red cars"."""
    category = CATEGORIES[group.category]
    if group.count > 1:
        return f"{NUMERALS[group.count - 1]} {group.color} {category.plural}"
    return f"{'an' if group.color[0] in 'aeiou' else 'a'} {group.color} {category.noun}"


def _caption(rng: random.Random, layout: Layout) -> str:
    frame = rng.choices(tuple(FRAMES), FRAMES.values())[0]
    place = rng.choice(PLACES[layout.background][:2]) if rng.random() < STATES_PLACE else ""
    states_sky = layout.sky and rng.random() < STATES_SKY
    sky = rng.choice(SKIES[layout.sky][:2]) if states_sky else ""
    *others, last = map(phrase, layout.groups)
    things = f"{', '.join(others)} and {last}" if others else last
    stated = relation(layout)
    if stated and rng.random() < STATES_RELATION:
        things = f"{others[0]} {RELATIONS[stated][0]} {last}"
    text = frame.format(
        things=things,
        # Agrees with the first group, as in "there is a red car and two dogs".
        be="is" if layout.groups[0].count == 1 else "are",
        place=f"{place} {sky}",
        scenery=SCENERY[layout.background],
        sky=sky,
    )
    text = " ".join(text.split())
    return f"{text[0].upper()}{text[1:]}."
