"""Curves over optimizer steps as numbers that a template draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 62, 350, 12, 196
"""The plot in the picture."""

FEW = 5
"""Points of a curve that are drawn large: they are more than the lines between them."""

Point = tuple[int, float]
"""A step and a finite value."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: list[Point]
    colour: int
    """Number of the page's colour."""
    dash: int = 0
    """Number of the page's dash, so that colour alone tells nothing apart."""
    gaps: list[int] = field(default_factory=list)
    """Steps at which the value was not finite."""


@dataclass(frozen=True)
class Chart:
    """Curves with axes."""

    title: str
    unit: str
    curves: list[Curve]
    may_be_log: bool = False
    """Whether the axis of the values is logarithmic where all are above 0 and the highest is a
    hundred times the lowest."""


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points, the lowest and the highest of each stretch, first and last too."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = max(1, (most - 2) // 2)
    for number in range(stretches):
        start = number * len(points) // stretches
        stretch = range(start, (number + 1) * len(points) // stretches)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    span = high - low
    if not span > abs(high) * 1e-9:
        span = abs(high) or 1.0
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def drawn(chart: Chart) -> dict[str, Any] | None:
    """A chart in the picture's coordinates, with the values that hovering shows.

    ``None`` if there is nothing to draw.
    """
    curves = [curve for curve in chart.curves if curve.points]
    values = [value for curve in curves for _, value in curve.points]
    if not values:
        return None
    steps = [step for curve in curves for step, _ in curve.points]
    low, high = min(values), max(values)
    is_log = chart.may_be_log and low > 0 and high >= 100 * low
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [10.0**power for power in powers[:: -(-len(powers) // 6)]]
        bottom, top = math.log10(min(low, marks[0])), math.log10(max(high, marks[-1]))
    else:
        marks = ticks(low, high)
        bottom, top = marks[0], marks[-1]
    first, last = 0, max(steps)  # a run begins at 0, also one of a single record
    marks_x = [t for t in ticks(first, last, 6) if t <= last and t == int(t)]

    def x(step: float) -> float:
        return round(LEFT + (step - first) / max(1, last - first) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        value = math.log10(value) if is_log else value
        return round(BOTTOM - (value - bottom) / ((top - bottom) or 1) * (BOTTOM - TOP), 1)

    return {
        "title": chart.title,
        "unit": chart.unit + (", logarithmic" if is_log else ""),
        "size": (WIDTH, HEIGHT),
        "box": (LEFT, RIGHT, TOP, BOTTOM),
        "across": [(y(mark), shown(mark)) for mark in marks],
        "along": [(x(mark), shown(mark)) for mark in marks_x or [first]],
        "curves": [
            {
                "name": curve.name,
                "colour": curve.colour,
                "dash": curve.dash,
                "line": " ".join(f"{x(step)},{y(value)}" for step, value in curve.points),
                "dots": [(x(step), y(value)) for step, value in curve.points]
                if len(curve.points) <= 30
                else [],
                "radius": 4 if len(curve.points) <= FEW else 2.2,
                "values": [(x(step), y(value), shown(value)) for step, value in curve.points]
                if len(curve.points) == 1  # which is no curve yet
                else [],
                "data": [[step, x(step), y(value), shown(value)] for step, value in curve.points],
                "gaps": _some(curve.gaps),
                "about": _about(curve.points),
            }
            for curve in curves
        ],
        "table": _table(curves),
    }


def shown(value: Any) -> str:
    """A number in few digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (1000 <= abs(value) < 1e7 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _about(points: Sequence[Point]) -> str:
    (first, begin), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{shown(begin)} at step {first}"
    step, lowest = min(points, key=lambda point: point[1])
    highest_at, highest = max(points, key=lambda point: point[1])
    return (
        f"{shown(begin)} at step {first}, {shown(end)} at step {last}; lowest {shown(lowest)} at "
        f"step {step}, highest {shown(highest)} at step {highest_at}"
    )


def _some(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
    return ", ".join(map(str, steps[:8])) + more


def _table(curves: Sequence[Curve], most: int = 60) -> list[list[str]]:
    """The values by step, for who cannot see or hover: a row for each step, the first the names."""
    by_curve = [dict(thinned(curve.points, most)) for curve in curves]
    steps: Iterable[int] = sorted({step for points in by_curve for step in points})
    body = [[str(step), *(shown(p[step]) if step in p else "" for p in by_curve)] for step in steps]
    return [["step", *(curve.name for curve in curves)], *body]
