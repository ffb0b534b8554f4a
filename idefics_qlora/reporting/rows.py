"""The rows of the gallery: pictures, right texts, and what was said of them, word by word."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from idefics_qlora.durable import read_whole
from idefics_qlora.reporting.folder import RunFolder, mappings, number
from idefics_qlora.reporting.words import marked

MOST_ROWS = 12
MOST_IMAGES = 4
MOST_BETWEEN = 4
"""Captions between the first and the last that are shown."""
MOST_CHARACTERS = 2000
SIDE = 320
SMALLEST = 1000
"""Bytes of any picture at least."""
LARGEST_FILE = 2**16
"""Bytes of a picture that is embedded as it is; larger ones are made smaller."""


class Pictures:
    """Pictures as text that a page can hold, until so many bytes are used up."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._known: dict[Path, dict[str, Any] | None] = {}

    def of(self, folder: Path, name: Any) -> dict[str, Any] | None:
        """A picture's source, width and height; ``None`` if it is not there, or there is no room.

        Args:
            folder: The run's.
            name: The file's in it.
        """
        path = (folder / str(name)).resolve()
        if not path.is_relative_to(folder.resolve()):
            return None
        if self._left < SMALLEST:
            return None
        if path not in self._known:
            self._known[path] = _read(path)
        picture = self._known[path]
        if picture is None or len(picture["source"]) > self._left:
            return None
        self._left -= len(picture["source"])
        return picture


def _read(path: Path) -> dict[str, Any] | None:
    """A picture as a page holds it, made small."""
    with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        content = read_whole(path)
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP", "JPEG")) as image:
            image.load()
            if image.format != "WEBP" or len(content) > LARGEST_FILE:
                small = image.convert("RGB")
                small.thumbnail((SIDE, SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "WEBP", quality=80)
                content = buffer.getvalue()
            width, height = image.size
        source = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
        shrunk = min(1.0, SIDE / max(width, height))
        size = max(1, round(width * shrunk)), max(1, round(height * shrunk))
        return {"source": source, "width": size[0], "height": size[1]}
    return None


def gallery(runs: Sequence[tuple[str, RunFolder]], pictures: Pictures) -> list[dict[str, Any]]:
    """The rows that any of the runs shows, each with what every run said of it.

    Args:
        runs: Each with its label.
        pictures: Has what room there is.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for label, run in runs:
        for entry in _entries(run):
            key = entry["row"], entry["right"][0]
            if key not in rows:
                if len(rows) == MOST_ROWS:
                    continue
                rows[key] = {**_shown(entry, run, pictures), "said": []}
            said = [
                {"when": when, "text": text, **_marked(text, entry["right"])}
                for when, text in _said(entry, run)
            ]
            rows[key]["said"].append({"run": label, "texts": said})
    return list(rows.values())


def highest(run: RunFolder, pictures: Pictures) -> list[dict[str, Any]]:
    """The rows of the highest loss."""
    return [
        {
            **_shown(entry, run, pictures),
            "loss": entry["loss"],
            "said": None if entry["text"] is None else _marked(entry["text"], entry["right"]),
        }
        for raw in mappings(run.gallery.get("highest"))[:MOST_ROWS]
        if (entry := _entry(raw)) is not None
    ]


def _entries(run: RunFolder) -> list[dict[str, Any]]:
    """The gallery's rows; of a run that kept none, those of its samples."""
    kept = [_entry(row) for row in mappings(run.gallery.get("rows"))]
    samples = {str(s.get("row")): s for s in run.samples}
    known = {entry["row"] for entry in kept if entry}
    kept += [
        _entry({**s, "right": [s.get("target")], "text": None})
        for name, s in samples.items()
        if name not in known
    ]
    return [entry for entry in kept if entry is not None]


def _entry(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row as it was kept, as far as it is one."""
    texts = [text.strip() for text in _list(raw.get("right")) if isinstance(text, str)]
    if not texts:
        return None
    return {
        "row": str(raw.get("row")),
        "files": [name for name in _list(raw.get("files")) if isinstance(name, str) and name],
        "images": _list(raw.get("images"))[:MOST_IMAGES],
        "more_images": int(number(raw.get("more_images")) or 0),
        "seen": _sizes(raw.get("seen")),
        "prompt": str(raw.get("prompt") or ""),
        "right": texts,
        "base": raw.get("base") if isinstance(raw.get("base"), str) else None,
        "text": raw.get("text") if isinstance(raw.get("text"), str) else None,
        "loss": number(raw.get("loss")),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shown(entry: Mapping[str, Any], run: RunFolder, pictures: Pictures) -> dict[str, Any]:
    """What a row is, for the page."""
    return {
        "row": entry["row"],
        "files": ", ".join(map(_cut, entry["files"][:MOST_IMAGES])),
        "prompt": _cut(entry["prompt"]),
        "right": [_cut(text) for text in entry["right"][:5]],
        "images": [pictures.of(run.path, name) for name in entry["images"]],
        "more_images": entry["more_images"],
        "as_seen": _as_seen(entry),
    }


def _sizes(value: Any) -> list[str]:
    """Widths and heights as text; empty if they were not kept."""
    pairs = [pair for pair in _list(value) if isinstance(pair, list) and len(pair) == 2]
    texts = ((str(number(side)).removesuffix(".0") for side in pair) for pair in pairs)
    return [" \N{MULTIPLICATION SIGN} ".join(sides) for sides in texts]


def _as_seen(entry: Mapping[str, Any]) -> str:
    """Whether the pictures are those of the row, or what the model sees; empty without any."""
    if not entry["images"]:
        return ""
    if not entry["seen"]:
        return "as the model sees it"
    return f"the model sees {', '.join(dict.fromkeys(entry['seen']))} pixels"


def _said(entry: Mapping[str, Any], run: RunFolder) -> list[tuple[str, str]]:
    """When what was said of a row: before training, in between, after it."""
    captioned = run.gallery.get("captioned")
    steps = {
        s["step"]: s["text"]
        for s in run.samples
        if s.get("row") == entry["row"] and isinstance(s.get("text"), str)
    }
    if entry["text"] is not None and captioned is None:  # of the last evaluation
        steps.setdefault(run.gallery.get("step", 0), entry["text"])
    after = entry["text"] if captioned is not None else None
    between = sorted(step for step in steps if after is None or step != captioned)
    if len(between) > MOST_BETWEEN:
        last = len(between) - 1
        between = [between[i * last // (MOST_BETWEEN - 1)] for i in range(MOST_BETWEEN)]
    said = [] if entry["base"] is None else [("base, before training", entry["base"])]
    said += [(f"step {step}", steps[step]) for step in between]
    if after is not None:
        best = ", the best" if run.best == f"checkpoint-{captioned}" else ""
        said.append((f"after training (step {captioned}{best})", after))
    return said


def _marked(text: str, right: Sequence[str]) -> dict[str, Any]:
    found = marked(_cut(text), right)
    return vars(found)


def _cut(text: str) -> str:
    text = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    text = text.strip()
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
