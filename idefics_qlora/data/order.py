"""The order of the rows: which of them an optimizer step sees.

A window is the unit of training: the ``global_batch_size`` examples of one optimizer step. Item
``w`` of :class:`Windows` is a pure function of ``(rows, seed, w)``; the number of worker processes,
the micro-batch size or a restart do not change it. Of a stream, whose rows have no numbers, window
``w`` has the rows that follow those of window ``w - 1``, and says where it ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.windows import Window


def crop_seed(seed: int, epoch: int, row: int) -> int:
    """Seed of a row's crops in an epoch."""
    return int(np.random.SeedSequence((seed, epoch, row)).generate_state(1)[0])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in one epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


class Windows(Dataset[Window]):
    """All windows of a run, by number.

    Rows are drawn epoch after epoch, each in a permutation of its own, without a break between
    epochs: a window at the border holds the last rows of one and the first of the next.

    Args:
        reader: The training rows.
        seed: Seed of the run.
        global_batch_size: Examples per window.
        augment: Whether images are cropped at random.
    """

    def __init__(
        self, reader: RowReader, *, seed: int, global_batch_size: int, augment: bool
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.augment = augment

    def positions(self, window: int) -> list[tuple[int, int]]:
        """(epoch, row) of each example of a window, in order."""
        first = window * self.global_batch_size
        n = len(self.reader)
        return [
            (i // n, int(epoch_order(self.seed, i // n, n)[i % n]))
            for i in range(first, first + self.global_batch_size)
        ]

    def __getitem__(self, window: int) -> Window:
        return self.reader.window(
            (row, ..., crop_seed(self.seed, epoch, row) if self.augment else None)
            for epoch, row in self.positions(window)
        )


class StreamedWindows(IterableDataset[Window]):
    """The windows of a stream of rows, in its own order, epoch after epoch.

    Args:
        reader: The training rows, a stream.
        seed: Decides the crops.
        global_batch_size: Examples per window.
        augment: Whether images are cropped at random.
        position: Where to begin: the ``position`` of the window before; ``None``: at the start.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        seed: int,
        global_batch_size: int,
        augment: bool,
        position: dict[str, Any] | None,
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.augment = augment
        self.position = position

    def __iter__(self) -> Iterator[Window]:
        stream = self.reader.stream()
        epoch, number = 0, 0
        if self.position is not None:
            epoch, number = self.position["epoch"], self.position["row"]
            stream.load_state_dict(self.position["stream"])
        stream.set_epoch(epoch)
        rows = iter(stream)
        while True:
            window: list[tuple[int, Any, int | None]] = []
            while len(window) < self.global_batch_size:
                try:
                    row = next(rows)
                except StopIteration:
                    if number == 0:
                        name = self.reader.name
                        raise ValueError(f"{name} has no row in epoch {epoch}") from None
                    epoch, number = epoch + 1, 0
                    stream.set_epoch(epoch)
                    rows = iter(stream)
                    continue
                except Exception as error:
                    name = f"{self.reader.name}[{number}]"
                    raise ValueError(
                        f"{name}: the stream breaks off: {type(error).__name__}: {error}"
                    ) from error
                seed = crop_seed(self.seed, epoch, number) if self.augment else None
                window.append((number, row, seed))
                number += 1
            state = json.loads(json.dumps(stream.state_dict()))  # a copy, of JSON values
            yield self.reader.window(window, {"epoch": epoch, "row": number, "stream": state})


class EvalBatches(Dataset[Window]):
    """The rows in order, ``batch_size`` at a time, images as the base preprocesses them.

    Args:
        reader: The rows, which have numbers.
        batch_size: Rows in one batch.
        num_asked: The first rows, which are there as questions as well.
    """

    def __init__(self, reader: RowReader, batch_size: int, num_asked: int = 0) -> None:
        reader.need_length()
        self.reader = reader
        self.batch_size = batch_size
        self.num_asked = num_asked

    def __len__(self) -> int:
        return -(-len(self.reader) // self.batch_size)

    def __getitem__(self, index: int) -> Window:
        first = index * self.batch_size
        last = min(first + self.batch_size, len(self.reader))
        rows = ((row, ..., None) for row in range(first, last))
        return self.reader.window(rows, asked=range(self.num_asked))
