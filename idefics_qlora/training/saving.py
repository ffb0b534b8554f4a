"""The checkpoints that a run writes: when due, before it fails, and of what was not finite."""

from __future__ import annotations

import errno
import logging
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from torch import Tensor

from idefics_qlora.checkpoint import (
    Snapshot,
    check_run,
    check_step,
    checkpoint_path,
    is_of_run,
    load_checkpoint,
    point_to,
    rotate,
    save_checkpoint,
)
from idefics_qlora.data.windows import Window
from idefics_qlora.durable import CheckpointError
from idefics_qlora.model.adapters import load_adapter
from idefics_qlora.process import StopSignals
from idefics_qlora.training.parts import restore_rng
from idefics_qlora.training.result import Clock
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)


class Saving:
    """Saves a run's state into its folder, and knows what is saved already.

    Args:
        state: As it is at the start: saved, or new.
        folder: ``output_dir``, resolved.
        clock: Tells the state how long the run has taken.
        stop: Knows whether a signal has asked the run to stop.
        background: Deletes old checkpoints.
    """

    def __init__(
        self,
        state: TrainState,
        folder: Path,
        clock: Clock,
        stop: StopSignals,
        background: Executor,
    ) -> None:
        self._state, self._config, self._folder = state, state.config, folder
        self._clock, self._stop, self._background = clock, stop, background
        self.saved_step = state.global_step
        self._saved_records = self._records()

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint whose evaluation is the best, if it is still there."""
        if self._state.best_step is None:
            return None
        best = checkpoint_path(self._folder, self._state.best_step)
        return best if is_of_run(best, self._state.run) else None

    def save(self, evaluation: dict[str, Any] | None = None) -> None:
        """Write ``checkpoint-<step>``, the best so far if its evaluation is the best; rotate.

        Raises:
            OSError: If it cannot be written and ``on_save_error`` says so, or the run ends here.
        """
        state = self._state
        self._clock.update(state)
        folder = checkpoint_path(self._folder, state.global_step)
        best_before = state.best_metric, state.best_step
        value = None if evaluation is None else evaluation.get(state.criterion.key)
        if value is not None and state.criterion.better(value, state.best_metric):
            state.best_metric, state.best_step = value, state.global_step
        try:
            save_checkpoint(folder, state.snapshot())
        except OSError as error:
            state.best_metric, state.best_step = best_before
            message = f"{folder} cannot be written ({error}); earlier checkpoints are whole"
            ends = state.is_over or self._stop.received is not None
            if ends or self._config.on_save_error == "raise":
                raise OSError(
                    error.errno,
                    f"{message}; {way_out_of(error)}, then start the script again: it goes on from "
                    "the newest checkpoint",
                ) from error
            logger.error("%s; training goes on and tries again later", message)
        else:
            self.saved_step, self._saved_records = state.global_step, self._records()
            self._point()
            self.rotate()

    def rotate(self) -> None:
        """Delete old checkpoints, those too that a process was killed before it could delete."""
        protected = {self._state.global_step, self._state.best_step}
        keep, run = self._config.save_total_limit, self._state.run
        rotate(self._folder, keep, protected, run, self._background)

    def _point(self) -> None:
        try:
            point_to(self._folder, self._state.best_step, self._state.global_step)
        except OSError as error:
            logger.warning("%s has old `best` and `last`: %s", self._folder, error)

    def save_if_new(self) -> None:
        """Save, unless the last step is saved already: the windows since then are only replayed."""
        if (self._state.global_step, self._records()) != (self.saved_step, self._saved_records):
            self.save()

    def _records(self) -> tuple[int, int]:
        """How many records there are, and how many ``on_log`` has had."""
        return len(self._state.log_history), self._state.num_told

    def keep(self, rng: dict[str, Tensor] | None = None) -> str:
        """Save what was learnt before a failure, which no second one may hide; tells of it.

        Args:
            rng: Random states to put back first.
        """
        state = self._state
        try:
            if rng is not None:
                restore_rng(rng, state.device)
            self.save_if_new()
        except Exception as error:  # a full disk, a device that is lost
            logger.error("step %d could not be saved: %s", state.global_step, error)
            return f"the state before it could not be saved ({type(error).__name__}: {error})"
        if state.global_step != self.saved_step:
            return "the state before it could not be saved, as the log says"
        return f"the state before it (step {state.global_step}) is kept: a new start does it again"

    def dump(self, window: Window, why: str) -> str:
        """Save what led to a value that is not finite; the words that tell where, after ``why``."""
        state = self._state
        folder = self._folder / f"failed-window-{state.window}"
        tensors = {} if window.batch is None else window.batch.tensors()
        try:
            save_checkpoint(folder, state.snapshot(rng=state.window_rng), extra=tensors)
        except OSError as error:
            return f"{why}the state before it could not be saved ({error})"
        return (
            f"{why}the state before it is in {folder}, with the window's tensors in "
            f"extra.safetensors: resume={str(folder)!r} does the window again"
        )

    def load_best(self) -> None:
        """Give the model the best adapter, if there is one that is whole."""
        state = self._state
        if state.best_step is None:
            logger.warning("there is no best checkpoint (any more): the last adapter stays")
            return
        best = checkpoint_path(self._folder, state.best_step)
        try:
            load_adapter(state.model, checked(best, state.run).adapter, str(best))
        except CheckpointError as error:
            logger.error("the last adapter stays, not the best: %s", error)
            state.best_step = state.best_metric = None


def checked(checkpoint: Path, run: str) -> Snapshot:
    """A checkpoint of the run with this id, verified."""
    snapshot = load_checkpoint(checkpoint)
    check_step(checkpoint, snapshot.state)
    check_run(checkpoint, snapshot.state, run)
    return snapshot


def way_out_of(error: OSError) -> str:
    """What to do about a checkpoint that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    if error.errno == errno.EFBIG:
        return "allow larger files (ulimit -f)"
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
        return "delete or rename what is in its way"
    return "mend that"
