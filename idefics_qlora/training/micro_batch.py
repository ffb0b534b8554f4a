"""How many examples go through the model at once: what fits, found out once and remembered.

With ``micro_batch_size="auto"`` a run on a GPU begins with the largest size that fits by estimate;
what its first window takes corrects it, and that is the run's size from there on. A longer window
that does not fit is split for itself alone. What did not fit is part of the run's state, so that
the windows as long as that are split beforehand, in a resumed run as well.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator

import torch

from idefics_qlora.data.windows import Window
from idefics_qlora.families import family_of
from idefics_qlora.model.memory import LOSS_BYTES, WORKSPACE_BYTES, MemoryEstimate, estimate_memory
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)

MOST_OF_MEMORY = 0.9
"""Share of the available memory that passes may take: shapes and lengths differ, and what is free
in one piece is less than what is free."""


def even(number: int, most: int) -> int:
    """Size of the parts of ``number`` examples, as few and as even as can be, ``most`` in each."""
    parts = -(-number // most)
    return -(-number // parts)


def available_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process can still take, with PyTorch's own unused blocks."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # not in older versions
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        free = max(0, min(free, limit - reserved))
    return free + reserved - torch.cuda.memory_allocated(device)


def pass_estimate(state: TrainState, window: Window) -> MemoryEstimate | None:
    """What examples as long as the longest of a window take; ``None`` if it cannot be told."""
    base = state.model.get_base_model()
    try:
        return estimate_memory(
            base.config,
            text_tokens=max(window.lengths),
            images=max(1, *window.images),
            gradient_checkpointing=state.config.gradient_checkpointing,
            fast=state.config.fast,
            precision=state.config.precision,
            quantize=getattr(base, "is_loaded_in_4bit", False),
            lora=state.model.active_peft_config,
            optim=state.config.optim,
        )
    except Exception as error:  # an adapter of a kind that it does not know
        logger.warning("how much memory is needed cannot be estimated: %s", error)
        return None


class FirstSize:
    """The first window of a run with "auto": sets the run's size before it, and again after it.

    On a CPU the size stays as it is.
    """

    def __init__(self, state: TrainState, window: Window) -> None:
        self._state, self._size = state, 0
        """Examples of the largest part, as soon as the window has been begun."""
        self._fixed = 0
        if state.device.type != "cuda":
            return
        device = state.device
        torch.cuda.empty_cache()
        self._reserved = torch.cuda.memory_reserved(device)
        self._allocated = torch.cuda.memory_allocated(device)
        self._room = int(MOST_OF_MEMORY * available_bytes(device))
        most = 2
        if (estimate := pass_estimate(state, window)) is not None:
            config = state.config
            # An evaluation cannot use the memory of graphs.
            family, base_config = family_of(state.model), state.model.get_base_model().config
            sizes = zip(window.lengths, window.images, strict=True)
            targets = max(family.most_targets(base_config, *size) for size in sizes)
            logits = config.eval_batch_size * targets * family.vocabulary(base_config) * LOSS_BYTES
            self._room -= estimate.passing(config.eval_batch_size, True) + logits
            beside = estimate.copies + WORKSPACE_BYTES  # not there yet
            self._fixed = estimate.passing(0) + beside
            most = largest_of(estimate, self._room - beside, config.global_batch_size)
        state.micro_batch_size = even(state.config.global_batch_size, most)
        self._size = min(state.micro_batch_size, len(window.lengths))

    def settle(self, tries: int) -> None:
        """Correct the size by what the window has taken, and keep it from now on.

        Args:
            tries: How often the window was begun; a size for which memory did not suffice is not
                tried again.
        """
        state = self._state
        state.growing = False
        if state.device.type != "cuda":
            return
        if tries == 1:
            device = state.device
            taken = max(
                torch.cuda.memory_reserved(device) - self._reserved,
                torch.cuda.max_memory_allocated(device) - self._allocated,
            )
            most = corrected(taken, self._fixed, self._size, self._room)
            number = state.config.global_batch_size
            state.micro_batch_size = even(number, min(most, number))
        logger.info(
            "micro_batch_size='auto': %d, where %.1f GiB are available to forward and backward "
            "passes",
            *(state.micro_batch_size, self._room / 2**30),
        )


def largest_of(estimate: MemoryEstimate, room: int, most: int) -> int:
    """Examples of the largest micro-batch that takes no more than ``room`` bytes, at least 1."""
    return max(1, bisect_right(range(1, most + 1), room, key=estimate.passing))


def corrected(taken: int, fixed: int, size: int, room: int) -> int:
    """Examples for which ``room`` bytes suffice, at least 1, when ``size`` have ``taken`` so many.

    Args:
        taken: Bytes.
        fixed: How many of them do not depend on the number of examples.
        size: Examples.
        room: Bytes.
    """
    per_example = max(1, (taken - fixed) // size)
    return max(1, (room - fixed) // per_example)


def size_for(state: TrainState, window: Window) -> int:
    """Examples of each micro-batch of a window: the run's, fewer if those are known not to fit."""
    if state.config.micro_batch_size != "auto":
        return state.micro_batch_size
    number = len(window.lengths)
    size = even(number, min(state.micro_batch_size, number))
    while size > 1 and any(_is_too_large(state, extent) for extent in _extents(window, size)):
        size = even(number, size - 1)
    return size


def smaller(state: TrainState, window: Window, size: int, start: int) -> int:
    """Examples of each micro-batch of a window for another try; the state remembers what failed.

    Args:
        state: The run's.
        window: That for which memory did not suffice.
        size: With this size, more than 1.
        start: Number of the first example of the micro-batch that failed.
    """
    if state.config.micro_batch_size == "auto" and not state.growing:
        failed = list(_extents(window, size))[start // size]
        state.too_large = [
            other
            for other in state.too_large
            if not all(a >= b for a, b in zip(other, failed, strict=True))
        ]
        state.too_large.append(failed)
        new = size_for(state, window)
        logger.warning(
            "out of memory with %d examples per micro-batch in window %d (up to %d text tokens): "
            "it is done again with %d, and so are windows of that length from now on",
            *(size, state.window, max(window.lengths), new),
        )
        return new
    new = size // 2
    if state.growing:
        new = even(state.config.global_batch_size, new)
    state.micro_batch_size = new
    logger.warning(
        "out of memory with %d examples per micro-batch in window %d: it is done again, and the "
        "run goes on, with micro_batch_size=%d",
        *(size, state.window, new),
    )
    return size_for(state, window)


def _extents(window: Window, size: int) -> Iterator[list[int]]:
    """Text tokens and images of each micro-batch, with padding."""
    for start in range(0, len(window.lengths), size):
        number = len(window.lengths[start : start + size])
        images = max(1, *window.images[start : start + size])
        yield [number * window.lengths[start], number * images]


def _is_too_large(state: TrainState, extent: list[int]) -> bool:
    """Whether a micro-batch is as large as one that did not fit."""
    return any(
        all(a >= b for a, b in zip(extent, failed, strict=True)) for failed in state.too_large
    )
