"""Sketches of the twenty categories, by noun: strokes in `sketches.yaml`, and four methods here.

Every sketch reaches all four sides of its tile, is mostly of the object's colour, and can be
recognised by its outline down to 30 pixels.
"""

from itertools import chain
from math import cos, pi, sin
from pathlib import Path

import yaml

from qvision_lab.scenes import pen

STROKES = yaml.safe_load(Path(__file__).with_name("sketches.yaml").read_text(encoding="utf-8"))
MANY = ("polygon", "line", "limb", "blob")  # these shapes take a list of points, or of boxes


class Sketches(pen.Pen):
    def sketch(self, noun: str) -> None:
        """Draw one category."""
        if noun not in STROKES:
            getattr(self, noun)()
        for stroke in STROKES.get(noun, ()):
            shape, color, *rest = stroke.split()
            numbers = [tuple(map(float, part.split(","))) for part in rest if "=" not in part]
            options = dict(part.split("=") for part in rest if "=" in part)
            options = {name: float(value) for name, value in options.items()}
            places = [numbers] if shape in MANY else chain(*numbers)
            tone = getattr(self, color, None) or getattr(pen, color, color)
            getattr(self, shape)(*places, fill=tone, **options)

    def ball(self) -> None:
        self.oval(0, 0, 1, 1, fill=self.body)
        turn = self.rng.randrange(120)
        for i in range(3):
            self.slice(0, 0, 1, 1, turn + 120 * i, turn + 120 * i + 44, fill=self.light)
        self.oval(0.4, 0.4, 0.6, 0.6, fill=self.light)

    def clock(self) -> None:
        for x0 in (0.04, 0.6):
            self.slice(x0, 0, x0 + 0.36, 0.4, 180, 360, fill=self.body)
        for x in (0.2, 0.8):
            self.line([(x, 0.84), (x + (x - 0.5) / 3, 1)], self.ink, 0.08)
        self.oval(0, 0.08, 1, 0.98, fill=self.body)
        self.oval(0.2, 0.26, 0.8, 0.8, fill=pen.WHITE)
        for i in range(12):
            x, y = sin(i * pi / 6), -cos(i * pi / 6)
            mark = [(0.5 + 0.22 * x, 0.53 + 0.2 * y), (0.5 + 0.26 * x, 0.53 + 0.24 * y)]
            self.line(mark, pen.DARK)
        for length, turn in ((0.13, self.uniform(0, 2 * pi)), (0.2, self.uniform(0, 2 * pi))):
            tip = (0.5 + length * sin(turn), 0.53 - length * cos(turn))
            self.line([(0.5, 0.53), tip], pen.DARK, 0.045)

    def tree(self) -> None:
        self.polygon([(0.42, 0.6), (0.58, 0.6), (0.64, 1), (0.36, 1)], pen.WOOD)
        crown = [(0, 0.3, 0.54, 0.72), (0.46, 0.3, 1, 0.72), (0.18, 0, 0.82, 0.5)]
        self.blob([*crown, (0.22, 0.36, 0.78, 0.78)], self.body)
        for _ in range(6):
            x, y = self.uniform(0.2, 0.7), self.uniform(0.14, 0.58)
            tone = self.choice((self.light, self.shade))
            self.oval(x, y, x + 0.11, y + 0.08, fill=tone, bare=True)

    def flower(self) -> None:
        self.line([(0.5, 0.5), (0.5, 1)], pen.LEAF, 0.09)
        self.polygon([(0.5, 0.98), (0.12, 0.72), (0.4, 0.8)], pen.LEAF, bare=True)
        self.polygon([(0.5, 0.98), (0.88, 0.72), (0.6, 0.8)], pen.LEAF, bare=True)
        for a in (i * pi / 3 for i in range(6)):  # petals
            self.spot(0.5 + 0.31 * cos(a), 0.32 + 0.21 * sin(a), 0.19, 0.14, self.body)
        self.oval(0.34, 0.2, 0.66, 0.44, fill=self.accent)
