"""What goes on around the loop: its parts made and resumed, evaluations, failures, the result.

The loop itself is in ``loop.py``; a :class:`Run` does for it all that is no mathematics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idefics_qlora.checkpoint import clear_leftovers
from idefics_qlora.data.bad_rows import BadRows
from idefics_qlora.data.templates import remember
from idefics_qlora.data.windows import Window
from idefics_qlora.data.workers import Loading
from idefics_qlora.families import family_of
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.model.execution import execution_of
from idefics_qlora.model.precision import (
    DTYPES,
    check_finite,
    set_activation_checkpointing,
    set_compute_dtype,
)
from idefics_qlora.notices import advising
from idefics_qlora.process import StopSignals
from idefics_qlora.progress import showing_run
from idefics_qlora.reporting.page import keep_report
from idefics_qlora.training.diagnostics import (
    too_small_a_rate,
    unmoved_modules,
    weight_marks,
)
from idefics_qlora.training.divergence import divergence
from idefics_qlora.training.evaluations import Evaluations
from idefics_qlora.training.flat import FlatAdamW
from idefics_qlora.training.gallery import Gallery
from idefics_qlora.training.history import History
from idefics_qlora.training.incoming import Incoming
from idefics_qlora.training.inputs import Inputs, workers_of
from idefics_qlora.training.overflow import OverflowReports, fp16_ledger
from idefics_qlora.training.parts import named_in_checkpoints
from idefics_qlora.training.result import (
    Clock,
    TrainResult,
    eval_metrics,
    peak_memory_bytes,
    resumed_words,
    run_metrics,
)
from idefics_qlora.training.resume import resume, take_over
from idefics_qlora.training.run_files import RunFiles
from idefics_qlora.training.saving import Saving
from idefics_qlora.training.state import TrainState
from idefics_qlora.training.trackers import Trackers

logger = logging.getLogger(__name__)

REPORT_COSTS = 20
"""Times as long as a report takes to make there is none between two."""


class Run:
    """A run from its beginning or its newest checkpoint on, in a folder that it has to itself.

    Args:
        inputs: As :func:`check_inputs` gave them.
        folder: ``output_dir``, resolved.
        on_log: Called with every log record; it may return ``STOP``.
        stop: Knows whether a signal has asked the run to stop.
        background: Deletes old checkpoints, and makes the report.
        cleanup: When it is over, the model is an ordinary one again.
    """

    def __init__(
        self,
        inputs: Inputs,
        folder: Path,
        on_log: Callable[[dict[str, Any]], Any] | None,
        stop: StopSignals,
        background: Executor,
        cleanup: ExitStack,
    ) -> None:
        config, model = inputs.config, inputs.model
        self.inputs = inputs
        self.notices = inputs.notices
        self.config = config
        self.stop = stop
        clear_leftovers(folder)
        dtype = DTYPES[config.precision]
        set_compute_dtype(model, dtype)
        set_activation_checkpointing(model, config.gradient_checkpointing)
        self._trainable = trainable_parameters(model)
        check_finite(
            {name: p for name, p in model.named_parameters() if not p.requires_grad},
            "load the base again, from files that are whole; if its values are beyond fp16's "
            "65504, load_model(compute_dtype=torch.bfloat16) and precision='bf16'",
        )
        device = next(iter(self._trainable.values())).device
        smaller = "use optim='paged_adamw_8bit' or adapters of a lower rank"
        with advising("the optimizer's state", otherwise=smaller):
            optimizer = cleanup.enter_context(FlatAdamW(named_in_checkpoints(model), config))
        execution = execution_of(model, dtype, fast=config.fast)
        cleanup.callback(execution.close)
        self.state = TrainState(
            model=model,
            optimizer=optimizer,
            execution=execution,
            scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
            config=config,
            total_steps=inputs.total_steps,
            device=device,
            origin=inputs.origin,
            criterion=inputs.criterion,
            unlogged_loss=torch.zeros((), dtype=torch.float64, device=device),
        )
        way_out = "make the adapter anew with add_lora, or load it from a checkpoint that is sound"
        if (checkpoint := resume(self.state, folder)) is not None:
            way_out = f"{checkpoint} holds them: delete it, or resume from an earlier one"
        check_finite(self._trainable, way_out)
        if checkpoint is not None:
            take_over(self.state, folder, checkpoint.parent)
            logger.info("resumed from %s at step %d", checkpoint, self.state.global_step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        remember(inputs.origin["templates"], model)
        self._first_step = self.state.global_step
        memory = partial(peak_memory_bytes, device)
        shown = showing_run(config.progress, inputs.total_steps, self._first_step, memory)
        self.progress = cleanup.enter_context(shown)
        if checkpoint is not None:
            self.progress.tell(resumed_words(self.state, checkpoint))
        else:
            self.progress.begin(
                f"training: {inputs.total_steps} steps of {config.global_batch_size} examples, "
                f"logging_steps={config.logging_steps}"
            )
        self._clock = Clock(self.state)
        self.saving = Saving(self.state, folder, self._clock, stop, background)
        self._files = RunFiles(folder, self.state, inputs)
        trackers = Trackers(folder, self.state)
        cleanup.callback(trackers.close)
        told = (self.progress, self._files, trackers), on_log
        self.history = History(self.state, self._clock, self.saving, *told, self.epoch)
        self.overflow = OverflowReports(self.state, folder, self.saving)
        bad_rows = BadRows(config.on_bad_row, folder / "bad_rows.jsonl", inputs.told_bad)
        num_workers = workers_of(inputs, device)
        loading = partial(
            Loading,
            num_workers=num_workers,
            pin=device.type == "cuda",
            timeout_s=config.loader_timeout_s,
        )
        around = inputs, self.state, self._clock, self.saving
        self.incoming = Incoming(*around, loading, num_workers, bad_rows)
        self._evaluations = self._gallery = None
        if inputs.held_out is not None:
            self._gallery = Gallery(inputs, folder, self.state)
            looking = inputs, folder, device, loading, bad_rows, self._gallery
            self._evaluations = Evaluations(*looking)
        self._folder, self._background = folder, background
        self._report: Future[float] | None = None
        self._reported = 0.0
        self._marks = weight_marks(self._trainable)
        model.train()

    @property
    def stopped_by(self) -> str | None:
        """What ends the run here: early stopping, a signal's name, ``on_log``, or nothing."""
        if self.state.stopped_early:
            return "early_stopping"
        if self.stop.received is not None:
            return self.stop.received.name
        return "on_log" if self.history.stop_asked else None

    def stepped(self) -> None:
        """Another optimizer step is done."""
        self._clock.stepped()
        self.progress.step(self.state.global_step)

    def check_rate(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Tell of a learning rate with which nothing moves; asked after the first step."""
        numbers = sum(p.numel() for p in self._trainable.values())
        measured = loss.item(), grad_norm.item()  # sync
        said = too_small_a_rate(*measured, numbers, self.config, self.state.total_steps)
        if said is not None:
            self.notices.warn("learning_rate too small", said)

    def evaluate(self) -> dict[str, Any]:
        """Log an evaluation, unless the step has one; returns its record.

        Should it fail, the step is saved first.
        """
        if (done := self.history.evaluation()) is not None:
            return done
        assert self._evaluations is not None
        what = f"the evaluation after step {self.state.global_step}"
        try:
            with advising(what, **self._evaluations.sizes()):
                record = self._evaluations.record(self.state.global_step)
                self.state.criterion.check(record, what)
                self.history.log(record)
        except Exception:
            self.saving.save_if_new()
            raise
        return record

    def report(self, is_last: bool = False) -> None:
        """Have the run's page made anew of its files, beside training.

        Only the last is sure to be made: of a long log each takes a while, which training shall not
        feel.
        """
        if self._report is not None and not is_last:
            if not self._report.done():
                return
            if time.monotonic() - self._reported < REPORT_COSTS * self._report.result():
                return
        self._reported = time.monotonic()
        self._report = self._background.submit(keep_report, self._folder)

    def failed(self, window: Window, error: Exception) -> str:
        """Save the state before a window whose step failed; tells of it, and of the window."""
        state = self.state
        if isinstance(error, FloatingPointError):
            diverged = divergence(state, window)
            why = f"{diverged}: lower learning_rate; " if diverged else ""
            return self.saving.dump(window, why)
        where = f"in window {state.window} (rows {list(window.rows)})"
        if type(error) is torch.OutOfMemoryError:  # in the update, or before the forward pass
            where += (
                f"; set gradient_checkpointing=True, lower micro_batch_size (now "
                f"{state.micro_batch_size}), or free the GPU from other processes"
            )
        if state.half_updated:
            return (
                f"{where}; its update broke off half-way, so the state is not saved: a new start "
                f"goes on from step {self.saving.saved_step}"
            )
        return f"{where}; {self.saving.keep(state.window_rng)}"

    def epoch(self) -> float:
        """Passes over the training rows so far; of a stream, those that are complete."""
        if self.inputs.reader.is_stream:
            return float(self.state.position["epoch"]) if self.state.position else 0.0
        return self.state.num_seen / len(self.inputs.reader)

    def result(self) -> TrainResult:
        """What the run came to; loads the best adapter if it has finished."""
        state, model = self.state, self.inputs.model
        still = unmoved_modules(self._trainable, self._marks)
        if state.num_images == 0:  # what sees pictures had nothing to learn from
            family = family_of(model)
            still = [name for name in still if family.part_of(name) == family.text_part]
        if still and state.global_step > max(
            self._first_step, self.config.num_warmup_steps(state.total_steps)
        ):
            names = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
            logger.warning("%d adapters never moved: %s", len(still), names)
        self._clock.update(state)
        metrics = run_metrics(state, self.epoch())
        held: int | None = None  # the evaluation of the adapter that the model holds
        if state.is_over and self.config.load_best_model_at_end:
            self.saving.load_best()
            held = state.best_step
        if state.is_over:
            self.saving.rotate()
        model.eval()
        if summary := str(self.notices):
            logger.warning("%s", summary)
        result = TrainResult(
            global_step=state.global_step,
            training_loss=metrics["train_loss"],
            metrics=metrics | eval_metrics(state.log_history, held),
            log_history=[*state.log_history, {**metrics, "step": state.global_step}],
            best_checkpoint=self.saving.best_checkpoint,
            fp16_ledger=fp16_ledger(state),
            stopped_by=None if state.global_step >= state.total_steps else self.stopped_by,
        )
        diagnostics = {"warnings": dict(self.notices.counts), "unmoved_adapters": still}
        self._files.end(result, diagnostics)
        if self._gallery is not None and state.is_over:
            self._gallery.ended(state.global_step if held is None else held)
        self.report(is_last=True)
        self.progress.tell(*result.last_words(self.config, state.total_steps, self._first_step))
        return result
