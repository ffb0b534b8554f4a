"""Images whose tiles stand in the text: what Idefics2, Idefics3 and SmolVLM have in common.

Shapes: B examples, T tokens, N tiles per example, K images per example, H and W pixels of the
largest tile.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from idefics_qlora.families.chat_template import ChatTemplate
from idefics_qlora.families.family import Piece, Processor, Reader, Said, Vision

END_OF_UTTERANCE = "<end_of_utterance>"
"""Ends each turn of a dialogue."""

Grid = tuple[int, int]
"""Rows and columns of tiles, beside the whole; (0, 0) for an image that is the whole alone."""

Size = tuple[int, int]
"""Height and width in pixels."""


def tiles_of(grid: Grid) -> int:
    """The tiles of an image: its grid, and the whole."""
    return grid[0] * grid[1] + 1


@dataclass(frozen=True)
class TiledVision(Vision):
    """Tiles, whose features take the place of the ``<image>`` tokens in their order."""

    pixel_values: Tensor
    """(B, N, 3, H, W) uint8, not normalised; zeros where an example has fewer than N tiles."""
    tile_sizes: Tensor
    """(B, N, 2) int64: height and width of each tile, 0 for what pads an example."""
    sees_image: Tensor
    """(B, T, K) bool: a token sees the images before it, and those of which it is a part."""
    pixel_mean: Tensor
    """(3,) float32, in units of 0..255."""
    pixel_std: Tensor
    """(3,) float32, in units of 0..255."""
    sizes: tuple[tuple[Size, ...], ...]
    """For each example those of its tiles: the same numbers where nobody waits for a device."""
    grids: tuple[tuple[Grid, ...], ...]
    """For each example those of its images."""

    @property
    def is_tile(self) -> Tensor:
        """(B, N) bool, False on what pads an example."""
        return self.tile_sizes[:, :, 0] > 0

    def is_pixel(self) -> Tensor:
        """(B, N, H, W) bool, or 1 for H and W: False on what pads a tile or an example."""
        return self.is_tile[:, :, None, None]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward: none without a picture."""
        # Padding that is all zeros is told from a tile by the model; where there is no tile at all,
        # nothing must be given, for some models fail on it and others see it.
        if not any(self.grids):
            return {}
        # The same operations in the same order as the image processor's, so equal to the bit.
        pixels = self.pixel_values.float()
        pixels = (pixels - self.pixel_mean.view(3, 1, 1)) / self.pixel_std.view(3, 1, 1)
        return {"pixel_values": pixels * self.is_pixel()[:, :, None]}

    def part(self, examples: slice, num_tokens: int, num_images: int) -> TiledVision:
        """Some of the examples, cut to their first tokens and tiles, and these to the largest."""
        sizes = self.sizes[examples]
        height, width = largest([size for row in sizes for size in row])
        return replace(
            self,
            pixel_values=self.pixel_values[examples, :num_images, :, :height, :width],
            tile_sizes=self.tile_sizes[examples, :num_images],
            sees_image=self.sees_image[examples, :num_tokens],
            sizes=sizes,
            grids=self.grids[examples],
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> TiledVision:
        """The same with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Pixels, and which of them are tiles."""
        return {"pixel_values": self.pixel_values, "is_tile": self.is_tile}

    def sees(self) -> Tensor:
        """(B, T, K) bool: which images a token attends to."""
        return self.sees_image

    def tiles(self, example: int, number: int) -> Tensor:
        """(N, 3, H, W) uint8: the tiles of an image, padded."""
        first = sum(map(tiles_of, self.grids[example][:number]))
        return self.pixel_values[example, first : first + tiles_of(self.grids[example][number])]

    def described(self, example: int, number: int) -> str:
        """How many tiles an image has."""
        rows, columns = self.grids[example][number]
        if not rows:
            return "1 tile"
        return f"{tiles_of((rows, columns))} tiles ({rows} x {columns} and the whole)"


def largest(sizes: Collection[Size]) -> Size:
    """H and W of tiles; 1 where there are none."""
    return max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1)


