"""Opening and preparing pictures; knows nothing of models.

Shapes: H, W pixels; S the side in pixels of the square that the vision tower sees.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from idefics_qlora.images.access import (
    DEFAULT_ACCESS,
    BadImage,
    ImageAccess,
    access_in_force,
    find_file,
    is_url,
    read_file,
)
from idefics_qlora.images.decode import decode
from idefics_qlora.images.kept import Kept, key_of

Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Any] | Image.Image"

logger = logging.getLogger(__name__)

LONGEST_SHAPE = 1000
"""How many times as long as wide a picture may be that is meant for a model: in the sizes that
models see, less than a pixel would be left of the width."""

_purpose: ContextVar[tuple[int | None, Kept | None]] = ContextVar("purpose", default=(None, None))


@contextmanager
def opening_for(side: int, kept: Kept | None = None) -> Iterator[None]:
    """Let pictures opened in this block be meant for a model; a ``to_example`` knows of none.

    Args:
        side: S, which ``ImageAccess.draft`` asks for.
        kept: Decoded pictures, looked up before one is decoded.
    """
    token = _purpose.set((side, kept))
    try:
        yield
    finally:
        _purpose.reset(token)


def open_image(
    source: Source, access: ImageAccess | None = None, *, min_side: int | None = None
) -> Image.Image:
    """Open a picture and return it as RGB.

    Args:
        source: A file path, an http(s) URL, the bytes of an encoded picture, a mapping with
            ``bytes`` or ``path`` (as ``datasets`` stores pictures), or a PIL image. A string that
            starts with ``http://`` or ``https://`` is a URL; every other string is a path, and a
            path object is always one.
        access: What may be opened, the limits, and where downloads are kept. ``None``: in a
            ``to_example``, the ``access`` of the ``train``, ``evaluate``, ... that asks for the
            row; elsewhere that of ``ImageAccess()``.
        min_side: Side in pixels of the square the picture is for. A large JPEG is then decoded at
            1/2, 1/4 or 1/8 of its size, which is faster, but stays large enough that a random crop
            of it is scaled down by 2 or more. The same seed then gives another crop, because crops
            are drawn in whole pixels. ``None``: decoded in full, or, with ``access.draft`` and
            where a model asks for the row, for that model's square.

    Returns:
        The decoded RGB image. Transparency is composited on white, 16-bit and floating-point values
        are scaled to 8 bit, the EXIF orientation is applied, and of an animation the first frame is
        taken. What a URL gives is kept on disk, and not downloaded again. A PIL image that is
        nothing but RGB already is returned itself.

    Raises:
        BadImage: If there is no such picture, or it may not be opened, or it cannot be decoded, or
            it is too large, or, where a model asks for the row, over 1000 times as long as wide.
            Nothing else is raised, whatever the source is.
    """
    name = _describe(source)
    access = access_in_force() if access is None else access
    for_a_model, _ = _purpose.get()
    if min_side is None and access.draft:
        min_side = for_a_model
    image = _opened(source, name, access, min_side)
    if for_a_model and max(image.size) > LONGEST_SHAPE * min(image.size):
        raise BadImage(
            name,
            f"{image.width} x {image.height} pixels: over {LONGEST_SHAPE} times as long as wide, "
            "so that a model sees nothing of it; crop it, or leave it out",
        )
    return image


def _opened(source: Source, name: str, access: ImageAccess, min_side: int | None) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return mark_origin(decode(source, name, access, min_side), source)
        if isinstance(source, Mapping):
            source = _from_mapping(source)
        if isinstance(source, (bytes, bytearray)):
            return mark_origin(_decode(source, name, access, min_side), source)
        if isinstance(source, str) and is_url(source):
            return mark_origin(_open_url(source, name, access, min_side), ["url", source])
        if isinstance(source, (str, os.PathLike)):
            data = read_file(source, access)
            file = ["file", Path(source).name, len(data)]
            return mark_origin(_decode(data, name, access, min_side), file)
        raise BadImage(
            name,
            f"{type(source).__name__} is no image; "
            "expected a path, URL, bytes, a mapping or PIL image",
        )
    except BadImage:
        raise
    # Pillow's decoders raise nearly anything on a broken file (OSError, SyntaxError, struct.error,
    # ZeroDivisionError, ...), so every exception here means the same: a bad picture.
    except Exception as error:
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def _decode(
    data: bytes | bytearray, name: str, access: ImageAccess, min_side: int | None
) -> Image.Image:
    """Encoded bytes as RGB, from what is kept if they are there."""
    _, kept = _purpose.get()
    if kept is None:
        return decode(data, name, access, min_side)
    key = key_of(data, access, min_side)
    image = kept.get(key)
    if image is None:
        image = decode(data, name, access, min_side)
        kept.put(key, image)
    return image


def mark_origin(image: Image.Image, source: Source | list[Any]) -> Image.Image:
    """Let a decoded picture tell :func:`origin` what it was decoded from; returns the picture.

    A picture that is made from it, by a crop or a rotation, does not have the mark.
    """
    if image is not source:
        image.idefics_qlora_origin = source  # type: ignore[attr-defined]
    return image


def origin(source: Source, access: ImageAccess = DEFAULT_ACCESS) -> list[Any]:
    """What tells a picture from others: what the user gave, as JSON values.

    Of a file its name and size, so that it may lie in another folder; of a URL the URL; of encoded
    bytes their hash. Decoders of different versions differ in single bits, so pixels are looked at
    only where nothing else is known.
    """
    if isinstance(source, Image.Image):
        given = getattr(source, "idefics_qlora_origin", None)
        if given is not None:
            return given if isinstance(given, list) else origin(given, access)
        with suppress(OSError):  # Image.open keeps the file's name, and so does `datasets`
            file = os.fsdecode(getattr(source, "filename", ""))
            return ["file", Path(file).name, os.stat(file).st_size]
        palette = bytes(source.getpalette() or ())
        return ["pixels", source.mode, list(source.size), _sha256(palette + source.tobytes())]
    encoded: Any = _from_mapping(source) if isinstance(source, Mapping) else source
    if isinstance(encoded, (bytes, bytearray)):
        return ["bytes", _sha256(encoded)]
    try:
        if isinstance(encoded, str) and is_url(encoded):
            return ["url", encoded]
        return ["file", Path(encoded).name, find_file(encoded, access).stat().st_size]
    except (BadImage, OSError):  # an address that `datasets` alone can open
        return ["address", os.fspath(encoded)]


def file_name(source: Source) -> str:
    """What the file of a picture is called, without its folders; empty if that is not known."""
    given: Any = source
    if isinstance(given, Image.Image):
        given = getattr(given, "idefics_qlora_origin", None) or getattr(given, "filename", "")
    if isinstance(given, Mapping):
        given = given.get("path")
    if isinstance(given, list):  # as ``origin`` has it
        given = given[1] if given[0] in ("file", "url") else ""
    if not isinstance(given, (str, os.PathLike)):
        return ""
    name = os.fsdecode(given)
    if name.startswith(("http:", "https:")):  # what stands behind the path may be a secret
        name = re.sub("[?#].*", "", name)
    return Path(name).name


def _sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def part_source(part: Mapping[str, Any]) -> Any:
    """The picture that a part of a chat message carries; ``None`` if it carries none."""
    if part.get("type") not in ("image", "image_url"):
        return None
    # `datasets` gives every part all keys, so an absent key and None mean the same.
    values = (part.get(key) for key in PICTURE_KEYS)
    source = next((value for value in values if value is not None), None)
    if isinstance(source, Mapping) and source.get("url") is not None:
        source = source["url"]  # OpenAI's {"type": "image_url", "image_url": {"url": ...}}
    if isinstance(source, str) and (found := re.match(r"\s*data:[^,]*;base64,", source)):
        with suppress(ValueError):  # a broken one is no address that can be opened
            return base64.b64decode(source[found.end() :])
    return source


PICTURE_KEYS = ("image", "path", "url", "image_url")
"""Where a part of a chat message carries its picture."""


def _open_url(url: str, name: str, access: ImageAccess, min_side: int | None) -> Image.Image:
    from idefics_qlora.images.cache import Cache
    from idefics_qlora.images.fetch import Downloader  # late: it loads the HTTP client

    cache = Cache(access)
    data = cache.get(url)
    if data is not None:
        return _decode(data, name, access, min_side)
    with Downloader(access) as downloader:
        download = downloader.download(url)
    image = decode(download.data, name, access, min_side)
    cache.put(url, *download)  # only now: what cannot be decoded is not kept
    return image


def _describe(source: Source) -> str:
    if isinstance(source, Image.Image):
        return f"<PIL image, mode {source.mode}, {source.width} x {source.height}>"
    if isinstance(source, (bytes, bytearray)):
        return f"<{len(source)} bytes>"
    if isinstance(source, Mapping):
        if source.get("path"):
            return f"{source['path']!r:.500}"
        return "<a mapping with bytes>" if source.get("bytes") else f"{dict(source)!r:.80}"
    if isinstance(source, (str, os.PathLike)):
        return f"{str(source)!r:.500}"
    return f"{source!r:.80}"


def _from_mapping(source: Mapping[str, Any]) -> Any:
    for key in ("bytes", "path"):
        if source.get(key) is not None:
            return source[key]
    raise BadImage(f"{dict(source)!r:.80}", "expected a mapping with `bytes` or `path`")
