"""How Idefics3 and SmolVLM read images: rows of square tiles, and the whole.

Shapes: N tiles per image, S the side in pixels of a tile, H and W pixels of an image, multiples
of S.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from idefics_qlora.families.family import Processor
from idefics_qlora.families.tiles import Grid, TiledReader, TiledVision
from idefics_qlora.images.cropping import random_part

LARGEST_SIDE = 4096
"""Pixels that the processors resize no side beyond."""


class Idefics3Vision(TiledVision):
    """Tiles of one size."""

    def image(self, example: int, number: int) -> Tensor:
        """(3, H, W) uint8: an image as the model sees it, put together from its tiles."""
        rows, columns = self.grids[example][number]
        tiles = self.tiles(example, number)[: max(1, rows * columns)]
        return torch.cat(
            [torch.cat(list(row), dim=2) for row in tiles.split(max(1, columns))], dim=1
        )


class Idefics3Reader(TiledReader):
    """Texts and images as ``Idefics3Processor`` and ``SmolVLMProcessor`` read them.

    An image is resized so that its longest side is as the processor says, then to multiples of a
    tile, and stands in the text row by row, at last as a whole:
    ``<fake_token_around_image><row_1_col_1><image>...<image>``, a new line after each row, another
    one, ``<fake_token_around_image><global-img><image>...<image><fake_token_around_image>``. One
    that is a single tile is the last part alone.

    Pixels of an image are the resized image, (3, H, W): the tiles are cut when a batch is made.

    Args:
        processor: The base's ``Idefics3Processor`` or ``SmolVLMProcessor``.

    Raises:
        ValueError: If its tokenizer lacks the image tokens.
    """

    models = "Idefics3 or SmolVLM"
    vision_type = Idefics3Vision

    def __init__(self, processor: Processor) -> None:
        self._whole = str(
            getattr(processor, "global_image_token", None)
            or getattr(processor, "global_image_tag", "<global-img>")
        )
        super().__init__(processor)
        self.tile = int(self.images.max_image_size["longest_edge"])
        self.side = self.longest_edge if self.splits else self.tile

    @property
    def longest_edge(self) -> int:
        """What ``longest_edge`` of ``load_model`` would have to be for the processor as it is."""
        return max(self.tile, int(self.images.size["longest_edge"]))

    def tile_tokens(self, known: Collection[str]) -> list[str]:
        """Those for rows and columns, and for the whole."""
        tiles = [token for token in known if re.fullmatch(r"<row_\d+_col_\d+>", token)]
        return [*tiles, *[self._whole][: self._whole in known]]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """H and W of a picture as the model sees it, as the processors compute them."""
        if not self.images.do_image_splitting:
            return self.tile, self.tile
        height, width = self._first_size(height, width)
        shape = width / height
        if width >= height:
            width = self._tiles_long(width)
            return self._tiles_long(int(width / shape)), width
        height = self._tiles_long(height)
        return height, self._tiles_long(int(height * shape))

    def _first_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which a picture is resized first, nearly in its shape."""
        if not self.images.do_resize:
            return height, width
        longest = int(self.images.size["longest_edge"])
        shape = width / height
        if width >= height:
            height, width = int(longest / shape), longest
            height += height % 2
        else:
            height, width = longest, int(longest * shape)
            width += width % 2
        height, width = max(1, height), max(1, width)
        shape = width / height
        if width >= height and width > LARGEST_SIDE:
            height, width = int(LARGEST_SIDE / shape), LARGEST_SIDE
        elif height > width and height > LARGEST_SIDE:
            height, width = LARGEST_SIDE, int(LARGEST_SIDE * shape)
        return max(1, height), max(1, width)

    def _tiles_long(self, pixels: int) -> int:
        return math.ceil(pixels / self.tile) * self.tile

    def pixels(self, image: Image.Image, crop_seed: int | None) -> Tensor:
        """(3, H, W) uint8: the picture, whole or cropped, in the size that it has when whole."""
        pixels = F.pil_to_tensor(image) if crop_seed is None else random_part(image, crop_seed)
        if self.images.do_resize:
            pixels = self.resized(pixels, *self._first_size(image.height, image.width))
        return self.resized(pixels, *self._size(image.height, image.width))

    def grid(self, pixels: Tensor) -> Grid:
        """As many rows and columns as fit."""
        rows, columns = (side // self.tile for side in pixels.shape[1:])
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def written(self, grid: Grid) -> str:
        """Row by row, then the whole."""
        rows, columns = grid
        tile = self.image_token * int(self.processor.image_seq_len)
        lines = [
            "".join(f"{self.around}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns))
            for r in range(rows)
        ]
        text = "".join(f"{line}\n" for line in lines) + "\n" * bool(lines)
        return f"{text}{self.around}{self._whole}{tile}{self.around}"

    def tiles(self, pixels: Tensor) -> Sequence[Tensor]:
        """(3, S, S) uint8 each: the tiles of an image row by row, then the whole."""
        side = self.tile
        if pixels.shape[1] == pixels.shape[2] == side:
            return [pixels]
        grid = pixels.unfold(1, side, side).unfold(2, side, side)  # (3, rows, columns, S, S)
        tiles = grid.permute(1, 2, 0, 3, 4).flatten(0, 1)
        return [*tiles, self.resized(pixels, side, side)]
