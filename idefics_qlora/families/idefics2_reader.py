"""How Idefics2 reads images: in their own shape, whole or beside their four quarters.

Shapes: B examples, N tiles per example, H and W pixels of the largest tile.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from idefics_qlora.families.family import Piece, Processor, Said
from idefics_qlora.families.tiles import Grid, Size, TiledReader, TiledVision
from idefics_qlora.images.cropping import random_part


class Idefics2Vision(TiledVision):
    """Tiles of different sizes, and which of their pixels are there."""

    def is_pixel(self) -> Tensor:
        """(B, N, H, W) bool: False on what pads a tile or an example."""
        height, width = self.pixel_values.shape[3:]
        device = self.tile_sizes.device
        rows = torch.arange(height, device=device) < self.tile_sizes[:, :, :1]  # (B, N, H)
        columns = torch.arange(width, device=device) < self.tile_sizes[:, :, 1:]  # (B, N, W)
        return rows[:, :, :, None] & columns[:, :, None, :]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward: none without a picture."""
        inputs = super().inputs()
        return inputs and {**inputs, "pixel_attention_mask": self.is_pixel()}

    def image(self, example: int, number: int) -> Tensor:
        """(3, H, W) uint8: an image as the model sees it, its last tile."""
        grids = self.grids[example][: number + 1]
        last = sum(rows * columns + 1 for rows, columns in grids) - 1
        height, width = self.sizes[example][last]
        return self.tiles(example, number)[-1, :, :height, :width]


class Idefics2Reader(TiledReader):
    """Texts and images as ``Idefics2Processor`` reads them.

    An image is made small enough, and not too narrow, in its own shape, and stands in the text as
    ``<fake_token_around_image><image>...<image><fake_token_around_image>``. With image splitting
    its four quarters, each made small enough by itself, stand before it in the same way. Images
    that follow each other share the token between them, and a word behind one has a space before
    it.

    Pixels of an image, (3, H, W), are what the model sees of it; with image splitting the picture
    in its own size, for the quarters are cut from that when a batch is made.

    Args:
        processor: The base's ``Idefics2Processor``.

    Raises:
        ValueError: If its tokenizer lacks the image tokens.
    """

    models = "Idefics2"
    vision_type = Idefics2Vision

    def __init__(self, processor: Processor) -> None:
        super().__init__(processor)
        self.side = int(self.images.size["longest_edge"])

    def interleaved(self, items: Sequence[Any], completion: str = "") -> list[Piece]:
        """Texts and images in reading order, written out."""
        return self._surrounded(super().interleaved(items, completion))

    def dialogue(self, turns: Sequence[Said], completion: str) -> list[Piece]:
        """A dialogue up to the completion, as the base's chat template writes it."""
        return self._surrounded(super().dialogue(turns, completion))

    def _surrounded(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with the token that stands around images."""
        around, written = Piece(self.around, is_control=True), list[Piece]()
        for piece in pieces:
            behind = bool(written) and written[-1] is around
            if piece.is_control and piece.text == self.image_token:
                written += [piece, around] if behind else [around, piece, around]
            elif piece.text:
                has_space = behind and re.match(r"[^\s<]", piece.text)
                written += [Piece(" ", piece.is_target), piece] if has_space else [piece]
        return written

    def _size(self, height: int, width: int) -> Size:
        """H and W that the processor gives to a picture of another size."""
        if not self.images.do_resize:
            return height, width
        longest, shortest = self.side, int(self.images.size["shortest_edge"])
        shape = width / height
        if width >= height and width > longest:
            height, width = int(longest / shape), longest
        elif height > width and height > longest:
            height, width = longest, int(longest * shape)
        return max(height, shortest), max(width, shortest)

    def pixels(self, image: Image.Image, crop_seed: int | None) -> Tensor:
        """(3, H, W) uint8: the picture, whole or cropped, in the size that it has when whole.

        Raises:
            ValueError: If it is to be cut into quarters, and has too few pixels for that.
        """
        height, width = image.height, image.width
        if not self.images.do_image_splitting:
            height, width = self._size(height, width)
        elif min(height, width) < 2:
            raise ValueError(
                f"a picture of {width} x {height} pixels cannot be cut into quarters: expected 2 "
                "pixels or more either way; leave it out, or load the base with "
                "image_splitting=False"
            )
        pixels = F.pil_to_tensor(image) if crop_seed is None else random_part(image, crop_seed)
        if pixels.shape[1:] == (height, width):
            return pixels
        return self.resized(pixels, height, width)

    def grid(self, pixels: Tensor) -> Grid:
        """Quarters, or nothing beside the whole."""
        return (2, 2) if self.images.do_image_splitting else (0, 0)

    def written(self, grid: Grid) -> str:
        """What stands between the tokens around an image."""
        tile = self.image_token * int(self.processor.image_seq_len)
        return self.around.join([tile] * (grid[0] * grid[1] + 1))

    def tiles(self, pixels: Tensor) -> Sequence[Tensor]:
        """(3, H, W) uint8 each: the quarters row by row, then the whole."""
        if not self.images.do_image_splitting:
            return [pixels]
        middle, center = pixels.shape[1] // 2, pixels.shape[2] // 2
        quarters = [
            part
            for half in (pixels[:, :middle], pixels[:, middle:])
            for part in (half[:, :, :center], half[:, :, center:])
        ]
        return [
            self.resized(tile, *self._size(tile.shape[1], tile.shape[2]))
            for tile in (*quarters, pixels)
        ]
