"""Images that are cut into tiles, which stand in the text: how Idefics3 and SmolVLM read.

Shapes: B examples, T tokens, N tiles per example, K images per example, S the side in pixels of a
tile, H and W pixels of an image, multiples of S.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers.image_utils import SizeDict

from idefics_qlora.families.chat_template import ChatTemplate
from idefics_qlora.families.family import Piece, Processor, Reader, Said, Vision
from idefics_qlora.images.cropping import random_part

END_OF_UTTERANCE = "<end_of_utterance>"
"""Ends each turn of a dialogue."""

LARGEST_SIDE = 4096
"""Pixels that the processors resize no side beyond."""

Grid = tuple[int, int]
"""Rows and columns of tiles; (0, 0) for an image that is one tile, the whole."""


@dataclass(frozen=True)
class Idefics3Vision(Vision):
    """Tiles, whose features take the place of the ``<image>`` tokens in their order."""

    pixel_values: Tensor
    """(B, N, 3, S, S) uint8, not normalised; zeros where an example has fewer than N tiles."""
    is_tile: Tensor
    """(B, N) bool, False on what pads an example."""
    sees_image: Tensor
    """(B, T, K) bool: a token sees the images before it, and those of which it is a part."""
    pixel_mean: Tensor
    """(3,) float32, in units of 0..255."""
    pixel_std: Tensor
    """(3,) float32, in units of 0..255."""
    grids: tuple[tuple[Grid, ...], ...]
    """For each example those of its images."""

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward: none without a picture."""
        # Padding that is all zeros is told from a tile by the model; where there is no tile at all,
        # nothing must be given, for one model fails on it and the other sees it.
        if not any(self.grids):
            return {}
        # The same operations in the same order as the image processor's, so equal to the bit.
        pixels = self.pixel_values.float()
        pixels = (pixels - self.pixel_mean.view(3, 1, 1)) / self.pixel_std.view(3, 1, 1)
        return {"pixel_values": pixels * self.is_tile[:, :, None, None, None]}

    def part(self, examples: slice, num_tokens: int, num_images: int) -> Idefics3Vision:
        """Some of the examples, cut to their first tokens and tiles."""
        return replace(
            self,
            pixel_values=self.pixel_values[examples, :num_images],
            is_tile=self.is_tile[examples, :num_images],
            sees_image=self.sees_image[examples, :num_tokens],
            grids=self.grids[examples],
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Idefics3Vision:
        """The same with every tensor changed."""
        tensors = [f.name for f in fields(self) if f.name != "grids"]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in tensors}
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Pixels, and which of them are tiles."""
        return {"pixel_values": self.pixel_values, "is_tile": self.is_tile}

    def sees(self) -> Tensor:
        """(B, T, K) bool: which images a token attends to."""
        return self.sees_image

    def image(self, example: int, number: int) -> Tensor:
        """(3, H, W) uint8: an image as the model sees it, put together from its tiles."""
        first = sum(map(_tiles_of, self.grids[example][:number]))
        rows, columns = self.grids[example][number]
        tiles = self.pixel_values[example, first : first + max(1, rows * columns)]
        return torch.cat(
            [torch.cat(list(row), dim=2) for row in tiles.split(max(1, columns))], dim=1
        )

    def described(self, example: int, number: int) -> str:
        """How many tiles an image has."""
        rows, columns = self.grids[example][number]
        if not rows:
            return "1 tile"
        return f"{_tiles_of((rows, columns))} tiles ({rows} x {columns} and the whole)"


def _tiles_of(grid: Grid) -> int:
    """The tiles of an image: its grid, and the whole."""
    return grid[0] * grid[1] + 1


class Idefics3Reader(Reader):
    """Texts and images as ``Idefics3Processor`` and ``SmolVLMProcessor`` read them.

    An image is resized so that its longest side is as the processor says, then to multiples of a
    tile, and stands in the text row by row, at last as a whole:
    ``<fake_token_around_image><row_1_col_1><image>...<image>``, a new line after each row, another
    one, ``<fake_token_around_image><global-img><image>...<image><fake_token_around_image>``. One
    that is a single tile is the last part alone. It is resized by the processor's own means,
    torchvision or PIL, so pixels are equal to those of the processor at hand.

    Pixels of an image are the resized image, (3, H, W): the tiles are cut when a batch is made.

    A list of texts and images is written as it is. A dialogue is written by the base's chat
    template.

    Args:
        processor: The base's ``Idefics3Processor`` or ``SmolVLMProcessor``.

    Raises:
        ValueError: If its tokenizer lacks the image tokens.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token = str(processor.image_token)
        self._around = str(processor.fake_image_token)
        self._whole = str(
            getattr(processor, "global_image_token", None)
            or getattr(processor, "global_image_tag", "<global-img>")
        )
        known = self.tokenizer.get_added_vocab()
        if missing := [t for t in (self.image_token, self._around) if t not in known]:
            raise ValueError(
                f"the tokenizer lacks {' and '.join(missing)}: it is not the processor of an "
                "Idefics3 or SmolVLM model"
            )
        tiles = [token for token in known if re.fullmatch(r"<row_\d+_col_\d+>", token)]
        pictured = [self.image_token, self._around, *tiles]
        self.image_tokens = (*pictured, *[self._whole][: self._whole in known])
        ends = [str(self.tokenizer.eos_token), *[END_OF_UTTERANCE][: END_OF_UTTERANCE in known]]
        self.end_tokens = tuple(dict.fromkeys(ends))
        self.control_tokens = frozenset({*self.image_tokens, *self.end_tokens})
        first = self.tokenizer("")["input_ids"][:1]
        has_begin = bool(first) and first[0] == self.tokenizer.bos_token_id
        self.begin = str(self.tokenizer.bos_token) if has_begin else ""
        self._template = ChatTemplate(
            processor, self.image_token, self.control_tokens, self.end_tokens
        )
        self._images = processor.image_processor
        self.tile = int(self._images.max_image_size["longest_edge"])
        self.side = self.tile
        if self._images.do_image_splitting:
            self.side = max(self.tile, int(self._images.size["longest_edge"]))
        self._token_ids: dict[Grid, list[int]] = {}
        scale = 1 / self._images.rescale_factor
        self.pixel_mean = torch.tensor(self._images.image_mean) * scale
        self.pixel_std = torch.tensor(self._images.image_std) * scale

    def interleaved(self, items: Sequence[Any]) -> list[Piece]:
        """Texts and images in reading order, written out."""
        image = Piece(self.image_token, is_control=True)
        return [Piece(item.strip(" ")) if isinstance(item, str) else image for item in items]

    def dialogue(self, turns: Sequence[Said], completion: str) -> list[Piece]:
        """A dialogue up to the completion, as the base's chat template writes it.

        Raises:
            ValueError: If the base has no chat template, or one that leaves something out.
        """
        pieces = self._template.pieces(turns, completion)
        if not self.begin or (pieces and pieces[0].text == self.begin):
            return pieces
        return [Piece(self.begin, is_control=True), *pieces]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """H and W of a picture as the model sees it, as the processors compute them."""
        if not self._images.do_image_splitting:
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
        if not self._images.do_resize:
            return height, width
        longest = int(self._images.size["longest_edge"])
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

    def _resized(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """An image in another size, by the processor's own means."""
        given: Any = pixels.numpy() if self._images.backend == "pil" else pixels
        size = SizeDict(height=height, width=width)
        return torch.as_tensor(self._images.resize(given, size, resample=self._images.resample))

    def pixels(self, image: Image.Image, crop_seed: int | None) -> Tensor:
        """(3, H, W) uint8: the picture, whole or cropped, in the size that it has when whole."""
        pixels = F.pil_to_tensor(image) if crop_seed is None else random_part(image, crop_seed)
        if self._images.do_resize:
            pixels = self._resized(pixels, *self._first_size(image.height, image.width))
        return self._resized(pixels, *self._size(image.height, image.width))

    def _grid(self, pixels: Tensor) -> Grid:
        rows, columns = (side // self.tile for side in pixels.shape[1:])
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def image_token_ids(self, pixels: Tensor) -> list[int]:
        """The tokens of an image's tiles."""
        rows, columns = grid = self._grid(pixels)
        if grid not in self._token_ids:
            tile = self.image_token * int(self.processor.image_seq_len)
            lines = [
                "".join(f"{self._around}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns))
                for r in range(rows)
            ]
            text = "".join(f"{line}\n" for line in lines) + "\n" * bool(lines)
            text += f"{self._around}{self._whole}{tile}{self._around}"
            self._token_ids[grid] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._token_ids[grid]

    def num_tiles(self, pixels: Tensor) -> int:
        """How many tiles an image has, the whole included."""
        return _tiles_of(self._grid(pixels))

    def blank(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8: grey, about 0 when normalised, as large as another image."""
        return self.pixel_mean.round().to(torch.uint8)[:, None, None].expand_as(pixels)

    def vision(
        self, input_ids: Tensor, is_token: Tensor, pixels: Sequence[Sequence[Tensor]]
    ) -> Idefics3Vision:
        """The tiles of a batch, N being the most of an example."""
        grids = tuple(tuple(map(self._grid, row)) for row in pixels)
        numbers = torch.tensor([sum(map(_tiles_of, row)) for row in grids])  # (B,)
        side, most = self.tile, max(1, int(numbers.max()))
        stacked = torch.zeros(len(pixels), most, 3, side, side, dtype=torch.uint8)
        most_images = max(1, *map(len, pixels))
        starts = torch.full((len(pixels), most_images), torch.iinfo(torch.int64).max)  # (B, K)
        for b, row in enumerate(pixels):
            n = 0
            for k, image in enumerate(row):
                starts[b, k] = n * int(self.processor.image_seq_len)
                tiles = self._tiles(image)
                stacked[b, n : n + len(tiles)] = tiles
                n += len(tiles)
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        before = (input_ids == image_id).cumsum(1)  # (B, T): <image> tokens up to here
        sees = before[:, :, None] > starts[:, None, :]
        return Idefics3Vision(
            pixel_values=stacked,
            is_tile=torch.arange(most) < numbers[:, None],
            sees_image=sees & is_token[:, :, None],
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            grids=grids,
        )

    def _tiles(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8: the tiles of an image row by row, then the whole."""
        side = self.tile
        if pixels.shape[1] == pixels.shape[2] == side:
            return pixels[None]
        grid = pixels.unfold(1, side, side).unfold(2, side, side)  # (3, rows, columns, S, S)
        tiles = grid.permute(1, 2, 0, 3, 4).flatten(0, 1)
        return torch.cat([tiles, self._resized(pixels, side, side)[None]])
