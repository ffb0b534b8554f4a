"""The passes of one window: cut into micro-batches that fit into the memory there is."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from idefics_qlora.data.windows import Window
from idefics_qlora.model.memory import estimate_memory
from idefics_qlora.training.parts import restore_rng
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)


class WindowTooLarge(torch.OutOfMemoryError):
    """Not even a single example fits into the memory; the state is that before the window."""


def window_backward(state: TrainState, window: Window) -> Tensor:
    """Loss of a window; its scaled gradient is in the ``.grad`` of the adapter.

    A window for which the memory does not suffice is done again with half the micro-batch.

    Args:
        state: ``window_rng`` has the random states with which the window begins.
        window: On the device.

    Returns:
        Scalar fp32 on the device: cross-entropy per target token, in nats.

    Raises:
        WindowTooLarge: If not even a single example fits.
    """
    loss = _try_backward(state, window)
    while loss is None:
        state.optimizer.zero_grad()
        _halve_micro_batch(state, window)
        restore_rng(state.window_rng, state.device)
        loss = _try_backward(state, window)
    if not state.execution.runs_hooks:
        state.optimizer.touch()
    return loss


def _try_backward(state: TrainState, window: Window) -> Tensor | None:
    """As :func:`window_backward`, ``None`` if the memory did not suffice."""
    loss = torch.zeros((), device=state.device)
    size = state.micro_batch_size
    try:
        state.execution.begin_window()
        for start, batch in zip(
            range(0, len(window.lengths), size), window.micro_batches(size), strict=True
        ):
            loss += state.execution.micro_batch_backward(
                batch,
                window.num_targets,
                lengths=window.lengths[start : start + size],
                scaler=state.scaler,
            )
    except torch.OutOfMemoryError:
        return None  # the failed try's tensors go with the exception
    return loss


def _halve_micro_batch(state: TrainState, window: Window) -> None:
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    if state.micro_batch_size == 1:
        raise WindowTooLarge(
            f"not even a single example of up to {max(window.lengths)} text tokens fits into the "
            f"memory{_needed(state, window)}: set gradient_checkpointing=True if it is not, free "
            "the GPU from other processes, or shorten the longest texts (max_length)"
        )
    failed, state.micro_batch_size = state.micro_batch_size, state.micro_batch_size // 2
    state.growing = False
    logger.warning(
        "out of memory with %d examples per micro-batch in window %d: it is done again, and the "
        "run goes on, with micro_batch_size=%d",
        *(failed, state.window, state.micro_batch_size),
    )


def _needed(state: TrainState, window: Window) -> str:
    base = state.model.get_base_model()
    try:
        need = estimate_memory(
            base.config,
            text_tokens=max(window.lengths),
            images=max(1, *window.images),
            precision=state.config.precision,
            quantize=getattr(base, "is_loaded_in_4bit", False),
            lora=state.model.active_peft_config,
            optim=state.config.optim,
        )
    except Exception as error:  # an adapter of a kind it does not know: the shortage is the news
        logger.warning("how much memory is needed cannot be estimated: %s", error)
        return ""
    kept, recomputed = (need.peak(1, recompute) / 2**30 for recompute in (False, True))
    return f" (about {kept:.1f} GiB, or {recomputed:.1f} GiB with gradient_checkpointing=True)"
