"""Opening and preparing pictures; knows nothing of models.

Shapes: H, W pixels; S the side in pixels of the square that the vision tower sees.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

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

if TYPE_CHECKING:
    from idefics_qlora.images.fetch import Downloader


CROP_SCALE = (0.9, 1.0)
"""Share of a training picture's area that a random crop keeps (the tutorial's values)."""

Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Any] | Image.Image"

logger = logging.getLogger(__name__)


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
            are drawn in whole pixels. ``None``: decoded in full.

    Returns:
        The decoded RGB image. Transparency is composited on white, 16-bit and floating-point values
        are scaled to 8 bit, the EXIF orientation is applied, and of an animation the first frame is
        taken. What a URL gives is kept on disk, and not downloaded again. A PIL image that is
        nothing but RGB already is returned itself.

    Raises:
        BadImage: If there is no such picture, or it may not be opened, or it cannot be decoded, or
            it is too large. Nothing else is raised, whatever the source is.
    """
    name = _describe(source)
    access = access_in_force() if access is None else access
    try:
        if isinstance(source, Image.Image):
            return mark_origin(decode(source, name, access, min_side), source)
        if isinstance(source, Mapping):
            source = _from_mapping(source)
        if isinstance(source, (bytes, bytearray)):
            return mark_origin(decode(source, name, access, min_side), source)
        if isinstance(source, str) and is_url(source):
            return mark_origin(_open_url(source, name, access, min_side), ["url", source])
        if isinstance(source, (str, os.PathLike)):
            data = read_file(source, access)
            file = ["file", Path(source).name, len(data)]
            return mark_origin(decode(data, name, access, min_side), file)
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


def _sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


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
    # get_params draws from PyTorch's global CPU generator. It is lent for that moment and restored,
    # so that dropout in the main process never depends on how many pictures were loaded there.
    # (torch.manual_seed would reseed the GPU generators as well.)
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        box = RandomResizedCrop.get_params(image, list(CROP_SCALE), [3 / 4, 4 / 3])
    finally:
        generator.set_state(state)
    top, left, height, width = box
    kept = _pixels(image)[top : top + height, left : left + width].permute(2, 0, 1)
    return F.resize(kept, [side, side], F.InterpolationMode.BICUBIC)[:3]


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


class FailedImage(NamedTuple):
    """A row whose picture cannot be had."""

    row: int
    """Index of the row."""
    source: str
    reason: str


@dataclass(frozen=True)
class PrefetchResult:
    """What :func:`prefetch_images` did; counts distinct pictures, but every row that failed."""

    num_downloaded: int
    num_already_there: int
    """In the cache before, or a local file."""
    failed: list[FailedImage]

    def __str__(self) -> str:
        lines = [
            f"{self.num_downloaded} pictures downloaded, {self.num_already_there} already there, "
            f"{len(self.failed)} rows failed"
        ]
        lines += [f"  row {row}: {source}: {reason}" for row, source, reason in self.failed[:10]]
        if len(self.failed) > 10:
            lines.append(f"  ... and {len(self.failed) - 10} rows more")
        return "\n".join(lines)


def prefetch_images(
    rows: Sequence[Mapping[str, Any]],
    column: str = "image_url",
    access: ImageAccess = DEFAULT_ACCESS,
    *,
    num_threads: int = 16,
    max_per_host: int = 6,
) -> PrefetchResult:
    """Download the rows' pictures ahead, so that training reads them from the disk.

    A picture is kept once it has been decoded without an error. Failures are reported, logged, and
    not remembered: call it again to try only those again.

    Args:
        rows: A ``datasets.Dataset``, or any sequence of mappings.
        column: Holds the URLs, one or a list in each row, or chat messages with pictures in their
            parts. Paths in it are looked up, everything else is passed over.
        access: As for :func:`open_image`; pass the same one to training.
        num_threads: Downloads at the same time.
        max_per_host: Of these, downloads from the same host.

    Returns:
        How many pictures were downloaded, and which rows failed and why.

    Raises:
        ValueError: If the rows have no such column, or one of the numbers is less than 1.
    """
    for name, number in {"num_threads": num_threads, "max_per_host": max_per_host}.items():
        if number < 1:
            raise ValueError(f"{name}={number!r}: expected 1 or more")
    wanted: dict[str | Path, list[int]] = {}  # each distinct source, and the rows that want it
    for index, source in _sources(_column(rows, column)):
        if source is None or isinstance(source, (str, Path)):
            wanted.setdefault(source or "", []).append(index)
    from idefics_qlora.images.fetch import Cache  # late: it loads the HTTP client

    cache = Cache(access)
    failed: dict[str | Path, str] = {}
    kept: list[str] = []
    missing: defaultdict[str, deque[str]] = defaultdict(deque)  # URLs by host
    num_local = 0
    for source in wanted:
        try:
            if source == "":
                raise BadImage("''", "the row has no picture")
            if isinstance(source, Path) or not is_url(source):
                find_file(source, access)
                num_local += 1
            elif cache.touch(source):
                kept.append(source)
            else:
                missing[urlsplit(source.strip()).netloc.lower()].append(source)
        except ValueError as error:  # a BadImage, or a URL that cannot be taken apart
            failed[source] = getattr(error, "reason", str(error))

    num_already_there = num_local + len(kept)
    num_downloaded = 0
    for url, problem in _download_all(missing, access, num_threads, max_per_host):
        if problem is not None:
            failed[url] = problem.reason
        else:
            num_downloaded += 1
            kept.append(url)
    for url in kept:
        if not cache.path(url).is_file():
            failed[url] = (
                f"it did not stay in {cache.folder}: the cache cannot be written, or "
                f"max_cache_bytes={access.max_cache_bytes} is less than these pictures need"
            )
    rows_failed = sorted(
        FailedImage(row, f"{str(source)!r:.500}", reason)
        for source, reason in failed.items()
        for row in wanted[source]
    )
    result = PrefetchResult(num_downloaded, num_already_there, rows_failed)
    logger.log(logging.WARNING if failed else logging.INFO, "%s", result)
    return result


