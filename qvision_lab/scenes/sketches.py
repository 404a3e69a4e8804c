"""Sketches of the twenty categories: one function each, named by the category's noun.

Every sketch reaches all four sides of its tile, is mostly of the object's colour, and can be
recognised by its outline down to 30 pixels.
"""

from __future__ import annotations

from math import cos, pi, sin

from qvision_lab.scenes.pen import CLEAR, DARK, GLASS, GOLD, LEAF, SILVER, WHITE, WOOD, Pen


def car(pen: Pen) -> None:
    pen.polygon([(0.14, 0.46), (0.3, 0), (0.68, 0), (0.86, 0.46)], pen.body)
    pen.polygon([(0.24, 0.42), (0.34, 0.1), (0.47, 0.1), (0.47, 0.42)], GLASS)
    pen.polygon([(0.53, 0.42), (0.53, 0.1), (0.65, 0.1), (0.76, 0.42)], GLASS)
    pen.block(0, 0.38, 1, 0.82, fill=pen.body, corner=0.16)
    pen.block(0.03, 0.68, 0.97, 0.78, fill=pen.shade, bare=True)
    pen.oval(0.9, 0.47, 0.98, 0.61, fill=GOLD)
    for x in (0.23, 0.77):
        pen.disc(x, 0.8, 0.2, DARK)
        pen.disc(x, 0.8, 0.08, SILVER, bare=True)


def bus(pen: Pen) -> None:
    pen.block(0, 0, 1, 0.88, fill=pen.body, corner=0.1)
    pen.block(0.03, 0.58, 0.97, 0.67, fill=pen.light, bare=True)
    for i in range(4):
        pen.block(0.06 + 0.17 * i, 0.16, 0.2 + 0.17 * i, 0.46, fill=GLASS)
    pen.block(0.77, 0.16, 0.93, 0.78, fill=GLASS)
    pen.line([(0.85, 0.18), (0.85, 0.76)], pen.ink)
    for x in (0.2, 0.64):
        pen.disc(x, 0.85, 0.15, DARK)
        pen.disc(x, 0.85, 0.06, SILVER, bare=True)


def train(pen: Pen) -> None:
    pen.polygon([(0.66, 0), (0.86, 0), (0.82, 0.36), (0.7, 0.36)], pen.shade)
    pen.block(0.42, 0.2, 0.54, 0.4, fill=pen.accent, corner=0.05)
    pen.block(0.3, 0.3, 0.94, 0.76, fill=pen.body, corner=0.12)
    for x in (0.52, 0.68):
        pen.line([(x, 0.33), (x, 0.73)], pen.light)
    pen.block(0.03, 0.1, 0.38, 0.8, fill=pen.body)
    pen.block(0.1, 0.22, 0.3, 0.44, fill=GLASS)
    pen.block(0, 0.06, 0.42, 0.15, fill=pen.shade)
    pen.block(0.03, 0.7, 0.94, 0.82, fill=pen.shade)
    pen.polygon([(0.88, 0.74), (1, 0.97), (0.84, 0.97)], pen.shade)
    for x, radius in ((0.17, 0.18), (0.44, 0.14), (0.65, 0.14)):
        pen.disc(x, 1 - radius, radius, DARK)
        pen.disc(x, 1 - radius, radius * 0.5, pen.body, bare=True)


def boat(pen: Pen) -> None:
    pen.line([(0.5, 0), (0.5, 0.72)], WOOD, 0.05)
    pen.polygon([(0.54, 0.02), (0.96, 0.62), (0.54, 0.62)], pen.body)
    pen.polygon([(0.46, 0.12), (0.46, 0.62), (0.1, 0.62)], pen.light)
    pen.polygon([(0, 0.68), (1, 0.68), (0.82, 1), (0.18, 1)], pen.body)
    pen.polygon([(0.06, 0.75), (0.94, 0.75), (0.91, 0.81), (0.09, 0.81)], pen.light, bare=True)


