"""Rows that repeat: told by their content, read or unread."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
from PIL import Image
from torch import Tensor

from idefics_qlora.data.checks import items_of
from idefics_qlora.data.example import Example
from idefics_qlora.data.rows import Rows

COMPARED_ROWS = 20_000
"""Rows of each kind that are compared with each other as they are, unread."""


COMPARED_BYTES = 2**27
"""Bytes of pictures that are compared at most."""


ID_COLUMNS = frozenset({"id", "_id", "idx", "index", "row_id", "uuid", "__index_level_0__"})
"""Columns that differ between rows that are otherwise the same."""


def digest(value: Any, load: bool = True) -> bytes:
    """What tells a row, an example or a value in it from others: equal for equal content.

    Args:
        value: Of texts, numbers, pictures, arrays, and containers of them.
        load: Whether a picture that is opened but not decoded is decoded. Otherwise it is told by
            its file's name, or, without one, equal to none.

    Raises:
        TypeError: If there is an object whose content is not known.
    """
    hashed = hashlib.blake2b(digest_size=16)
    _update(hashed.update, value, load)
    return hashed.digest()


def digest_of(value: Any, load: bool = True) -> bytes | None:
    """The digest, or ``None`` where it cannot be told: of unknown objects and broken pictures."""
    try:
        return digest(value, load)
    except Exception:
        return None


def _update(update: Callable[[bytes], None], value: Any, load: bool) -> None:
    update(type(value).__name__.encode() + b"(")
    if isinstance(value, (bytes, bytearray)):
        update(bytes(value))
    elif isinstance(value, Mapping) and value.get("bytes") is not None:
        _update(update, value["bytes"], load)  # a picture, whatever the name of its file
    elif isinstance(value, Mapping):
        for item in value.items():
            _update(update, item, load)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(update, item, load)
    elif isinstance(value, Image.Image):
        if not load and getattr(value, "tile", None):
            update(str(getattr(value, "filename", "") or id(value)).encode())
        else:
            value.load()
            update(f"{value.mode} {value.size}".encode())
            update(value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            _update(update, getattr(value, part.name), load)
    elif isinstance(value, (np.ndarray, Tensor)):
        array = np.asarray(value)
        update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    elif isinstance(value, (str, int, float, os.PathLike)):
        update(str(value).encode(errors="surrogatepass"))
    elif isinstance(value, (date, Decimal, UUID, np.generic)):
        update(repr(value).encode())
    elif value is not None:
        raise TypeError(f"{type(value).__name__}: what it holds cannot be told")
    update(b")")


class Unread:
    """Rows as they are, unread: lists, tuples and tables of ``datasets``, where that costs little.

    Args:
        rows: Training or evaluation rows; the first ``COMPARED_ROWS`` are looked at.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows: Any = ()
        self.light: list[Any] = []
        """Of each row, texts and numbers: rows that are equal have equal ones."""
        if isinstance(rows, (list, tuple)):
            self._rows = rows[:COMPARED_ROWS]
            self.light = [_light(row) for row in self._rows]
        elif type(rows).__module__.startswith("datasets.") and hasattr(rows, "select"):
            table: Any = rows
            table = table.with_format("arrow").select(range(min(len(table), COMPARED_ROWS)))
            texts = [
                name
                for name, kind in table.features.items()
                if hasattr(kind, "dtype") and not hasattr(kind, "decode_example")
            ]
            self._rows = table
            self.light = [_light(row) for row in table.select_columns(texts)[:].to_pylist()]

    def whole(self, index: int) -> tuple[bytes | None, int]:
        """A row's digest (``None`` if it has none), and the bytes of its pictures."""
        row = self._rows[index]
        if hasattr(row, "to_pylist"):  # a table of one row, its pictures still encoded
            (row,) = row.to_pylist()
        if isinstance(row, Mapping):
            row = {key: value for key, value in row.items() if key not in ID_COLUMNS}
        return digest_of(row, load=False), _num_bytes(row)


def _light(value: Any) -> Any:
    if isinstance(value, Example):
        return (*map(_light, items_of(value.prompt)), value.completion)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return _light(value["bytes"])
    if isinstance(value, Mapping):
        return tuple(_light(item) for key, item in value.items() if key not in ID_COLUMNS)
    if isinstance(value, (list, tuple)):
        return tuple(map(_light, value))
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, Image.Image):
        return value.size
    return value if isinstance(value, (str, int, float)) else type(value).__name__


def _num_bytes(value: Any) -> int:
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, Example):
        return sum(map(_num_bytes, items_of(value.prompt)))
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def same_unread(every: Mapping[str, Unread]) -> dict[tuple[str, int], tuple[str, int]]:
    """Rows, by name and number, that are the same as an earlier one; and which one that is."""
    alike: dict[Any, list[tuple[str, int]]] = defaultdict(list)
    for name, rows in every.items():
        for index, light in enumerate(rows.light):
            alike[light].append((name, index))
    same: dict[tuple[str, int], tuple[str, int]] = {}
    num_bytes = 0
    for group in alike.values():
        first: dict[bytes | None, tuple[str, int]] = {}
        for name, index in group if len(group) > 1 else ():
            if num_bytes > COMPARED_BYTES:
                return same
            key, size = every[name].whole(index)
            num_bytes += size
            earlier = first.setdefault(key, (name, index))
            if key is not None and earlier != (name, index):
                same[name, index] = earlier
    return same
