"""Paint and pen: what everything in a scene is drawn with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from qvision_lab.data.scenes.world import COLORS

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


@dataclass(frozen=True)
class Paint:
    body: Color
    shade: Color  # parts that lie further back
    light: Color  # parts that catch the light; grey on white things
    ink: Color  # outlines: dark, but light around black things
    accent: Color  # small parts of another colour


def mix(a: Color, b: Color, part: float) -> Color:
    """`a` with `part` (0 to 1) of `b`."""
    return tuple(round(p + (q - p) * part) for p, q in zip(a, b, strict=True))


def vary(color: Color, rng: random.Random, amount: int = 10) -> Color:
    """The colour with every channel moved by up to `amount`, and all of them by up to as much."""
    light = rng.randint(-amount, amount)
    return tuple(min(max(c + light + rng.randint(-amount, amount), 0), 255) for c in color)


def paint(color: str, rng: random.Random) -> Paint:
    """The tones of one object of this colour, a little different for each."""
    accent = WOOD if color in ("yellow", "orange") else GOLD
    if color == "black":
        body = vary(COLORS[color], rng, 5)
        return Paint(body, mix(body, (0, 0, 0), 0.4), mix(body, WHITE, 0.3), SILVER, accent)
    if color == "white":
        body = vary(COLORS[color], rng, 4)
        return Paint(body, mix(body, DARK, 0.16), mix(body, DARK, 0.09), DARK, accent)
    body = vary(COLORS[color], rng, 9)
    return Paint(body, mix(body, DARK, 0.18), mix(body, WHITE, 0.45), DARK, accent)


class Pen:
    """Draws on one tile in unit coordinates; outlines stay inside their shapes."""

    def __init__(self, tile: Image.Image, rng: random.Random, tones: Paint | None = None) -> None:
        self.tile, self.rng = tile, rng
        self.draw = ImageDraw.Draw(tile)
        self.right, self.bottom = tile.width - 1, tile.height - 1
        self.width = max(2, round(min(tile.size) * 0.023))  # of outlines, in tile pixels
        if tones is not None:
            self.body, self.shade, self.light = tones.body, tones.shade, tones.light
            self.ink, self.accent = tones.ink, tones.accent

    def vary(self, color: Color, amount: int = 10) -> Color:
        return vary(color, self.rng, amount)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return x0 * self.right, y0 * self.bottom, x1 * self.right, y1 * self.bottom

    def xy(self, points: Points) -> list[tuple[float, float]]:
        return [(x * self.right, y * self.bottom) for x, y in points]

    def polygon(self, points: Points, fill: Color, bare: bool = False) -> None:
        outline = None if bare else self.ink
        self.draw.polygon(self.xy(points), fill, outline, 1 if bare else self.width)

    def oval(self, *box: float, fill: Color, bare: bool = False) -> None:
        self.draw.ellipse(self.box(*box), fill, None if bare else self.ink, self.width)

    def block(self, *box: float, fill: Color, corner: float = 0, bare: bool = False) -> None:
        """A rectangle; `corner` is its radius as a part of the tile's shorter side."""
        radius = corner * min(self.right, self.bottom)
        outline = None if bare else self.ink
        self.draw.rounded_rectangle(self.box(*box), radius, fill, outline, self.width)

    def disc(self, x: float, y: float, radius: float, fill: Color, bare: bool = False) -> None:
        """A circle, whatever the tile's shape; `radius` as a part of the tile's height."""
        x, y, radius = x * self.right, y * self.bottom, radius * self.bottom
        box = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse(box, fill, None if bare else self.ink, self.width)

    def blob(self, ovals: Sequence[tuple[float, float, float, float]], fill: Color) -> None:
        """Several ovals with one outline around them all."""
        boxes = [self.box(*oval) for oval in ovals]
        for box in boxes:
            self.draw.ellipse(box, self.ink)
        w = self.width
        for x0, y0, x1, y1 in boxes:
            self.draw.ellipse((x0 + w, y0 + w, x1 - w, y1 - w), fill)

    def line(self, points: Points, fill: Color, width: float = 0) -> None:
        """`width` as a part of the tile's shorter side, at least that of an outline."""
        thick = max(self.width, round(width * min(self.right, self.bottom)))
        self.draw.line(self.xy(points), fill, thick, "curve")

    def limb(self, points: Points, fill: Color, width: float) -> None:
        """A thick line with round ends and an outline, such as a tail."""
        thick = width * min(self.right, self.bottom)
        for color, across in ((self.ink, thick), (fill, thick - 2 * self.width)):
            path, r = self.xy(points), across / 2
            self.draw.line(path, color, round(across), "curve")
            for x, y in (path[0], path[-1]):
                self.draw.ellipse((x - r, y - r, x + r, y + r), color)

    def slice(self, box: tuple[float, ...], start: float, end: float, fill: Color) -> None:
        """A piece of an oval's pie, in degrees clockwise from the right."""
        self.draw.pieslice(self.box(*box), start, end, fill, self.ink, self.width)

    def fade(self, y0: float, y1: float, top: Color, bottom: Color) -> None:
        """Fill the rows from y0 to y1 with a vertical gradient."""
        start, stop = round(y0 * self.tile.height), round(y1 * self.tile.height)
        column = np.linspace(top, bottom, stop - start).astype(np.uint8)[:, None]
        rows = Image.fromarray(column).resize((self.tile.width, stop - start), Image.NEAREST)
        self.tile.paste(rows, (0, start))
