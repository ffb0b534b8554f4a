"""Outlines, patterns and marks that both the pre-training scenes and the creature cards draw with.

Lengths are pixels of the canvas, colours are RGB triples of 0..255, and `y` grows downwards.
"""

from __future__ import annotations

import colorsys
import math
import random

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

SHAPES: tuple[str, ...] = ("ball", "box", "tent", "star", "bow", "cross", "moon")
PATTERNS: tuple[str, ...] = ("plain", "lined", "dotted", "checked")
MARKS: tuple[str, ...] = ("dot", "heart", "star")


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB of a hue in degrees (any real number), a saturation and a value (clipped to 0..1)."""
    saturation, value = min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)
    red, green, blue = colorsys.hsv_to_rgb((hue / 360.0) % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """The colour `share` (0..1) of the way from `one` to `other`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


_CIRCLE = [(math.cos(math.tau * i / 28), math.sin(math.tau * i / 28)) for i in range(28)]


def _star(inner: float) -> list[Point]:
    points = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else inner
        angle = math.pi * i / 5 - math.pi / 2
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _heart() -> list[Point]:
    points = []
    for i in range(24):
        t = math.tau * i / 24
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.5, -(y + 2.5) / 14.5))
    return points


def _moon() -> list[Point]:
    outer = [
        (math.cos(a), math.sin(a)) for a in (0.7 + i * (math.tau - 1.4) / 20 for i in range(21))
    ]
    inner = [
        (0.45 + 0.72 * math.cos(a), 0.72 * math.sin(a))
        for a in (math.tau - 1.1 - i * (math.tau - 2.2) / 16 for i in range(17))
    ]
    return outer + inner


# Unit outlines: they fill about -1..1 both ways, so that one radius means about one size.
_OUTLINES: dict[str, list[Point]] = {
    "ball": _CIRCLE,
    "box": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "tent": [(0.0, -1.05), (1.05, 0.9), (-1.05, 0.9)],
    "star": [(1.12 * x, 1.12 * y) for x, y in _star(0.46)],
    "bow": [(-1.1, -0.95), (0.0, -0.3), (1.1, -0.95), (1.1, 0.95), (0.0, 0.3), (-1.1, 0.95)],
    "cross": [
        (-0.36, -1.05), (0.36, -1.05), (0.36, -0.36), (1.05, -0.36), (1.05, 0.36), (0.36, 0.36),
        (0.36, 1.05), (-0.36, 1.05), (-0.36, 0.36), (-1.05, 0.36), (-1.05, -0.36), (-0.36, -0.36),
    ],
    "moon": _moon(),
    "heart": _heart(),
    "dot": _CIRCLE,
}  # fmt: skip


def outline(
    shape: str, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0
) -> list[Point]:
    """Corners of `shape` around (cx, cy), with radii rx and ry, turned by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    scaled = ((x * rx, y * ry) for x, y in _OUTLINES[shape])
    return [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in scaled]


def draw_mark(
    draw: ImageDraw.ImageDraw, kind: str, cx: float, cy: float, radius: float, fill: Colour
) -> None:
    """One small mark (a dot, heart or star) around (cx, cy)."""
    swell = 1.15 if kind == "star" else 1.0
    draw.polygon(outline(kind, cx, cy, radius * swell, radius * swell), fill=fill)


def draw_body(
    image: Image.Image,
    corners: list[Point],
    pattern: str,
    fill: Colour,
    accent: Colour,
    pitch: float,
    rng: random.Random,
    edge: Colour | None = None,
    edge_width: int = 0,
) -> None:
    """Fill an outline with a pattern, in place.

    Args:
        image: The RGB canvas.
        corners: The outline's corners.
        pattern: One of `PATTERNS`.
        fill: Colour of the ground.
        accent: Colour of the lines, dots or checks.
        pitch: Pixels from one line, dot or check to the next.
        rng: Decides the pattern's phase.
        edge: Colour of the outline; none when None.
        edge_width: Width of the outline in pixels.
    """
    draw = ImageDraw.Draw(image)
    if pattern == "plain":
        draw.polygon(corners, fill=fill)
    else:
        # The pattern goes on a layer of its own, and through the outline as a mask.
        left, top = (math.floor(min(c[i] for c in corners)) for i in (0, 1))
        right, bottom = (math.ceil(max(c[i] for c in corners)) + 1 for i in (0, 1))
        width, height = right - left, bottom - top
        layer = Image.new("RGB", (width, height), fill)
        pen = ImageDraw.Draw(layer)
        phase = rng.uniform(0.0, pitch)
        if pattern == "lined":
            y = phase - pitch
            while y < height:
                pen.rectangle((0, y, width, y + pitch * 0.45), fill=accent)
                y += pitch
        elif pattern == "dotted":
            radius, row, y = pitch * 0.31, 0, phase - pitch
            while y < height + pitch:
                x = (pitch / 2 if row % 2 else 0.0) + phase - pitch
                while x < width + pitch:
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=accent)
                    x += pitch
                row, y = row + 1, y + pitch * 0.8
        else:
            half = pitch * 0.6
            for i in range(int(width / half) + 2):
                for j in range(int(height / half) + 2):
                    if (i + j) % 2:
                        x, y = i * half - phase / 2, j * half - phase / 2
                        pen.rectangle((x, y, x + half, y + half), fill=accent)
        mask = Image.new("L", (width, height), 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in corners], fill=255)
        image.paste(layer, (left, top), mask)
    if edge is not None and edge_width:
        draw.line([*corners, corners[0], corners[1]], fill=edge, width=edge_width, joint="curve")
