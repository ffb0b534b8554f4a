"""The window's loss: summed cross-entropy over the window's target tokens.

Shapes: B examples, T tokens, V vocabulary including the additional tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from idefics_qlora.data.batches import IGNORE


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over the targets, in fp32.

    Divided by the number of targets of the whole window, it gives the window's loss, however the
    window was cut into micro-batches. The model's own loss cannot be used: it reshapes by the
    vocabulary without the additional tokens and raises.

    Args:
        logits: (B, T, V), any floating dtype; position t predicts token t + 1.
        labels: (B, T), token ids, -100 where a token is no target. The first token is never one.

    Returns:
        Scalar fp32 tensor, in nats.
    """
    predicted = logits[:, :-1].float().flatten(0, 1)  # (B (T-1), V)
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
