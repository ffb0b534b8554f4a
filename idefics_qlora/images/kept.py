"""Decoded pictures, kept so that they are decoded once and not in every epoch.

What is kept is what decoding gave, to the bit. Its key is a hash of the encoded bytes and of all
that decides what becomes of them, so that a changed file, another limit or another Pillow never
finds what is there. Whatever is damaged is decoded again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import mmap
import multiprocessing
import os
import shutil
import struct
import time
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

import PIL
from PIL import Image, ImageFile, features

from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.cache import cache_folder, make_room, write_whole
from idefics_qlora.machine import available_bytes

logger = logging.getLogger(__name__)

_HEAD = struct.Struct("<4sIII")
"""The kind of content, width, height, and the CRC-32 of the two and the pixels."""

_KIND = b"RGB1"
"""Eight bits of red, green and blue for each pixel, line by line."""


def key_of(data: bytes | bytearray, access: ImageAccess, min_side: int | None) -> bytes:
    """What a decoded picture is kept under: 32 bytes.

    Args:
        data: The encoded picture.
        access: What it is decoded with.
        min_side: As for :func:`~idefics_qlora.images.open_image`.
    """
    decides = (
        *(_KIND, _decoders(), access.max_pixels, Image.MAX_IMAGE_PIXELS, min_side),
        *(access.max_bytes, ImageFile.LOAD_TRUNCATED_IMAGES),
    )
    hashed = hashlib.sha256(repr(decides).encode())
    hashed.update(data)
    return hashed.digest()


@functools.cache
def _decoders() -> tuple[str | None, ...]:
    names = ("libjpeg_turbo", "jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif", "littlecms2")
    with_versions = (name for name in names if name in features.modules | features.codecs)
    turbo = features.version("libjpeg_turbo")
    return (PIL.__version__, turbo, *(features.version(name) for name in with_versions))


class Kept(ABC):
    """Decoded pictures by key; one object serves a process and all that are forked from it."""

    @abstractmethod
    def get(self, key: bytes) -> Image.Image | None:
        """The RGB picture, if it is kept and whole."""

    @abstractmethod
    def put(self, key: bytes, image: Image.Image) -> None:
        """Keep an RGB picture, if there is room; nothing is raised if there is none."""


def _packed(image: Image.Image) -> tuple[bytes, bytes]:
    pixels = image.tobytes()
    return _HEAD.pack(_KIND, *image.size, _checksum(*image.size, pixels)), pixels


def _unpacked(content: bytes | memoryview) -> Image.Image | None:
    if len(content) < _HEAD.size:
        return None
    kind, width, height, checksum = _HEAD.unpack_from(content)
    pixels = memoryview(content)[_HEAD.size :]
    if kind != _KIND or len(pixels) != 3 * width * height:
        return None
    if _checksum(width, height, pixels) != checksum:
        return None
    return Image.frombytes("RGB", (width, height), pixels)


def _checksum(width: int, height: int, pixels: bytes | memoryview) -> int:
    return zlib.crc32(pixels, zlib.crc32(struct.pack("<II", width, height)))


class KeptOnDisk(Kept):
    """In files of the cache folder, for all runs; each appears by one rename.

    Pictures that no run has used since this object was made give way to new ones; the others stay,
    for epochs go through all of them, and would find none that was removed for the next.

    Args:
        access: Names the folder, and how many bytes there may be.
    """

    MIN_FREE = 0.05
    """Share of the disk that is left free: checkpoints need it, too."""

    def __init__(self, access: ImageAccess) -> None:
        self.folder = cache_folder(access) / "decoded"
        self.max_bytes = access.max_cache_bytes
        self._began = time.time() - 1.0  # clocks of file systems are coarse
        self._is_full = False

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / name[2:]

    def get(self, key: bytes) -> Image.Image | None:
        """The RGB picture, if it is kept and whole."""
        path = self._path(key)
        try:
            image = _unpacked(path.read_bytes())
        except OSError:
            return None
        if image is not None:
            try:
                os.utime(path)
            except OSError:  # a cache that can be read only, or another process removed it
                return image
        return image

    def put(self, key: bytes, image: Image.Image) -> None:
        """Keep an RGB picture, if there is room; nothing is raised if there is none."""
        if self._is_full:
            return
        head, pixels = _packed(image)
        size = len(head) + len(pixels)
        if size > self.max_bytes // 20:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.folder)
            has_room = disk.free - size > self.MIN_FREE * disk.total
            why = f"{disk.free / 2**30:.1f} GiB of the disk are free"
            if has_room:
                has_room = make_room(self.folder, self.max_bytes, size, self._began)
                why = f"its max_cache_bytes={self.max_bytes} are used"
            if has_room:
                write_whole(self._path(key), head, pixels)
        except OSError as error:
            has_room, why = False, str(error)
        if not has_room:
            self._is_full = True
            logger.warning(
                "cache_images='disk': %s keeps no more decoded pictures (%s): the others are "
                "decoded in every epoch; ImageAccess(cache_dir=..., max_cache_bytes=...) names "
                "another place or limit",
                *(self.folder, why),
            )


class KeptInMemory(Kept):
    """In memory that a process shares with those forked from it; gone with them.

    Nothing is removed for another picture: epochs go through all of them, so any is as good.

    Args:
        max_bytes: Bytes that there may be; they are taken as pictures come.
    """

    _ENTRY = struct.Struct("<QQ32s")
    """Where a picture begins, its length (0: there is none), and its key."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max(mmap.PAGESIZE, max_bytes)
        self._pixels = mmap.mmap(-1, self.max_bytes)
        self._num_entries = 2 * self.max_bytes // 2**15 + 64  # twice those of 100 x 100 pixels
        self._entries = mmap.mmap(-1, self._ENTRY.size * (self._num_entries + 1))
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        self._lock = multiprocessing.get_context("fork" if can_fork else None).Lock()
        self._is_full = False

    def _entry(self, number: int) -> tuple[int, int, bytes]:
        return self._ENTRY.unpack_from(self._entries, number * self._ENTRY.size)

    def _set(self, number: int, *values: int | bytes) -> None:
        self._ENTRY.pack_into(self._entries, number * self._ENTRY.size, *values)

    def _place(self, key: bytes) -> int:
        """Number of the key's entry, or of the free one where it belongs."""
        number = int.from_bytes(key[:8], "little") % self._num_entries
        while (entry := self._entry(number))[1] and entry[2] != key:
            number = (number + 1) % self._num_entries
        return number

    def get(self, key: bytes) -> Image.Image | None:
        """The RGB picture, if it is kept and whole."""
        start, length, _ = self._entry(self._place(key))
        # Read without the lock: what another process is just writing fails its checksum.
        return _unpacked(memoryview(self._pixels)[start : start + length]) if length else None

    def put(self, key: bytes, image: Image.Image) -> None:
        """Keep an RGB picture, if there is room; nothing is raised if there is none."""
        if self._is_full:
            return
        parts = b"".join(_packed(image))
        # A process that was killed may hold it for ever; then nothing more is kept.
        if not self._lock.acquire(timeout=5):
            self._is_full = True
            return
        try:
            used, number, said = self._entry(self._num_entries)  # behind the last one: the sums
            place = self._place(key)
            if self._entry(place)[1]:  # another process was quicker
                return
            end = used + len(parts)
            self._is_full = end > self.max_bytes or number >= self._num_entries // 2
            if not self._is_full:
                self._pixels[used:end] = parts
                self._set(place, used, len(parts), key)
                used, number = end, number + 1
            self._set(self._num_entries, used, number, b"full" if self._is_full else b"")
        finally:
            self._lock.release()
        if self._is_full and not said.startswith(b"full"):
            logger.warning(
                "cache_images='memory': %.1f GiB are taken: further pictures are decoded in every "
                "epoch; cache_images='disk' may have more room",
                self.max_bytes / 2**30,
            )


def kept_pictures(where: str | None, access: ImageAccess) -> Kept | None:
    """What keeps decoded pictures, as ``TrainConfig.cache_images`` says.

    In memory they take half of what is available at most, and no more than ``max_cache_bytes``.

    Raises:
        ValueError: If the system does not give that memory.
    """
    if where is None or access.max_cache_bytes == 0:
        return None
    if where == "disk":
        return KeptOnDisk(access)
    max_bytes = min(access.max_cache_bytes, available_bytes() // 2)
    try:
        return KeptInMemory(max_bytes)
    except OSError as error:
        raise ValueError(
            f"cache_images='memory': {max_bytes / 2**30:.1f} GiB cannot be had ({error.strerror}): "
            "use cache_images='disk', or pass access=ImageAccess(max_cache_bytes=...) with less"
        ) from error
