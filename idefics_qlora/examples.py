"""What the model learns from: prompt and completion, and how known row formats become them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from idefics_qlora.images import BadImage, Source, open_image

PromptItem: TypeAlias = Source
"""A string is text, everything else (PIL image, path object, bytes, mapping) is an image."""


@dataclass(frozen=True)
class Example:
    """One thing to learn: what the model sees, and what it shall answer.

    Attributes:
        prompt: Images and texts in reading order. A string is text; an image is a PIL image, a
            ``pathlib.Path``, the bytes of an encoded picture, or a mapping with ``bytes`` or
            ``path``. Spaces at the ends of a text are not significant, as in ``IdeficsProcessor``.
        completion: The text to learn; it usually begins with a space. The end-of-sequence token is
            added by the library.

    Raises:
        TypeError: If an item of the prompt is neither text nor an image.
        ValueError: If the prompt or the completion is empty, or a text is a bare image URL.
    """

    prompt: Sequence[PromptItem]
    completion: str

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if not isinstance(self.completion, str):
            raise TypeError(f"completion={self.completion!r}: expected a string")
        if not self.completion.strip():
            raise ValueError(
                f"completion={self.completion!r} is empty: there is nothing to learn from this "
                "row; remove it, or give its text"
            )


ToExample: TypeAlias = Callable[[Any], Example]


def check_prompt(prompt: Sequence[PromptItem]) -> None:
    """Raise if ``prompt`` is not a non-empty sequence of texts and images."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise TypeError(
            f"prompt={prompt!r:.80}: expected a list of images and texts, such as "
            '[image, "Question: ... Answer:"]'
        )
    if not prompt:
        raise ValueError("prompt=[] is empty: expected images and texts")
    for item in prompt:
        if is_text(item):
            if re.fullmatch(r"\s*https?://\S+\s*", str(item)):
                raise ValueError(
                    f"the prompt text {item!r} is a bare URL: a string is text for the model; to "
                    "show it the picture, pass idefics_qlora.images.open_image(url)"
                )
        elif not isinstance(item, (Image.Image, os.PathLike, bytes, bytearray, Mapping)):
            hint = "; the row has no image" if item is None else ""
            raise TypeError(
                f"prompt item {item!r:.80} ({type(item).__name__}): expected text or an image "
                f"(PIL image, pathlib.Path, bytes, or a mapping with `bytes` or `path`){hint}"
            )


def is_text(item: PromptItem) -> bool:
    """Whether a prompt's item is text (a plain string), as opposed to an image."""
    return isinstance(item, str)


def as_example(row: Any, to_example: ToExample | None = None) -> Example:
    """The row's :class:`Example`.

    Args:
        row: One row of the training or evaluation rows.
        to_example: The user's conversion, or ``None`` for rows that are examples already, or
            mappings with ``prompt`` and ``completion``, or rows like PokemonCards'.

    Raises:
        TypeError: If the row has no known format, or a value in it has the wrong type.
        ValueError: If a value in it cannot be used (``BadImage`` for an image).
        KeyError: If ``to_example`` asks for a column that is not there.
    """
    if to_example is not None:
        example = to_example(row)
        if not isinstance(example, Example):
            raise TypeError(f"to_example returned {example!r:.80}: expected an Example")
        return example
    if isinstance(row, Example):
        return row
    if isinstance(row, Mapping):
        if {"prompt", "completion"} <= row.keys():
            return Example(row["prompt"], row["completion"])
        if {"name", "caption"} <= row.keys():
            return pokemon_card_example(row)
    columns = f"columns {sorted(row)}" if isinstance(row, Mapping) else f"type {type(row).__name__}"
    raise TypeError(
        f"a row with {columns} is no known format: expected an Example, or `prompt` and "
        "`completion`, or `image`, `name` and `caption`; otherwise pass to_example=your_function"
    )


@contextmanager
def naming_row(where: str) -> Iterator[None]:
    """Put the row's name, such as ``train_rows[3]``, in front of what goes wrong with it."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{error.source} of {where}", error.reason) from error
    except KeyError as error:
        raise ValueError(f"{where}: column {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


QUESTION = "Question: What's on the picture? Answer:"
"""The tutorial's prompt text."""


def pokemon_card_example(row: Mapping[str, Any]) -> Example:
    """The tutorial's example from a row of the PokemonCards dataset (or one with its columns).

    Args:
        row: Has ``name``, ``caption`` and the picture as ``image``, or as ``image_url`` (a URL or
            a file path).

    Returns:
        ``[image, "Question: What's on the picture? Answer:"]`` with the completion
        ``" This is {name}. {first sentence of caption}"``.

    Raises:
        ValueError: If the name, the caption or the picture is missing, or the picture is bad.
    """
    for column in ("name", "caption"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"{column}={row[column]!r}: expected text")
    source = row.get("image") if row.get("image") is not None else row.get("image_url")
    if source is None or source == "":
        raise ValueError("the row has neither `image` nor `image_url`: expected a picture")
    text = f" This is {row['name']}. {first_sentence(row['caption'])}"
    return Example([open_image(source), QUESTION], text)


_ABBREVIATIONS = ("Mr", "Mrs", "Ms", "Dr", "Lt", "Jr", "Sr", "St", "No", "vs", "Prof", "Gen")
_SENTENCE_END = re.compile(
    r"(?<!\.)(?<!\b[A-Z])"  # neither an ellipsis nor an initial
    + "".join(rf"(?<!\b{word})" for word in _ABBREVIATIONS)
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
