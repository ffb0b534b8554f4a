"""Files that can be relied on: written to the disk itself, and verified when they are read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from safetensors.torch import load
from torch import Tensor

Part: TypeAlias = "bytes | memoryview"


DAMAGE = frozenset(
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENXIO", "ENODEV")
)
"""Errors that tell of a file that is none. All others may pass, and must not make a good checkpoint
look damaged."""


NO_WAITING = getattr(os, "O_NONBLOCK", 0)
"""Opens a pipe without waiting for its writer; Windows has none that a path names."""


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or altered; the message names folder, file and reason."""


@contextmanager
def _opened(path: Path, size: int | None) -> Iterator[BinaryIO]:
    """A file to be read, of so many bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_WAITING)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} cannot be read: it is no file")
            if size not in (None, status.st_size):
                raise CheckpointError(
                    f"{path} has {status.st_size} bytes, its manifest says {size}"
                )
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except CheckpointError:
        raise
    except ValueError as error:  # a name that cannot be one
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    except OSError as error:
        if error.errno not in DAMAGE:
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_whole(path: Path, size: int | None = None) -> bytes:
    """Content of a file.

    Args:
        path: The file.
        size: Bytes that it must have.

    Raises:
        CheckpointError: If there is no such file, or it has another size.
        OSError: If it cannot be read for a reason that may pass.
    """
    with _opened(path, size) as file:
        return file.read()


def sha256_of_file(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal, without holding all of it in memory.

    Arguments and errors as in :func:`read_whole`.
    """
    digest = hashlib.sha256()
    with _opened(path, size) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def json_mapping(path: Path, content: bytes) -> dict[str, Any]:
    """A file's JSON object."""
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"it is no object but {value!r:.40}")
        return value
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def tensors_in(path: Path, content: bytes) -> dict[str, Tensor]:
    """A file's tensors, on the CPU."""
    try:
        return load(content)
    except Exception as error:  # what the library raises for a header that is none is not told
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def sha256_of(*parts: Part) -> str:
    """SHA-256 of some parts one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them, in the order of its files: the widest first, so all are aligned."""


def tensor_parts(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> list[Part]:
    """What ``safetensors.torch.save`` returns, in parts that are the tensors' own memory.

    The library's function copies all of it twice, which takes longer than writing it, and refuses
    tensors that share memory, as the optimizer's maps do.
    """
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return list(tensor_file(kinds, tensors.__getitem__, metadata))


def tensor_file(
    kinds: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor_of: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> Iterator[Part]:
    """A safetensors file part by part: a tensor is asked for when its turn comes.

    Args:
        kinds: Dtype and shape of each tensor.
        tensor_of: Gives the tensor of a name.
        metadata: The file's own.
    """
    order = {dtype: number for number, dtype in enumerate(_DTYPES)}
    names = sorted(kinds, key=lambda name: (order[kinds[name][0]], name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    yield len(described).to_bytes(8, "little")
    yield described
    for name in names:
        tensor = tensor_of(name).detach().cpu()  # sync
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def json_bytes(value: Any) -> bytes:
    """A value as readable JSON."""
    return json.dumps(value, indent=2).encode()


def write_synced(path: Path, parts: Iterable[Part]) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Give a file a content, all of it or none; one that has it already is left as it is."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.unlink(missing_ok=True)  # left behind by a killed process
    with contextlib.suppress(OSError, CheckpointError):
        if read_whole(path, size=len(content)) == content:
            return
    try:
        write_synced(temporary, [content])
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file that something else has written is on the disk."""
    with path.open("rb+") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows opens no folders, nor needs it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_is_free(target: Path) -> None:
    """See that a folder can be made.

    Raises:
        FileExistsError: If there is something of its name.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already: delete it, or choose another folder")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder, to be filled in this block; it gets its name when all is on the disk.

    Until then it is a hidden sibling: a process killed at any moment leaves a whole folder or none
    of this name, and an error leaves nothing.

    Raises:
        FileExistsError: If there is something of this name.
    """
    check_is_free(target)
    temporary = target.with_name(f".{target.name}.incomplete")
    try:
        if temporary.exists():  # left behind by a killed process
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                sync_file(path)
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space
        raise
