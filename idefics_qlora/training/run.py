"""What goes on around the loop: windows coming in, the log, evaluations, checkpoints, the result.

The loop itself is in ``training.py``; a :class:`Run` does for it all that is no mathematics.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idefics_qlora.checkpoint import (
    Snapshot,
    check_run,
    check_step,
    checkpoint_path,
    checkpoints,
    clear_leftovers,
    is_of_run,
    is_ours,
    load_checkpoint,
    rotate,
    save_checkpoint,
    set_aside,
)
from idefics_qlora.data.bad_rows import BadRows
from idefics_qlora.data.batches import Window
from idefics_qlora.data.loading import LoaderError, Loading
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.windows import StreamedWindows, Windows
from idefics_qlora.evaluation.held_out import mean_loss
from idefics_qlora.evaluation.image_use import image_use
from idefics_qlora.evaluation.samples import EvalSamples
from idefics_qlora.families import family_of
from idefics_qlora.files import CheckpointError
from idefics_qlora.model.adapters import load_adapter, trainable_parameters
from idefics_qlora.model.precision import (
    DTYPES,
    autocast,
    check_finite,
    set_activation_checkpointing,
    set_compute_dtype,
)
from idefics_qlora.notices import advising, with_words
from idefics_qlora.process import StopSignals
from idefics_qlora.training.diagnostics import (
    check_labels,
    too_small_a_rate,
    unmoved_modules,
    weight_marks,
)
from idefics_qlora.training.divergence import Divergence
from idefics_qlora.training.inputs import ROWS_CHECKED, Inputs
from idefics_qlora.training.optim import allocate_states, make_optimizer
from idefics_qlora.training.overflow import (
    MAX_SKIPS_IN_A_ROW,
    endless_overflow,
    first_nonfinite_module,
    fp16_ledger,
)
from idefics_qlora.training.result import Clock, TrainResult, run_metrics
from idefics_qlora.training.resume import checkpoints_to_resume
from idefics_qlora.training.state import TrainState, new_run, restore_rng, rng_tensors

logger = logging.getLogger(__name__)


class Run:
    """A run from its beginning or its newest checkpoint on, in a folder that it has to itself.

    Args:
        inputs: As :func:`check_inputs` gave them.
        folder: ``output_dir``, resolved.
        on_log: Called with every log record.
        stop: Knows whether a signal has asked the run to stop.
        background: Deletes old checkpoints.
    """

    def __init__(
        self,
        inputs: Inputs,
        folder: Path,
        on_log: Callable[[dict[str, Any]], None] | None,
        stop: StopSignals,
        background: Executor,
    ) -> None:
        config, model = inputs.config, inputs.model
        self.inputs = inputs
        self.notices = inputs.notices
        self.config = config
        self.folder = folder
        self.stop = stop
        self._on_log = on_log
        self._background = background
        clear_leftovers(self.folder)
        set_compute_dtype(model, DTYPES[config.precision])
        set_activation_checkpointing(model, config.gradient_checkpointing)
        self._trainable = trainable_parameters(model)
        check_finite(
            {name: p for name, p in model.named_parameters() if not p.requires_grad},
            "load the base again, from files that are whole; if its values are beyond fp16's "
            "65504, load_model(compute_dtype=torch.bfloat16) and precision='bf16'",
        )
        device = next(iter(self._trainable.values())).device
        self.state = TrainState(
            model=model,
            optimizer=make_optimizer(self._trainable.values(), config),
            scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
            config=config,
            total_steps=inputs.total_steps,
            device=device,
            origin=inputs.origin,
            unlogged_loss=torch.zeros((), dtype=torch.float64, device=device),
        )
        way_out = "make the adapter anew with add_lora, or load it from a checkpoint that is sound"
        if (checkpoint := self._resume()) is not None:
            way_out = f"{checkpoint} holds them: delete it, or resume from an earlier one"
        check_finite(self._trainable, way_out)
        if checkpoint is not None:
            self._take_over(checkpoint.parent)
            logger.info("resumed from %s at step %d", checkpoint, self.state.global_step)
        smaller = "use optim='paged_adamw_8bit' or adapters of a lower rank"
        with advising("the optimizer's state", otherwise=smaller):
            allocate_states(self.state.optimizer)
        self.state.optimizer.zero_grad(set_to_none=True)  # a failed run may have left some
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._first_step = self._saved_step = self.state.global_step
        self._saved_records = self._records()
        self._clock = Clock(self.state)
        self._bad_rows = BadRows(config.on_bad_row, self.folder / "bad_rows.jsonl")
        self._loading = partial(
            Loading,
            num_workers=config.num_workers,
            pin=device.type == "cuda",
            timeout_s=config.loader_timeout_s,
        )
        options: dict[str, Any] = {
            "seed": config.seed,
            "global_batch_size": config.global_batch_size,
            "augment": config.augment,
        }
        self._windows: Windows | StreamedWindows = (
            StreamedWindows(inputs.reader, **options, position=self.state.position)
            if inputs.reader.is_stream
            else Windows(inputs.reader, **options)
        )
        self._samples = None
        if inputs.held_out is not None and config.eval_samples:
            self._samples = EvalSamples(inputs.held_out.reader, config.eval_samples, self.folder)
        self._marks = weight_marks(self._trainable)
        self._labels_checked = False
        self._diverged: str | None = None
        model.train()

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest ``eval_loss``, if it is still there."""
        if self.state.best_step is None:
            return None
        best = checkpoint_path(self.folder, self.state.best_step)
        return best if is_of_run(best, self.state.run) else None

    def _resume(self) -> Path | None:
        """Put the state of the checkpoint back that ``config.resume`` asks for; tells which.

        Raises:
            CheckpointError: If none can be used, though there are some.
            OSError: If one cannot be read for a reason that may pass: it is not passed over.
        """
        chosen = checkpoints_to_resume(self.config, self.folder)
        for checkpoint in reversed(chosen):
            try:
                snapshot = load_checkpoint(checkpoint)
                check_step(checkpoint, snapshot.state)
                self.state.restore(snapshot, checkpoint)
                return checkpoint
            except CheckpointError as error:
                if self.config.resume != "auto":
                    raise
                logger.warning("passed over: %s", error)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{checkpoint} cannot be read ({error.strerror}), though it may be whole: "
                    "mend that and start again, or move it out of the folder to go on without it",
                    error.filename,
                ) from error
        if damaged := [folder.name for folder in chosen if is_ours(folder)]:
            raise CheckpointError(
                f"none of {', '.join(damaged)} in {self.folder} is whole, as the log says: mend or "
                "delete them, or choose another output_dir"
            )
        return None

    def _take_over(self, origin: Path) -> None:
        """Make the folder that of the run as it was at the step from which it goes on.

        In another folder it is another run from there on, with a copy of the best so far.

        Args:
            origin: The folder of the checkpoint from which the run goes on.
        """
        state = self.state
        set_aside(self.folder, state.global_step)
        best = None if state.best_step is None else checkpoint_path(origin, state.best_step)
        if best is not None:
            try:
                snapshot = self._checked(best)
            except CheckpointError as error:
                logger.warning("the best checkpoint so far is forgotten: %s", error)
                best = state.best_step = state.best_metric = None
        if origin != self.folder:
            state.run = new_run()
            if best is not None:
                copied = replace(snapshot, state={**snapshot.state, "run": state.run})
                save_checkpoint(self.folder / best.name, copied)
        others = [f.name for f in checkpoints(self.folder) if not is_of_run(f, state.run)]
        if others:
            names = ", ".join(others)
            logger.warning(
                "not of this run, or damaged, and left alone in %s: %s", *(self.folder, names)
            )

    def _checked(self, checkpoint: Path) -> Snapshot:
        """A checkpoint of this run, verified."""
        snapshot = load_checkpoint(checkpoint)
        check_step(checkpoint, snapshot.state)
        check_run(checkpoint, snapshot.state, self.state.run)
        return snapshot

    def windows(self) -> Loading[Window]:
        """The windows from the state's next one on."""
        return self._loading(self._windows, first=self.state.window)

    def next_window(self, windows: Loading[Window]) -> Window:
        """Wait for the next window; note its bad rows, and look at the labels of the first.

        Raises:
            LoaderError: If a loader worker is lost; the message names the rows it may have read.
            MemoryError: If there is none left for a row; the message names it.
            ValueError: If too many rows are bad, or labels are wrong.
        """
        state = self.state
        try:
            with self._clock.waiting():
                window = next(windows)
            self._bad_rows.note(window.bad)
            num_bad = state.num_bad_rows + len(window.bad)
            num_seen = state.num_seen + len(window.rows) + len(window.bad)
            self._bad_rows.check_share(num_bad, num_seen, ROWS_CHECKED)
        except ValueError:  # it names its row
            self._keep()
            raise
        except LoaderError as error:
            self._keep()
            raise LoaderError(f"{error}{self._reading(error.items)}", error.items) from error
        except Exception as error:
            words = f"in window {windows.number}"
            words += self._reading(range(windows.number, windows.number + 1))
            if isinstance(error, MemoryError):
                words += f"; free memory, or use fewer num_workers (now {self.config.num_workers})"
            raise with_words(error, f"{words}; {self._keep()}") from error
        if not self._labels_checked:
            logger.info("%s", check_labels(window, self.inputs.reader.collator))
            self._labels_checked = True
        self._note_long_row(window)
        return window

    def _note_long_row(self, window: Window) -> None:
        lengths = self.inputs.lengths
        if lengths is None or window.batch is None:
            return
        name = f"{self.inputs.reader.name}[{window.batch_rows[0]}]"  # the window's longest
        for kind, line in lengths.find(name, window.lengths[0], self.state.micro_batch_size):
            self.notices.warn(kind, f"{name}: {line}")

    def check_rate(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Tell of a learning rate with which nothing moves; asked after the first step."""
        numbers = sum(p.numel() for p in self._trainable.values())
        measured = loss.item(), grad_norm.item()  # sync
        said = too_small_a_rate(*measured, numbers, self.config, self.state.total_steps)
        if said is not None:
            self.notices.warn("learning_rate too small", said)

    def _reading(self, items: range) -> str:
        if not isinstance(self._windows, Windows):
            return ""
        rows = sorted({row for window in items for _, row in self._windows.positions(window)})
        return f"; it was reading one of the rows {rows}"

    def log(self, record: dict[str, Any]) -> None:
        """Add a record to the history, with the epoch and the step, and hand it out."""
        record |= {"epoch": round(self.epoch(), 4), "step": self.state.global_step}
        if self.state.num_bad_rows:
            record["bad_rows"] = self.state.num_bad_rows
        self.state.log_history.append(record)
        self.hand_out()

    def hand_out(self) -> None:
        """Give ``on_log`` the records that it has not had yet.

        Should it fail, the step is saved first, and it gets the record again after a restart.
        """
        state = self.state
        for record in state.log_history[state.num_told :]:
            if self._on_log is not None:
                try:
                    self._on_log(dict(record))
                except Exception:
                    self.save_if_new()
                    raise
            state.num_told += 1

    def log_training(self, grad_norm: Tensor, learning_rate: float) -> float:
        """Log the mean loss since the last such record; returns it."""
        state = self.state
        loss_sum = state.unlogged_loss.item()  # sync
        record = {
            "loss": loss_sum / state.unlogged_steps,
            "grad_norm": grad_norm.item(),
            "learning_rate": learning_rate,
            "data_wait_s": self._clock.data_wait(),
        }
        if state.scaler.is_enabled():
            record["loss_scale"] = state.scaler.get_scale()
            record["skipped_windows"] = state.skipped_windows
        state.loss_sum += loss_sum
        state.unlogged_loss.zero_()
        state.unlogged_steps = 0
        self.log(record)
        return float(record["loss"])

    def evaluate(self) -> float:
        """Log an evaluation, unless the step has one; returns its loss.

        Should it fail, the step is saved first.
        """
        for record in reversed(self.state.log_history):
            if record["step"] != self.state.global_step:
                break
            if "eval_loss" in record:
                return float(record["eval_loss"])
        what = f"the evaluation after step {self.state.global_step}"
        try:
            with advising(what, eval_batch_size=self.config.eval_batch_size):
                return self._evaluate()
        except Exception:
            self.save_if_new()
            raise

    def _evaluate(self) -> float:
        config, model, held_out = self.config, self.inputs.model, self.inputs.held_out
        assert held_out is not None
        record = mean_loss(model, self._loading(held_out), self.state.device, self._bad_rows)
        if config.eval_image_use:
            record |= self._image_use(held_out.reader)
        if self._samples is not None:
            record["eval_samples"] = self._samples.caption(model, config.eval_batch_size)
        self.log(record)
        return float(record["eval_loss"])

    def _image_use(self, reader: RowReader) -> dict[str, float]:
        try:
            use = image_use(
                self.inputs.model,
                self.inputs.processor,
                reader.rows,
                to_example=reader.to_example,
                max_rows=ROWS_CHECKED,
                batch_size=self.config.eval_batch_size,
                loss_on=self.config.loss_on,
                max_length=self.config.max_length,
                access=reader.collator.access,
            )
        except ValueError as error:
            logger.warning("whether the model looks cannot be told: %s", error)
            return {}
        if use.looks:
            logger.info("%s", use)
        else:
            self.notices.warn("an evaluation in which the model did not look", str(use))
        return {
            "eval_loss_another_image": use.loss["another"],
            "eval_loss_blank_image": use.loss["blank"],
            "eval_image_gain": use.gain[0],
            "eval_looks": float(use.looks),
        }

    def save(self, eval_loss: float | None = None) -> None:
        """Write ``checkpoint-<step>``, the best so far if ``eval_loss`` is the lowest; rotate.

        Raises:
            OSError: If it cannot be written and ``on_save_error`` says so, or the run ends here.
        """
        state = self.state
        self._clock.update(state)
        folder = checkpoint_path(self.folder, state.global_step)
        best_before = state.best_metric, state.best_step
        best_metric = float("inf") if state.best_metric is None else state.best_metric
        if eval_loss is not None and eval_loss < best_metric:
            state.best_metric, state.best_step = eval_loss, state.global_step
        try:
            save_checkpoint(folder, state.snapshot())
        except OSError as error:
            state.best_metric, state.best_step = best_before
            message = f"{folder} cannot be written ({error}); earlier checkpoints are whole"
            ends = state.global_step == state.total_steps or self.stop.received is not None
            if ends or self.config.on_save_error == "raise":
                raise OSError(
                    error.errno,
                    f"{message}; {way_out_of(error)}, then start the script again: it goes on from "
                    "the newest checkpoint",
                ) from error
            logger.error("%s; training goes on and tries again later", message)
        else:
            self._saved_step, self._saved_records = state.global_step, self._records()
            protected = {state.global_step, state.best_step}
            keep = self.config.save_total_limit
            rotate(self.folder, keep, protected, state.run, self._background)

    def save_if_new(self) -> None:
        """Save, unless the last step is saved already: the windows since then are only replayed."""
        if (self.state.global_step, self._records()) != (self._saved_step, self._saved_records):
            self.save()

    def _records(self) -> tuple[int, int]:
        """How many records there are, and how many ``on_log`` has had."""
        return len(self.state.log_history), self.state.num_told

    def _keep(self, rng: dict[str, Tensor] | None = None) -> str:
        """Save what was learnt before a failure, which no second one may hide; tells of it.

        Args:
            rng: Random states to put back first.
        """
        state = self.state
        try:
            if rng is not None:
                restore_rng(rng, state.device)
            self.save_if_new()
        except Exception as error:  # a full disk, a device that is lost
            logger.error("step %d could not be saved: %s", state.global_step, error)
            return f"the state before it could not be saved ({type(error).__name__}: {error})"
        if state.global_step != self._saved_step:
            return "the state before it could not be saved, as the log says"
        return f"the state before it (step {state.global_step}) is kept: a new start does it again"

    def failed(self, window: Window, error: Exception) -> str:
        """Save the state before a window whose step failed; tells of it, and of the window."""
        state = self.state
        if isinstance(error, FloatingPointError):
            return self.dump(window)
        where = f"in window {state.window} (rows {list(window.rows)})"
        if type(error) is torch.OutOfMemoryError:  # in the update, or before the forward pass
            where += (
                f"; set gradient_checkpointing=True, lower micro_batch_size (now "
                f"{state.micro_batch_size}), or free the GPU from other processes"
            )
        if state.half_updated:
            return (
                f"{where}; its update broke off half-way, so the state is not saved: a new start "
                f"goes on from step {self._saved_step}"
            )
        return f"{where}; {self._keep(state.window_rng)}"

    def report_skip(self, window: Window) -> None:
        """Tell of a window whose fp16 gradients overflowed.

        Raises:
            FloatingPointError: If it is one of too many in a row; the state is saved, unless
                training has diverged.
        """
        state = self.state
        logger.warning(
            "window %d skipped: its fp16 gradients overflowed; loss scale now %g",
            *(state.window - 1, state.scaler.get_scale()),
        )
        # The first skip is mostly a matter of scale; several in a row are not.
        tell = state.skipped_windows == 1 or state.skips_in_a_row in (3, MAX_SKIPS_IN_A_ROW)
        diverged = self._divergence(window) if tell else None
        if tell and state.first_nonfinite_module is None:
            self._explain_overflow(window, diverged)
        if diverged:
            self._diverged = str(diverged)
            if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
                # Not saved: it would be of no use, and might take a sound checkpoint's place.
                raise FloatingPointError(self._way_back(diverged))
            logger.warning("%s: lower learning_rate", diverged)
        if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            error = endless_overflow(state)
            state.skips_in_a_row = 0  # a resumed run may try as often again
            self.save()  # the lower scale as well, though the step may be saved already
            raise error

    def _explain_overflow(self, window: Window, diverged: Divergence | None) -> None:
        # The pass is done again to say where it was, with the same dropout masks.
        state = self.state
        rng = rng_tensors(state.device)
        restore_rng(state.window_rng, state.device)
        try:
            with autocast(state.device, DTYPES[self.config.precision]):
                batches = window.to(state.device).micro_batches(state.micro_batch_size)
                state.first_nonfinite_module = first_nonfinite_module(state.model, batches)
        except Exception as error:  # an explanation must not end a run
            logger.warning("where it overflowed cannot be told: %s", error)
            return
        finally:
            restore_rng(rng, state.device)
        if state.first_nonfinite_module is not None:
            logger.warning(
                "the first module with an output that is not finite is %s",
                state.first_nonfinite_module,
            )
        elif not diverged:
            logger.warning(
                "its forward pass is finite: the loss scale was too large, as is usual at first"
            )

    def _divergence(self, window: Window) -> Divergence | None:
        """Whether the adapter is to blame for values that are not finite; a fresh one is not."""
        state = self.state
        if state.global_step == 0:
            return None
        try:
            batches = window.to(state.device).micro_batches(state.micro_batch_size)
            return Divergence(state.model, batches) or None
        except Exception as error:  # an explanation must not end a run
            logger.warning("whether training has diverged cannot be told: %s", error)
            return None

    def _way_back(self, diverged: Divergence) -> str:
        """What to do after training has diverged: not to go on from where it had already."""
        state = self.state
        newest_first = checkpoints(self.folder)[::-1]
        best = self.best_checkpoint
        sound = diverged.sound(([] if best is None else [best]) + newest_first)
        anew = ""
        if sound is not None:
            anew = (
                f", or with {sound.name}'s adapter: load_finetuned({str(sound)!r}, trainable=True)"
            )
        broken = ""
        if newest_first and diverged.sound(newest_first[:1]) is None:
            broken = f"; do not go on from the newest, {newest_first[0].name}: it is broken already"
        return (
            f"{state.skips_in_a_row} windows in a row had fp16 gradients that overflow (step "
            f"{state.global_step}), because {diverged}. Lower learning_rate="
            f"{self.config.learning_rate:g} and start anew in another output_dir, from the "
            f"beginning{anew}{broken}"
        )

    def dump(self, window: Window) -> str:
        """Save what led to a value that is not finite; the words that tell where, and why."""
        state = self.state
        diverged = self._divergence(window)
        why = f"{diverged}: lower learning_rate; " if diverged else ""
        folder = self.folder / f"failed-window-{state.window}"
        tensors = {} if window.batch is None else window.batch.tensors()
        try:
            save_checkpoint(folder, state.snapshot(rng=state.window_rng), extra=tensors)
        except OSError as error:
            return f"{why}the state before it could not be saved ({error})"
        return (
            f"{why}the state before it is in {folder}, with the window's tensors in "
            f"extra.safetensors: resume={str(folder)!r} does the window again"
        )

    def _load_best(self) -> None:
        state = self.state
        if state.best_step is None:
            logger.warning("there is no best checkpoint (any more): the last adapter stays")
            return
        best = checkpoint_path(self.folder, state.best_step)
        try:
            load_adapter(self.inputs.model, self._checked(best).adapter, str(best))
        except CheckpointError as error:
            logger.error("the last adapter stays, not the best: %s", error)
            state.best_step = state.best_metric = None

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
        if still and state.global_step > max(self._first_step, self.config.warmup_steps):
            names = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
            logger.warning("%d adapters never moved: %s", len(still), names)
        self._clock.update(state)
        metrics = run_metrics(state, self.epoch())
        finished = state.global_step >= state.total_steps
        if finished and self.config.load_best_model_at_end:
            self._load_best()
        model.eval()
        if summary := str(self.notices):
            logger.warning("%s", summary)
        stopped = None if finished else self.stop.received
        return TrainResult(
            global_step=state.global_step,
            training_loss=metrics["train_loss"],
            metrics=metrics,
            log_history=[*state.log_history, {**metrics, "step": state.global_step}],
            best_checkpoint=self.best_checkpoint,
            fp16_ledger=fp16_ledger(state, self._diverged),
            stopped_by=None if stopped is None else stopped.name,
        )


def way_out_of(error: OSError) -> str:
    """What to do about a checkpoint that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    if error.errno == errno.EFBIG:
        return "allow larger files (ulimit -f)"
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
        return "delete or rename what is in its way"
    return "mend that"
