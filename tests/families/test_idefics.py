"""What is peculiar to IDEFICS."""

import pytest
from published import PUBLISHED
from random_model import configuration

import idefics_qlora as iq
from idefics_qlora.families import FAMILIES


def test_flops_of_9b_match_the_count_by_hand():
    """0.76 + 0.0322 T TFLOP per example, of which adapters and attention scores are 2 to 3 %."""
    config = configuration("9b")
    for tokens in (50, 100):
        expected = (0.76 + 0.0322 * tokens) * 1e12
        assert FAMILIES["idefics"].training_flops(config, tokens, 1) == pytest.approx(
            expected, rel=0.03
        )


@pytest.mark.slow
def test_the_table_says_which_card_takes_idefics_80b():
    """One of 80 GB in 4 bits, no smaller one, whether activations are kept or recomputed."""
    config = PUBLISHED["HuggingFaceM4/idefics-80b"].configuration()
    estimate = iq.estimate_memory(config, text_tokens=50, micro_batch=1)
    lines = [line.split() for line in str(estimate).splitlines()]
    assert lines[-3:-1] == [["24", "GB", "none", "none"], ["40", "GB", "none", "none"]]
    assert lines[-1][:2] == ["80", "GB"]
    assert [int(number) >= 8 for number in lines[-1][2:]] == [True, True]
    assert estimate.adapters == 4 * 78_962_688
