"""What the fast path saves, counted without a GPU."""

import pytest


@pytest.mark.slow
def test_idefics_9b_needs_half_the_memory_and_a_third_of_the_operations(capsys):
    """At full size, on tensors without data: operations, activations per example, and no wait."""
    import work

    results = work.main(["--architecture", "9b"])
    before, now = results["before"], results["now"]
    assert 11_000 < before["operations"] < 15_000
    assert now["operations"] < 0.33 * before["operations"]
    assert now["saved_gb_per_example"] < 0.75 < 1.3 < before["saved_gb_per_example"]
    assert now["waits"] == 0
