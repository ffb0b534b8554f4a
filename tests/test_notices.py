"""Warnings of a run are told once and counted."""

import logging

from idefics_qlora.notices import Notices


def test_a_kind_is_told_once_and_counted(caplog):
    """The first of a kind is logged, the others only counted; the sum names every kind."""
    notices = Notices()
    assert str(notices) == ""
    with caplog.at_level(logging.WARNING, "idefics_qlora"):
        notices.warn("empty pictures", "row 3 is empty")
        notices.warn("empty pictures", "row 4 is empty", number=2)
        notices.warn("long rows", "row 5 is long")
    assert [record.getMessage() for record in caplog.records] == ["row 3 is empty", "row 5 is long"]
    assert str(notices).endswith(": empty pictures (3 times); long rows")
    assert str(notices).startswith("2 warnings in this run")