def airplane(pen: Pen) -> None:
    pen.polygon([(0.4, 0.44), (0.58, 0.44), (0.46, 0.06), (0.36, 0.06)], pen.shade)
    pen.polygon([(0, 0), (0.12, 0), (0.26, 0.44), (0.06, 0.5)], pen.body)
    pen.blob([(0.02, 0.36, 0.6, 0.7), (0.12, 0.32, 1, 0.74)], pen.body)
    pen.polygon([(0.84, 0.4), (0.93, 0.46), (0.84, 0.5)], GLASS, bare=True)
    for i in range(4):
        pen.disc(0.36 + 0.12 * i, 0.47, 0.045, GLASS, bare=True)
    pen.polygon([(0.38, 0.6), (0.62, 0.6), (0.36, 1), (0.24, 1)], pen.shade)
    pen.polygon([(0.02, 0.48), (0.2, 0.48), (0.1, 0.7), (0.02, 0.7)], pen.shade)


def cat(pen: Pen) -> None:
    pen.limb([(0.32, 0.9), (0.14, 0.88), (0.07, 0.74), (0.1, 0.5)], pen.body, 0.13)
    pen.oval(0.24, 0.42, 0.86, 1, fill=pen.body)
    for x in (0.48, 0.62):
        pen.block(x, 0.8, x + 0.13, 1, fill=pen.body, corner=0.06)
    for tip, near, far in ((0.34, 0.33, 0.56), (0.94, 0.97, 0.72)):
        pen.polygon([(near, 0.34), (tip, 0), (far, 0.14)], pen.body)
    pen.oval(0.28, 0.1, 1, 0.6, fill=pen.body)
    for x in (0.48, 0.8):
        pen.oval(x - 0.06, 0.27, x + 0.06, 0.39, fill=(190, 235, 110))
        pen.oval(x - 0.02, 0.28, x + 0.02, 0.38, fill=DARK, bare=True)
    pen.polygon([(0.6, 0.42), (0.68, 0.42), (0.64, 0.47)], (245, 130, 150), bare=True)
    for y in (0.44, 0.5):
        for x0, x1 in ((0.34, 0.52), (0.76, 0.94)):
            pen.line([(x0, y), (x1, 0.47)], pen.ink)


def dog(pen: Pen) -> None:
    pen.limb([(0.22, 0.5), (0.1, 0.4), (0.06, 0.22)], pen.body, 0.13)
    for x in (0.22, 0.6):
        pen.block(x, 0.6, x + 0.12, 0.98, fill=pen.shade, corner=0.05)
    pen.block(0.14, 0.4, 0.76, 0.76, fill=pen.body, corner=0.18)
    for x in (0.14, 0.64):
        pen.block(x, 0.56, x + 0.13, 1, fill=pen.body, corner=0.05)
        pen.block(x + 0.03, 0.5, x + 0.1, 0.7, fill=pen.body, bare=True)
    pen.blob([(0.56, 0.0, 0.88, 0.46), (0.74, 0.16, 1, 0.44)], pen.body)
    pen.block(0.56, 0.43, 0.78, 0.5, fill=pen.accent)
    pen.oval(0.54, 0.06, 0.68, 0.44, fill=pen.shade)
    pen.disc(0.79, 0.18, 0.065, WHITE, bare=True)
    pen.disc(0.8, 0.18, 0.045, DARK, bare=True)
    pen.oval(0.94, 0.19, 1, 0.29, fill=DARK)


def bird(pen: Pen) -> None:
    pen.polygon([(0, 0.5), (0.3, 0.56), (0.22, 0.78), (0.02, 0.72)], pen.shade)
    for x in (0.48, 0.58):
        pen.line([(x, 0.84), (x + 0.03, 1)], (240, 140, 30), 0.05)
    pen.polygon([(0.84, 0.28), (1, 0.38), (0.84, 0.46)], (250, 160, 30))
    pen.blob([(0.16, 0.4, 0.8, 0.92), (0.62, 0.16, 0.92, 0.6)], pen.body)
    pen.disc(0.8, 0.33, 0.07, WHITE, bare=True)
    pen.disc(0.81, 0.33, 0.045, DARK, bare=True)
    pen.polygon([(0.34, 0.62), (0.14, 0), (0.48, 0.2), (0.66, 0.62), (0.5, 0.72)], pen.shade)


def ball(pen: Pen) -> None:
    pen.oval(0, 0, 1, 1, fill=pen.body)
    turn = pen.rng.randrange(120)
    for i in range(3):
        pen.slice((0, 0, 1, 1), turn + 120 * i, turn + 120 * i + 44, pen.light)
    pen.oval(0.4, 0.4, 0.6, 0.6, fill=pen.light)