class TiledReader(Reader):
    """What the processors have in common.

    A picture is resized by the processor's own means, torchvision or PIL, so pixels are equal to
    those of the processor at hand. A list of texts and images is written as it is, a dialogue by
    the base's chat template.

    Args:
        processor: The base's.

    Raises:
        ValueError: If its tokenizer lacks the image tokens.
    """

    models: str
    """Whose processor it is, for messages."""
    vision_type: type[TiledVision]

    def __init__(self, processor: Processor) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token = str(processor.image_token)
        self.around = str(processor.fake_image_token)
        known = self.tokenizer.get_added_vocab()
        if missing := [t for t in (self.image_token, self.around) if t not in known]:
            raise ValueError(
                f"the tokenizer lacks {' and '.join(missing)}: it is not the processor of an "
                f"{self.models} model"
            )
        self.image_tokens = (self.image_token, self.around, *self.tile_tokens(known))
        ends = [str(self.tokenizer.eos_token), *[END_OF_UTTERANCE][: END_OF_UTTERANCE in known]]
        self.end_tokens = tuple(dict.fromkeys(ends))
        self.control_tokens = frozenset({*self.image_tokens, *self.end_tokens})
        first = self.tokenizer("")["input_ids"][:1]
        has_begin = bool(first) and first[0] == self.tokenizer.bos_token_id
        self.begin = str(self.tokenizer.bos_token) if has_begin else ""
        self._template = ChatTemplate(
            processor, self.image_token, self.control_tokens, self.end_tokens
        )
        self.images = processor.image_processor
        self.splits = bool(self.images.do_image_splitting)
        self._token_ids: dict[Grid, list[int]] = {}
        scale = 1 / self.images.rescale_factor
        self.pixel_mean = torch.tensor(self.images.image_mean) * scale
        self.pixel_std = torch.tensor(self.images.image_std) * scale

    def tile_tokens(self, known: Collection[str]) -> list[str]:
        """Tokens that only tiles have, of those that the tokenizer knows."""
        return []

    @abstractmethod
    def grid(self, pixels: Tensor) -> Grid:
        """What an image, as :meth:`pixels` gave it, is cut into."""

    @abstractmethod
    def tiles(self, pixels: Tensor) -> Sequence[Tensor]:
        """(3, H, W) uint8 each: the tiles of an image, as :meth:`pixels` gave it."""

    @abstractmethod
    def written(self, grid: Grid) -> str:
        """What stands in a text for the tiles of an image."""

    def interleaved(self, items: Sequence[Any], completion: str = "") -> list[Piece]:
        """Texts and images in reading order, written out.

        Texts as they are, but for the spaces at the end: those belong to what follows.
        """
        image = Piece(self.image_token, is_control=True)
        texts = [item if isinstance(item, str) else None for item in items]
        if texts and texts[-1] is not None:
            texts[-1] = texts[-1].rstrip(" ")
        pieces = [image if text is None else Piece(text) for text in texts]
        return pieces + [Piece(completion, is_target=True)] * bool(completion)

    def dialogue(self, turns: Sequence[Said], completion: str) -> list[Piece]:
        """A dialogue up to the completion, as the base's chat template writes it.

        Raises:
            ValueError: If the base has no chat template, or one that leaves something out.
        """
        pieces = self._template.pieces(turns, completion)
        if not self.begin or (pieces and pieces[0].text == self.begin):
            return pieces
        return [Piece(self.begin, is_control=True), *pieces]

    def resized(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """An image in another size, by the processor's own means."""
        given: Any = pixels.numpy() if self.images.backend == "pil" else pixels
        size = SizeDict(height=height, width=width)
        return torch.as_tensor(self.images.resize(given, size, resample=self.images.resample))

    def image_token_ids(self, pixels: Tensor) -> list[int]:
        """The tokens of an image's tiles."""
        grid = self.grid(pixels)
        if grid not in self._token_ids:
            encoded = self.tokenizer(self.written(grid), add_special_tokens=False)
            self._token_ids[grid] = encoded["input_ids"]
        return self._token_ids[grid]

    def num_tiles(self, pixels: Tensor) -> int:
        """How many tiles an image has, the whole included."""
        return tiles_of(self.grid(pixels))

    def blank(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8: grey, about 0 when normalised, as large as another image."""
        return self.pixel_mean.round().to(torch.uint8)[:, None, None].expand_as(pixels)

    def vision(
        self, input_ids: Tensor, is_token: Tensor, pixels: Sequence[Sequence[Tensor]]
    ) -> TiledVision:
        """The tiles of a batch, N being the most of an example."""
        grids = tuple(tuple(map(self.grid, row)) for row in pixels)
        tiles = [[tile for image in row for tile in self.tiles(image)] for row in pixels]
        sizes = tuple(tuple((t.shape[1], t.shape[2]) for t in row) for row in tiles)
        most = max(1, *map(len, tiles))
        height, width = largest([size for row in sizes for size in row])
        stacked = torch.zeros(len(pixels), most, 3, height, width, dtype=torch.uint8)
        tile_sizes = torch.zeros(len(pixels), most, 2, dtype=torch.int64)
        starts = torch.full(  # (B, K): <image> tokens before those of an image
            (len(pixels), max(1, *map(len, pixels))), torch.iinfo(torch.int64).max
        )
        for b, row in enumerate(tiles):
            for n, tile in enumerate(row):
                stacked[b, n, :, : tile.shape[1], : tile.shape[2]] = tile
                tile_sizes[b, n] = torch.tensor(sizes[b][n])
            for k in range(len(grids[b])):
                before = sum(map(tiles_of, grids[b][:k]))
                starts[b, k] = before * int(self.processor.image_seq_len)
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        up_to_here = (input_ids == image_id).cumsum(1)  # (B, T): <image> tokens
        sees = up_to_here[:, :, None] > starts[:, None, :]
        return self.vision_type(
            pixel_values=stacked,
            tile_sizes=tile_sizes,
            sees_image=sees & is_token[:, :, None],
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            sizes=sizes,
            grids=grids,
        )
