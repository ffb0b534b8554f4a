"""The training loop: one window, one optimizer step.

The loop is written out in :func:`train` and :func:`train_step` and read top to bottom. ``# sync``
marks where the CPU waits for the GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from idefics_qlora import model as models
from idefics_qlora.batches import Collator
from idefics_qlora.checkpoint import (
    CheckpointError,
    checkpoints,
    clear_leftovers,
    latest_checkpoint,
    load_checkpoint,
    rotate,
    save_checkpoint,
    set_aside,
)
from idefics_qlora.config import LossOn, OnBadRow, TrainConfig
from idefics_qlora.diagnostics import (
    EvalSamples,
    check_coverage,
    check_labels,
    gradient_coverage,
    image_use,
    unmoved_modules,
    weight_marks,
)
from idefics_qlora.examples import ToExample
from idefics_qlora.faults import BadRows, RunLock, StopSignals, first_nonfinite_module
from idefics_qlora.loading import LoaderError, Loading
from idefics_qlora.loss import summed_cross_entropy
from idefics_qlora.memory import estimate_memory
from idefics_qlora.optim import lr_at, make_optimizer
from idefics_qlora.state import TrainState, restore_rng, rng_tensors
from idefics_qlora.windows import (
    EvalBatches,
    Fingerprint,
    RowReader,
    Rows,
    StreamedWindows,
    Window,
    Windows,
    epoch_order,
)

logger = logging.getLogger(__name__)

MAX_SKIPS_IN_A_ROW = 25
ROWS_CHECKED = 64
"""Rows of each kind that are read before training starts, in the order of their use."""


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
    ``peak_memory_bytes`` (of the GPU, or of the process on a CPU)."""
    log_history: list[dict[str, Any]]
    """Every log record, in order."""
    best_checkpoint: Path | None
    """The checkpoint with the lowest ``eval_loss``."""
    fp16_ledger: dict[str, Any] | None = None
    """In fp16: ``loss_scale``, ``skipped_windows``, ``skips_in_a_row`` (at the end),
    ``first_nonfinite_module`` (``None`` if every forward pass was finite) and ``advice``."""
    stopped_by: str | None = None
    """Name of the signal that stopped the run early, such as ``SIGTERM``; a script would then exit
    with 128 + its number. The last checkpoint is the newest state."""


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

    A window for which the GPU's memory does not suffice is done again with half the micro-batch.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite in bf16 or fp32, where no
            scale can be lowered; the weights are untouched.
        DeadAdapters: If a part of the model gets no gradient in the first step.
        torch.OutOfMemoryError: If not even a single example fits.
    """
    if window.batch is None:
        state.advance(window)
        return None
    learning_rate = lr_at(state.global_step, state.total_steps, state.config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate

    state.window_rng = rng_tensors(state.device)
    window = window.to(state.device)
    loss = _try_backward(state, window)
    while loss is None:
        state.optimizer.zero_grad(set_to_none=True)
        _halve_micro_batch(state, window)
        restore_rng(state.window_rng, state.device)
        loss = _try_backward(state, window)

    state.scaler.unscale_(state.optimizer)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    if state.coverage is None and any(window.images):  # without images, only the text learns
        state.coverage = gradient_coverage(models.trainable_parameters(state.model))  # sync
        if state.coverage is not None:
            check_coverage(state.coverage, state.config.allow_dead_parts)
    grad_norm = clip_grad_norm_(parameters, state.config.max_grad_norm)
    if not state.scaler.is_enabled() and not torch.isfinite(loss + grad_norm):  # sync
        state.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"window {state.window} (rows {list(window.rows)}) gave the loss {loss.item()} and a "
            f"gradient of norm {grad_norm.item()} at step {state.global_step} with "
            f"precision={state.config.precision!r}; the weights are untouched; look at these rows, "
            "or lower learning_rate"
        )
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)  # sync; does nothing when a gradient is not finite
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    skipped = state.scaler.get_scale() < scale

    state.advance(window)
    if state.growing:
        state.micro_batch_size = min(2 * state.micro_batch_size, state.config.global_batch_size)
    if skipped:
        state.skipped_windows += 1
        state.skips_in_a_row += 1
    else:
        state.global_step += 1
        state.skips_in_a_row = 0
        state.unlogged_loss += loss
        state.unlogged_steps += 1
    return StepOutput(loss, grad_norm, learning_rate, skipped)


def _try_backward(state: TrainState, window: Window) -> Tensor | None:
    """Loss of a window, its scaled gradient added up; ``None`` if the memory did not suffice."""
    loss = torch.zeros((), device=state.device)
    try:
        for batch in window.micro_batches(state.micro_batch_size):
            with models.autocast(state.device, models.DTYPES[state.config.precision]):
                logits = state.model(**batch.inputs(), use_cache=False).logits  # (B, T, V)
            # Divided by the whole window's targets, the micro-batches' gradients add up to the
            # gradient of the window's mean, whatever their lengths.
            micro_loss = summed_cross_entropy(logits, batch.labels) / window.num_targets
            state.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
    except torch.OutOfMemoryError:
        return None  # the failed try's tensors go with the exception
    return loss


def _halve_micro_batch(state: TrainState, window: Window) -> None:
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    if state.micro_batch_size == 1:
        need = estimate_memory(
            state.model.get_base_model().config,
            text_tokens=max(window.lengths),
            images=max(window.images),
            precision=state.config.precision,
            lora=state.model.active_peft_config,
            optim=state.config.optim,
        )
        kept, recomputed = (need.peak(1, recompute) / 2**30 for recompute in (False, True))
        raise torch.OutOfMemoryError(
            f"not even a single example of window {state.window} (rows {list(window.rows)}, up to "
            f"{max(window.lengths)} text tokens) fits into the memory: about {kept:.1f} GiB are "
            f"needed, or {recomputed:.1f} GiB with gradient_checkpointing=True; set that, free the "
            "GPU from other processes, or shorten the longest texts"
        )
    failed, state.micro_batch_size = state.micro_batch_size, state.micro_batch_size // 2
    state.growing = False
    logger.warning(
        "out of memory with %d examples per micro-batch in window %d: it is done again, and the "
        "run goes on, with micro_batch_size=%d",
        *(failed, state.window, state.micro_batch_size),
    )


def train(
    model: PeftModel,
    processor: models.Processor,
    train_rows: Rows,
    eval_rows: Rows | None = None,
    *,
    config: TrainConfig,
    to_example: ToExample | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Fine-tune the adapter of a model.

    Args:
        model: A base from ``load_model`` with an adapter from ``add_lora``. Its unquantised frozen
            parts are cast to ``config.precision``.
        processor: The base's processor.
        train_rows: Rows to learn from: a list, a ``datasets.Dataset`` or any sequence.
        eval_rows: Held-out rows for the evaluation loss.
        config: The run's settings.
        to_example: Converts a row to an :class:`~idefics_qlora.Example`; not needed for rows that
            are examples already or have a known format.
        on_log: Called with every log record.

    Returns:
        The run's result; the model holds the best adapter (``load_best_model_at_end``) or the last.

    Raises:
        ValueError: If rows, model and settings do not go together; raised before training starts,
            and names the row or the field.
        FloatingPointError: If 25 windows in a row overflow in fp16, or a gradient is not finite in
            bf16 or fp32.
    """
    if eval_rows is None and config.load_best_model_at_end:
        raise ValueError(
            f"load_best_model_at_end=True needs eval_rows to find the best checkpoint (every "
            f"eval_steps={config.eval_steps} steps), but there are none: pass eval_rows, or set "
            "load_best_model_at_end=False"
        )
    trainable = models.trainable_parameters(model)
    device = next(iter(trainable.values())).device
    collator = Collator(processor, config.loss_on, models.num_embeddings(model), config.max_length)
    reader = RowReader(train_rows, "train_rows", to_example, collator)
    if reader.is_stream and config.max_steps is None:
        raise ValueError("max_steps=None: a stream of rows has no length, so say how many steps")
    total_steps = config.max_steps or config.total_steps(len(reader))
    if config.warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} is more than the {total_steps} steps that "
            f"num_train_epochs={config.num_train_epochs} comes to: the learning rate would never "
            "reach its peak"
        )
    origin = {
        "base": models.base_fingerprint(model),
        "train_rows": _first_rows(reader, config),
        "eval_rows": None,
    }
    held_out = None
    if eval_rows is not None:
        eval_reader = RowReader(eval_rows, "eval_rows", to_example, collator)
        held_out = EvalBatches(eval_reader, config.eval_batch_size)
        origin["eval_rows"] = _first_rows(eval_reader, config)
    output_dir = Path(config.output_dir)
    loading = partial(
        Loading,
        num_workers=config.num_workers,
        pin=device.type == "cuda",
        timeout_s=config.loader_timeout_s,
    )

    with (
        RunLock(output_dir),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="rotation") as background,
        StopSignals() as stop,
    ):
        clear_leftovers(output_dir)
        torch.manual_seed(config.seed)  # dropout
        models.set_compute_dtype(model, models.DTYPES[config.precision])
        models.set_activation_checkpointing(model, config.gradient_checkpointing)
        state = TrainState(
            model=model,
            optimizer=make_optimizer(trainable.values(), config),
            scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
            config=config,
            total_steps=total_steps,
            device=device,
            origin=origin,
            unlogged_loss=torch.zeros((), dtype=torch.float64, device=device),
        )
        saved_step = 0
        if (checkpoint := _resume_from(config)) is not None:
            state.restore(load_checkpoint(checkpoint), checkpoint)
            set_aside(output_dir, newer_than=checkpoint)
            saved_step = state.global_step
            logger.info("resumed from %s at step %d", checkpoint, state.global_step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started_at = state.global_step
        clock = _Clock(state)

        bad_rows = BadRows(config.on_bad_row, output_dir / "bad_rows.jsonl")

        def log(record: dict[str, Any]) -> None:
            record |= {"epoch": round(_epoch(state, reader), 4), "step": state.global_step}
            if state.num_bad_rows:
                record["bad_rows"] = state.num_bad_rows
            state.log_history.append(record)
            if on_log is not None:
                on_log(dict(record))

        def save(eval_loss: float | None = None) -> None:
            nonlocal saved_step
            clock.update(state)
            folder = output_dir / f"checkpoint-{state.global_step}"
            best_before = state.best_metric, state.best_checkpoint
            best_metric = float("inf") if state.best_metric is None else state.best_metric
            if eval_loss is not None and eval_loss < best_metric:
                state.best_metric, state.best_checkpoint = eval_loss, folder
            try:
                save_checkpoint(folder, state.snapshot())
            except OSError as error:
                state.best_metric, state.best_checkpoint = best_before
                message = f"{folder} cannot be written ({error}); earlier checkpoints are whole"
                ended = state.global_step == state.total_steps or stop.received is not None
                if ended or config.on_save_error == "raise":
                    raise OSError(
                        error.errno,
                        f"{message}; make room, then start the script again: it goes on from the "
                        "newest checkpoint",
                    ) from error
                logger.error("%s; training goes on and tries again later", message)
            else:
                saved_step = state.global_step
                protected = {folder, state.best_checkpoint}
                rotate(output_dir, config.save_total_limit, protected, background)

        options: dict[str, Any] = {
            "seed": config.seed,
            "global_batch_size": config.global_batch_size,
            "augment": config.augment,
        }
        windows: Windows | StreamedWindows = (
            StreamedWindows(reader, **options, position=state.position)
            if reader.is_stream
            else Windows(reader, **options)
        )
        samples = None
        if held_out is not None and config.eval_samples:
            samples = EvalSamples(held_out.reader, config.eval_samples, output_dir)
        marks = weight_marks(trainable)
        labels_checked = False
        model.train()
        with (
            loading(windows, first=state.window) as stream,
            tqdm(
                total=state.total_steps, initial=state.global_step, unit="step", disable=None
            ) as progress,
        ):
            while state.global_step < state.total_steps and stop.received is None:
                try:
                    with clock.waiting():
                        window = next(stream)
                    bad_rows.note(window.bad)
                    seen = state.num_seen + len(window.rows) + len(window.bad)
                    num_bad = state.num_bad_rows + len(window.bad)
                    bad_rows.check_share(num_bad, max(seen, ROWS_CHECKED))
                except (LoaderError, ValueError) as error:
                    if saved_step != state.global_step:
                        save()
                    if isinstance(error, LoaderError) and isinstance(windows, Windows):
                        rows = sorted({r for w in error.items for _, r in windows.positions(w)})
                        message = f"{error}; it was reading one of the rows {rows}"
                        raise LoaderError(message, error.items) from error
                    raise
                if not labels_checked:
                    logger.info("%s", check_labels(window, collator))
                    labels_checked = True
                try:
                    output = train_step(state, window)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {_dump(state, window)}") from error
                if output is None:  # every row of the window was bad
                    continue
                if output.skipped:
                    _report_skip(state, window)
                    if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
                        overflow = _endless_overflow(state)
                        state.skips_in_a_row = 0  # a resumed run may try as often again
                        if saved_step != state.global_step:
                            save()
                        raise overflow
                    continue

                progress.update()
                last = state.global_step == state.total_steps
                if last or due(state.global_step, config.logging_steps):
                    log(_training_record(state, output, clock))
                    progress.set_postfix(loss=f"{state.log_history[-1]['loss']:.3f}")
                eval_loss = None
                if held_out is not None and (last or due(state.global_step, config.eval_steps)):
                    record = _evaluate(model, loading(held_out), device, bad_rows)
                    if config.eval_image_use:
                        record |= _image_use_record(model, processor, held_out.reader, config)
                    if samples is not None:
                        captions = samples.caption(model, config.eval_batch_size)
                        record["eval_samples"] = captions
                    log(record)
                    eval_loss = record["eval_loss"]
                if last or due(state.global_step, config.save_steps):
                    save(eval_loss)
            if stop.received is not None and saved_step != state.global_step:
                save()

        if state.global_step > started_at and (still := unmoved_modules(trainable, marks)):
            logger.warning(
                "%d adapters never moved: %s%s",
                *(len(still), ", ".join(still[:5]), ", ..." if len(still) > 5 else ""),
            )
        clock.update(state)
        metrics = _metrics(state, _epoch(state, reader))
        best = state.best_checkpoint
        finished = state.global_step == state.total_steps
        if finished and config.load_best_model_at_end:
            _load_best(model, best)
        model.eval()
        return TrainResult(
            global_step=state.global_step,
            training_loss=metrics["train_loss"],
            metrics=metrics,
            log_history=[*state.log_history, {**metrics, "step": state.global_step}],
            best_checkpoint=best,
            fp16_ledger=_fp16_ledger(state),
            stopped_by=None if finished or stop.received is None else stop.received.name,
        )


def evaluate(
    model: models.Model,
    processor: models.Processor,
    rows: Rows,
    *,
    to_example: ToExample | None = None,
    batch_size: int = 2,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    on_bad_row: OnBadRow = "skip",
    num_workers: int = 0,
) -> dict[str, Any]:
    """Loss of a model on held-out rows.

    The mode of every module (training or evaluation) is restored, and no random number is drawn,
    so an evaluation does not change what training does next.

    Args:
        model: The base, or the base with an adapter.
        processor: The base's processor.
        rows: Rows to evaluate on.
        to_example: As in :func:`train`.
        batch_size: Examples in one forward pass.
        loss_on: Which text tokens are targets.
        max_length: Text tokens of an example at most, as in :class:`~idefics_qlora.TrainConfig`.
        on_bad_row: What to do with a row that cannot be read: ``skip`` or ``raise``.
        num_workers: Processes that load batches ahead.

    Returns:
        ``eval_loss`` (cross-entropy per target token over all rows together, in nats),
        ``eval_runtime`` (s), ``eval_samples_per_second`` and ``eval_steps_per_second`` (batches);
        ``eval_bad_rows`` if any rows were left out.

    Raises:
        ValueError: If there are no rows, or a row is bad and ``on_bad_row`` says so, or more than
            5 % are.
    """
    collator = Collator(processor, loss_on, models.num_embeddings(model), max_length)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected a whole number of at least 1")
    batches = EvalBatches(RowReader(rows, "rows", to_example, collator), batch_size)
    device = next(model.parameters()).device
    loading = Loading(batches, num_workers=num_workers, pin=device.type == "cuda")
    return _evaluate(model, loading, device, BadRows(on_bad_row))


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` optimizer steps happens after ``step``."""
    return step % every == 0


def _evaluate(
    model: models.Model, loading: Loading[Window], device: torch.device, bad_rows: BadRows
) -> dict[str, Any]:
    started = time.perf_counter()
    num_batches = num_examples = num_targets = num_bad = 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    with models.evaluation_mode(model), loading as windows:
        for window in windows:
            num_bad += len(window.bad)
            bad_rows.note(window.bad)
            if window.batch is None:
                continue
            num_batches += 1
            num_examples += len(window.rows)
            num_targets += window.num_targets
            batch = window.batch.to(device)
            logits = model(**batch.inputs(), use_cache=False).logits
            total += summed_cross_entropy(logits, batch.labels)
    bad_rows.check_share(num_bad, num_examples + num_bad)
    loss = total.item() / num_targets  # sync
    seconds = time.perf_counter() - started
    record = {
        "eval_loss": loss,
        "eval_runtime": seconds,
        "eval_samples_per_second": num_examples / seconds,
        "eval_steps_per_second": num_batches / seconds,
    }
    return record | ({"eval_bad_rows": num_bad} if num_bad else {})


def _first_rows(reader: RowReader, config: TrainConfig) -> Fingerprint:
    """The rows' fingerprint; raises if the rows are bad, before any training starts."""
    order: Iterable[int] = ()
    if not reader.is_stream:
        in_order = reader.name == "eval_rows"
        order = range(len(reader)) if in_order else epoch_order(config.seed, 0, len(reader))
    fingerprint, bad = reader.first_rows(map(int, order), ROWS_CHECKED)
    rows = BadRows(config.on_bad_row)
    rows.note(bad)
    rows.check_share(len(bad), len(fingerprint["first"]))
    return fingerprint


def _epoch(state: TrainState, reader: RowReader) -> float:
    """Passes over the training rows so far; of a stream, those that are complete."""
    if reader.is_stream:
        return float(state.position["epoch"]) if state.position else 0.0
    return state.num_seen / len(reader)


def _training_record(state: TrainState, output: StepOutput, clock: _Clock) -> dict[str, float]:
    loss_sum = state.unlogged_loss.item()  # sync
    record = {
        "loss": loss_sum / state.unlogged_steps,
        "grad_norm": output.grad_norm.item(),
        "learning_rate": output.learning_rate,
        "data_wait_s": clock.data_wait(),
    }
    if state.scaler.is_enabled():
        record["loss_scale"] = state.scaler.get_scale()
        record["skipped_windows"] = state.skipped_windows
    state.loss_sum += loss_sum
    state.unlogged_loss.zero_()
    state.unlogged_steps = 0
    return record


def _report_skip(state: TrainState, window: Window) -> None:
    logger.warning(
        "window %d skipped: its fp16 gradients overflowed; loss scale now %g",
        *(state.window - 1, state.scaler.get_scale()),
    )
    if state.skipped_windows > 1:
        return
    # Once a run, the pass is done again to say where it happened, with the same dropout masks.
    rng = rng_tensors(state.device)
    restore_rng(state.window_rng, state.device)
    with models.autocast(state.device, models.DTYPES[state.config.precision]):
        batches = window.to(state.device).micro_batches(state.micro_batch_size)
        name = first_nonfinite_module(state.model, batches)
    restore_rng(rng, state.device)
    state.first_nonfinite_module = name
    if name is None:
        logger.warning("its forward pass is finite: the loss scale was too large, as is usual once")
    else:
        logger.warning("the first module with an output that is not finite is %s", name)


def _image_use_record(
    model: PeftModel, processor: models.Processor, reader: RowReader, config: TrainConfig
) -> dict[str, float]:
    use = image_use(
        model,
        processor,
        reader.rows,
        to_example=reader.to_example,
        max_rows=ROWS_CHECKED,
        batch_size=config.eval_batch_size,
        loss_on=config.loss_on,
        max_length=config.max_length,
    )
    logger.log(logging.INFO if use.looks else logging.WARNING, "%s", use)
    return {
        "eval_loss_another_image": use.loss["another"],
        "eval_loss_blank_image": use.loss["blank"],
        "eval_image_gain": use.gain[0],
        "eval_looks": float(use.looks),
    }


def _fp16_ledger(state: TrainState) -> dict[str, Any] | None:
    if not state.scaler.is_enabled():
        return None
    share = state.skipped_windows / max(1, state.window)
    advice = "nothing to do: a few skipped windows at the start are usual"
    if state.first_nonfinite_module is not None:
        advice = (
            f"the output of {state.first_nonfinite_module} overflowed: set precision='bf16' on an "
            "Ampere GPU or newer, or 'fp32'"
        )
    elif share > 0.02 and state.skipped_windows > 3:
        advice = (
            f"{share:.0%} of the windows were skipped: set precision='bf16' on an Ampere GPU or "
            "newer, or lower learning_rate"
        )
    return {
        "loss_scale": state.scaler.get_scale(),
        "skipped_windows": state.skipped_windows,
        "skips_in_a_row": state.skips_in_a_row,
        "first_nonfinite_module": state.first_nonfinite_module,
        "advice": advice,
    }


def _endless_overflow(state: TrainState) -> FloatingPointError:
    return FloatingPointError(
        f"{state.skips_in_a_row} windows in a row had fp16 gradients that overflow, the loss scale "
        f"has fallen to {state.scaler.get_scale():g}, and nothing is learnt (step "
        f"{state.global_step}): set precision='bf16' (on an Ampere GPU or newer) or 'fp32' and "
        "start again, which goes on from the newest checkpoint, or lower learning_rate"
    )


def _dump(state: TrainState, window: Window) -> str:
    """Save what led to a value that is not finite; the words that tell where."""
    folder = Path(state.config.output_dir) / f"failed-window-{state.window}"
    tensors = {name: getattr(window.batch, name) for name in ("input_ids", "labels")}
    tensors |= {name: getattr(window.batch, name) for name in ("pixel_values", "attention_mask")}
    try:
        save_checkpoint(folder, state.snapshot(rng=state.window_rng), extra=tensors)
    except OSError as error:
        return f"the state before it could not be saved ({error})"
    return (
        f"the state before it is in {folder}, with the window's tensors in extra.safetensors: "
        f"resume={str(folder)!r} does the window again"
    )


def _load_best(model: PeftModel, best: Path | None) -> None:
    if best is None:
        logger.warning("no evaluation gave a finite loss: the last adapter stays, not the best")
        return
    try:
        models.load_adapter(model, load_checkpoint(best).adapter, str(best))
    except CheckpointError as error:
        logger.error("the best checkpoint is damaged (%s): the last adapter stays", error)


def _resume_from(config: TrainConfig) -> Path | None:
    if config.resume == "auto":
        return latest_checkpoint(config.output_dir)
    if config.resume == "never":
        if existing := checkpoints(config.output_dir):
            raise ValueError(
                f"resume='never', but {existing[-1]} exists: choose another output_dir, delete the "
                "old run, or continue it with resume='auto'"
            )
        return None
    folder = Path(config.resume)
    if not folder.is_dir():
        there = [path.name for path in checkpoints(folder.parent)]
        raise ValueError(
            f"resume={str(folder)!r} is no folder: expected a checkpoint, 'auto' or 'never'; "
            f"{str(folder.parent)!r} has {', '.join(there) or 'no checkpoints'}"
        )
    return folder


class _Clock:
    """Time of this process's part of a run."""

    def __init__(self, state: TrainState) -> None:
        self._start = time.perf_counter() - state.seconds
        self._waited = 0.0
        self._windows = 0

    def update(self, state: TrainState) -> None:
        state.seconds = time.perf_counter() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in this block is time the device waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started
        self._windows += 1

    def data_wait(self) -> float:
        """Mean seconds of waiting per window since the last call."""
        mean = self._waited / max(1, self._windows)
        self._waited, self._windows = 0.0, 0
        return mean


def _metrics(state: TrainState, epoch: float) -> dict[str, float]:
    seconds = max(state.seconds, 1e-9)
    flops = models.training_flops(
        state.model.get_base_model().config, state.num_tokens, state.num_images
    )
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


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or resident in a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
