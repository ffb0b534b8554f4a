"""Examples from a picture and columns of text, by templates; the tutorial's rows."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from idefics_qlora.data.example import PICTURE_ENDING, Example, open_value
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.nearby import nearest

IMAGE_COLUMNS = ("image", "image_path", "image_url")
"""Where a row's one picture is looked for."""


QUESTION = "Question: What's on the picture? Answer:"
"""The tutorial's prompt text."""


def has_value(row: Mapping[str, Any], column: str) -> bool:
    """Whether the column is there and neither ``None`` nor an empty text."""
    value = row.get(column)
    return value is not None and not (isinstance(value, str) and not value)


def first_picture(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, str]:
    """The first of these columns' values that is there, and the name of its column."""
    for column in columns:
        if has_value(row, column):
            return row[column], column
    names = " nor ".join(f"`{column}`" for column in columns)
    raise ValueError(f"the row has no picture: neither {names} has a value")


def has_picture(row: Mapping[str, Any], image: str | None) -> bool:
    """Whether the row has a value in this column, or for ``None`` in one of ``IMAGE_COLUMNS``."""
    return any(has_value(row, column) for column in (IMAGE_COLUMNS if image is None else (image,)))


def has_picture_ending(text: str) -> bool:
    """Whether a text ends as the names of pictures do."""
    return re.fullmatch(rf"\s*\S.*{PICTURE_ENDING}\s*", text) is not None


def meant_picture(row: Mapping[str, Any]) -> str:
    """Asks whether a column with the path of a picture is misnamed; empty if none looks so."""
    for column, value in row.items():
        if isinstance(value, (str, os.PathLike)) and has_picture_ending(os.fsdecode(value)):
            if column == "file_name":  # `load_rows` would have renamed it
                return "did you mean `image` for `file_name`?"
            return f"did you mean `file_name` for `{column}`? (in rows that no file holds, `image`)"
    return ""


def pokemon_card_example(
    row: Mapping[str, Any], *, question: str = QUESTION, access: ImageAccess | None = None
) -> Example:
    """The tutorial's example from a row of the PokemonCards dataset (or one with its columns).

    Args:
        row: Has ``name``, ``caption`` and the picture as ``image``, or as ``image_path`` or
            ``image_url`` (each a URL or a file path).
        question: The prompt's text, after the picture.
        access: How pictures may be opened; ``None``: as for :func:`~images.open_image`.

    Returns:
        ``[image, question]`` with the completion
        ``" This is {name}. {first sentence of caption}"``.

    Raises:
        ValueError: If the name, the caption or the picture is missing, or the picture is bad.
    """
    for column in ("name", "caption"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"{column}={row[column]!r}: expected text")
    text = f" This is {row['name']}. {first_sentence(row['caption'])}"
    return Example([open_value(*first_picture(row, IMAGE_COLUMNS), access), question], text)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """A ``to_example`` for rows of a picture and columns of text, by templates.

    ``Captions(answer=" {title}. {text}")`` makes an example of a row with ``image``, ``title`` and
    ``text``. Values are put in as they are and never read as templates.

    Attributes:
        answer: Template of the completion: text with ``{column}`` fields (``{{`` for a brace).
        question: Template of the prompt's text, after the picture.
        image: The picture's column. Its values are PIL images (as a ``datasets.Image`` column has
            them), bytes, mappings with ``bytes`` or ``path``, paths, or strings, which are URLs or
            paths. ``None``: the first of ``image``, ``image_path`` and ``image_url`` with a value.
        access: How pictures may be opened; ``None``: as for ``images.open_image``.

    Raises:
        ValueError: If a template is none; and, when called, if a column is missing or has no value
            (``BadImage`` if the picture cannot be opened).
    """

    answer: str
    question: str = QUESTION
    image: str | None = None
    access: ImageAccess | None = None

    def __post_init__(self) -> None:
        for name in ("answer", "question"):
            _fields(name, getattr(self, name))

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """The row's example."""
        answer = _fill("answer", self.answer, row)
        return Example(self.prompt(row), answer)

    def prompt(self, row: Mapping[str, Any]) -> list[Any]:
        """The example's prompt alone; columns of the answer may be missing."""
        columns = IMAGE_COLUMNS if self.image is None else (self.image,)
        if not any(column in row for column in columns):
            names = " nor ".join(f"`{column}`" for column in columns)
            way = meant_picture(row) or "pass image=its picture column"
            raise ValueError(f"the row has {sorted(row)}, not {names}: {way}")
        question = self.text(row)
        return [open_value(*first_picture(row, columns), self.access), question]

    def text(self, row: Mapping[str, Any]) -> str:
        """The prompt's text alone."""
        return _fill("question", self.question, row)


def columns_of(name: str, template: str) -> list[str]:
    """The columns that a template of this name asks for."""
    return [column for _, column in _fields(name, template) if column is not None]


def _fields(name: str, template: str) -> list[tuple[str, str | None]]:
    """The template's literal texts, each with the column that follows it."""
    try:
        parsed = list(string.Formatter().parse(template))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={template!r}: {error}; write a brace itself as {{{{") from error
    for _, column, spec, conversion in parsed:
        # Attributes and indices would reach beyond the row's values, so a field is a column's name.
        if column is not None and (
            not column or re.search(r"[.\[\]]", column) or spec or conversion
        ):
            raise ValueError(
                f"{name}={template!r}: expected fields of the form {{column}}, with the column's "
                "plain name"
            )
    return [(literal, column) for literal, column, _, _ in parsed]


def _fill(name: str, template: str, row: Mapping[str, Any]) -> str:
    parts = []
    for literal, column in _fields(name, template):
        parts.append(literal)
        if column is None:
            continue
        if column not in row:
            meant = nearest(column, row)
            raise ValueError(
                f"column {column!r}, which {name}={template!r} asks for, is missing; the row has "
                f"{sorted(row)}" + (f": did you mean {{{meant}}}?" if meant else "")
            )
        value = row[column]
        if not isinstance(value, (str, Real)) or value != value:  # NaN, as pandas marks a gap
            raise TypeError(f"{column}={value!r:.80}: expected text or a number")
        if not str(value).strip():
            raise ValueError(f"{column}={value!r} is empty: expected text")
        parts.append(str(value))
    return "".join(parts)


_ABBREVIATIONS = ("Mr", "Mrs", "Ms", "Dr", "Lt", "Jr", "Sr", "St", "Mt", "vs", "Prof", "Gen", "e.g")


_SENTENCE_END = re.compile(
    r"(?<!\.)(?<!\b[A-Z])"  # neither an ellipsis nor an initial
    + "".join(rf"(?<!\b{re.escape(word)})" for word in _ABBREVIATIONS)
    + r"(?!(?<=\bNo)\.\s+\d)"  # "No. 151", but not the answer "No."
    + r"[.!?](?=\s+[^a-z\s]|\s*$)"
)


def first_sentence(text: str) -> str:
    """The first sentence of ``text``, with its full stop.

    A full stop ends a sentence when the next word does not begin in lower case, unless it belongs
    to an abbreviation ("Mr. Mime", "Lt. Surge's", "No. 151"), an initial or an ellipsis. Without
    any such end the whole text is one sentence.
    """
    text = " ".join(text.split())
    end = _SENTENCE_END.search(text)
    return text[: end.end()] if end else text
