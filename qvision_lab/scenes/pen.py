"""Pen: the shapes and colours that scenes are drawn with."""

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from qvision_lab.scenes.layout import COLORS

Color = tuple[int, ...]  # red, green, blue, 0 to 255, and sometimes opacity
Points = Sequence[tuple[float, float]]

DARK: Color = (30, 28, 34)
GLASS: Color = (186, 222, 244)
WHITE: Color = (250, 250, 250)
SILVER: Color = (150, 152, 160)
GOLD: Color = (255, 210, 60)
WOOD: Color = (124, 82, 48)
LEAF: Color = (46, 140, 62)
CLEAR: Color = (0, 0, 0, 0)

# Variation of an object's body, what is mixed into it for shade and light, its outline.
TONES = (9, (DARK, 0.18), (WHITE, 0.45), DARK)
EXTREME_TONES = {
    "black": (5, ((0, 0, 0), 0.4), (WHITE, 0.3), SILVER),
    "white": (4, (DARK, 0.16), (DARK, 0.09), DARK),  # its light is grey
}


def mix(a: Color, b: Color, part: float) -> Color:
    """`a` with `part` (0 to 1) of `b`."""
    return tuple(round(p + (q - p) * part) for p, q in zip(a, b, strict=True))


class Pen:
    """Draws on one tile in unit coordinates, x to the right and y down.

    The tones of an object's colour are `body`, `shade`, `light`, `accent` and `ink`, which outlines
    every shape that is not bare, inside its edge. Without a colour there are no outlines.
    """

    def __init__(self, tile: Image.Image, rng: random.Random, color: str | None = None) -> None:
        self.tile, self.rng, self.draw = tile, rng, ImageDraw.Draw(tile)
        self.random, self.uniform, self.choice = rng.random, rng.uniform, rng.choice
        self.right, self.bottom = tile.width - 1, tile.height - 1
        self.width = max(2, round(min(tile.size) * 0.023))  # of outlines, in tile pixels
        self.ink = None
        if color is not None:
            amount, dark, light, self.ink = EXTREME_TONES.get(color, TONES)
            self.body = self.vary(COLORS[color], amount)
            self.shade, self.light = mix(self.body, *dark), mix(self.body, *light)
            self.accent = WOOD if color in ("yellow", "orange") else GOLD

    def vary(self, color: Color, amount: int = 10) -> Color:
        """Move every channel by up to `amount`, and all of them together by up to `amount`."""
        light = self.rng.randint(-amount, amount)
        moved = (c + light + self.rng.randint(-amount, amount) for c in color)
        return tuple(min(max(c, 0), 255) for c in moved)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return x0 * self.right, y0 * self.bottom, x1 * self.right, y1 * self.bottom

    def xy(self, points: Points) -> list[tuple[float, float]]:
        return [(x * self.right, y * self.bottom) for x, y in points]

    def outline(self, bare: bool) -> tuple[Color | None, int]:
        return None if bare else self.ink, self.width

    def polygon(self, points: Points, fill: Color, bare: bool = False) -> None:
        self.draw.polygon(self.xy(points), fill, *self.outline(bare))

    def oval(self, *box: float, fill: Color, bare: bool = False) -> None:
        self.draw.ellipse(self.box(*box), fill, *self.outline(bare))

    def spot(self, x: float, y: float, w: float, h: float, fill: Color) -> None:
        """An oval by its centre and radii."""
        self.oval(x - w, y - h, x + w, y + h, fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Color, bare: bool = False) -> None:
        """A circle on any tile; `radius` is a part of the tile's height."""
        x, y, r = x * self.right, y * self.bottom, radius * self.bottom
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill, *self.outline(bare))

    def block(self, *box: float, fill: Color, corner: float = 0, bare: bool = False) -> None:
        """A rectangle; `corner` is its radius as a part of the tile's shorter side."""
        radius = corner * min(self.right, self.bottom)
        self.draw.rounded_rectangle(self.box(*box), radius, fill, *self.outline(bare))

    def slice(self, box: tuple[float, ...], start: float, end: float, fill: Color) -> None:
        """A sector of an oval, in degrees clockwise from the right."""
        self.draw.pieslice(self.box(*box), start, end, fill, self.ink, self.width)

    def blob(self, ovals: Sequence[tuple[float, float, float, float]], fill: Color) -> None:
        """The union of several ovals, with one outline."""
        boxes, w = [self.box(*oval) for oval in ovals], self.width
        for box in boxes:
            self.draw.ellipse(box, self.ink)
        for x0, y0, x1, y1 in boxes:
            self.draw.ellipse((x0 + w, y0 + w, x1 - w, y1 - w), fill)

    def line(self, points: Points, fill: Color, width: float = 0) -> None:
        """`width` is a part of the tile's shorter side, at least that of an outline."""
        thick = max(self.width, round(width * min(self.right, self.bottom)))
        self.draw.line(self.xy(points), fill, thick, "curve")

    def limb(self, points: Points, fill: Color, width: float) -> None:
        """A thick line with round ends and an outline, such as a tail."""
        path, thick = self.xy(points), width * min(self.right, self.bottom)
        for color, across in ((self.ink, thick), (fill, thick - 2 * self.width)):
            self.draw.line(path, color, round(across), "curve")
            for x, y in (path[0], path[-1]):
                r = across / 2
                self.draw.ellipse((x - r, y - r, x + r, y + r), color)

    def fade(self, y0: float, y1: float, top: Color, bottom: Color) -> None:
        """Fill the rows from y0 to y1 with a vertical gradient."""
        start, stop = round(y0 * self.tile.height), round(y1 * self.tile.height)
        column = np.linspace(top, bottom, stop - start).astype(np.uint8)[:, None]
        rows = Image.fromarray(column).resize((self.tile.width, stop - start), Image.NEAREST)
        self.tile.paste(rows, (0, start))
