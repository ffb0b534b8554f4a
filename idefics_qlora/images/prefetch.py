"""Pictures of many rows, downloaded ahead."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from idefics_qlora.images.access import (
    DEFAULT_ACCESS,
    BadImage,
    ImageAccess,
    find_file,
    is_url,
)
from idefics_qlora.images.decode import decode
from idefics_qlora.images.opening import part_source
from idefics_qlora.progress import counting

if TYPE_CHECKING:
    from idefics_qlora.images.fetch import Downloader

logger = logging.getLogger(__name__)


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
    from idefics_qlora.images.cache import Cache  # late: it loads the HTTP client

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


def _download_all(
    urls: dict[str, deque[str]], access: ImageAccess, num_threads: int, max_per_host: int
) -> Iterator[tuple[str, BadImage | None]]:
    """Download, check and keep every URL; yields each with what was wrong with it."""
    from idefics_qlora.images.fetch import Downloader

    with (
        Downloader(access) as downloader,
        counting("fetching", sum(map(len, urls.values())), "pictures") as counted,
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
                    counted.advance(note=f"{num_failed} failed" if num_failed else "")
                    yield url, error
        finally:
            executor.shutdown(wait=not running, cancel_futures=True)


def _keep(url: str, access: ImageAccess, downloader: Downloader) -> BadImage | None:
    from idefics_qlora.images.cache import Cache

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
