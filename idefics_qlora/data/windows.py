"""A window: the examples of one optimizer step, the unit of training.

Which rows it has is decided in ``order.py``; how it is cut into micro-batches changes speed and
memory, never its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idefics_qlora.data.bad_rows import BadRow
from idefics_qlora.data.batches import Batch, Tokens


@dataclass(frozen=True)
class Question:
    """A row as generation needs it: without its answer, and with all answers that are right."""

    row: int
    tokens: Tokens
    """Images placed."""
    pixels: list[Tensor]
    """Its images, (3, H, W) uint8."""
    references: tuple[str, ...]
    """The example's, or its completion; without white space at the ends."""


@dataclass(frozen=True)
class Window:
    """What one optimizer step sees: all examples of a window, the longest first."""

    batch: Batch | None
    """``None`` if every row was bad."""
    rows: tuple[int, ...]
    """Row number of each example that could be read, in the order of the window."""
    batch_rows: tuple[int, ...]
    """Row number of each example of ``batch``."""
    lengths: tuple[int, ...]
    """Text tokens of each example of ``batch``."""
    images: tuple[int, ...]
    """Images of each example of ``batch``; tiles, where a family cuts images into tiles."""
    num_targets: int
    """Target tokens of the whole window: what its loss is divided by."""
    bad: tuple[BadRow, ...] = ()
    """Rows that were left out: the window is smaller by them, nothing takes their place."""
    position: dict[str, Any] | None = None
    """Where a stream of rows is after this window, as JSON values."""
    questions: tuple[Question, ...] = ()
    """In an evaluation, the rows of which the model is asked what it says, in order."""

    def micro_batches(self, size: int) -> list[Batch]:
        """The window in parts of ``size`` examples, each cut to its own longest example.

        Neighbours have similar lengths, so little is padding. The parts share the window's memory.
        """
        if self.batch is None:
            return []
        return [
            self.batch.part(
                slice(start, start + size),
                num_tokens=self.lengths[start],
                num_images=max(1, *self.images[start : start + size]),
            )
            for start in range(0, len(self.rows), size)
        ]

    def to(self, device: torch.device) -> Window:
        """The window on ``device``; from pinned memory the copies do not wait."""
        return self if self.batch is None else replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> Window:
        """The window in page-locked memory (a ``DataLoader`` calls this)."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())
