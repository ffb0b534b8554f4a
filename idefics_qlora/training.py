"""The training loop: one window, one optimizer step.

The loop is written out in :func:`train` and :func:`train_step` and read top to bottom. ``# sync``
marks where the CPU waits for the GPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from tqdm import tqdm

from idefics_qlora import model as models
from idefics_qlora.batches import (
    Batch,
    Collator,
    EvalBatches,
    RowReader,
    Rows,
    Window,
    Windows,
    eval_loader,
    window_loader,
)
from idefics_qlora.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    rotate,
    save_checkpoint,
)
from idefics_qlora.config import LossOn, TrainConfig
from idefics_qlora.examples import ToExample
from idefics_qlora.loss import summed_cross_entropy
from idefics_qlora.optim import lr_at, make_optimizer
from idefics_qlora.state import TrainState

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
    ``skipped_windows``, and ``peak_memory_bytes`` (of the GPU, or of the process on a CPU)."""
    log_history: list[dict[str, float]]
    """Every log record, in order."""
    best_checkpoint: Path | None
    """The checkpoint with the lowest ``eval_loss``."""


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


def train_step(state: TrainState, window: Window) -> StepOutput:
    """One optimizer step over one window.

    Raises:
        FloatingPointError: If the gradient is not finite in bf16 or fp32, where no scale can be
            lowered; the weights are untouched.
    """
    learning_rate = lr_at(state.global_step, state.total_steps, state.config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate

    loss = torch.zeros((), device=state.device)
    for batch in window.batches:
        batch = batch.to(state.device)
        with models.autocast(state.device, models.DTYPES[state.config.precision]):
            logits = state.model(**batch.inputs(), use_cache=False).logits  # (B, T, V)
        # Divided by the whole window's targets, the micro-batches' gradients add up to the gradient
        # of the window's mean, whatever their lengths.
        micro_loss = summed_cross_entropy(logits, batch.labels) / window.num_targets
        state.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()

    state.scaler.unscale_(state.optimizer)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    grad_norm = clip_grad_norm_(parameters, state.config.max_grad_norm)
    scale = state.scaler.get_scale()
    if not state.scaler.is_enabled() and not torch.isfinite(grad_norm):  # sync
        state.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"the gradient of window {state.window} (rows {list(window.rows)}) is "
            f"{grad_norm.item()} at step {state.global_step} with "
            f"precision={state.config.precision!r}; the weights are untouched; look at these rows, "
            "or lower learning_rate"
        )
    state.scaler.step(state.optimizer)  # sync; does nothing when a gradient is not finite
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    skipped = state.scaler.get_scale() < scale

    state.window += 1
    state.num_examples += len(window.rows)
    state.num_images += window.num_images
    state.num_tokens += window.num_tokens
    if skipped:
        state.skipped_windows += 1
        state.skips_in_a_row += 1
    else:
        state.global_step += 1
        state.skips_in_a_row = 0
        state.unlogged_loss += loss
        state.unlogged_steps += 1
    return StepOutput(loss, grad_norm, learning_rate, skipped)


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
    windows = Windows(
        reader,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        augment=config.augment,
    )
    reader.check(windows.first_rows(ROWS_CHECKED))
    held_out = None
    if eval_rows is not None:
        eval_reader = RowReader(eval_rows, "eval_rows", to_example, collator)
        eval_reader.check(range(min(len(eval_reader), ROWS_CHECKED)))
        held_out = EvalBatches(eval_reader, config.eval_batch_size)
    output_dir = Path(config.output_dir)
    resume_from = _resume_from(config)

    torch.manual_seed(config.seed)  # dropout
    models.set_compute_dtype(model, models.DTYPES[config.precision])
    models.set_activation_checkpointing(model, config.gradient_checkpointing)
    state = TrainState(
        model=model,
        optimizer=make_optimizer(trainable.values(), config),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        config=config,
        total_steps=config.total_steps(len(reader)),
        device=device,
        unlogged_loss=torch.zeros((), dtype=torch.float64, device=device),
    )
    if resume_from is not None:
        state.restore(load_checkpoint(resume_from), str(resume_from))
        logger.info("resumed from %s at step %d", resume_from, state.global_step)
    model.train()
    pin = device.type == "cuda"
    if pin:
        torch.cuda.reset_peak_memory_stats(device)
    started = _Clock(state)
    progress = tqdm(total=state.total_steps, initial=state.global_step, unit="step", disable=None)

    def log(record: dict[str, float]) -> None:
        epoch = state.num_examples / len(reader)
        record = {**record, "epoch": round(epoch, 4), "step": state.global_step}
        state.log_history.append(record)
        if on_log is not None:
            on_log(record)

    loader = iter(window_loader(windows, state.window, config.num_workers, pin))
    while state.global_step < state.total_steps:
        output = train_step(state, next(loader))
        if output.skipped:
            _check_skips(state)
            continue
        progress.update()
        last = state.global_step == state.total_steps
        if last or due(state.global_step, config.logging_steps):
            log(_training_record(state, output))
            progress.set_postfix(loss=f"{state.log_history[-1]['loss']:.3f}")
        eval_loss = None
        if held_out is not None and (last or due(state.global_step, config.eval_steps)):
            record = _evaluate(model, eval_loader(held_out, config.num_workers, pin), device)
            log(record)
            eval_loss = record["eval_loss"]
        if last or due(state.global_step, config.save_steps):
            if eval_loss is not None and eval_loss < (state.best_metric or math.inf):
                state.best_metric, state.best_step = eval_loss, state.global_step
            save_checkpoint(output_dir, state.global_step, state.snapshot())
            rotate(output_dir, config.save_total_limit, _best_checkpoint(state))
    progress.close()

    metrics = started.metrics(state, len(reader))
    best = _best_checkpoint(state)
    if config.load_best_model_at_end and best is not None and state.best_step != state.global_step:
        models.load_adapter(model, load_checkpoint(best).adapter, str(best))
    model.eval()
    return TrainResult(
        global_step=state.global_step,
        training_loss=metrics["train_loss"],
        metrics=metrics,
        log_history=[*state.log_history, {**metrics, "step": state.global_step}],
        best_checkpoint=best,
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
    num_workers: int = 0,
) -> dict[str, float]:
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
        num_workers: Processes that load batches ahead.

    Returns:
        ``eval_loss`` (cross-entropy per target token over all rows together, in nats),
        ``eval_runtime`` (s), ``eval_samples_per_second`` and ``eval_steps_per_second`` (batches).
    """
    collator = Collator(processor, loss_on, models.num_embeddings(model), max_length)
    batches = EvalBatches(RowReader(rows, "rows", to_example, collator), batch_size)
    device = next(model.parameters()).device
    return _evaluate(model, eval_loader(batches, num_workers, device.type == "cuda"), device)


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` optimizer steps happens after ``step``."""
    return step % every == 0


