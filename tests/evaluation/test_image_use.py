"""Whether a model looks is decided so that it holds over the evaluations of a run."""

import math

import numpy as np
import pytest

import idefics_qlora as iq
from idefics_qlora.evaluation.image_use import LEAST_GAIN, LEVEL, chance_of

ROWS, EVALUATIONS, RUNS = 64, 50, 1000
NAN3 = (math.nan,) * 3


def row_losses(rng, size):
    """What pictures add to rows' losses, summed over a row: skewed, of very heavy tails, and rows
    differ by orders of magnitude (long texts, hard ones)."""
    scale = rng.lognormal(0.0, 1.5, size=(*size[:-1], 1))  # the row's
    return scale * (rng.pareto(2.5, size=size) + np.abs(rng.standard_t(2, size=size)))


def judged(own, another, tokens):
    """The verdict on rows' summed losses."""
    differences = another - own
    gain = differences.sum() / tokens.sum()
    loss = {"own": own.sum() / tokens.sum(), "another": another.sum() / tokens.sum(), "blank": 0.0}
    interval = (gain, gain, gain)
    return iq.ImageUse(len(own), loss, interval, NAN3, {}, chance_of(differences))


def test_no_false_alarm_in_fifty_evaluations():
    """Of models that do not look fewer than 1 % are called lookers in any of 50 evaluations; by the
    95 % interval that decided before, most would be."""
    rng = np.random.default_rng(0)
    alarms = certain = before = 0
    for _ in range(RUNS):
        tokens = rng.integers(2, 60, size=ROWS)
        # Without looking, a row's own picture is one drawn like any other.
        own, another = np.moveaxis(row_losses(rng, (EVALUATIONS, ROWS, 2)), 2, 0)
        own, another = own + tokens, another + tokens  # the text's own loss: 1 nat a token
        verdicts = [judged(*pair, tokens) for pair in zip(own, another, strict=True)]
        alarms += any(use.looks for use in verdicts)
        certain += any(use.p_value <= LEVEL for use in verdicts)
        differences = another - own
        standard_error = differences.std(axis=1) / ROWS**0.5
        before += bool((differences.mean(axis=1) > 1.96 * standard_error).any())
    assert certain < 0.01 * RUNS  # the level alone, whatever the gain
    assert alarms <= certain
    assert before > 0.5 * RUNS


@pytest.mark.parametrize(
    ("rows", "share", "gain"),
    [(ROWS, 1.0, 0.2), (ROWS, 0.5, 0.5), (256, 0.33, 1.0), (256, 1.0, 0.05)],
)
def test_a_model_that_looks_is_found(rows, share, gain):
    """Whether every row gains a little or a third of them much, amid the same heavy tails."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        tokens = rng.integers(10, 60, size=rows)
        own, another = 0.02 * np.moveaxis(row_losses(rng, (rows, 2)), 1, 0) + tokens
        another = another + gain * tokens * (rng.random(rows) < share)
        found += judged(own, another, tokens).looks
    assert found >= 0.95 * 200


def use_of(gain, p_value, num_rows=64, another=1.0):
    loss = {"own": another - gain[0], "another": another, "blank": another}
    return iq.ImageUse(num_rows, loss, gain, gain, {}, p_value)


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (use_of((0.0009, -0.0002, 0.002), 0.1), "This model does not look"),
        (use_of((0.0009, 0.0002, 0.0016), 0.01), "This model hardly looks"),
        (use_of((0.0009, 0.0007, 0.0011), 1e-9), "This model hardly looks"),
        (use_of((0.019, 0.015, 0.023), 1e-9), "This model hardly looks"),
        (use_of((0.021, 0.015, 0.027), 1e-9), "This model looks"),
        (use_of((0.5, 0.3, 0.7), 1e-3, num_rows=9), "9 rows cannot tell"),
        (use_of((-0.01, -0.1, 0.08), 1.0), "64 rows cannot tell"),
        (use_of((0.011, 0.008, 0.013), 1e-9, another=0.3), "This model looks"),
    ],
)
def test_the_verdict_fits_the_numbers(use, verdict):
    """A gain needs to be certain and to matter; the smallest that does is named."""
    assert str(use).startswith(f"{verdict}")
    assert use.looks == verdict.endswith("model looks")
    least = f"a gain counts from {max(LEAST_GAIN, 0.02 * use.loss['another']):+.4f} on"
    assert (least in str(use)) != use.looks


def test_few_rows_cannot_tell():
    """However large the gains: fourteen rows cannot reach the level, fifteen can."""
    assert chance_of(np.ones(14)) > LEVEL > chance_of(np.ones(15))
    assert chance_of(np.zeros(64)) == 1.0
    assert chance_of(-np.ones(64)) == 1.0
