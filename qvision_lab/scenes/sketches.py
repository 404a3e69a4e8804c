"""Sketches of the twenty categories: one method each, named by the category's noun.

Every sketch reaches all four sides of its tile, is mostly of the object's colour, and can be
recognised by its outline down to 30 pixels.
"""

from math import cos, pi, sin

from qvision_lab.scenes.pen import CLEAR, DARK, GLASS, GOLD, LEAF, SILVER, WHITE, WOOD, Pen


class Sketches(Pen):
    def car(self) -> None:
        self.polygon([(0.14, 0.46), (0.3, 0), (0.68, 0), (0.86, 0.46)], self.body)
        self.polygon([(0.24, 0.42), (0.34, 0.1), (0.47, 0.1), (0.47, 0.42)], GLASS)
        self.polygon([(0.53, 0.42), (0.53, 0.1), (0.65, 0.1), (0.76, 0.42)], GLASS)
        self.block(0, 0.38, 1, 0.82, fill=self.body, corner=0.16)
        self.block(0.03, 0.68, 0.97, 0.78, fill=self.shade, bare=True)
        self.oval(0.9, 0.47, 0.98, 0.61, fill=GOLD)
        for x in (0.23, 0.77):
            self.disc(x, 0.8, 0.2, DARK)
            self.disc(x, 0.8, 0.08, SILVER, bare=True)

    def bus(self) -> None:
        self.block(0, 0, 1, 0.88, fill=self.body, corner=0.1)
        self.block(0.03, 0.58, 0.97, 0.67, fill=self.light, bare=True)
        for i in range(4):
            self.block(0.06 + 0.17 * i, 0.16, 0.2 + 0.17 * i, 0.46, fill=GLASS)
        self.block(0.77, 0.16, 0.93, 0.78, fill=GLASS)
        self.line([(0.85, 0.18), (0.85, 0.76)], self.ink)
        for x in (0.2, 0.64):
            self.disc(x, 0.85, 0.15, DARK)
            self.disc(x, 0.85, 0.06, SILVER, bare=True)

    def train(self) -> None:
        self.polygon([(0.66, 0), (0.86, 0), (0.82, 0.36), (0.7, 0.36)], self.shade)
        self.block(0.42, 0.2, 0.54, 0.4, fill=self.accent, corner=0.05)
        self.block(0.3, 0.3, 0.94, 0.76, fill=self.body, corner=0.12)
        for x in (0.52, 0.68):
            self.line([(x, 0.33), (x, 0.73)], self.light)
        self.block(0.03, 0.1, 0.38, 0.8, fill=self.body)
        self.block(0.1, 0.22, 0.3, 0.44, fill=GLASS)
        self.block(0, 0.06, 0.42, 0.15, fill=self.shade)
        self.block(0.03, 0.7, 0.94, 0.82, fill=self.shade)
        self.polygon([(0.88, 0.74), (1, 0.97), (0.84, 0.97)], self.shade)
        for x, radius in ((0.17, 0.18), (0.44, 0.14), (0.65, 0.14)):
            self.disc(x, 1 - radius, radius, DARK)
            self.disc(x, 1 - radius, radius * 0.5, self.body, bare=True)

    def boat(self) -> None:
        self.line([(0.5, 0), (0.5, 0.72)], WOOD, 0.05)
        self.polygon([(0.54, 0.02), (0.96, 0.62), (0.54, 0.62)], self.body)
        self.polygon([(0.46, 0.12), (0.46, 0.62), (0.1, 0.62)], self.light)
        self.polygon([(0, 0.68), (1, 0.68), (0.82, 1), (0.18, 1)], self.body)
        stripe = [(0.06, 0.75), (0.94, 0.75), (0.91, 0.81), (0.09, 0.81)]
        self.polygon(stripe, self.light, bare=True)

    def airplane(self) -> None:
        self.polygon([(0.4, 0.44), (0.58, 0.44), (0.46, 0.06), (0.36, 0.06)], self.shade)
        self.polygon([(0, 0), (0.12, 0), (0.26, 0.44), (0.06, 0.5)], self.body)
        self.blob([(0.02, 0.36, 0.6, 0.7), (0.12, 0.32, 1, 0.74)], self.body)
        self.polygon([(0.84, 0.4), (0.93, 0.46), (0.84, 0.5)], GLASS, bare=True)
        for i in range(4):
            self.disc(0.36 + 0.12 * i, 0.47, 0.045, GLASS, bare=True)
        self.polygon([(0.38, 0.6), (0.62, 0.6), (0.36, 1), (0.24, 1)], self.shade)
        self.polygon([(0.02, 0.48), (0.2, 0.48), (0.1, 0.7), (0.02, 0.7)], self.shade)

    def cat(self) -> None:
        self.limb([(0.32, 0.9), (0.14, 0.88), (0.07, 0.74), (0.1, 0.5)], self.body, 0.13)
        self.oval(0.24, 0.42, 0.86, 1, fill=self.body)
        for x in (0.48, 0.62):
            self.block(x, 0.8, x + 0.13, 1, fill=self.body, corner=0.06)
        for tip, near, far in ((0.34, 0.33, 0.56), (0.94, 0.97, 0.72)):
            self.polygon([(near, 0.34), (tip, 0), (far, 0.14)], self.body)
        self.oval(0.28, 0.1, 1, 0.6, fill=self.body)
        for x in (0.48, 0.8):
            self.oval(x - 0.06, 0.27, x + 0.06, 0.39, fill=(190, 235, 110))
            self.oval(x - 0.02, 0.28, x + 0.02, 0.38, fill=DARK, bare=True)
        self.polygon([(0.6, 0.42), (0.68, 0.42), (0.64, 0.47)], (245, 130, 150), bare=True)
        for y in (0.44, 0.5):
            for x0, x1 in ((0.34, 0.52), (0.76, 0.94)):
                self.line([(x0, y), (x1, 0.47)], self.ink)

    def dog(self) -> None:
        self.limb([(0.22, 0.5), (0.1, 0.4), (0.06, 0.22)], self.body, 0.13)
        for x in (0.22, 0.6):
            self.block(x, 0.6, x + 0.12, 0.98, fill=self.shade, corner=0.05)
        self.block(0.14, 0.4, 0.76, 0.76, fill=self.body, corner=0.18)
        for x in (0.14, 0.64):
            self.block(x, 0.56, x + 0.13, 1, fill=self.body, corner=0.05)
            self.block(x + 0.03, 0.5, x + 0.1, 0.7, fill=self.body, bare=True)
        self.blob([(0.56, 0.0, 0.88, 0.46), (0.74, 0.16, 1, 0.44)], self.body)
        self.block(0.56, 0.43, 0.78, 0.5, fill=self.accent)
        self.oval(0.54, 0.06, 0.68, 0.44, fill=self.shade)
        self.disc(0.79, 0.18, 0.065, WHITE, bare=True)
        self.disc(0.8, 0.18, 0.045, DARK, bare=True)
        self.oval(0.94, 0.19, 1, 0.29, fill=DARK)

    def bird(self) -> None:
        self.polygon([(0, 0.5), (0.3, 0.56), (0.22, 0.78), (0.02, 0.72)], self.shade)
        for x in (0.48, 0.58):
            self.line([(x, 0.84), (x + 0.03, 1)], (240, 140, 30), 0.05)
        self.polygon([(0.84, 0.28), (1, 0.38), (0.84, 0.46)], (250, 160, 30))
        self.blob([(0.16, 0.4, 0.8, 0.92), (0.62, 0.16, 0.92, 0.6)], self.body)
        self.disc(0.8, 0.33, 0.07, WHITE, bare=True)
        self.disc(0.81, 0.33, 0.045, DARK, bare=True)
        self.polygon([(0.34, 0.62), (0.14, 0), (0.48, 0.2), (0.66, 0.62), (0.5, 0.72)], self.shade)

    def ball(self) -> None:
        self.oval(0, 0, 1, 1, fill=self.body)
        turn = self.rng.randrange(120)
        for i in range(3):
            self.slice((0, 0, 1, 1), turn + 120 * i, turn + 120 * i + 44, self.light)
        self.oval(0.4, 0.4, 0.6, 0.6, fill=self.light)

    def kite(self) -> None:
        self.line([(0.5, 0.7), (0.62, 0.79), (0.42, 0.88), (0.55, 1)], self.ink)
        top, right, bottom, left, middle = (0.5, 0), (1, 0.32), (0.5, 0.74), (0, 0.32), (0.5, 0.32)
        self.polygon([top, right, bottom, left], self.body)
        self.polygon([top, middle, left], self.light)
        self.polygon([bottom, middle, right], self.shade)
        self.line([top, bottom], self.ink)
        self.line([left, right], self.ink)
        for x, y in ((0.58, 0.8), (0.46, 0.91)):
            for side in (-0.16, 0.16):
                self.polygon([(x, y), (x + side, y - 0.05), (x + side, y + 0.05)], self.body)

    def umbrella(self) -> None:
        self.line([(0.5, 0), (0.5, 0.92)], WOOD, 0.05)
        self.line([(0.5, 0.9), (0.51, 0.95), (0.55, 0.985), (0.6, 0.975), (0.63, 0.9)], WOOD, 0.05)
        self.slice((0, 0.06, 1, 1.1), 180, 360, self.body)
        self.polygon([(0.5, 0.06), (0.3, 0.2), (0.22, 0.58), (0.41, 0.58)], self.light)
        self.polygon([(0.5, 0.06), (0.7, 0.2), (0.78, 0.58), (0.59, 0.58)], self.light)

    def cup(self) -> None:
        self.oval(0.5, 0.26, 1, 0.78, fill=self.body)
        self.oval(0.62, 0.38, 0.88, 0.66, fill=CLEAR)
        self.polygon([(0, 0.1), (0.76, 0.1), (0.68, 0.94), (0.08, 0.94)], self.body)
        self.oval(0.08, 0.84, 0.68, 1, fill=self.body)
        self.polygon([(0.03, 0.14), (0.73, 0.14), (0.66, 0.92), (0.1, 0.92)], self.body, bare=True)
        self.block(0.12, 0.3, 0.2, 0.8, fill=self.light, corner=0.04, bare=True)
        self.oval(0, 0, 0.76, 0.22, fill=self.light)
        self.oval(0.09, 0.06, 0.67, 0.2, fill=(92, 56, 34))

    def apple(self) -> None:
        self.line([(0.5, 0.34), (0.46, 0.16), (0.4, 0)], WOOD, 0.07)
        self.oval(0.5, 0.02, 0.84, 0.2, fill=LEAF)
        self.blob([(0, 0.2, 0.6, 0.92), (0.4, 0.2, 1, 0.92), (0.09, 0.3, 0.91, 1)], self.body)
        self.oval(0.14, 0.32, 0.3, 0.56, fill=self.light, bare=True)
        self.line([(0.38, 0.3), (0.5, 0.36), (0.62, 0.3)], self.ink)

    def book(self) -> None:
        self.polygon([(0, 0.74), (0.8, 0.74), (1, 0), (1, 0.24), (0.8, 1), (0, 1)], self.shade)
        self.polygon([(0.05, 0.76), (0.8, 0.76), (0.8, 0.92), (0.05, 0.92)], WHITE)
        pages = [(0.8, 0.76), (0.98, 0.08), (0.98, 0.22), (0.8, 0.92)]
        self.polygon(pages, (224, 220, 208), bare=True)
        self.line([(0.08, 0.84), (0.78, 0.84)], (170, 168, 160))
        self.polygon([(0.2, 0), (1, 0), (0.8, 0.76), (0, 0.76)], self.body)
        self.polygon([(0.2, 0), (0.3, 0), (0.1, 0.76), (0, 0.76)], self.shade)
        self.polygon([(0.44, 0.18), (0.82, 0.18), (0.74, 0.46), (0.36, 0.46)], self.light)

    def clock(self) -> None:
        for x0 in (0.04, 0.6):
            self.slice((x0, 0, x0 + 0.36, 0.4), 180, 360, self.body)
        for x in (0.2, 0.8):
            self.line([(x, 0.84), (x + (x - 0.5) / 3, 1)], self.ink, 0.08)
        self.oval(0, 0.08, 1, 0.98, fill=self.body)
        self.oval(0.2, 0.26, 0.8, 0.8, fill=WHITE)
        for i in range(12):
            x, y = sin(i * pi / 6), -cos(i * pi / 6)
            self.line([(0.5 + 0.22 * x, 0.53 + 0.2 * y), (0.5 + 0.26 * x, 0.53 + 0.24 * y)], DARK)
        for length, turn in ((0.13, self.uniform(0, 2 * pi)), (0.2, self.uniform(0, 2 * pi))):
            tip = (0.5 + length * sin(turn), 0.53 - length * cos(turn))
            self.line([(0.5, 0.53), tip], DARK, 0.045)

    def chair(self) -> None:
        for x0, y0, y1 in ((0.14, 0.6, 0.9), (0.74, 0.6, 0.9), (0, 0.62, 1), (0.86, 0.62, 1)):
            self.block(x0, y0, x0 + 0.14, y1, fill=self.shade)
        self.block(0.1, 0, 0.9, 0.54, fill=self.body, corner=0.14)
        self.block(0.24, 0.08, 0.76, 0.42, fill=self.light, corner=0.1)
        self.polygon([(0.1, 0.5), (0.9, 0.5), (1, 0.7), (0, 0.7)], self.body)
        self.block(0, 0.66, 1, 0.75, fill=self.shade)

    def tree(self) -> None:
        self.polygon([(0.42, 0.6), (0.58, 0.6), (0.64, 1), (0.36, 1)], WOOD)
        crown = [(0, 0.3, 0.54, 0.72), (0.46, 0.3, 1, 0.72), (0.18, 0, 0.82, 0.5)]
        self.blob([*crown, (0.22, 0.36, 0.78, 0.78)], self.body)
        for _ in range(6):
            x, y = self.uniform(0.2, 0.7), self.uniform(0.14, 0.58)
            tone = self.choice((self.light, self.shade))
            self.oval(x, y, x + 0.11, y + 0.08, fill=tone, bare=True)

    def house(self) -> None:
        self.block(0.72, 0.04, 0.84, 0.4, fill=self.shade)
        self.block(0.08, 0.4, 0.92, 1, fill=self.body)
        self.polygon([(0.5, 0), (1, 0.48), (0, 0.48)], self.shade)
        self.block(0.42, 0.62, 0.6, 1, fill=WOOD)
        for x in (0.16, 0.68):
            self.block(x, 0.6, x + 0.18, 0.8, fill=GLASS)
            self.line([(x + 0.09, 0.6), (x + 0.09, 0.8)], self.ink)
        self.disc(0.5, 0.31, 0.07, GLASS)

    def flower(self) -> None:
        self.line([(0.5, 0.5), (0.5, 1)], LEAF, 0.09)
        self.polygon([(0.5, 0.98), (0.12, 0.72), (0.4, 0.8)], LEAF, bare=True)
        self.polygon([(0.5, 0.98), (0.88, 0.72), (0.6, 0.8)], LEAF, bare=True)
        for a in (i * pi / 3 for i in range(6)):  # petals
            self.spot(0.5 + 0.31 * cos(a), 0.32 + 0.21 * sin(a), 0.19, 0.14, self.body)
        self.oval(0.34, 0.2, 0.66, 0.44, fill=self.accent)

    def fish(self) -> None:
        self.polygon([(0.3, 0.24), (0.42, 0), (0.66, 0.02), (0.62, 0.3)], self.shade)
        self.polygon([(0.4, 0.8), (0.36, 1), (0.54, 1), (0.58, 0.8)], self.shade)
        self.polygon([(0.26, 0.5), (0, 0.12), (0.06, 0.5), (0, 0.9)], self.shade)
        self.oval(0.16, 0.14, 1, 0.88, fill=self.body)
        for x in (0.34, 0.48):
            self.draw.arc(self.box(x, 0.28, x + 0.16, 0.76), 280, 80, self.light, self.width)
        self.draw.arc(self.box(0.52, 0.22, 0.76, 0.8), 290, 70, self.ink, self.width)
        self.disc(0.85, 0.4, 0.09, WHITE)
        self.disc(0.86, 0.4, 0.045, DARK, bare=True)
