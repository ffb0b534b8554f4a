"""How a micro-batch is computed: through the model's own layers, or the fast way.

The loop knows only :class:`Execution`. Which one it has changes speed and memory, and the results
by rounding alone.

Shapes: B examples of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.data.batches import Batch
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.lora_linear import HOOKS_OF_ALL, has_other_forward, hooks_of
from idefics_qlora.model.loss import predictions
from idefics_qlora.model.precision import autocast

logger = logging.getLogger(__name__)


class Execution(Protocol):
    """Forward and backward pass of micro-batches."""

    @property
    def reached(self) -> Sequence[Parameter] | None:
        """The parameters that got a gradient in this window; ``None``: their hooks have told."""

    def is_unchanged(self) -> bool:
        """Whether nobody has changed the model since the last window began; costs milliseconds."""

    def begin_window(self, *, unchanged: bool) -> None:
        """Take over the present values of the adapter: before a window's first micro-batch.

        Args:
            unchanged: Whether :meth:`is_unchanged` has said so, and nobody had a chance since.
        """

    def micro_batch_backward(
        self,
        batch: Batch,
        num_targets: int,
        *,
        lengths: Sequence[int],
        images: Sequence[int],
        scaler: torch.amp.GradScaler,
    ) -> Tensor:
        """Add the scaled gradient of a micro-batch to the ``.grad`` that is there.

        Args:
            batch: On the model's device, padded on the right.
            num_targets: Target tokens of the whole window. Divided by them, the micro-batches'
                gradients add up to that of the window's mean, whatever their lengths.
            lengths: Tokens of each example of the micro-batch.
            images: Images of each.
            scaler: Has the scale of the loss.

        Returns:
            Its part of the window's loss, a scalar in fp32 on the device, not scaled.

        Raises:
            torch.OutOfMemoryError: If the memory does not suffice; ``.grad`` may hold a part.
        """

    def close(self) -> None:
        """Leave the model as it was."""


class Eager:
    """Layer by layer, as the model and autograd do it: what version 0.1 did, to the bit."""

    reached = None

    def __init__(self, model: PeftModel, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._device = next(model.parameters()).device

    def is_unchanged(self) -> bool:
        """It does not matter here."""
        return True

    def begin_window(self, *, unchanged: bool) -> None:
        """Nothing to do."""

    def micro_batch_backward(
        self,
        batch: Batch,
        num_targets: int,
        *,
        lengths: Sequence[int],
        images: Sequence[int],
        scaler: torch.amp.GradScaler,
    ) -> Tensor:
        """As :class:`Execution` says."""
        with autocast(self._device, self._dtype):
            predicted = predictions(self._model, batch)
        loss = predicted.summed() / num_targets
        scaler.scale(loss).backward()
        return loss.detach()

    def close(self) -> None:
        """Nothing to do."""


class Fast:
    """Fused blocks over packed rows, replayed as CUDA graphs (``graphs.py``).

    A window before which somebody has put hooks on the model, or replaced the forward of one of its
    modules, is computed eagerly, so that they run.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype) -> None:
        self._path = FastPath(model, dtype)
        self._eager = Eager(model, dtype)
        self._modules = list(model.modules())
        self._hooks = [*HOOKS_OF_ALL, *(h for m in self._modules for h in hooks_of(m))]
        self._one = torch.ones((), device=next(model.parameters()).device)
        self._is_eager = False

    @property
    def reached(self) -> Sequence[Parameter] | None:
        """As :class:`Execution` says."""
        if self._is_eager or self._path.reached is None:
            return None
        return [p for p in self._path.reached if p.requires_grad]  # frozen meanwhile: no more

    def is_unchanged(self) -> bool:
        """As :class:`Execution` says."""
        if self._is_eager:
            return self._why_eager() is not None
        return self._why_eager() is None and self._path.is_unchanged()

    def begin_window(self, *, unchanged: bool) -> None:
        """Look for hooks; cast A and B once."""
        if not unchanged:
            why = self._why_eager()
            if why and not self._is_eager:
                logger.info("%s: micro-batches go through its own layers", why)
            self._is_eager = why is not None
        if not self._is_eager:
            self._path.begin_window(unchanged=unchanged)

    def _why_eager(self) -> str | None:
        if any(self._hooks) or any(map(_has_hooks, self._path.parameters)):
            return "there are hooks on the model"
        if any(map(has_other_forward, self._modules)):
            return "a module's forward was replaced"
        return None

    def micro_batch_backward(
        self,
        batch: Batch,
        num_targets: int,
        *,
        lengths: Sequence[int],
        images: Sequence[int],
        scaler: torch.amp.GradScaler,
    ) -> Tensor:
        """As :class:`Execution` says."""
        if self._is_eager:
            return self._eager.micro_batch_backward(
                batch, num_targets, lengths=lengths, images=images, scaler=scaler
            )
        scale = scaler.scale(self._one)
        return self._path.micro_batch_backward(
            batch, num_targets, lengths=lengths, images=images, scale=scale
        )

    def close(self) -> None:
        """Free the graphs, and give every layer its own forward back; the log says how many."""
        self._path.close()
        counts = self._path.counts
        if counts.graphs:
            logger.info(
                "%d CUDA graphs were recorded in %.1f s; %d micro-batches were replayed, %d ran "
                "eagerly",
                *(counts.graphs, counts.seconds, counts.replayed, counts.eager),
            )


def _has_hooks(parameter: Any) -> bool:
    """Whether others than the optimizer (which leaves a mark) are told of a gradient."""
    told = len(parameter._post_accumulate_grad_hooks or ())
    return bool(parameter._backward_hooks) or told > hasattr(parameter, "flat_hook")


def execution_of(model: PeftModel, dtype: torch.dtype, *, fast: bool) -> Execution:
    """The execution of a run.

    Args:
        model: The base with its adapter, in training mode and with activation checkpointing as the
            run has it.
        dtype: Autocast's; fp32 for none.
        fast: Whether the fast way is wanted; a model that cannot go it is computed eagerly, and
            the log says why.
    """
    if not fast:
        return Eager(model, dtype)
    reason = FastPath.why_not(model)
    if reason is None:
        return Fast(model, dtype)
    logger.info("micro-batches go through the model's own layers: %s", reason)
    return Eager(model, dtype)
