"""The seven backgrounds, which return where the ground begins (0 to 1), and sun and moon."""

from math import cos, pi, sin

from qvision_lab.scenes.pen import CLEAR, DARK, GOLD, WHITE, Color, Pen, mix


class Backdrops(Pen):
    def sun(self) -> None:
        for i in range(12):
            a = i * pi / 6
            spread = ((a - 0.13, 0.3), (a, 0.5), (a + 0.13, 0.3))
            self.polygon([(0.5 + r * cos(t), 0.5 + r * sin(t)) for t, r in spread], GOLD)
        self.oval(0.2, 0.2, 0.8, 0.8, fill=(255, 196, 30))
        self.oval(0.25, 0.25, 0.75, 0.75, fill=(255, 226, 84))

    def moon(self) -> None:
        self.oval(0, 0, 1, 1, fill=(255, 248, 214))
        self.oval(0.3, -0.08, 1.2, 0.82, fill=CLEAR)

    def clouds(self, color: Color = WHITE) -> None:
        for _ in range(self.rng.randint(0, 3)):
            x, y, s = self.random(), self.uniform(0.02, 0.22), self.uniform(0.05, 0.09)
            for dx, dy, r in ((-1.1, 0.25, 0.6), (0, 0, 0.85), (1.1, 0.2, 0.65), (0.5, 0.3, 0.6)):
                self.spot(x + s * dx, y + s * dy, s * r, s * r * 0.6, color)

    def hills(self, horizon: float, color: Color, height: float) -> None:
        for _ in range(3):
            x, w, h = self.random(), self.uniform(0.25, 0.5), self.uniform(0.4, 1) * height
            self.spot(x, horizon, w, h, self.vary(color, 6))

    def dots(self, n: int, y0: float, y1: float, color: Color, size: float) -> None:
        """Stars, snow flakes, grains of sand."""
        for _ in range(n):
            x, y, r = self.random(), self.uniform(y0, y1), size * self.uniform(0.5, 1.2)
            self.spot(x, y, r, r, color)

    def beach(self) -> float:
        horizon, shore = self.uniform(0.36, 0.46), self.uniform(0.56, 0.64)
        self.fade(0, horizon, self.vary((98, 186, 240)), (214, 240, 252))
        self.clouds()
        self.fade(horizon, shore, self.vary((28, 112, 178)), (76, 186, 206))
        self.fade(shore, 1, self.vary((250, 226, 164)), self.vary((226, 186, 116)))
        for i in range(9):  # the surf
            x = i / 8
            self.spot(x, shore + 0.012 * sin(5 * x + self.random()), 0.09, 0.018, (246, 252, 255))
        self.dots(60, shore + 0.03, 1, (198, 156, 92), 0.003)
        return shore

    def field(self) -> float:
        horizon = self.uniform(0.42, 0.54)
        self.fade(0, horizon + 0.02, self.vary((110, 176, 240)), (222, 240, 252))
        self.clouds()
        self.hills(horizon, (92, 150, 92), 0.14)
        self.fade(horizon, 1, self.vary((142, 200, 92)), self.vary((66, 148, 52)))
        for _ in range(26):  # tufts of grass
            x, y = self.random(), self.uniform(horizon + 0.03, 0.99)
            blades = ((-0.012, -0.02), (0, 0), (0.004, -0.028), (0, 0), (0.016, -0.016))
            self.draw.line(self.xy([(x + dx, y + dy) for dx, dy in blades]), (48, 122, 42), 3)
        return horizon

    def street(self) -> float:
        horizon = self.uniform(0.54, 0.6)
        self.fade(0, horizon, self.vary((146, 178, 214)), (226, 230, 236))
        self.clouds((236, 240, 246))
        x = -self.uniform(0, 0.08)
        while x < 1:
            width, top = self.uniform(0.12, 0.2), self.uniform(0.29, 0.42)
            wall = self.vary(self.choice(((178, 150, 140), (150, 160, 176), (186, 176, 150))), 12)
            self.block(x, top, x + width, horizon, fill=wall)
            glass = mix(wall, self.choice((DARK, GOLD)), 0.4)
            columns = round(width / 0.045)
            for i in range(columns):
                left = x + width * (i + 0.28) / columns
                for row in range(int((horizon - top) / 0.05)):
                    y = top + 0.018 + 0.05 * row
                    self.block(left, y, left + 0.018, y + 0.024, fill=glass)
            x += width + self.uniform(0, 0.03)
        self.fade(horizon, horizon + 0.06, (202, 198, 192), (178, 174, 170))
        self.fade(horizon + 0.06, 1, self.vary((104, 106, 112)), self.vary((74, 76, 82)))
        start = self.uniform(-0.2, 0)
        for i in range(6):  # the road's middle line
            left = start + 0.24 * i
            self.block(left, 0.8, left + 0.13, 0.82, fill=(238, 232, 206))
        return horizon

    def room(self) -> float:
        floor = self.uniform(0.54, 0.64)
        walls = ((236, 214, 186), (222, 206, 222), (206, 220, 208), (238, 222, 170))
        wall = self.vary(self.choice(walls), 8)
        self.fade(0, floor, wall, mix(wall, DARK, 0.12))
        for i in range(12):
            x = (i + 0.5) / 12
            self.block(x, 0, x + 0.02, floor, fill=mix(wall, WHITE, 0.3))
        x, y = self.uniform(0.06, 0.68), self.uniform(0.06, 0.12)
        self.block(x, y, x + 0.26, y + 0.26, fill=WHITE)
        for dx, dy in ((0.02, 0.02), (0.02, 0.14), (0.14, 0.02), (0.14, 0.14)):
            pane = mix((150, 206, 246), WHITE, self.uniform(0, 0.3))
            self.block(x + dx, y + dy, x + dx + 0.1, y + dy + 0.1, fill=pane)
        plank = self.vary((168, 112, 70), 14)
        self.fade(floor, 1, mix(plank, DARK, 0.2), plank)
        self.block(0, floor - 0.03, 1, floor, fill=(246, 242, 234))
        for i in range(6):
            y, below = (floor + (1 - floor) * (row / 6) ** 1.3 for row in (i, i + 1))
            joints = (self.random(), self.random())
            for gap in ([(0, y), (1, y)], *([(x, y), (x, below)] for x in joints)):
                self.draw.line(self.xy(gap), mix(plank, DARK, 0.5), 2)
        return floor

    def snow(self) -> float:
        horizon = self.uniform(0.5, 0.58)
        self.fade(0, horizon, self.vary((168, 184, 210)), (226, 232, 242))
        for _ in range(3):  # mountains with white tops
            x, w, top = self.random(), self.uniform(0.2, 0.4), self.uniform(0.29, 0.38)
            rock = self.vary((140, 154, 184), 8)
            self.polygon([(x - w, horizon), (x, top), (x + w, horizon)], rock)
            cap, part = top + 0.07, w * 0.07 / (horizon - top)
            teeth = ((1, 0), (1 / 3, -0.02), (0, 0.02), (-1 / 3, -0.02), (-1, 0))
            self.polygon([(x, top), *((x + part * dx, cap + dy) for dx, dy in teeth)], WHITE)
        self.fade(horizon, 1, (250, 252, 255), self.vary((218, 226, 242)))
        self.hills(horizon + 0.04, (244, 247, 253), 0.07)
        self.dots(70, 0, 1, WHITE, 0.006)
        return horizon

    def lake(self) -> float:
        horizon = self.uniform(0.34, 0.44)
        self.fade(0, horizon, self.vary((128, 190, 238)), (226, 240, 250))
        self.clouds()
        self.hills(horizon, (84, 134, 110), 0.11)
        self.fade(horizon, 1, self.vary((92, 164, 206)), self.vary((22, 82, 148)))
        for _ in range(34):  # waves, wider where they are nearer
            y, x = self.uniform(horizon + 0.03, 0.99), self.random()
            w = 0.02 + 0.05 * (y - horizon)
            self.draw.arc(self.box(x - w, y, x + w, y + w * 0.5), 200, 340, (176, 218, 240), 2)
        return horizon

    def night(self) -> float:
        horizon = self.uniform(0.56, 0.66)
        self.fade(0, horizon, self.vary((12, 14, 44), 6), self.vary((50, 42, 104)))
        self.dots(60, 0, horizon, (255, 250, 220), 0.004)
        self.hills(horizon, (30, 34, 62), 0.12)
        self.fade(horizon, 1, (38, 46, 66), self.vary((20, 24, 38), 6))
        return horizon
