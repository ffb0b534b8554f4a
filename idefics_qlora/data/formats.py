"""Row formats that people have, in one table; the function of each is in ``converters.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

from idefics_qlora.data import converters
from idefics_qlora.data.captions import (
    IMAGE_COLUMNS,
    Captions,
    first_picture,
    has_value,
    meant_picture,
    pokemon_card_example,
)
from idefics_qlora.data.example import (
    Example,
    PromptItem,
    ToExample,
    as_prompt,
    naming_row,
)
from idefics_qlora.data.templates import for_row
from idefics_qlora.images.access import DEFAULT_ACCESS, BadImage, ImageAccess, opening_with


def as_example(
    row: Any,
    to_example: ToExample | None = None,
    access: ImageAccess = DEFAULT_ACCESS,
    trained: Captions | None = None,
) -> Example:
    """The row's :class:`Example`.

    Args:
        row: One row of the training or evaluation rows.
        to_example: The user's conversion, or ``None`` for rows that are examples already, or
            mappings in one of the :data:`FORMATS`.
        access: What the row's pictures are opened with, unless ``to_example`` names another.
        trained: With what the model was trained: without a ``to_example``, rows that say nothing of
            what is asked are asked the same.

    Raises:
        TypeError: If the row has no known format, or a value in it has the wrong type.
        ValueError: If a value in it cannot be used (``BadImage`` for an image).
        KeyError: If ``to_example`` asks for a column that is not there.
    """
    with opening_with(access):
        if to_example is not None:
            example = to_example(row)
            if not isinstance(example, Example):
                raise TypeError(f"to_example returned {example!r:.80}: expected an Example")
            return example
        if isinstance(row, Mapping) and (captions := for_row(row, trained)) is not None:
            with _as_trained():
                return captions(row)
        return row if isinstance(row, Example) else _known_example(row)


def prompt_of(
    row: Any,
    to_example: ToExample | None = None,
    access: ImageAccess = DEFAULT_ACCESS,
    trained: Captions | None = None,
) -> Sequence[PromptItem]:
    """What a model is asked by a row; its answer is not looked at and may be missing.

    Args:
        row: As for :func:`as_example`, or a prompt.
        to_example: As for :func:`as_example`; it may return a prompt instead of an example.
        access: As for :func:`as_example`.
        trained: As for :func:`as_example`.

    Raises:
        TypeError, ValueError, KeyError: As :func:`as_example`.
    """
    with opening_with(access):
        if isinstance(to_example, Captions):
            return to_example.prompt(row)
        if to_example is not None:
            row = to_example(row)
        elif isinstance(row, Mapping):
            if (captions := for_row(row, trained)) is not None:
                with _as_trained():
                    return captions.prompt(row)
            return _known_example(_answered(row)).prompt
        return row.prompt if isinstance(row, Example) else as_prompt(row)


@contextmanager
def _as_trained() -> Iterator[None]:
    """Say whose templates a row does not fit."""
    try:
        yield
    except BadImage:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{error} (so the model was trained; for other rows pass to_example="
            "idefics_qlora.Captions(...) or a function of your own)"
        ) from error


class Format(NamedTuple):
    """A kind of rows."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    """Columns that such a row has; of each tuple, one."""
    answer: tuple[str, ...]
    """Those of them that hold nothing but the answer: generation can do without."""
    becomes: str
    convert: Callable[[Mapping[str, Any]], Example]

    def missing(self, row: Container[str]) -> list[tuple[str, ...]]:
        """What the row, or its columns, lack; of each tuple one."""
        return [columns for columns in self.needs if not any(c in row for c in columns)]


def _known_example(row: Any) -> Example:
    if not isinstance(row, Mapping):
        raise TypeError(
            f"a row with type {type(row).__name__} is no known format: expected an Example or a "
            "mapping of columns; otherwise pass to_example= a function of your own"
        )
    for columns in (_filled(row), row):
        for known in FORMATS:
            if not known.missing(columns):
                return known.convert(row)
    if not any(column in row for column in ("images", *IMAGE_COLUMNS, *_PICTURE_FILES)) and (
        meant := meant_picture(row)
    ):
        raise TypeError(f"the row has {sorted(map(str, row))} and no picture: {meant}")
    image = "" if any(column in row for column in IMAGE_COLUMNS) else 'image="picture_column", '
    raise TypeError(
        f"a row with columns {sorted(map(str, row))} is no known format; {_nearest(row)}; "
        f'otherwise pass to_example=idefics_qlora.Captions({image}answer=" {{your_column}}") or a '
        "function of your own"
    )


def _filled(row: Mapping[str, Any]) -> set[str]:
    """The columns with a value: in a table of several kinds of rows, each row has those of all."""
    return {
        column
        for column, value in row.items()
        if has_value(row, column) and not (isinstance(value, float) and value != value)  # a gap
    }


def _nearest(row: Mapping[str, Any]) -> str:
    """The formats that came nearest to a row, and what each missed."""
    columns = [column for column in row if isinstance(column, str)]
    found = []
    for known in FORMATS:
        missing = known.missing(row)
        alike = {
            needed: match
            for one_of in missing
            for needed in one_of
            for match in _alike(needed, columns)
        }
        near = len(known.needs) - len(missing) + len({*alike.values()}) / 2
        if near:
            lacks = ", ".join(" or ".join(f"`{column}`" for column in one) for one in missing)
            typed = "".join(f" (`{have}` for `{need}`?)" for need, have in alike.items())
            found.append((near / len(known.needs), f"{known.name} misses {lacks}{typed}"))
    found.sort(key=lambda item: -item[0])  # stable
    if not found:
        return "known are " + ", ".join(known.name for known in FORMATS)
    return "nearest: " + "; ".join(told for _, told in found[:3])


def _alike(needed: str, columns: Sequence[str]) -> list[str]:
    """The column that may be meant by another spelling."""
    lower = {column.lower(): column for column in columns}
    return [lower[match] for match in get_close_matches(needed, lower, n=1, cutoff=0.75)]


NO_ANSWER = "-"
"""Stands where a row has no answer, for which generation asks."""


def _answered(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with an answer of no meaning in the place of its own, or where it lacks one."""
    row = _merged(row) if _SAMPLE.missing(row) in ([], [_SAMPLE.answer]) else row
    for column, who, role, user, said in (
        ("messages", "role", "assistant", ("user",), "content"),
        ("conversations", "from", "gpt", ("human", "user"), "value"),
        ("conversations", "role", "assistant", ("user",), "content"),
    ):
        turns: Any = row.get(column)
        last = turns[-1] if isinstance(turns, (list, tuple)) and turns else None
        if isinstance(last, Mapping) and last.get(who) in user:
            return {**row, column: [*turns, {who: role, said: NO_ANSWER}]}
    candidates = []
    for columns in (_filled(row), row):
        lacking = [known.missing(columns) for known in FORMATS]
        candidates += [known for known, lacks in zip(FORMATS, lacking, strict=True) if not lacks]
        candidates += [k for k, lacks in zip(FORMATS, lacking, strict=True) if lacks == [k.answer]]
    for known in candidates[:1]:
        if known.answer:
            return {**row, **dict.fromkeys(known.answer), known.answer[0]: NO_ANSWER}
    return row


