"""A window and its parts."""

from helpers import equal_batches

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader


def test_micro_batches_are_what_collating_them_alone_gives(processor, examples, picture):
    """A window's parts, cut to their own longest example, equal batches made of those examples."""
    several = [iq.Example([picture, picture, "What are they?"], " Two."), *examples[:15]]
    reader = RowReader(several, "train_rows", None, Collator(processor))
    window = Windows(reader, seed=7, global_batch_size=16, augment=False)[0]
    parts = window.micro_batches(3)
    assert [len(part.input_ids) for part in parts] == [3, 3, 3, 3, 3, 1]
    assert {part.vision.pixel_values.shape[1] for part in parts} == {1, 2}
    assert sum(part.num_targets for part in parts) == window.num_targets
    assert [part.input_ids.shape[1] for part in parts] == list(window.lengths[::3])
    collator = Collator(processor)
    by_length = sorted(
        (several[row] for row in window.rows),
        key=lambda example: len(collator.tokens([example])[0].ids),
        reverse=True,
    )
    for i, part in enumerate(parts):
        assert equal_batches(part, collator(by_length[3 * i : 3 * i + 3]))
