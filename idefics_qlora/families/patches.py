"""Patches of a picture and their places, as the towers of Idefics2 and its successors learnt them.

Shapes: P pictures or tiles, L patches of the largest, D width, H and W pixels.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor


def patches_of(embeddings: Any, pixels: Tensor, is_patch: Tensor) -> Tensor:
    """Patches (P, L, D) with their places: what a tower's embeddings give, bit by bit.

    Their own forward does two things, in versions of transformers, that must not be. It compares
    places in the dtype of the pixels, and in 16 bits most of the patches of a tower whose sides are
    no power of two (of all but the smallest bases) get the place of a neighbour. And it asks which
    patches are there, and waits for the answer: no graph can be recorded of that, and nothing be
    traced without data. A picture's patches spread over the places that the tower was trained with,
    whatever their number.

    Args:
        embeddings: The tower's.
        pixels: (P, 3, H, W), normalised.
        is_patch: (P, rows, columns) bool.
    """
    side = embeddings.num_patches_per_side
    bounds = torch.arange(1 / side, 1.0, 1 / side, device=pixels.device)

    def places(are: Tensor) -> Tensor:
        numbers = torch.arange(are.shape[1], device=are.device, dtype=torch.float32)
        parts = torch.clamp(numbers[None] * (1.0 / are.sum(dim=1))[:, None], max=1.0 - 1e-6)
        return torch.bucketize(parts, bounds, right=True)

    rows, columns = places(is_patch[:, :, 0]), places(is_patch[:, 0, :])
    at = (rows[:, :, None] * side + columns[:, None, :]).masked_fill(~is_patch, 0)
    patches: Tensor = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    return patches + embeddings.position_embedding(at.flatten(1))


def place_exactly(embeddings: Any) -> None:
    """Let a tower's embeddings compute :func:`patches_of` instead of their own forward."""
    embeddings.__dict__["forward"] = MethodType(_forward, embeddings)


def _forward(self: Any, pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
    return patches_of(self, pixel_values, patch_attention_mask)
