"""The windows that a run gets from its loader, and what is looked at when one has come."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from idefics_qlora.data.bad_rows import BadRows
from idefics_qlora.data.order import StreamedWindows, Windows
from idefics_qlora.data.pace import WAITING_SHARE, what_helps
from idefics_qlora.data.windows import Window
from idefics_qlora.data.workers import LoaderError, Loading
from idefics_qlora.notices import with_words
from idefics_qlora.training.diagnostics import check_labels
from idefics_qlora.training.inputs import ROWS_CHECKED, Inputs
from idefics_qlora.training.result import Clock
from idefics_qlora.training.saving import Saving
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)


class Incoming:
    """A run's windows, from its state's next one on.

    Args:
        inputs: Those of the run.
        state: Where it is.
        clock: Is told of the time of waiting.
        saving: Keeps what was learnt when no window can be had.
        loading: Loads windows as the run's settings say.
        num_workers: Processes that do.
        bad_rows: Takes down the rows that cannot be used.
    """

    def __init__(
        self,
        inputs: Inputs,
        state: TrainState,
        clock: Clock,
        saving: Saving,
        loading: Callable[..., Loading[Any]],
        num_workers: int,
        bad_rows: BadRows,
    ) -> None:
        config = inputs.config
        self._inputs, self._state, self._clock, self._saving = inputs, state, clock, saving
        self._loading, self._num_workers, self._bad_rows = loading, num_workers, bad_rows
        options: dict[str, Any] = {
            "seed": config.seed,
            "global_batch_size": config.global_batch_size,
            "augment": config.augment,
        }
        self._windows: Windows | StreamedWindows = (
            StreamedWindows(inputs.reader, **options, position=state.position)
            if inputs.reader.is_stream
            else Windows(inputs.reader, **options)
        )
        self._labels_checked = False

    def windows(self) -> Loading[Window]:
        """The windows from the state's next one on."""
        return self._loading(self._windows, first=self._state.window)

    def next(self, windows: Loading[Window]) -> Window:
        """Wait for the next window; note its bad rows, and look at the labels of the first.

        Raises:
            LoaderError: If a loader worker is lost; the message names the rows it may have read.
            MemoryError: If there is none left for a row; the message names it.
            ValueError: If too many rows are bad, or labels are wrong.
        """
        state = self._state
        try:
            with self._clock.waiting():
                window = next(windows)
            self._bad_rows.note(window.bad)
            num_bad = state.num_bad_rows + len(window.bad)
            num_seen = state.num_seen + len(window.rows) + len(window.bad)
            self._bad_rows.check_share(num_bad, num_seen, ROWS_CHECKED)
        except ValueError:  # it names its row
            self._saving.keep()
            raise
        except LoaderError as error:
            self._saving.keep()
            raise LoaderError(f"{error}{self._reading(error.items)}", error.items) from error
        except Exception as error:
            words = f"in window {windows.number}"
            words += self._reading(range(windows.number, windows.number + 1))
            if isinstance(error, MemoryError):
                words += f"; free memory, or use fewer num_workers (now {self._num_workers})"
            raise with_words(error, f"{words}; {self._saving.keep()}") from error
        if not self._labels_checked:
            logger.info("%s", check_labels(window, self._inputs.reader.collator))
            self._labels_checked = True
        self._note_long_row(window)
        self._note_waiting()
        return window

    def _note_waiting(self) -> None:
        share = self._clock.share_waited()
        if share is not None and share > WAITING_SHARE:
            helps = what_helps(
                self._num_workers,
                is_stream=self._inputs.reader.is_stream,
                is_cached=self._inputs.config.cache_images is not None,
                is_draft=self._inputs.reader.collator.access.draft,
            )
            self._inputs.notices.warn(
                "training waits for data",
                f"training waited for data {share:.0%} of the time before step "
                f"{self._state.global_step + 1}: {helps}",
            )

    def _note_long_row(self, window: Window) -> None:
        lengths = self._inputs.lengths
        if lengths is None or window.batch is None:
            return
        name = f"{self._inputs.reader.name}[{window.batch_rows[0]}]"  # the window's longest
        for kind, line in lengths.find(name, window.lengths[0], self._state.micro_batch_size):
            self._inputs.notices.warn(kind, f"{name}: {line}")

    def _reading(self, items: range) -> str:
        if not isinstance(self._windows, Windows):
            return ""
        rows = sorted({row for window in items for _, row in self._windows.positions(window)})
        return f"; it was reading one of the rows {rows}"
