"""What is told about some rows before a run starts, for the tests of such warnings."""

import logging

import numpy as np
from PIL import Image

from idefics_qlora.data.batches import Collator
from idefics_qlora.data.first_rows import FirstRows, tell_same_rows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.notices import Notices


def told(caplog):
    """The warnings logged so far, which are then forgotten."""
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return lines


def found(processor, rows, to_example=None, held_out=None, name="train_rows"):
    """The warnings about some rows, by kind."""
    collator = Collator(processor)
    notices = Noted()
    sides = []
    for side, side_rows in ((name, rows), ("eval_rows", held_out)):
        if side_rows is None:
            continue
        reader = RowReader(side_rows, side, to_example, collator)
        sides.append(FirstRows(reader))
        order = () if reader.is_stream else range(len(reader))
        _, bad = reader.first_rows(order, 64, sides[-1].looking)
        assert not bad
        sides[-1].tell(notices, 2)
    tell_same_rows(sides[0], sides[1] if held_out else None, notices)
    assert notices.lines.keys() == notices.counts.keys()
    return notices.lines


class Noted(Notices):
    """Keeps the first line of each kind."""

    def __init__(self):
        super().__init__()
        self.lines = {}

    def warn(self, kind, message, number=1):
        self.lines.setdefault(kind, message)
        super().warn(kind, message, number)


def drawn(seed, size=(120, 160)):
    """A picture of its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def rows_of(number, **changes):
    """Sound rows, each with its own picture and text."""
    return [
        {"prompt": [drawn(i), "What is it? Answer:"], "completion": f" Card {i}.", **changes}
        for i in range(number)
    ]
