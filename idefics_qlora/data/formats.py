"""Row formats that people have, and how each becomes an example."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from idefics_qlora.data.example import (
    Example,
    ToExample,
    Turn,
    are_messages,
    named_messages,
    open_value,
    open_values,
    turns_of,
)
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess, opening_with


def as_example(
    row: Any, to_example: ToExample | None = None, access: ImageAccess = DEFAULT_ACCESS
) -> Example:
    """The row's :class:`Example`.

    Args:
        row: One row of the training or evaluation rows.
        to_example: The user's conversion, or ``None`` for rows that are examples already, or
            mappings with ``messages``, or with ``prompt`` and ``completion``, or rows like
            PokemonCards'. Images stand in the texts' parts or in ``images`` (or one in ``image``).
        access: What the row's pictures are opened with, unless ``to_example`` names another.

    Raises:
        TypeError: If the row has no known format, or a value in it has the wrong type.
        ValueError: If a value in it cannot be used (``BadImage`` for an image).
        KeyError: If ``to_example`` asks for a column that is not there.
    """
    with opening_with(access):
        return _as_example(row, to_example)


def _as_example(row: Any, to_example: ToExample | None) -> Example:
    if to_example is not None:
        example = to_example(row)
        if not isinstance(example, Example):
            raise TypeError(f"to_example returned {example!r:.80}: expected an Example")
        return example
    if isinstance(row, Example):
        return row
    if isinstance(row, Mapping):
        if "messages" in row:
            return _dialogue_example(named_messages("messages", row["messages"]), _images(row))
        if {"prompt", "completion"} <= row.keys():
            return _prompt_completion_example(row)
        if {"name", "caption"} <= row.keys():
            return pokemon_card_example(row)
    columns = f"columns {sorted(row)}" if isinstance(row, Mapping) else f"type {type(row).__name__}"
    raise TypeError(
        f"a row with {columns} is no known format: expected an Example, or `messages`, or `prompt` "
        "and `completion`, or `image`, `name` and `caption`; otherwise pass "
        'to_example=idefics_qlora.Captions(answer=" {your_column}") or a function of your own'
    )


def _prompt_completion_example(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if are_messages(prompt):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        messages = [*named_messages("prompt", prompt), *named_messages("completion", completion)]
        return _dialogue_example(messages, _images(row), len(prompt))
    if isinstance(prompt, str):
        return Example([*open_values(_images(row)), prompt], completion)
    if _images(row):
        raise ValueError(
            "the row has images beside a `prompt` that is a list of items: put them into the list"
        )
    return Example(prompt, completion)


def _dialogue_example(
    messages: list[tuple[str, Any]], images: Sequence[Any], learnt_from: int = 0
) -> Example:
    """The last turn as completion; of the others, those before ``learnt_from`` are context."""
    *context, last = turns_of(messages, images)
    if last.role != "assistant":
        raise ValueError(
            f"{messages[-1][0]} is the last message and has role={last.role!r}: expected an "
            "assistant turn, which the model learns; remove what follows it, or the row"
        )
    context = [Turn(t.role, t.content) if i < learnt_from else t for i, t in enumerate(context)]
    return Example(context, str(last.content[0]))


IMAGE_COLUMNS = ("image", "image_path", "image_url")
"""Where a row's one picture is looked for."""


QUESTION = "Question: What's on the picture? Answer:"
"""The tutorial's prompt text."""


def _images(row: Mapping[str, Any]) -> Sequence[Any]:
    """What the row has in ``images``, or in an image column, not opened; empty without either."""
    # `datasets` gives every row all columns, so None and an absent column mean the same.
    if row.get("images") is not None:
        images = row["images"]
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes, bytearray)):
            raise TypeError(
                f"images={images!r:.80}: expected a list; an empty one for a row without pictures"
            )
        return images
    columns = [column for column in IMAGE_COLUMNS if row.get(column) not in (None, "")]
    return [_image(row, columns)[0]] if columns else []


def _image(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, str]:
    """The first of these columns' values that is there, and the name of its column."""
    for column in columns:
        if row.get(column) is not None and row[column] != "":
            return row[column], column
    names = " nor ".join(f"`{column}`" for column in columns)
    raise ValueError(f"the row has no picture: neither {names} has a value")


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
    return Example([open_value(*_image(row, IMAGE_COLUMNS), access), question], text)


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
        columns = IMAGE_COLUMNS if self.image is None else (self.image,)
        if not any(column in row for column in columns):
            names = " nor ".join(f"`{column}`" for column in columns)
            raise ValueError(
                f"the row has {sorted(row)}, not {names}: pass image=its picture column"
            )
        question = _fill("question", self.question, row)
        answer = _fill("answer", self.answer, row)
        return Example([open_value(*_image(row, columns), self.access), question], answer)


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
            raise ValueError(
                f"column {column!r}, which {name}={template!r} asks for, is missing; the row has "
                f"{sorted(row)}"
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
