"""The numbers of charts."""

import random

import pytest

from idefics_qlora.reporting.plots import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    Curve,
    drawn,
    thinned,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (1, 40, [0, 10, 20, 30, 40]),
        (-3.2, 7.9, [-5.0, 0.0, 5.0, 10.0]),
        (0.0, 0.0, [0.0, 0.25]),
        (2e-9, 8e-3, [0.0, 0.002, 0.004, 0.006, 0.008]),
    ],
)
def test_marks_are_round_and_hold_all_values(low, high, marks):
    """Axes have few numbers, and no value lies outside of them."""
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if high > low:
        assert found == pytest.approx(marks)


def test_marks_of_any_span():
    """However large or small the values are."""
    rng = random.Random(0)
    for _ in range(2000):
        low = rng.uniform(-1, 1) * 10 ** rng.uniform(-12, 12)
        high = low + abs(low) * 10 ** rng.uniform(-8, 3)
        found = ticks(low, high)
        assert found[0] <= low + 1e-9 * abs(low)
        assert found[-1] >= high - 1e-9 * abs(high)
        assert 2 <= len(found) <= 9


def test_thinning_keeps_what_stands_out():
    """A single spike of thousands of points is still there, and so are both ends."""
    points = [(step, 1.0) for step in range(10_000)]
    points[4321], points[8765] = (4321, 50.0), (8765, -3.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert {(4321, 50.0), (8765, -3.0), points[0], points[-1]} <= {*kept}
    assert kept == sorted(kept)


def test_points_lie_in_the_plot():
    """Linear and logarithmic, one point or many, all are within the axes; the highest on top."""
    for values in ([1.0], [3.0, 3.0], [5.0, 0.0, -5.0], [1000.0, 10.0, 0.1], [1e-9, 2e9]):
        points = list(enumerate(values))
        chart = drawn(Chart("t", "u", [Curve("c", points, 0)], True))
        (curve,) = chart["curves"]
        ys = [y for _, _, y, _ in curve["data"]]
        assert all(LEFT <= x <= RIGHT for _, x, _, _ in curve["data"])
        assert all(TOP <= y <= BOTTOM for y in ys), (values, ys)
        assert ys.index(min(ys)) == values.index(max(values))
        assert ("logarithmic" in chart["unit"]) == (values[0] >= 1000 or values[-1] > 1e9)
    assert drawn(Chart("t", "u", [Curve("c", [], 0)])) is None


def test_short_runs_are_drawn_from_their_beginning():
    """A single record stands at its step with its value; few points are large; many are a line."""
    (one,) = drawn(Chart("t", "u", [Curve("c", [(2, 8.4458)], 0)]))["curves"]
    assert [(x, text) for x, _, text in one["values"]] == [(RIGHT, "8.446")]
    assert one["dots"][0][0] == RIGHT
    few = drawn(Chart("t", "u", [Curve("c", [(1, 3.0), (2, 2.0), (4, 1.0)], 0)]))
    assert [text for _, text in few["along"]] == ["0", "1", "2", "3", "4"]
    many = drawn(Chart("t", "u", [Curve("c", [(n, 1.0) for n in range(1, 20)], 0)]))
    assert few["curves"][0]["values"] == many["curves"][0]["values"] == []
    assert one["radius"] == few["curves"][0]["radius"] > many["curves"][0]["radius"]
    assert min(x for x, _ in few["curves"][0]["dots"]) == LEFT + (RIGHT - LEFT) / 4
