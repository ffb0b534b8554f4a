"""Opening and preparing pictures; knows nothing of models.

Shapes: H, W pixels; S the side in pixels of the square that the vision tower sees.
"""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are refused before they are decoded."""

MAX_BYTES = 64 * 2**20
"""Downloads larger than this many bytes are refused."""

TIMEOUT_S = 20.0
"""Seconds without an answer after which a download is given up."""

CROP_SCALE = (0.9, 1.0)
"""Share of a training picture's area that a random crop keeps (the tutorial's values)."""

Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Any] | Image.Image"


class BadImage(ValueError):
    """A picture that cannot be had from its source; the message names the source and the reason."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"cannot open the image {source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.source, self.reason)  # so that it crosses from a loader worker


def open_image(source: Source) -> Image.Image:
    """Open a picture and return it as RGB.

    Args:
        source: A file path, an http(s) URL, the bytes of an encoded picture, a mapping with
            ``bytes`` or ``path`` (as ``datasets`` stores pictures), or a PIL image. A string that
            starts with ``http://`` or ``https://`` is a URL; every other string is a path.

    Returns:
        The decoded RGB image. Transparency is composited on white, the EXIF orientation is
        applied, and of an animation the first frame is taken.

    Raises:
        BadImage: If there is no such picture, or it cannot be decoded, or it is too large.
    """
    name = _describe(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with Image.open(_opened(source)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(name, f"{image.width} x {image.height} pixels are over {MAX_PIXELS}")
            return _to_rgb(image)
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(name, "there is no such file") from None
    # Pillow's decoders raise nearly anything on a broken file (OSError, SyntaxError, struct.error,
    # ZeroDivisionError, ...), so every exception here means the same: a bad picture.
    except Exception as error:
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def full_image(image: Image.Image, side: int) -> Tensor:
    """The whole picture squashed to the model's square, as the checkpoint's processor does.

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
    pixels = F.pil_to_tensor(image)  # (3, H, W) uint8
    # get_params draws from PyTorch's global CPU generator. It is lent for that moment and restored,
    # so that dropout in the main process never depends on how many pictures were loaded there.
    # (torch.manual_seed would reseed the GPU generators as well.)
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        box = RandomResizedCrop.get_params(pixels, list(CROP_SCALE), [3 / 4, 4 / 3])
    finally:
        generator.set_state(state)
    return F.resized_crop(pixels, *box, [side, side], F.InterpolationMode.BICUBIC)


def _describe(source: Source) -> str:
    if isinstance(source, Image.Image):
        return f"<PIL image, mode {source.mode}, {source.width} x {source.height}>"
    if isinstance(source, (bytes, bytearray)):
        return f"<{len(source)} bytes>"
    if isinstance(source, Mapping):
        return repr(source["path"]) if source.get("path") else "<a mapping with bytes>"
    return repr(str(source))


def _opened(source: Source) -> io.BytesIO | Path:
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            source = source["bytes"]
        elif source.get("path"):
            source = source["path"]
        else:
            raise BadImage(repr(dict(source)), "expected a mapping with `bytes` or `path`")
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return io.BytesIO(_download(source))
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    raise BadImage(
        repr(source)[:80],
        f"{type(source).__name__} is no image; expected a path, URL, bytes, a mapping or PIL image",
    )


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "idefics_qlora"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise BadImage(repr(url), f"the server answered {error.code} {error.reason}") from error
    except OSError as error:
        raise BadImage(repr(url), f"no answer: {error}") from error
    if len(data) > MAX_BYTES:
        raise BadImage(repr(url), f"more than {MAX_BYTES} bytes")
    return data


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
