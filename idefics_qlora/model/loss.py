"""The window's loss: summed cross-entropy over the window's target tokens.

Shapes: B examples, T tokens, R of them targets, V vocabulary including the additional tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics_qlora.data.batches import IGNORE, Batch
from idefics_qlora.families import family_of
from idefics_qlora.families.family import Model


class Predictions(NamedTuple):
    """What a batch's targets are predicted by."""

    logits: Tensor
    """(R, V); of a family that computes them for all tokens, (B, T, V)."""
    labels: Tensor
    """(R,) or (B, T): as ``logits``; of the latter, position t predicts token t + 1."""
    examples: Tensor | None
    """(R,): the example of each target."""

    def summed(self) -> Tensor:
        """Cross-entropy summed over all targets: scalar fp32, in nats."""
        if self.examples is None:
            return summed_cross_entropy(self.logits, self.labels)
        return F.cross_entropy(self.logits.float(), self.labels, reduction="sum")

    def by_example(self, num_examples: int) -> Tensor:
        """Cross-entropy summed over each example's targets: (B,) fp32, in nats."""
        if self.examples is None:
            rows = zip(self.logits, self.labels, strict=True)
            return torch.stack([summed_cross_entropy(a[None], b[None]) for a, b in rows])
        losses = F.cross_entropy(self.logits.float(), self.labels, reduction="none")
        return losses.new_zeros(num_examples).index_add_(0, self.examples, losses)


def predictions(model: Model, batch: Batch) -> Predictions:
    """The model's own forward pass, its head on the targets alone where the family says so.

    A large vocabulary's logits for all tokens would take more memory than all the rest: of
    Idefics3, whose images are some 2,200 tokens of the text, 3.9 GiB per example.

    Args:
        model: In the mode, and under the autocast, that the pass shall have.
        batch: On the model's device.
    """
    inputs = batch.inputs()
    if not family_of(model).head_on_targets:
        return Predictions(model(**inputs, use_cache=False).logits, batch.labels, None)
    examples, places = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # sync
    # The model's own forward, so that whatever is hooked on it runs.
    only_targets = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0][examples, places], *args[1:])
    )
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        only_targets.remove()
    return Predictions(logits, batch.labels[examples, places + 1], examples)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over the targets, in fp32.

    Divided by the number of targets of the whole window, it gives the window's loss, however the
    window was cut into micro-batches. IDEFICS' own loss cannot be used: it reshapes by the
    vocabulary without the additional tokens and raises.

    Args:
        logits: (B, T, V), any floating dtype; position t predicts token t + 1.
        labels: (B, T), token ids, -100 where a token is no target. The first token is never one.

    Returns:
        Scalar fp32 tensor, in nats.
    """
    predicted = logits[:, :-1].float().flatten(0, 1)  # (B (T-1), V)
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