def _evaluate(
    model: models.Model, loader: DataLoader[Batch], device: torch.device
) -> dict[str, float]:
    started = time.perf_counter()
    num_examples = num_targets = 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    with models.evaluation_mode(model):
        for batch in loader:
            num_examples += len(batch.input_ids)
            num_targets += batch.num_targets
            batch = batch.to(device)
            logits = model(**batch.inputs(), use_cache=False).logits
            total += summed_cross_entropy(logits, batch.labels)
    loss = total.item() / num_targets  # sync
    seconds = time.perf_counter() - started
    return {
        "eval_loss": loss,
        "eval_runtime": seconds,
        "eval_samples_per_second": num_examples / seconds,
        "eval_steps_per_second": len(loader) / seconds,
    }


def _training_record(state: TrainState, output: StepOutput) -> dict[str, float]:
    loss_sum = state.unlogged_loss.item()  # sync
    record = {
        "loss": loss_sum / state.unlogged_steps,
        "grad_norm": output.grad_norm.item(),
        "learning_rate": output.learning_rate,
    }
    state.loss_sum += loss_sum
    state.unlogged_loss.zero_()
    state.unlogged_steps = 0
    return record


def _check_skips(state: TrainState) -> None:
    scale = state.scaler.get_scale()
    logger.warning(
        "window %d skipped: its fp16 gradients overflowed; loss scale now %g",
        state.window - 1,
        scale,
    )
    if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise FloatingPointError(
            f"{state.skips_in_a_row} windows in a row had fp16 gradients that overflow, the loss "
            f"scale has fallen to {scale:g}, and nothing is learnt (step {state.global_step}): set "
            "precision='bf16' (on an Ampere GPU or newer) or 'fp32', or lower learning_rate; the "
            "last checkpoint is from before"
        )


def _best_checkpoint(state: TrainState) -> Path | None:
    if state.best_step is None:
        return None
    return Path(state.config.output_dir) / f"checkpoint-{state.best_step}"


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
    return Path(config.resume)


class _Clock:
    """Time and work of this process's part of a run."""

    def __init__(self, state: TrainState) -> None:
        self.time = time.perf_counter()
        self.step = state.global_step
        self.examples = state.num_examples
        self.tokens = state.num_tokens

    def metrics(self, state: TrainState, num_rows: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.time
        flops = models.training_flops(
            state.model.get_base_model().config, state.num_tokens, state.num_images
        )
        loss_sum = state.loss_sum + state.unlogged_loss.item()
        return {
            "train_runtime": seconds,
            "train_samples_per_second": (state.num_examples - self.examples) / seconds,
            "train_steps_per_second": (state.global_step - self.step) / seconds,
            "train_tokens_per_second": (state.num_tokens - self.tokens) / seconds,
            "train_loss": loss_sum / max(1, state.global_step),
            "epoch": state.num_examples / num_rows,
            "total_flos": flops,
            "skipped_windows": state.skipped_windows,
            "peak_memory_bytes": peak_memory_bytes(state.device),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or resident in a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
