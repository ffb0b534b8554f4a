"""Rows from files: JSONL or CSV, and the pictures beside it; knows nothing of models."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from idefics_qlora.data.formats import IMAGE_COLUMNS
from idefics_qlora.images.access import DEFAULT_ACCESS, BadImage, ImageAccess, checked_path, is_url

METADATA = ("metadata.jsonl", "metadata.csv")
"""What a folder's metadata is called, as in the ``imagefolder`` of ``datasets``."""


def load_rows(
    path: str | os.PathLike[str], *, access: ImageAccess = DEFAULT_ACCESS
) -> list[dict[str, Any]]:
    """Rows of a folder of pictures with metadata, or of a JSONL or CSV file beside its pictures.

    In ``image``, ``image_path``, ``image_url``, the list ``images`` and the parts of chat messages,
    a string that is no URL is the path of a picture, relative to the metadata's folder. A column
    ``file_name``, as ``imagefolder`` has it, becomes ``image``. Paths that leave the folder are
    refused, also by a symbolic link. The pictures are opened when their row is used; pass the same
    ``access`` there.

    ``datasets.load_dataset("imagefolder", data_dir=...)`` reads the same folders (and folders
    without metadata); its rows can be used as well. This function makes no copy in a cache, reads
    lists and messages with pictures, and its errors name file and line.

    Args:
        path: A folder with ``metadata.jsonl`` or ``metadata.csv``, or a ``.jsonl`` or ``.csv`` file
            in UTF-8.
        access: Its ``folder`` takes the place of the metadata's, and with ``allow_absolute_paths``
            absolute paths may lead anywhere.

    Returns:
        One dictionary per line, pictures as absolute paths; in a list, as training needs it.

    Raises:
        FileNotFoundError: If there is no such file, or no metadata in the folder.
        ValueError: If a line cannot be read or a path leaves the folder; names file and line.
    """
    file = _metadata_file(Path(path).expanduser())
    access = replace(access, folder=Path(access.folder or file.parent).expanduser().resolve())
    rows = []
    for line, row in _jsonl(file) if file.suffix == ".jsonl" else _csv(file):
        try:
            rows.append(_with_paths(row, access))
        except (OSError, RuntimeError, ValueError) as error:  # the two: links in a circle
            raise ValueError(f"{file}, line {line}: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _metadata_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix not in (".jsonl", ".csv"):
            raise ValueError(f"{path}: expected a folder, or a file that ends in .jsonl or .csv")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        return path
    found = [path / name for name in METADATA if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path} has neither {' nor '.join(METADATA)}: write one with a line per picture, such "
            'as {"file_name": "a.png", "text": "..."}; for folders named after classes, use '
            'datasets.load_dataset("imagefolder", data_dir=...)'
        )
    if len(found) > 1:
        raise ValueError(f"{path} has both {' and '.join(METADATA)}: pass the one that is meant")
    return found[0]


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: no JSON in UTF-8: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: {row!r:.80} is no JSON object")
            yield number, row


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(max(csv.field_size_limit(), 2**24))  # a text may be long
        reader = csv.DictReader(lines, strict=True)
        number = 1
        try:
            columns = len(reader.fieldnames or ())
            number = reader.line_num + 1  # where a row starts; in quotes it may span several lines
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"expected {columns} values, as many as the header has")
                yield number, row
                number = reader.line_num + 1
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error


def _with_paths(row: dict[str, Any], access: ImageAccess) -> dict[str, Any]:
    row = dict(row)
    if "file_name" in row:
        if "image" in row:
            raise ValueError("the row has both `file_name` and `image`: keep one")
        row["image"] = row.pop("file_name")
    if isinstance(row.get("file_names"), list):
        row["images"] = row.pop("file_names")
    if other := [name for name in row if name.endswith(("_file_name", "_file_names"))]:
        raise ValueError(f"{other[0]!r} is no column of pictures here: use `image` or `images`")
    for column in IMAGE_COLUMNS:
        if column in row:
            row[column] = _inside(row[column], access, column)
    if isinstance(row.get("images"), list):
        row["images"] = [
            _inside(image, access, f"images[{i}]") for i, image in enumerate(row["images"])
        ]
    for column in ("messages", "prompt", "completion"):
        if isinstance(row.get(column), list):
            row[column] = [_message(message, access, column) for message in row[column]]
    return row


def _message(message: Any, access: ImageAccess, column: str) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    content = list(message["content"])
    for i, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") == "image":
            pictures = {key: part[key] for key in ("image", "path", "url") if key in part}
            inside = {key: _inside(value, access, column) for key, value in pictures.items()}
            content[i] = {**part, **inside}
    return {**message, "content": content}


def _inside(value: Any, access: ImageAccess, column: str) -> Any:
    """The path of a picture below the folder; what is no path stays, and is judged when opened."""
    if not isinstance(value, str) or not value.strip() or is_url(value.strip()):
        return value.strip() if isinstance(value, str) else value
    try:
        checked_path(value, Path(value), access)
    except BadImage as error:
        raise ValueError(f"{column}={value!r} {error.reason}") from error
    return Path(access.folder or "", value)
