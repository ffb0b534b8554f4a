"""Whether training has made a model worse than it was: then no precision helps, but a lower rate.

An adapter that has learnt nothing yet is the base model; so the base's own loss of a window tells
what its loss may be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from peft import PeftModel

from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import Batch
from idefics_qlora.data.windows import Window
from idefics_qlora.durable import CheckpointError
from idefics_qlora.model.adapters import adapter_tensors, load_adapter, without_adapter
from idefics_qlora.model.loss import predictions
from idefics_qlora.model.precision import evaluation_mode
from idefics_qlora.training.micro_batch import size_for
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)

MARGIN = 1.0
"""Nats per target token by which an adapter may be worse than none: a little, by chance."""


class Divergence:
    """Measures a window's loss with the present adapter and without any.

    Args:
        model: With the adapter in question.
        batches: The window's micro-batches, on the model's device.
    """

    def __init__(self, model: PeftModel, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self.loss = self._loss()
        with without_adapter(model):
            self.untrained = self._loss()

    def __bool__(self) -> bool:
        """Whether the adapter is to blame; not where the base alone is not finite either."""
        return math.isfinite(self.untrained) and self._is_bad(self.loss)

    def __str__(self) -> str:
        return (
            f"training has diverged: this window's loss is {self.loss:.4g} with the adapter and "
            f"{self.untrained:.4g} without"
        )

    def sound(self, folders: Iterable[Path]) -> Path | None:
        """The first checkpoint whose adapter is whole and not to blame; the model keeps its own."""
        own = {name: tensor.clone() for name, tensor in adapter_tensors(self._model).items()}
        try:
            for folder in folders:
                try:
                    adapter = load_checkpoint(folder).adapter
                    load_adapter(self._model, adapter, str(folder))
                except (CheckpointError, ValueError):
                    continue
                if not self._is_bad(self._loss()):
                    return folder
        finally:
            load_adapter(self._model, own, "of the run")
        return None

    def _is_bad(self, loss: float) -> bool:
        return not loss <= self.untrained + MARGIN  # NaN is bad

    def _loss(self) -> float:
        total = 0.0
        with evaluation_mode(self._model):
            for batch in self._batches:
                total += predictions(self._model, batch).summed().item()  # sync
        return total / sum(batch.num_targets for batch in self._batches)


def divergence(state: TrainState, window: Window) -> Divergence | None:
    """Whether the adapter is to blame for values that are not finite; a fresh one is not."""
    if state.global_step == 0:
        return None
    try:
        batches = window.to(state.device).micro_batches(size_for(state, window))
        return Divergence(state.model, batches) or None
    except Exception as error:  # an explanation must not end a run
        logger.warning("whether training has diverged cannot be told: %s", error)
        return None
