"""What a run came to, and what it took."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from idefics_qlora.config import TrainConfig
from idefics_qlora.families import family_of
from idefics_qlora.machine import peak_resident_bytes
from idefics_qlora.training.state import TrainState

JUDGED_S = 5.0
"""Seconds of training after which the share of waiting for data is judged."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    global_step: int
    """Optimizer steps done."""
    training_loss: float
    """Mean loss of all steps, in nats per target token."""
    metrics: dict[str, float]
    """``train_runtime`` (s), ``train_samples_per_second``, ``train_steps_per_second``,
    ``train_tokens_per_second`` (text tokens), ``train_loss``, ``epoch``, ``total_flos``,
    ``skipped_windows``, ``bad_rows`` (left out of windows, each time counted),
    ``micro_batch_size`` (at the end), all over the whole run, and
    ``peak_memory_bytes`` (of the GPU, or of the process on a CPU); and every number ``eval_...`` of
    the last evaluation, or of the best one if its adapter was loaded."""
    log_history: list[dict[str, Any]]
    """Every log record, in order."""
    best_checkpoint: Path | None
    """The checkpoint whose evaluation was the best, by ``metric_for_best_model``."""
    fp16_ledger: dict[str, Any] | None = None
    """In fp16: ``loss_scale``, ``skipped_windows``, ``skips_in_a_row`` (at the end),
    ``first_nonfinite_module`` (``None`` if every forward pass was finite) and ``advice``."""
    stopped_by: str | None = None
    """What stopped the run early: the name of a signal, such as ``SIGTERM`` (a script would then
    exit with 128 + its number), or ``on_log``, and the last checkpoint is the newest state; or
    ``early_stopping``, after which nothing is left to do."""

    def last_words(self, config: TrainConfig, total_steps: int, first_step: int) -> list[str]:
        """Lines that say what the run came to, where it is, and how to use it or go on."""
        seconds, speed = self.metrics["train_runtime"], self.metrics["train_samples_per_second"]
        lines = [f"{self.global_step} steps"]
        if self.global_step > first_step:  # else the time has gone on, and no step with it
            lines[0] += f" in {seconds:.0f} s, {speed:.4g} examples/s"
        if self.stopped_by == "early_stopping":
            lines[0] += f", ended by early stopping before step {total_steps}"
        elif self.stopped_by is not None:
            lines = [
                f"stopped by {self.stopped_by} after step {self.global_step} of {total_steps}: "
                "started again, the run goes on"
            ]
        folder, best = str(config.output_dir), self.best_checkpoint
        name = f"checkpoint-{self.global_step}" if best is None else best.name
        which = "newest" if best is None else "best"
        return [
            *lines,
            f"the {which} checkpoint is {os.path.join(folder, name)}",
            f"use it with: model, processor = iq.load_finetuned({folder!r})",
        ]


def resumed_words(state: TrainState, checkpoint: Path) -> str:
    """A line that says where a run goes on, or why it does not."""
    step = state.global_step
    if not state.is_over or state.finished_step < step:
        return f"goes on after step {step} of {state.total_steps} from {checkpoint}"
    raised = "num_train_epochs" if state.config.max_steps is None else "max_steps"
    how = f"already complete at step {step}"
    if state.stopped_early:
        how, raised = f"already ended by early stopping at step {step}", "early_stopping_patience"
    return f"{how}: nothing to do; raise {raised} to go on"


class Clock:
    """Time of this process's part of a run."""

    def __init__(self, state: TrainState) -> None:
        self._start = time.perf_counter() - state.seconds
        self._window_started: float | None = None
        self._computed_s, self._counted = 0.0, state.num_examples
        self._waited = 0.0
        self._windows = 0
        self._judged_from: float | None = None
        self._waited_since = 0.0

    def update(self, state: TrainState) -> None:
        """Note in the state how long the run has taken."""
        state.seconds = time.perf_counter() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in this block is time the device waits for data."""
        started = time.perf_counter()
        if self._window_started is None:
            self._window_started = started
        yield
        now = time.perf_counter()
        self._waited += now - started
        self._windows += 1
        if self._judged_from is None:  # nothing could be read ahead of the first window
            self._judged_from = now
        else:
            self._waited_since += now - started

    def stepped(self) -> None:
        """A step ends here: what follows, an evaluation or a save, is no time of training."""
        if self._window_started is not None:
            self._computed_s += time.perf_counter() - self._window_started
            self._window_started = None

    def rate(self, num_examples: int) -> float:
        """Examples per second of training since the last call, of so many in all."""
        rate = (num_examples - self._counted) / max(self._computed_s, 1e-9)
        self._computed_s, self._counted = 0.0, num_examples
        return rate

    def data_wait(self) -> float:
        """Mean seconds of waiting per window since the last call."""
        mean = self._waited / max(1, self._windows)
        self._waited, self._windows = 0.0, 0
        return mean

    def share_waited(self) -> float | None:
        """Share of the time since the last answer that the device waited for data.

        ``None`` where that is less than ``JUDGED_S``: there is no answer yet.
        """
        now = time.perf_counter()
        if self._judged_from is None or now - self._judged_from < JUDGED_S:
            return None
        share = self._waited_since / (now - self._judged_from)
        self._judged_from, self._waited_since = now, 0.0
        return share


def run_metrics(state: TrainState, epoch: float) -> dict[str, float]:
    """The metrics of :class:`TrainResult`."""
    seconds = max(state.seconds, 1e-9)
    config = state.model.get_base_model().config
    family = family_of(state.model)
    flops = family.training_flops(config, state.num_tokens, state.num_images)
    loss_sum = state.loss_sum + state.unlogged_loss.item()
    return {
        "train_runtime": state.seconds,
        "train_samples_per_second": state.num_examples / seconds,
        "train_steps_per_second": state.global_step / seconds,
        "train_tokens_per_second": state.num_tokens / seconds,
        "train_loss": loss_sum / max(1, state.global_step),
        "epoch": epoch,
        "total_flos": flops,
        "skipped_windows": state.skipped_windows,
        "bad_rows": state.num_bad_rows,
        "micro_batch_size": state.micro_batch_size,
        "peak_memory_bytes": peak_memory_bytes(state.device),
    }


def eval_metrics(history: list[dict[str, Any]], step: int | None) -> dict[str, float]:
    """The numbers of the evaluation after a step; of the last one if there is no step."""
    for record in reversed(history):
        if "eval_loss" in record and step in (None, record["step"]):
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            return {k: v for k, v in numbers.items() if k.startswith("eval_")}
    return {}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or resident in a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
