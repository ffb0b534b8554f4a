"""What tests of what is given away share."""

import pytest


@pytest.fixture
def pictures(cards, tmp_path):
    """Two pictures as files, one of them a JPEG."""
    files = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for card, file in zip(cards[30:], files, strict=False):
        card["image"].save(file)
    return files
