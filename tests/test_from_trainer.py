"""Who comes from HF Trainer finds each of its settings on a page, and the page is true."""

import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments

import idefics_qlora as iq
from idefics_qlora.config import OTHER_NAMES

PAGE = (Path(__file__).parents[1] / "docs" / "from_trainer.md").read_text(encoding="utf-8")
OURS = {field.name for field in dataclasses.fields(iq.TrainConfig)}
THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}


def section(title):
    """The text below a heading."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]


def test_every_setting_of_the_trainer_is_known():
    """Each of the installed version is ours, has another name here, or is said to have none."""
    without = set(re.findall(r"`(\w+)`", section("No counterpart")))
    assert not without & (OURS | OTHER_NAMES.keys())
    assert THEIRS - OURS - OTHER_NAMES.keys() - without == set()


def test_the_same_names_are_the_same():
    """The first list is of names that both have."""
    listed = re.findall(r"`(\w+)`", section("The same name").strip().partition("\n\n")[0])
    assert set(listed) == THEIRS & OURS


def test_the_table_is_what_the_errors_say():
    """Page and error messages are one: a changed advice changes both."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section("Another name"), re.MULTILINE)
    assert sorted(rows) == sorted(OTHER_NAMES.items())
