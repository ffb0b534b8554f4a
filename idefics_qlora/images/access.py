"""What may be opened as a picture, and the bytes of local files; knows nothing of formats."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


class BadImage(ValueError):
    """A picture that cannot be had from its source; the message names the source and the reason."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"cannot open the image {source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.source, self.reason)  # so that it crosses from a loader worker


@dataclass(frozen=True, kw_only=True)
class ImageAccess:
    """What may be read to get a picture, and at what cost. Every field has a safe default.

    Raises:
        ValueError: If a limit is negative, or a time-out is not positive.
    """

    folder: str | os.PathLike[str] | None = None
    """Paths are taken from here and may not lead out of it, neither by ``..`` nor by a symbolic
    link. ``None``: every path is the caller's own, relative to the working directory."""

    allow_absolute_paths: bool = False
    """With a ``folder``: absolute paths are opened too, wherever they lead."""

    allow_private_hosts: bool = False
    """URLs may lead to loopback, private, link-local and other addresses that are not public."""

    cache_dir: str | os.PathLike[str] | None = None
    """Downloads are kept here. ``None``: the environment variable ``IDEFICS_QLORA_CACHE``, or else
    ``idefics_qlora`` in the user's cache folder."""

    max_cache_bytes: int = 32 * 2**30
    """Bytes on disk above which the pictures not used for longest are removed; 0 keeps none."""

    max_bytes: int = 64 * 2**20
    """Bytes of an encoded picture above which it is refused unread."""

    max_pixels: int = 64_000_000
    """Pixels above which a picture is refused undecoded. ``PIL.Image.MAX_IMAGE_PIXELS`` holds as
    well."""

    draft: bool = False
    """A JPEG far larger than the model's square is decoded at 1/2, 1/4 or 1/8 of its size, so that
    what is scaled down to the square has at least twice its side: quicker, and pixels differ by
    0.1 to 0.3 of 255 levels in the mean. A run cannot change it; pass it to ``evaluate`` and
    ``generate`` as well."""

    connect_timeout_s: float = 10.0
    """Seconds for the name's look-up, and for each connection with its TLS handshake."""

    read_timeout_s: float = 20.0
    """Seconds without a byte from the server after which a try is given up."""

    total_timeout_s: float = 120.0
    """Seconds for a whole download with its redirects, retries and waiting."""

    max_redirects: int = 5
    """Redirects followed; each is checked like the first address."""

    max_retries: int = 3
    """Further tries after a broken connection, a time-out, 408, 425, 429 or a 5xx answer."""

    max_wait_s: float = 30.0
    """Seconds between two tries at most, whatever the server's ``Retry-After`` asks for."""

    user_agent: str = "idefics_qlora"
    """Name the server is told; some sites want an address in it under which you can be reached."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("max_") and value < 0:
                raise ValueError(f"{name}={value!r}: expected 0 or more")
            if name.endswith("_timeout_s") and not value > 0:
                raise ValueError(f"{name}={value!r}: expected more than 0 seconds")


DEFAULT_ACCESS = ImageAccess()
"""Any file, public hosts only, the user's cache."""


_in_force: ContextVar[ImageAccess] = ContextVar("image_access", default=DEFAULT_ACCESS)


def access_in_force() -> ImageAccess:
    """What pictures are opened with where no access is named."""
    return _in_force.get()


@contextmanager
def opening_with(access: ImageAccess) -> Iterator[None]:
    """Let ``access`` be in force in this block.

    So the access of a whole run holds in a user's ``to_example`` as well, which is called with
    nothing but its row.
    """
    token = _in_force.set(access)
    try:
        yield
    finally:
        _in_force.reset(token)


_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://|(blob|data|file|ftps?|https?):", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether a string is an http(s) URL (``True``) or a file path (``False``).

    Raises:
        BadImage: If it is an address of another kind, such as ``file:`` or ``data:``.
    """
    if not (match := _ADDRESS.match(text.strip())):
        return False
    scheme = (match[1] or match[2]).lower()
    if scheme in ("http", "https"):
        return True
    raise BadImage(
        f"{text!r:.500}",
        f"a {scheme}: address: expected an http(s) URL, or a plain file path; "
        "pass a path of such a name as pathlib.Path",
    )


def find_file(source: str | os.PathLike[str], access: ImageAccess) -> Path:
    """The path of a regular file that ``access`` lets be read.

    Raises:
        BadImage: If there is none, it may not be read, is no regular file, or is too large.
    """
    name = f"{os.fspath(source)!r:.500}"
    path = Path(source)
    try:
        path = checked_path(name, path, access)
        # Before it is opened: a pipe or a device could block, or do something when opened.
        _check_file(name, path.stat(), access)
        return path
    except BadImage:
        raise
    except FileNotFoundError:
        told = os.fspath(source) == str(path.absolute())
        looked = "" if told else f" (looked for {path.absolute()})"
        raise BadImage(name, f"there is no such file{looked}") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in the name, ...
        raise BadImage(name, getattr(error, "strerror", None) or str(error)) from error


def read_file(source: str | os.PathLike[str], access: ImageAccess) -> bytes:
    """The content of that file.

    Raises:
        BadImage: If :func:`find_file` does, or it cannot be read.
    """
    name = f"{os.fspath(source)!r:.500}"
    path = find_file(source, access)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            _check_file(name, os.fstat(file.fileno()), access)  # exchanged in between, perhaps
            return file.read(access.max_bytes + 1)  # one too many is noticed when it is decoded
    except OSError as error:
        raise BadImage(name, error.strerror or str(error)) from error


def checked_path(name: str, path: Path, access: ImageAccess) -> Path:
    """Where a path leads, if ``access`` lets it lead there; whether there is a file is not asked.

    Raises:
        BadImage: If it leads out of the folder; ``name`` is what the error calls it.
    """
    if access.folder is None or (path.is_absolute() and access.allow_absolute_paths):
        return path
    folder = Path(access.folder).expanduser().resolve()
    resolved = (folder / path).resolve()  # an absolute path stays what it is
    if ".." in path.parts or not resolved.is_relative_to(folder):
        way_out = (
            ", or pass ImageAccess(allow_absolute_paths=True) if the rows may name any file"
            if path.anchor
            else ""
        )
        raise BadImage(name, f"leads out of {folder}: expected a path inside it{way_out}")
    return resolved


def _check_file(name: str, status: os.stat_result, access: ImageAccess) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BadImage(name, "a folder: expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise BadImage(name, "a pipe, socket or device: expected a regular file")
    check_size(name, status.st_size, access)


def check_size(name: str, num_bytes: int, access: ImageAccess) -> None:
    """Raise :class:`BadImage` if an encoded picture has more bytes than allowed."""
    if num_bytes > access.max_bytes:
        raise BadImage(name, f"more than {access.max_bytes} bytes (ImageAccess.max_bytes)")
