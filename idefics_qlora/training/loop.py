"""The training loop: one window, one optimizer step.

The loop is written out in :func:`train` and :func:`train_step` and read top to bottom. ``# sync``
marks where the CPU waits for the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from idefics_qlora.checkpoint import resolved
from idefics_qlora.config import TrainConfig
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.rows import Rows
from idefics_qlora.data.windows import Window
from idefics_qlora.evaluation.predictions import Metric
from idefics_qlora.families import family_of
from idefics_qlora.families.family import Processor
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.notices import with_words
from idefics_qlora.process import RunLock, StopSignals, guarded_children, seeded
from idefics_qlora.training.diagnostics import check_coverage, gradient_coverage
from idefics_qlora.training.inputs import check_inputs
from idefics_qlora.training.optim import lr_at
from idefics_qlora.training.parts import rng_tensors
from idefics_qlora.training.result import TrainResult
from idefics_qlora.training.resume import settled
from idefics_qlora.training.run import Run
from idefics_qlora.training.state import TrainState
from idefics_qlora.training.window_pass import window_backward

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # whoever calls, from under whatever mode, means to train
@torch.enable_grad()
def train(
    model: PeftModel,
    processor: Processor,
    train_rows: Rows,
    eval_rows: Rows | None = None,
    *,
    config: TrainConfig,
    to_example: ToExample | None = None,
    metrics: Mapping[str, Metric] | None = None,
    on_log: Callable[[dict[str, Any]], Any] | None = None,
    access: ImageAccess = DEFAULT_ACCESS,
) -> TrainResult:
    """Fine-tune the adapter of a model.

    The global random generators are the caller's again when it is over, however it ends.

    Args:
        model: A base from ``load_model`` with an adapter from ``add_lora``. Its unquantised frozen
            parts are cast to ``config.precision``.
        processor: The base's processor.
        train_rows: Rows to learn from: a list, a ``datasets.Dataset`` or any sequence.
        eval_rows: Held-out rows for the evaluation loss and the metrics.
        config: The run's settings.
        to_example: Converts a row to an :class:`~idefics_qlora.Example`; not needed for rows that
            are examples already or have a known format.
        metrics: Functions by name, called in every evaluation with what the model says of the
            first ``eval_generate_rows`` held-out rows and, for each, the right answers (the
            example's ``references``, or its completion), both without white space at the ends:
            ``(predictions: list[str], references: list[list[str]]) -> float``, recorded as
            ``eval_<name>``, or a dictionary, recorded as ``eval_<name>_<key>``. Those of
            ``iq.metrics`` can be given as they are.
        on_log: Called with every log record. If it returns ``STOP``, the run ends after this step
            as it does after a signal: saved, to be continued by another start.
        access: What may be opened as a picture, and at what cost: files, hosts, bytes, pixels.

    Returns:
        The run's result; the model holds the best adapter (``load_best_model_at_end``) or the last.

    Raises:
        ValueError: If rows, model and settings do not go together; raised before training starts,
            and names the row or the field. If a metric gives a number that is not finite.
        FloatingPointError: If 25 windows in a row overflow in fp16, or a gradient is not finite in
            bf16 or fp32.
    """
    inputs = check_inputs(
        model, processor, train_rows, eval_rows, config, to_example, access, metrics or {}
    )
    folder = resolved(config.output_dir)
    with (
        RunLock(folder),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="rotation") as background,
        StopSignals() as stop,
        guarded_children(),
        seeded(config.seed, next(model.parameters()).device),  # dropout
        ExitStack() as cleanup,
    ):
        run = Run(settled(inputs, folder), folder, on_log, stop, background, cleanup)
        state = run.state
        with run.incoming.windows() as windows:
            if state.finished_step < state.global_step:  # the run broke off while it did this
                finish_step(run)
            while state.global_step < state.total_steps and run.stopped_by is None:
                window = run.incoming.next(windows)  # read ahead: data/order.py, workers.py
                try:
                    output = train_step(state, window)
                except Exception as error:
                    raise with_words(error, run.failed(window, error)) from error
                if output is None:  # every row of the window was bad
                    continue
                if output.skipped:
                    run.overflow.report(window)
                    continue

                run.stepped()
                if state.global_step == 1:
                    run.check_rate(output.loss, output.grad_norm)
                last = state.global_step == state.total_steps
                if last or due(state.global_step, config.logging_steps):
                    run.history.log_training(output.grad_norm, output.learning_rate)
                finish_step(run)
            if run.stopped_by is not None:
                run.saving.save_if_new()
        return run.result()


def finish_step(run: Run) -> None:
    """Evaluate and save, if that is due after this step.

    Done again after a failure and a restart, it does what had not been done and ends with the same
    state, checkpoint and history.
    """
    state, config = run.state, run.config
    last = state.global_step == state.total_steps
    run.history.hand_out()
    evaluation = None
    has_eval_rows = run.inputs.held_out is not None
    if has_eval_rows and (last or due(state.global_step, config.eval_steps)):
        evaluation = run.evaluate()
        state.is_unchanged = False
    state.finished_step = state.global_step
    if state.is_over or due(state.global_step, config.save_steps):
        run.saving.save(evaluation)
    if evaluation is not None:
        run.report()


@dataclass(frozen=True)
class StepOutput:
    """What one window gave."""

    loss: Tensor
    """Scalar fp32 on the device: cross-entropy per target token of the window, in nats."""
    grad_norm: Tensor
    """Scalar fp32 on the device: L2 norm of the whole gradient before clipping."""
    learning_rate: float
    skipped: bool
    """Whether the fp16 gradients overflowed, so that nothing was updated."""


def train_step(state: TrainState, window: Window) -> StepOutput | None:
    """One optimizer step over one window; ``None`` if all its rows were bad.

    A window for which the GPU's memory does not suffice is done again in smaller micro-batches.
    Whatever is raised, the weights, the optimizer and the counters are those before the window, and
    ``state.window_rng`` has its random states, unless ``state.half_updated`` says otherwise.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite in bf16 or fp32, where no
            scale can be lowered; the weights are untouched.
        DeadAdapters: If a part of the model gets no gradient in the first step.
        WindowTooLarge: If not even a single example fits (a ``torch.OutOfMemoryError``).
    """
    state.window_rng = rng_tensors(state.device)
    if window.batch is None:
        state.advance(window)
        return None
    learning_rate = lr_at(state.global_step, state.total_steps, state.config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate

    # Forward and backward passes, one micro-batch after the other: model/execution.py.
    loss = window_backward(state, window.to(state.device))
    if state.scaler.is_enabled():
        state.optimizer.spoil_unless_finite(loss)  # an overflow, without a sync
    state.scaler.unscale_(state.optimizer)
    if state.coverage is None and any(window.images):  # without images, only the text learns
        parameters_by_name = dict(state.model.named_parameters())
        state.coverage = gradient_coverage(parameters_by_name, family_of(state.model))  # sync
        if state.coverage is not None:
            check_coverage(state.coverage, state.config.allow_dead_parts)
    grad_norm = state.optimizer.clip(state.config.max_grad_norm)
    if not state.scaler.is_enabled() and not torch.isfinite(loss + grad_norm):  # sync
        state.optimizer.zero_grad()
        raise FloatingPointError(
            f"window {state.window} (rows {list(window.rows)}) gave the loss {loss.item()} and a "
            f"gradient of norm {grad_norm.item()} at step {state.global_step} with "
            f"precision={state.config.precision!r}; the weights are untouched; look at these rows, "
            "or lower learning_rate"
        )
    # While the GPU works; on_log and evaluations, which let others at the model, take it back.
    state.is_unchanged = state.optimizer.is_unchanged() and state.execution.is_unchanged()
    state.optimizer.reserve()
    state.half_updated = True
    skipped = not state.scaler.step(state.optimizer)  # sync: whether every gradient is finite
    state.scaler.update()
    state.optimizer.zero_grad()

    state.advance(window)
    if skipped:
        state.skipped_windows += 1
        state.skips_in_a_row += 1
    else:
        state.global_step += 1
        state.skips_in_a_row = 0
        state.unlogged_loss += loss
        state.unlogged_steps += 1
    state.half_updated = False
    return StepOutput(loss, grad_norm, learning_rate, skipped)


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` optimizer steps happens after ``step``."""
    return step % every == 0
