"""Files in the user's cache folder: whole or not there, and bounded; downloads, kept in them."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
import warnings
from pathlib import Path

from idefics_qlora.images.access import ImageAccess


def cache_folder(access: ImageAccess) -> Path:
    """Where everything is kept: ``access.cache_dir``, or what it says of ``None``."""
    folder = access.cache_dir or os.environ.get("IDEFICS_QLORA_CACHE")
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "idefics_qlora"
    return Path(folder).expanduser()


def write_whole(path: Path, *parts: bytes) -> None:
    """Write a file that appears by one rename, so that it is whole or not there.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(file, "wb") as stream:
            stream.writelines(parts)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def make_room(
    folder: Path, max_bytes: int, num_new_bytes: int, used_before: float = math.inf
) -> bool:
    """Remove the files not used for longest if there are too many bytes.

    Args:
        folder: Has folders with the files.
        max_bytes: Bytes that there may be.
        num_new_bytes: Bytes that this process has just written, or is about to.
        used_before: Only files whose last use, in seconds since the epoch, was before may go.

    Returns:
        Whether there is room for more.
    """
    # Looking at every file for each new one would be slow. A process looks when it has written
    # a 20th of the limit, and leaves a 20th free: alone it never exceeds the limit, and each
    # further process that writes at the same time exceeds it by a 20th at most.
    slack = max_bytes // 20
    _unseen_bytes[folder] = _unseen_bytes.get(folder, slack) + num_new_bytes
    if _unseen_bytes[folder] < slack:
        return True
    _unseen_bytes[folder] = 0
    files, num_bytes = [], 0
    for path in folder.glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process removed it
            continue
        num_bytes += status.st_size
        if not path.name.startswith("."):
            if status.st_mtime < used_before:
                files.append((status.st_mtime_ns, status.st_size, path))
        elif status.st_mtime < time.time() - 3600:  # a killed process' unfinished file
            files.append((-1, status.st_size, path))
    excess = num_bytes - (max_bytes - slack)
    for last_used, size, path in sorted(files):
        if excess > 0 or last_used == -1:
            path.unlink(missing_ok=True)
            excess -= size
    return excess <= 0


class Cache:
    """Downloaded pictures on disk, one file per URL; safe for several processes at once.

    A file is the SHA-256 of a picture's bytes, and the bytes. It appears by one rename, so it is
    whole or not there; damage is found by the checksum and leads to another download. Failures are
    not kept: the next call tries again. The time of a file's last use is its modification time.
    What came from a private host is kept under another name, which is looked for only where such
    hosts are allowed.
    """

    def __init__(self, access: ImageAccess) -> None:
        self.folder = cache_folder(access) / "pictures"
        self.max_bytes = access.max_cache_bytes
        self._allow_private_hosts = access.allow_private_hosts

    def path(self, url: str) -> Path:
        """Where the picture behind a URL is kept, if it is."""
        private = self._path(url, is_public=False)
        if self._allow_private_hosts and private.is_file():
            return private
        return self._path(url, is_public=True)

    def _path(self, url: str, is_public: bool) -> Path:
        key = hashlib.sha256(url.strip().partition("#")[0].encode()).hexdigest()
        return self.folder / key[:2] / (key[2:] + ("" if is_public else "-private"))

    def touch(self, url: str) -> bool:
        """Whether the picture is kept; marks it as used now."""
        try:
            os.utime(self.path(url))
        except FileNotFoundError:
            return False
        except OSError:  # a cache that can be read only
            return self.path(url).is_file()
        return True

    def get(self, url: str) -> bytes | None:
        """The picture's bytes, if they are kept and whole; marks them as used now."""
        path = self.path(url)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        self.touch(url)
        return content[32:]

    def put(self, url: str, data: bytes, is_public: bool = True) -> None:
        """Keep a picture; a disk that is full or read-only is a warning."""
        if len(data) + 32 > self.max_bytes:
            return
        path = self._path(url, is_public)
        try:
            write_whole(path, hashlib.sha256(data).digest(), data)
            make_room(self.folder, self.max_bytes, len(data) + 32)
        except OSError as error:
            warnings.warn(
                f"downloaded pictures cannot be kept in {self.folder} ({error}), so they are "
                "downloaded again each time: set IDEFICS_QLORA_CACHE to a folder with room",
                RuntimeWarning,
                stacklevel=2,
            )


_unseen_bytes: dict[Path, int] = {}
"""Per cache folder: bytes this process wrote since it last looked at the folder."""
