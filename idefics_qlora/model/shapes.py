"""The shapes that micro-batches are padded to, so that their graphs come again.

Shapes: B examples, T tokens, N images per example, M rows, R of them with a target.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What two micro-batches that run the same graph have in common."""

    examples: int
    """B"""
    length: int
    """T"""
    rows: int
    """M"""
    targets: int
    """R"""
    images: int
    """N"""
    pictures: int
    """P, that the vision tower sees; B N, where all examples have the same number."""
    sides: tuple[int, ...] = ()
    """What else follows from the sizes of pictures."""


def shape_of(
    examples: int,
    num_tokens: int,
    longest: int,
    targets: int,
    images: int,
    pictures: int,
    image_tokens: int = 0,
) -> Shape:
    """The shape that a micro-batch is padded to, so that shapes come again.

    Rows are rounded up by 3 % at most (but to multiples of 16), lengths to multiples of 32, targets
    to quarters of the rows that are no image's, pictures to eighths of what there is room for.

    Args:
        examples: B.
        num_tokens: Tokens of all examples.
        longest: Tokens of the longest.
        targets: Rows with a target, at most.
        images: N.
        pictures: Images of all examples.
        image_tokens: Those of ``num_tokens`` that images have.
    """
    eighth = max(1, -(-examples * images // 8))
    step = min(max(16, 2 ** (num_tokens.bit_length() - 6)), 256)
    rows = -(-num_tokens // step) * step
    quarter = max(1, -(-(rows - image_tokens) // 4))
    return Shape(
        examples,
        -(-longest // 32) * 32,
        rows,
        min(-(-max(1, targets) // quarter) * quarter, rows),
        images,
        min(-(-max(1, pictures) // eighth) * eighth, examples * images),
    )
