"""Rows from files and folders, with the pictures beside them; knows nothing of models."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from idefics_qlora.data.captions import IMAGE_COLUMNS
from idefics_qlora.data.example import PICTURE_ENDING
from idefics_qlora.images.access import DEFAULT_ACCESS, BadImage, ImageAccess, checked_path, is_url
from idefics_qlora.images.opening import PICTURE_KEYS
from idefics_qlora.nearby import did_you_mean

METADATA = ("metadata.jsonl", "metadata.csv")
"""What a folder's metadata is called, as in the ``imagefolder`` of ``datasets``."""


def load_rows(
    path: str | os.PathLike[str],
    *,
    image: str | None = None,
    access: ImageAccess = DEFAULT_ACCESS,
) -> list[dict[str, Any]]:
    """Rows of a folder of pictures, or of a JSONL, JSON, CSV or parquet file beside its pictures.

    A folder has metadata, or folders of pictures that are named after their classes, which become
    ``label``. In ``image``, ``image_path``, ``image_url``, the list ``images`` and the parts of
    chat messages, a string that is no URL is the path of a picture, relative to the metadata's
    folder. A column ``file_name``, as ``imagefolder`` has it, becomes ``image``. Paths that leave
    the folder are refused, also by a symbolic link. The pictures are opened when their row is used;
    pass the same ``access`` there.

    ``datasets.load_dataset("imagefolder", data_dir=...)`` reads the same folders; its rows can be
    used as well. This function makes no copy in a cache, reads lists and messages with pictures,
    and its errors name file and line. What a parquet file holds is read into memory:
    ``datasets.load_dataset("parquet", data_files=...)`` suits larger ones.

    Args:
        path: A folder with ``metadata.jsonl`` or ``metadata.csv`` or with folders of pictures; or a
            file: ``.jsonl``, ``.csv`` or ``.tsv`` (commas, or, where its first line has none,
            semicolons or tabs), ``.json`` (a list of objects) in UTF-8, or ``.parquet``.
        image: Another column whose strings are paths of pictures, as ``Captions(image=...)`` names
            it.
        access: Its ``folder`` takes the place of the metadata's, and with ``allow_absolute_paths``
            absolute paths may lead anywhere.

    Returns:
        One dictionary per line, row or picture, pictures as absolute paths or as bytes; in a list,
        as training needs it.

    Raises:
        FileNotFoundError: If there is no such file, or neither metadata nor classes in the folder.
        ValueError: If a line cannot be read or a path leaves the folder; names file and line.
        ImportError: If what reads parquet files is not installed.
    """
    path = Path(path).expanduser()
    metadata = [path / name for name in METADATA if (path / name).is_file()]
    if path.is_dir() and not metadata:
        return _classes(path, access)
    if len(metadata) > 1:
        raise ValueError(f"{path} has both {' and '.join(METADATA)}: pass the one that is meant")
    file = metadata[0] if metadata else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder{did_you_mean(path)}")
    if file.suffix not in READERS:
        raise ValueError(
            f"{path}: expected a folder, or a file that ends in {' or '.join(READERS)}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{path}: expected a folder or a file")
    access = replace(access, folder=Path(access.folder or file.parent).expanduser().resolve())
    rows = []
    for place, row in READERS[file.suffix](file):
        try:
            rows.append(_with_paths(row, access, image))
        except (OSError, RuntimeError, ValueError) as error:  # the two: links in a circle
            raise ValueError(f"{file}, {place}: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _classes(folder: Path, access: ImageAccess) -> list[dict[str, Any]]:
    """A row for each picture of folders that are named after their classes."""
    access = replace(access, folder=Path(access.folder or folder).expanduser().resolve())
    rows: list[dict[str, Any]] = []
    for inner in _folders(folder):
        pictures = _pictures(inner)
        if deeper := [deep for deep in _folders(inner) if _pictures(deep)]:
            raise ValueError(
                f"{inner} holds folders of pictures ({', '.join(d.name for d in deeper[:3])}): "
                f"if these are the classes, pass {str(inner)!r}; if {inner.name!r} is one, put its "
                "pictures into it"
            )
        for picture in pictures:
            try:
                checked_path(f"{str(picture)!r}", picture.absolute(), access)
            except (BadImage, OSError, RuntimeError) as error:  # the two: links in a circle
                raise ValueError(str(error)) from error
            rows.append({"image": picture.absolute(), "label": inner.name})
    if not rows or _pictures(folder):
        raise FileNotFoundError(
            f"{folder} has neither {' nor '.join(METADATA)}, nor folders of pictures alone, named "
            'after classes: write the former with a line per picture, such as {"file_name": '
            '"a.png", "text": "..."}; of files with rows, pass the file itself; other folders are '
            'read by datasets.load_dataset("imagefolder", data_dir=...); pictures alone, '
            'to be captioned, are rows as they are: [{"image": path} for path in '
            'Path(folder).glob("*.jpg")]'
        )
    return rows


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    ending = re.compile(rf"[^.].*{PICTURE_ENDING}")  # not "._a.png", which macOS leaves
    return sorted(p for p in folder.iterdir() if ending.fullmatch(p.name))


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
            yield f"line {number}", row


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(max(csv.field_size_limit(), 2**24))  # a text may be long
        number = 1
        try:
            # Where there is no comma, what spreadsheets write instead.
            header, marks = lines.readline(), "\t,;" if file.suffix == ".tsv" else ",;\t"
            mark = next((mark for mark in marks if mark in header), ",")
            lines.seek(0)
            reader = csv.DictReader(lines, strict=True, delimiter=mark)
            columns = [*(reader.fieldnames or ())]
            if len(columns) == 1 and re.search(r"[^\w .-]", columns[0]):
                raise ValueError(
                    f"the header is one column, {columns[0]!r:.80}: expected commas, semicolons or "
                    "tabs between columns; save the table with one of these as its separator"
                )
            number = reader.line_num + 1  # where a row starts; in quotes it may span several lines
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(_other_number(row, columns, mark))
                yield f"line {number}", row
                number = reader.line_num + 1
        except UnicodeDecodeError:  # of a block of many lines
            raise _no_utf8(file) from None
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error


def _other_number(row: Mapping[Any, Any], columns: list[str], mark: str) -> str:
    """What is wrong with a line of more, or fewer, values than the header has columns."""
    values = [value for column in columns if (value := row[column]) is not None]
    number, way = len(values) + len(row.get(None, ())), ""
    if number > len(columns):
        values[-1] = mark.join([values[-1], *row[None]])
        quoted = io.StringIO()
        csv.writer(quoted, delimiter=mark, lineterminator="").writerow(values)
        kind = {",": "comma", ";": "semicolon"}.get(mark, "tab")
        way = f"; a text with a {kind} goes in quotes: {quoted.getvalue():.120}"
    return (
        f"{number} value{'s' * (number > 1)}, expected {len(columns)} (columns "
        f"{', '.join(columns)}, separated by {mark!r}){way}"
    )


def _no_utf8(file: Path) -> ValueError:
    """Names the line that is no UTF-8."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return ValueError(f"{file}, line {number}: {error}: save it in UTF-8")
    return ValueError(f"{file}: no UTF-8: save it in UTF-8")


def _json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of objects")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number}: {row!r:.80} is no JSON object")
        yield f"row {number}", row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from datasets import Features  # late: it takes seconds
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"{file}: parquet files are read by pyarrow, which comes with datasets ({error}): "
            'pip install "datasets>=4.0"'
        ) from error
    number = 0
    try:
        with ParquetFile(file) as table:
            features = Features.from_arrow_schema(table.schema_arrow)
            classes = {name: kind for name, kind in features.items() if hasattr(kind, "int2str")}
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    for name, kind in classes.items():  # rows of a table hold their numbers alone
                        known = row[name] is not None and row[name] >= 0  # -1: not told
                        row[name] = kind.int2str(row[name]) if known else None
                    yield f"row {number}", row
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's own are of both kinds
        raise ValueError(f"{file}, after {number} rows: no parquet: {error}") from error


READERS = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".json": _json, ".parquet": _parquet}
"""By the end of a file's name: what gives its rows, each with its place for errors."""


def _with_paths(row: dict[str, Any], access: ImageAccess, image: str | None) -> dict[str, Any]:
    row = dict(row)
    if "file_name" in row and image != "file_name":
        if "image" in row:
            raise ValueError("the row has both `file_name` and `image`: keep one")
        row["image"] = row.pop("file_name")
    if isinstance(row.get("file_names"), list):
        row["images"] = row.pop("file_names")
    if other := [name for name in row if name.endswith(("_file_name", "_file_names"))]:
        raise ValueError(f"{other[0]!r} is no column of pictures here: use `image` or `images`")
    for column in dict.fromkeys([*IMAGE_COLUMNS, *([image] if image else [])]):
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
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            pictures = {key: part[key] for key in PICTURE_KEYS if key in part}
            inside = {key: _inside(value, access, column) for key, value in pictures.items()}
            content[i] = {**part, **inside}
    return {**message, "content": content}


def _inside(value: Any, access: ImageAccess, column: str) -> Any:
    """The path of a picture below the folder; what is no path stays, and is judged when opened."""
    if isinstance(value, list):
        return [_inside(item, access, column) for item in value]
    if isinstance(value, Mapping):  # {"bytes": ..., "path": ...}, or {"url": ...}
        key = "path" if value.get("bytes") is None else None
        key = "url" if "url" in value else key
        return {**value, key: _inside(value[key], access, column)} if key in value else value
    if not isinstance(value, str):
        return value
    address = value.strip()
    if not address or re.match("data:[^,]*;base64,", address) or is_url(address):
        return address
    try:
        checked_path(value, Path(value), access)
    except BadImage as error:
        raise ValueError(f"{column}={value!r} {error.reason}") from error
    return Path(access.folder or "", value)