def _column(rows: Any, column: str) -> Any:
    names = getattr(rows, "column_names", None)  # a Dataset decodes other columns row by row
    if names is None:
        names = sorted(rows[0]) if len(rows) else [column]
    if column not in names:
        raise ValueError(f"column={column!r}: the rows have {names}; name the one with the URLs")
    return rows[column] if hasattr(rows, "column_names") else [row.get(column) for row in rows]


def _sources(values: Any) -> Iterator[tuple[int, Any]]:
    """Each row's number with each of its sources; a row may have a list of them, or messages."""
    for index, value in enumerate(values):
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Mapping) and "role" in item:
                parts = item["content"] if isinstance(item.get("content"), (list, tuple)) else ()
                carried = [part_source(p) for p in parts if isinstance(p, Mapping)]
                yield from ((index, source) for source in carried if source is not None)
            else:
                yield index, item


def part_source(part: Mapping[str, Any]) -> Any:
    """The picture that a part of a chat message carries; ``None`` if it carries none."""
    if part.get("type") != "image":
        return None
    # `datasets` gives every part all keys, so an absent key and None mean the same.
    values = (part.get(key) for key in ("image", "path", "url"))
    return next((value for value in values if value is not None), None)


def _download_all(
    urls: dict[str, deque[str]], access: ImageAccess, num_threads: int, max_per_host: int
) -> Iterator[tuple[str, BadImage | None]]:
    """Download, check and keep every URL; yields each with what was wrong with it."""
    from idefics_qlora.images.fetch import Downloader

    with (
        Downloader(access) as downloader,
        tqdm(total=sum(map(len, urls.values())), unit="picture", disable=None) as progress,
    ):
        executor = ThreadPoolExecutor(num_threads)
        running: dict[Future[BadImage | None], tuple[str, str]] = {}
        per_host: Counter[str] = Counter()
        num_failed = 0
        try:
            while urls or running:
                # Only what may start now is handed to the threads: none waits for a slow host.
                for host in list(urls):
                    while (
                        urls[host] and per_host[host] < max_per_host and len(running) < num_threads
                    ):
                        url = urls[host].popleft()
                        running[executor.submit(_keep, url, access, downloader)] = (host, url)
                        per_host[host] += 1
                    if not urls[host]:
                        del urls[host]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    host, url = running.pop(future)
                    per_host[host] -= 1
                    error = future.result()
                    num_failed += error is not None
                    progress.set_postfix(failed=num_failed, refresh=False)
                    progress.update()
                    yield url, error
        finally:
            executor.shutdown(wait=not running, cancel_futures=True)


def _keep(url: str, access: ImageAccess, downloader: Downloader) -> BadImage | None:
    from idefics_qlora.images.fetch import Cache

    name = f"{url!r:.500}"
    try:
        download = downloader.download(url)
        decode(download.data, name, access, min_side=1)  # read to its end, though decoded small
        Cache(access).put(url, *download)
    except BadImage as error:
        return error
    except Exception as error:
        return BadImage(name, f"{type(error).__name__}: {error}")
    return None


def _open_url(url: str, name: str, access: ImageAccess, min_side: int | None) -> Image.Image:
    from idefics_qlora.images.fetch import Cache, Downloader  # late: it loads the HTTP client

    cache = Cache(access)
    data = cache.get(url)
    if data is not None:
        return decode(data, name, access, min_side)
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
