"""How a scene is drawn: a backdrop, then every object in a tile of its own, with Pillow.

Everything is drawn at double size and halved at the end, which makes smooth edges. A sketch (one
function per category) works in unit coordinates, x to the right and y down, and reaches all four
sides of its tile: so an object fills its box, and the truth does not depend on Pillow.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageChops

from qvision_lab.data.scenes.backdrops import BACKDROPS, SKIES
from qvision_lab.data.scenes.pen import DARK, Pen, paint
from qvision_lab.data.scenes.sketches import FLOATING, SKETCHES
from qvision_lab.data.scenes.world import PICTURE, Layout, SceneObject

# How much darkness, 0 to 255, is laid over an object (light falls from the upper left) and at its
# foot; and the film's grain.
DOWN, RIGHT = np.mgrid[0:32, 0:32] / 31
SHADE = Image.fromarray((70 * np.clip(0.8 * DOWN + 0.4 * RIGHT - 0.35, 0, 1)).astype(np.uint8))
EDGE = np.hypot(2 * DOWN - 1, 2 * RIGHT - 1)
FOOT = Image.fromarray((110 * np.clip(1 - EDGE, 0, 1) ** 0.7).astype(np.uint8))
GRAIN = np.random.default_rng(0).normal(0, 4, (2 * PICTURE, 2 * PICTURE, 1)).astype(np.float32)


@dataclass(frozen=True)
class Picture:
    """A drawn scene: the image, and which of its pixels show each object."""

    image: Image.Image  # RGB, 224 x 224
    masks: Bool[np.ndarray, "objects 224 224"]


def draw(layout: Layout) -> Picture:
    """Draw a layout. The same layout gives the same pixels under the same Pillow and numpy."""
    rng = random.Random(f"drawing/{layout.split}/{layout.seed}/{layout.index}")
    canvas = Image.new("RGB", (2 * PICTURE, 2 * PICTURE))
    horizon = BACKDROPS[layout.background](Pen(canvas, rng))
    if layout.sky_box is not None:
        x, y, width, height = layout.sky_box
        tile = Image.new("RGBA", (2 * width, 2 * height))
        SKIES[layout.sky](Pen(tile, rng))
        canvas.paste(tile, (2 * x, 2 * y), tile)
    owner = np.zeros((PICTURE, PICTURE), np.uint8)  # 1 + the index of the object that shows
    for i, thing in enumerate(layout.objects):
        x, y, width, height = thing.box
        tile, corner = sketch(thing), (2 * x, 2 * y)
        alpha = tile.getchannel("A")
        if thing.category not in FLOATING and y + height > horizon * PICTURE:
            depth = height // 5
            foot = FOOT.resize((2 * width, 2 * depth))
            canvas.paste(DARK, (2 * x, 2 * (y + height) - depth), foot)
        canvas.paste(tile, corner, alpha)
        canvas.paste(DARK, corner, ImageChops.multiply(alpha, SHADE.resize(tile.size)))
        owner[y : y + height, x : x + width][np.asarray(alpha.reduce(2)) >= 128] = i + 1
    masks = owner == np.arange(1, len(layout.objects) + 1, dtype=np.uint8)[:, None, None]
    return Picture(_develop(canvas.reduce(2), rng), masks)


def sketch(thing: SceneObject) -> Image.Image:
    """One object by itself: an RGBA tile of twice its box."""
    rng = random.Random(thing.pose)
    _, _, width, height = thing.box
    tile = Image.new("RGBA", (2 * width, 2 * height))
    SKETCHES[thing.category](Pen(tile, rng, paint(thing.color, rng)))
    return tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else tile


def _develop(image: Image.Image, rng: random.Random) -> Image.Image:
    """Film grain and up to 10% more or less light, so that no surface is flat."""
    x, y = rng.randrange(PICTURE), rng.randrange(PICTURE)
    pixels = np.asarray(image) * np.float32(rng.uniform(0.9, 1.1))
    pixels += GRAIN[y : y + PICTURE, x : x + PICTURE]
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
