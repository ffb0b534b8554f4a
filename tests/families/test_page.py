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
    """Memory in 4 and 16 bits, and the precision: ``python benchmarks/families.py`` was run."""
    page = families.PAGE.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert cells[3:5] == [families.peaks(name, quantize) for quantize in (True, False)]
    assert cells[6] == FAMILIES[PUBLISHED[name].config_class.model_type].precision
