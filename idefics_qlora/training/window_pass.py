"""The passes of one window: cut into micro-batches that fit into the memory there is."""

from __future__ import annotations

import torch
from torch import Tensor

from idefics_qlora.data.windows import Window
from idefics_qlora.training.micro_batch import FirstSize, pass_estimate, size_for, smaller
from idefics_qlora.training.parts import restore_rng
from idefics_qlora.training.state import TrainState


class WindowTooLarge(torch.OutOfMemoryError):
    """Not even a single example fits into the memory; the state is that before the window."""


def window_backward(state: TrainState, window: Window) -> Tensor:
    """Loss of a window; its scaled gradient is in the ``.grad`` of the adapter.

    A window for which the memory does not suffice is done again in smaller parts.

    Args:
        state: ``window_rng`` has the random states with which the window begins.
        window: On the device.

    Returns:
        Scalar fp32 on the device: cross-entropy per target token, in nats.

    Raises:
        WindowTooLarge: If not even a single example fits.
    """
    if not state.is_unchanged:
        state.optimizer.begin_window()
    first = FirstSize(state, window) if state.growing else None
    size, tries = size_for(state, window), 1
    while isinstance(loss := _try_backward(state, window, size), int):
        state.optimizer.zero_grad()
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise WindowTooLarge(
                f"not even a single example of up to {max(window.lengths)} text tokens fits into "
                f"the memory{_needed(state, window)}: set gradient_checkpointing=True if it is "
                "not, free the GPU from other processes, or shorten the longest texts (max_length)"
            )
        size, tries = smaller(state, window, size, start=loss), tries + 1
        restore_rng(state.window_rng, state.device)
        state.is_unchanged = False
    if first is not None:
        first.settle(tries)
    if (reached := state.execution.reached) is not None:
        state.optimizer.touch(reached)
    return loss


def _try_backward(state: TrainState, window: Window, size: int) -> Tensor | int:
    """As :func:`window_backward`, or where the part begins for which memory did not suffice."""
    loss = torch.zeros((), device=state.device)
    start = 0
    try:
        state.execution.begin_window(unchanged=state.is_unchanged)
        for start, batch in zip(
            range(0, len(window.lengths), size), window.micro_batches(size), strict=True
        ):
            loss += state.execution.micro_batch_backward(
                batch,
                window.num_targets,
                lengths=window.lengths[start : start + size],
                images=window.images[start : start + size],
                scaler=state.scaler,
            )
    except torch.OutOfMemoryError:
        return start  # the failed try's tensors go with the exception
    return loss


def _needed(state: TrainState, window: Window) -> str:
    if (need := pass_estimate(state, window)) is None:
        return ""
    kept, recomputed = (need.peak(1, recompute) / 2**30 for recompute in (False, True))
    return f" (about {kept:.1f} GiB, or {recomputed:.1f} GiB with gradient_checkpointing=True)"