def kite(pen: Pen) -> None:
    pen.line([(0.5, 0.7), (0.62, 0.79), (0.42, 0.88), (0.55, 1)], pen.ink)
    top, right, bottom, left, middle = (0.5, 0), (1, 0.32), (0.5, 0.74), (0, 0.32), (0.5, 0.32)
    pen.polygon([top, right, bottom, left], pen.body)
    pen.polygon([top, middle, left], pen.light)
    pen.polygon([bottom, middle, right], pen.shade)
    pen.line([top, bottom], pen.ink)
    pen.line([left, right], pen.ink)
    for x, y in ((0.58, 0.8), (0.46, 0.91)):
        for side in (-0.16, 0.16):
            pen.polygon([(x, y), (x + side, y - 0.05), (x + side, y + 0.05)], pen.body)


def umbrella(pen: Pen) -> None:
    pen.line([(0.5, 0), (0.5, 0.92)], WOOD, 0.05)
    pen.line([(0.5, 0.9), (0.51, 0.95), (0.55, 0.985), (0.6, 0.975), (0.63, 0.9)], WOOD, 0.05)
    pen.slice((0, 0.06, 1, 1.1), 180, 360, pen.body)
    pen.polygon([(0.5, 0.06), (0.3, 0.2), (0.22, 0.58), (0.41, 0.58)], pen.light)
    pen.polygon([(0.5, 0.06), (0.7, 0.2), (0.78, 0.58), (0.59, 0.58)], pen.light)


def cup(pen: Pen) -> None:
    pen.oval(0.5, 0.26, 1, 0.78, fill=pen.body)
    pen.oval(0.62, 0.38, 0.88, 0.66, fill=CLEAR)
    pen.polygon([(0, 0.1), (0.76, 0.1), (0.68, 0.94), (0.08, 0.94)], pen.body)
    pen.oval(0.08, 0.84, 0.68, 1, fill=pen.body)
    pen.polygon([(0.03, 0.14), (0.73, 0.14), (0.66, 0.92), (0.1, 0.92)], pen.body, bare=True)
    pen.block(0.12, 0.3, 0.2, 0.8, fill=pen.light, corner=0.04, bare=True)
    pen.oval(0, 0, 0.76, 0.22, fill=pen.light)
    pen.oval(0.09, 0.06, 0.67, 0.2, fill=(92, 56, 34))


def apple(pen: Pen) -> None:
    pen.line([(0.5, 0.34), (0.46, 0.16), (0.4, 0)], WOOD, 0.07)
    pen.oval(0.5, 0.02, 0.84, 0.2, fill=LEAF)
    pen.blob([(0, 0.2, 0.6, 0.92), (0.4, 0.2, 1, 0.92), (0.09, 0.3, 0.91, 1)], pen.body)
    pen.oval(0.14, 0.32, 0.3, 0.56, fill=pen.light, bare=True)
    pen.line([(0.38, 0.3), (0.5, 0.36), (0.62, 0.3)], pen.ink)


def book(pen: Pen) -> None:
    pen.polygon([(0, 0.74), (0.8, 0.74), (1, 0), (1, 0.24), (0.8, 1), (0, 1)], pen.shade)
    pen.polygon([(0.05, 0.76), (0.8, 0.76), (0.8, 0.92), (0.05, 0.92)], WHITE)
    pen.polygon([(0.8, 0.76), (0.98, 0.08), (0.98, 0.22), (0.8, 0.92)], (224, 220, 208), bare=True)
    pen.line([(0.08, 0.84), (0.78, 0.84)], (170, 168, 160))
    pen.polygon([(0.2, 0), (1, 0), (0.8, 0.76), (0, 0.76)], pen.body)
    pen.polygon([(0.2, 0), (0.3, 0), (0.1, 0.76), (0, 0.76)], pen.shade)
    pen.polygon([(0.44, 0.18), (0.82, 0.18), (0.74, 0.46), (0.36, 0.46)], pen.light)


