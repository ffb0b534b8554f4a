"""From the bytes of a picture to RGB."""

from __future__ import annotations

import functools
import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from idefics_qlora.images.access import BadImage, ImageAccess, check_size

REFUSED_FORMATS = ("EPS", "IPTC")
"""Formats that are never opened. For EPS, Pillow starts Ghostscript on the file's program; an IPTC
file can contain an EPS, which Pillow would open."""

_DRAFT_SCALE = 2 / 0.9
"""Sides of a JPEG decoded at reduced size per side asked for: a random crop keeps at least 0.9 of
the shorter side, and what is still scaled down by 2 hardly differs from the full decoding."""


def decode(
    source: bytes | bytearray | Image.Image, name: str, access: ImageAccess, min_side: int | None
) -> Image.Image:
    """The picture as RGB; the arguments are those of :func:`~idefics_qlora.images.open_image`.

    Raises:
        BadImage: If it is refused for its size or format; ``name`` is what the error calls it.
        Exception: Whatever Pillow raises on a broken file: nearly anything.
    """
    with _quiet_pillow():
        if isinstance(source, Image.Image):
            if source.format in REFUSED_FORMATS and getattr(source, "tile", None):
                raise BadImage(name, f"{source.format} files are not decoded: {_NO_PROGRAMS}")
            return _to_rgb(source, name, access)
        check_size(name, len(source), access)
        Image.init()  # registers every format; costs nothing the second time
        formats = [kind for kind in Image.ID if kind not in REFUSED_FORMATS]
        try:
            opened = Image.open(io.BytesIO(source), formats=formats)
        except UnidentifiedImageError as error:
            raise BadImage(name, _what_else(bytes(source[:512]))) from error
        with opened as image:
            _check_pixels(image, name, access)
            if min_side is not None:
                side = math.ceil(min_side * _DRAFT_SCALE)
                image.draft(None, (side, side))  # does nothing to other formats than JPEG
            # What is read frame by frame may hold on to its decoder; these two do not.
            return _to_rgb(image, name, access, is_ours=image.format in ("JPEG", "PNG"))


def _check_pixels(image: Image.Image, name: str, access: ImageAccess) -> None:
    if 0 in image.size:
        raise BadImage(
            name,
            f"{image.width} x {image.height} pixels: it is empty (cut beyond its border?)",
        )
    if image.width * image.height > access.max_pixels:
        raise BadImage(
            name,
            f"{image.width} x {image.height} pixels are over {access.max_pixels} "
            "(ImageAccess.max_pixels)",
        )


_NO_PROGRAMS = "Pillow would start another program on them; convert it to PNG"

_NO_PICTURES = {
    b"%!PS": f"EPS files are not decoded: {_NO_PROGRAMS}",
    b"\xc5\xd0\xd3\xc6": f"EPS files are not decoded: {_NO_PROGRAMS}",
    b"%PDF": "a PDF file: convert its page to PNG",
    b"<svg": "an SVG drawing: convert it to PNG",
    b"<?xml": "an XML file (an SVG drawing perhaps): convert it to PNG",
    b"<!doctype html": "an HTML page, no picture",
    b"<html": "an HTML page, no picture",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
}


def _what_else(start: bytes) -> str:
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, reason in _NO_PICTURES.items():
        if start.startswith(magic.lower()):
            return reason
    if not start:
        return "it is empty"
    return "no format that Pillow reads (UnidentifiedImageError)"


_quiet_lock = threading.Lock()
_num_quiet = 0
_filters = warnings.catch_warnings()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Hide Pillow's warnings about odd files; its warning of a decompression bomb is an error.

    The filters belong to the process, not to a thread, so threads that decode at the same time
    share one change of them: the first makes it, the last takes it back.
    """
    global _num_quiet, _filters
    with _quiet_lock:
        if _num_quiet == 0:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        _num_quiet += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet -= 1
            if _num_quiet == 0:
                _filters.__exit__(None, None, None)


def _after_fork() -> None:
    global _quiet_lock, _num_quiet
    _quiet_lock, _num_quiet = threading.Lock(), 0  # a thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_UPRIGHT = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(
    image: Image.Image, name: str, access: ImageAccess, is_ours: bool = False
) -> Image.Image:
    _check_pixels(image, name, access)
    image.load()
    _check_pixels(image, name, access)  # icons tell their true size only now
    try:
        method = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata beside good pixels (exif_transpose would fail)
        method = None
    if method is not None:
        image = image.transpose(method)

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = _from_wide_grey(image)
    elif image.mode == "LAB":
        rgb = ImageCms.applyTransform(image, _lab_to_srgb()) or image
    elif image.has_transparency_data and image.mode not in ("CMYK", "YCbCr", "HSV", "RGBX"):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
    elif image.mode == "RGB" and (is_ours or not image.info):
        rgb = image  # copying it would take a tenth of the time that a JPEG takes
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # an orientation or transparency left there would be applied a second time
    return rgb


_BAND_PIXELS = 2**18


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The grey levels some lines at a time, as floating-point numbers, and the first line's number.

    All lines at once would take ten times the picture's memory.
    """
    lines = max(1, _BAND_PIXELS // max(1, image.width))
    dtype = np.float64 if image.mode == "I" else np.float32
    for top in range(0, image.height, lines):
        band = image.crop((0, top, image.width, min(top + lines, image.height)))
        yield top, np.asarray(band).astype(dtype)


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Grey levels of a wide mode as RGB; convert() would clip them, mostly to white.

    16-bit levels keep their proportion to 65535, 32-bit integers to the smallest of 255, 65535 and
    their own maximum that holds them all, floating-point levels to 1 or, if larger, their maximum.
    Where levels are negative, the least of them is black.
    """
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        finite = (levels[np.isfinite(levels)] for _, levels in _bands(image))
        extremes = [(levels.min(), levels.max()) for levels in finite if levels.size]
        lows, highs = zip(*extremes, strict=True) if extremes else ((0.0,), (1.0,))
        low, high = min(lows), max(highs)
        if low >= 0:
            bounds = (1.0,) if image.mode == "F" else (255.0, 65535.0)
            low, high = 0.0, next((bound for bound in bounds if high <= bound), high)
    clear = image.info.get("transparency")
    rgb = Image.new("RGB", image.size)
    for top, levels in _bands(image):
        levels = np.nan_to_num(levels, nan=low, posinf=high, neginf=low)
        scaled = (levels - low) * (255.0 / ((high - low) or 1.0))
        grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        if isinstance(clear, int):
            grey[levels == clear] = 255
        rgb.paste(Image.fromarray(grey).convert("RGB"), (0, top))
    return rgb


@functools.cache
def _lab_to_srgb() -> Any:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
