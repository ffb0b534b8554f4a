"""Pictures as the square of pixels that a vision tower sees: whole, or a seeded crop.

Shapes: H, W pixels; S the side in pixels of the square.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    pass


CROP_SCALE = (0.9, 1.0)
"""Share of a training picture's area that a random crop keeps (the tutorial's values)."""


def full_image(image: Image.Image, side: int) -> Tensor:
    """The whole picture squashed to the model's square, as the base's processor does.

    Args:
        image: RGB picture of any size.
        side: S, in pixels.

    Returns:
        uint8 tensor (3, S, S).
    """
    return F.resize(F.pil_to_tensor(image), [side, side], F.InterpolationMode.BICUBIC)


def random_crop(image: Image.Image, side: int, seed: int) -> Tensor:
    """A random crop of 90-100 % of the picture's area, squashed to the model's square.

    Args:
        image: RGB picture of any size.
        side: S, in pixels.
        seed: Decides the crop; the same seed gives the same crop in any process.

    Returns:
        uint8 tensor (3, S, S).
    """
    kept = _part(image, seed, [3 / 4, 4 / 3])
    return F.resize(kept, [side, side], F.InterpolationMode.BICUBIC)[:3]


def random_part(image: Image.Image, seed: int) -> Tensor:
    """A random crop of 90-100 % of the picture's area, of nearly its shape, not resized.

    Args:
        image: RGB picture of any size.
        seed: Decides the crop; the same seed gives the same crop in any process.

    Returns:
        uint8 tensor (3, H, W).
    """
    shape = image.width / image.height
    return _part(image, seed, [shape * 3 / 4, shape * 4 / 3])[:3].contiguous()


def _part(image: Image.Image, seed: int, ratios: list[float]) -> Tensor:
    """A random crop, width over height between ``ratios``: uint8 (C, H, W)."""
    # get_params draws from PyTorch's global CPU generator. It is lent for that moment and restored,
    # so that dropout in the main process never depends on how many pictures were loaded there.
    # (torch.manual_seed would reseed the GPU generators as well.)
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, list(CROP_SCALE), ratios)
    finally:
        generator.set_state(state)
    return _pixels(image)[top : top + height, left : left + width].permute(2, 0, 1)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 (H, W, C) of an RGB picture: its own memory, where C is 4, or else a copy."""
    try:
        import pyarrow  # comes with datasets

        shared = from_dlpack(pyarrow.array(image).flatten())
    except (
        ImportError,
        TypeError,
        ValueError,
    ):  # Pillow before 11.2, or over 16 MB, which lie in many blocks
        return torch.from_numpy(np.array(image))
    return shared.view(image.height, image.width, 4)


def write_png(pixels: Tensor, path: Path) -> Path:
    """Write a picture (3, H, W) uint8 to a file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path