def _sample(row: Mapping[str, Any]) -> Example:
    return _known_example(_merged(row))


def _merged(row: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a webdataset sample as the columns of one row."""
    fields, text = row.get("json"), row.get("txt")
    if isinstance(fields, (str, bytes)):
        with naming_row("json"):
            fields = json.loads(fields)
    if not isinstance(fields, Mapping | None):
        raise TypeError(f"json={fields!r:.80}: expected an object of columns")
    merged = {k: v for k, v in (fields or {}).items() if k not in ("images", *IMAGE_COLUMNS)}
    merged["image"], _ = first_picture(row, _PICTURE_FILES)
    if text is not None:
        merged["text"] = text.decode() if isinstance(text, bytes) else text
    return merged


_PICTURES = ("image", "images", "image_path", "image_url")
_PICTURE_FILES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

_SAMPLE = Format(
    "a sample of webdataset",
    (("__key__",), _PICTURE_FILES, ("txt", "json")),
    ("txt", "json"),
    "what a row with its picture as `image`, its `txt` as `text` and the columns of its `json` is",
    _sample,
)

FORMATS = (
    Format(
        "chat messages",
        (("messages",),),
        (),
        "a dialogue of which every turn of the assistant is learnt; pictures in the messages' "
        "parts (`image`, `image_url`) or in `images`, in order",
        converters.chat,
    ),
    Format(
        "prompt and completion",
        (("prompt",), ("completion",)),
        ("completion",),
        "the pictures, the prompt, and the completion as it is; or, of messages, a dialogue of "
        "which the completion is learnt",
        converters.prompt_and_completion,
    ),
    Format(
        "a card",
        (("name",), ("caption",)),
        (),
        "the picture, `Question: What's on the picture? Answer:`, and ` This is {name}. {first "
        "sentence of caption}`",
        pokemon_card_example,
    ),
    Format(
        "LLaVA's conversations",
        (("conversations",),),
        (),
        "a dialogue: `from` is `human` or `gpt`; each `<image>` in a human's `value` is the place "
        "of a picture in `image` or `images`",
        converters.conversations,
    ),
    Format(
        "the_cauldron's texts",
        (("images",), ("texts",)),
        (),
        "a dialogue of `user` and `assistant`, the pictures first",
        converters.question_pairs,
    ),
    Format(
        "a question with its answer",
        (_PICTURES, ("question",), ("answer", "answers")),
        ("answer", "answers"),
        "a dialogue: the picture and the question, then the answer; of several right `answers`, "
        "the most common, and all as `references`",
        converters.question_and_answer,
    ),
    Format(
        "a caption",
        (_PICTURES, ("text", "caption")),
        ("text", "caption"),
        "the picture, `Question: What's on the picture? Answer:`, and the text",
        converters.caption,
    ),
    Format(
        "a class",
        (_PICTURES, ("label",)),
        ("label",),
        "the picture, `Question: What's on the picture? Answer:`, and the name of the class",
        converters.class_name,
    ),
    _SAMPLE,
)
"""The known formats; a row is in the first of which it has all columns, if possible with values."""


def table() -> str:
    """The formats as a table in Markdown, for the documentation."""
    lines = ["| format | columns | what is learnt |", "| --- | --- | --- |"]
    for known in FORMATS:
        columns = ", ".join(" or ".join(f"`{c}`" for c in one_of) for one_of in known.needs)
        lines.append(f"| {known.name} | {columns} | {known.becomes} |")
    return "\n".join(lines)
