"""docs/families.md says what the estimate says."""

import re

import families
import pytest
from published import PUBLISHED

from idefics_qlora.families import FAMILIES

SMALLEST = "HuggingFaceTB/SmolVLM-256M-Instruct"


@pytest.mark.parametrize(
    "name",
    [
        name if name == SMALLEST else pytest.param(name, marks=pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_the_table_is_that_of_the_estimate(name):
    """Every cell: ``python benchmarks/families.py`` was run."""
    page = families.PAGE.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
    assert [cell.strip() for cell in row.strip("| ").split("|")] == families.cells(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_of_a_picture_are_those_of_its_tiles(name):
    """And what stands between them: two tokens a tile and six more, where rows and columns are
    tokens of the vocabulary; where they are words, five more a tile at least."""
    config, (tiles, tokens) = PUBLISHED[name].configuration(), families.PICTURES[name]
    family = FAMILIES[config.model_type]
    if family.model_type == "idefics":
        assert (tiles, tokens) == (1, 3)
        return
    beside = tokens - tiles * family.tokens_of_a_tile(config)
    if family.model_type == "idefics2":
        assert (tiles, beside) == (5, 6)
    elif config.text_config.vocab_size == 49280:
        assert (tiles, beside) == (13, 2 * 12 + 6)
    else:
        assert tiles == 13
        assert beside > 7 * 12 + 6
