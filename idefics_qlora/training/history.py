"""The log of a run: its records, kept in the history and handed to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from idefics_qlora.training.result import Clock
from idefics_qlora.training.saving import Saving
from idefics_qlora.training.state import TrainState


class Listener(Protocol):
    """What is told of log records."""

    def record(self, record: Mapping[str, Any]) -> None:
        """There is a new one."""


class _Stop:
    """What ``on_log`` returns to end the run after this step, saved and to be continued."""

    def __repr__(self) -> str:
        return "STOP"


STOP = _Stop()


class History:
    """Adds records to a run's history, and gives each to ``on_log`` once.

    Args:
        state: Has the history, and how much of it has been told.
        clock: Knows how long the device waited for data.
        saving: Saves the step if ``on_log`` fails.
        listeners: Have every record as soon as it is there.
        on_log: Called with every record; it may return ``STOP``.
        epoch: Passes over the training rows so far.
    """

    def __init__(
        self,
        state: TrainState,
        clock: Clock,
        saving: Saving,
        listeners: Sequence[Listener],
        on_log: Callable[[dict[str, Any]], Any] | None,
        epoch: Callable[[], float],
    ) -> None:
        self._state, self._clock, self._saving = state, clock, saving
        self._listeners, self._on_log, self._epoch = listeners, on_log, epoch
        self.stop_asked = False

    def log(self, record: dict[str, Any]) -> None:
        """Add a record to the history, with the epoch and the step, and hand it out."""
        record |= {"epoch": round(self._epoch(), 4), "step": self._state.global_step}
        if self._state.num_bad_rows:
            record["bad_rows"] = self._state.num_bad_rows
        self._state.log_history.append(record)
        for listener in self._listeners:
            listener.record(record)
        self.hand_out()

    def hand_out(self) -> None:
        """Give ``on_log`` the records that it has not had yet.

        Should it fail, the step is saved first, and it gets the record again after a restart.
        """
        state = self._state
        for record in state.log_history[state.num_told :]:
            if self._on_log is not None:
                state.is_unchanged = False  # it may do anything to the model
                try:
                    self.stop_asked |= self._on_log(dict(record)) is STOP
                except Exception:
                    self._saving.save_if_new()
                    raise
            state.num_told += 1

    def log_training(self, grad_norm: Tensor, learning_rate: float) -> None:
        """Log the mean loss since the last such record."""
        state = self._state
        loss_sum = state.unlogged_loss.item()  # sync
        record = {
            "loss": loss_sum / state.unlogged_steps,
            "grad_norm": grad_norm.item(),
            "learning_rate": learning_rate,
            "data_wait_s": self._clock.data_wait(),
            "examples_per_second": self._clock.rate(state.num_examples),
        }
        if state.scaler.is_enabled():
            record["loss_scale"] = state.scaler.get_scale()
            record["skipped_windows"] = state.skipped_windows
        state.loss_sum += loss_sum
        state.unlogged_loss.zero_()
        state.unlogged_steps = 0
        self.log(record)

    def evaluation(self) -> dict[str, Any] | None:
        """The evaluation that has been logged for this step, if there is one."""
        for record in reversed(self._state.log_history):
            if record["step"] != self._state.global_step:
                break
            if "eval_loss" in record:
                return record
        return None
