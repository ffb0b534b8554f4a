"""What is peculiar to IDEFICS."""

import pytest
from random_model import configuration

from idefics_qlora.families import FAMILIES


def test_flops_of_9b_match_the_count_by_hand():
    """0.76 + 0.0322 T TFLOP per example, of which adapters and attention scores are 2 to 3 %."""
    config = configuration("9b")
    for tokens in (50, 100):
        expected = (0.76 + 0.0322 * tokens) * 1e12
        assert FAMILIES["idefics"].training_flops(config, tokens, 1) == pytest.approx(
            expected, rel=0.03
        )