def clock(pen: Pen) -> None:
    for x0 in (0.04, 0.6):
        pen.slice((x0, 0, x0 + 0.36, 0.4), 180, 360, pen.body)
    for x in (0.2, 0.8):
        pen.line([(x, 0.84), (x + (x - 0.5) / 3, 1)], pen.ink, 0.08)
    pen.oval(0, 0.08, 1, 0.98, fill=pen.body)
    pen.oval(0.2, 0.26, 0.8, 0.8, fill=WHITE)
    for i in range(12):
        x, y = sin(i * pi / 6), -cos(i * pi / 6)
        pen.line([(0.5 + 0.22 * x, 0.53 + 0.2 * y), (0.5 + 0.26 * x, 0.53 + 0.24 * y)], DARK)
    for length, turn in ((0.13, pen.rng.uniform(0, 2 * pi)), (0.2, pen.rng.uniform(0, 2 * pi))):
        tip = (0.5 + length * sin(turn), 0.53 - length * cos(turn))
        pen.line([(0.5, 0.53), tip], DARK, 0.045)


def chair(pen: Pen) -> None:
    for x0, y0, y1 in ((0.14, 0.6, 0.9), (0.74, 0.6, 0.9), (0, 0.62, 1), (0.86, 0.62, 1)):
        pen.block(x0, y0, x0 + 0.14, y1, fill=pen.shade)
    pen.block(0.1, 0, 0.9, 0.54, fill=pen.body, corner=0.14)
    pen.block(0.24, 0.08, 0.76, 0.42, fill=pen.light, corner=0.1)
    pen.polygon([(0.1, 0.5), (0.9, 0.5), (1, 0.7), (0, 0.7)], pen.body)
    pen.block(0, 0.66, 1, 0.75, fill=pen.shade)


def tree(pen: Pen) -> None:
    pen.polygon([(0.42, 0.6), (0.58, 0.6), (0.64, 1), (0.36, 1)], WOOD)
    crown = [(0, 0.3, 0.54, 0.72), (0.46, 0.3, 1, 0.72), (0.18, 0, 0.82, 0.5)]
    pen.blob([*crown, (0.22, 0.36, 0.78, 0.78)], pen.body)
    for _ in range(6):
        x, y = pen.rng.uniform(0.2, 0.7), pen.rng.uniform(0.14, 0.58)
        pen.oval(x, y, x + 0.11, y + 0.08, fill=pen.rng.choice((pen.light, pen.shade)), bare=True)


def house(pen: Pen) -> None:
    pen.block(0.72, 0.04, 0.84, 0.4, fill=pen.shade)
    pen.block(0.08, 0.4, 0.92, 1, fill=pen.body)
    pen.polygon([(0.5, 0), (1, 0.48), (0, 0.48)], pen.shade)
    pen.block(0.42, 0.62, 0.6, 1, fill=WOOD)
    for x in (0.16, 0.68):
        pen.block(x, 0.6, x + 0.18, 0.8, fill=GLASS)
        pen.line([(x + 0.09, 0.6), (x + 0.09, 0.8)], pen.ink)
    pen.disc(0.5, 0.31, 0.07, GLASS)


def flower(pen: Pen) -> None:
    pen.line([(0.5, 0.5), (0.5, 1)], LEAF, 0.09)
    pen.polygon([(0.5, 0.98), (0.12, 0.72), (0.4, 0.8)], LEAF, bare=True)
    pen.polygon([(0.5, 0.98), (0.88, 0.72), (0.6, 0.8)], LEAF, bare=True)
    for a in (i * pi / 3 for i in range(6)):  # petals
        pen.spot(0.5 + 0.31 * cos(a), 0.32 + 0.21 * sin(a), 0.19, 0.14, pen.body)
    pen.oval(0.34, 0.2, 0.66, 0.44, fill=pen.accent)


def fish(pen: Pen) -> None:
    pen.polygon([(0.3, 0.24), (0.42, 0), (0.66, 0.02), (0.62, 0.3)], pen.shade)
    pen.polygon([(0.4, 0.8), (0.36, 1), (0.54, 1), (0.58, 0.8)], pen.shade)
    pen.polygon([(0.26, 0.5), (0, 0.12), (0.06, 0.5), (0, 0.9)], pen.shade)
    pen.oval(0.16, 0.14, 1, 0.88, fill=pen.body)
    for x in (0.34, 0.48):
        pen.draw.arc(pen.box(x, 0.28, x + 0.16, 0.76), 280, 80, pen.light, pen.width)
    pen.draw.arc(pen.box(0.52, 0.22, 0.76, 0.8), 290, 70, pen.ink, pen.width)
    pen.disc(0.85, 0.4, 0.09, WHITE)
    pen.disc(0.86, 0.4, 0.045, DARK, bare=True)
