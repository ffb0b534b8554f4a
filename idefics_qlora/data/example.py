"""What the model learns from: prompt and completion, and how known row formats become them."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from idefics_qlora.images.access import DEFAULT_ACCESS, BadImage, ImageAccess, opening_with
from idefics_qlora.images.opening import Source, open_image, part_source

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue in a prompt.

    How a dialogue is written depends on the checkpoint, so a turn holds no role names or control
    tokens: those are added with the tokenizer at hand.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: One text, or texts and images in reading order. Kept as a tuple, adjacent texts
            joined, without white space at the ends of a text.
        is_target: Whether the model learns to say this turn; only for turns of the assistant.

    Raises:
        TypeError: If an item is neither text nor an image.
        ValueError: If the role is none of the three, the turn is empty, or a turn of the assistant
            has an image.
    """

    role: Role
    content: Sequence[Source] | str
    is_target: bool = False

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role={self.role!r}: expected one of {', '.join(get_args(Role))}")
        content = [self.content] if isinstance(self.content, str) else self.content
        _check_items(content, "content", may_be_url=True)  # here a text is known to be one
        items: list[Source] = []
        for are_texts, run in groupby(content, is_text):
            if not are_texts:
                items += run
            elif not _is_blank(text := "".join(map(str, run)).strip()):
                items.append(text)
        if not items:
            raise ValueError(f"content={self.content!r:.80} is empty: remove the turn or the row")
        if self.role == "assistant" and not all(map(is_text, items)):
            raise ValueError("an assistant turn has an image: the model writes text alone")
        if self.is_target and self.role != "assistant":
            raise ValueError(f"is_target=True: the model learns no {self.role} turn")
        object.__setattr__(self, "content", tuple(items))


PromptItem: TypeAlias = "Source | Turn"
"""A string is text, a :class:`Turn` a part of a dialogue, everything else (PIL image, path object,
bytes, mapping) an image."""


@dataclass(frozen=True)
class Example:
    """One thing to learn: what the model sees, and what it shall answer.

    Attributes:
        prompt: Images and texts in reading order, or a dialogue. A string is text; an image is a
            PIL image, a ``pathlib.Path``, the bytes of an encoded picture, or a mapping with
            ``bytes`` or ``path``. Spaces at the ends of a text are not significant, as in
            ``IdeficsProcessor``. A dialogue is a list of :class:`Turn`, or of chat messages (see
            :func:`as_turns`), up to the turn that the completion answers.
        completion: The text to learn; after images and texts it usually begins with a space. The
            end-of-sequence token is added by the library.

    Raises:
        TypeError: If an item of the prompt is neither text nor an image.
        ValueError: If the prompt or the completion is empty, a text is a bare URL or path of a
            picture or no Unicode, or a dialogue ends with a turn of the assistant.
    """

    prompt: Sequence[PromptItem]
    completion: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", as_prompt(self.prompt))
        if not isinstance(self.completion, str):
            raise TypeError(f"completion={self.completion!r:.80}: expected a string")
        _check_unicode(self.completion, "completion")
        if _is_blank(self.completion):
            raise ValueError(
                f"completion={self.completion!r:.80} is empty, or nothing of it can be seen: there "
                "is nothing to learn from this row; remove it, or give its text"
            )


ToExample: TypeAlias = Callable[[Any], Example]


def as_prompt(prompt: Any) -> Sequence[PromptItem]:
    """``prompt`` as an example has it, chat messages become turns; raise if it is no prompt."""
    if are_messages(prompt):
        prompt = as_turns(prompt)
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise TypeError(
            f"prompt={prompt!r:.80}: expected a list of images and texts, such as "
            '[image, "Question: ... Answer:"]'
        )
    if not prompt:
        raise ValueError("prompt=[] is empty: expected images and texts")
    turns = [item for item in prompt if isinstance(item, Turn)]
    if not turns:
        _check_items(prompt, "prompt")
    elif len(turns) < len(prompt):
        raise TypeError("the prompt mixes turns with other items: put these into a Turn")
    elif turns[-1].role == "assistant":
        raise ValueError(
            "the prompt ends with an assistant turn: expected the turn that is to be answered"
        )
    return prompt


PICTURE_ENDING = r"(?i:\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|avif))"
"""How the names of pictures end, as a regular expression."""

_INVISIBLE = {*"\u034f\u115f\u1160\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))}
"""What Unicode counts as letters, signs or marks, though nothing is drawn: fillers, selectors."""


def _is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, zero-width and control characters."""
    return all(
        c.isspace() or c in _INVISIBLE or unicodedata.category(c) in ("Cc", "Cf") for c in text
    )


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} {text!r:.80} has half a character, {text[error.start]!r}, at position "
            f"{error.start} (a text cut within an emoji?): expected Unicode; "
            'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") mends it'
        ) from error


def _check_items(items: Any, name: str, may_be_url: bool = False) -> None:
    if not isinstance(items, Sequence) or isinstance(items, (bytes, bytearray)):
        raise TypeError(f"{name}={items!r:.80}: expected text, or a list of texts and images")
    for item in items:
        if isinstance(item, str):
            _check_unicode(item, f"{name} text")
            if may_be_url:
                continue
            if re.fullmatch(r"\s*https?://\S+\s*", item):
                raise ValueError(
                    f"the {name} text {item!r} is a bare URL: a string is text for the model; to "
                    "show it the picture, pass idefics_qlora.images.open_image(url)"
                )
            if re.fullmatch(rf"\s*\S+{PICTURE_ENDING}\s*", item):
                raise ValueError(
                    f"the {name} text {item!r} is the path of a picture: a string is text for the "
                    "model; to show it the picture, pass pathlib.Path(...); if the name is meant, "
                    "put it into a sentence"
                )
        elif not isinstance(item, (Image.Image, os.PathLike, bytes, bytearray, Mapping)):
            hint = "; the row has no image" if item is None else ""
            raise TypeError(
                f"{name} item {item!r:.80} ({type(item).__name__}): expected text or an image "
                f"(PIL image, pathlib.Path, bytes, or a mapping with `bytes` or `path`){hint}"
            )


def is_text(item: PromptItem) -> bool:
    """Whether a prompt's item is text (a plain string), as opposed to an image or a turn."""
    return isinstance(item, str)


def prompt_images(prompt: Sequence[PromptItem]) -> list[Source]:
    """The images of a prompt in reading order, those of its turns included."""
    images: list[Source] = []
    for item in prompt:
        items = item.content if isinstance(item, Turn) else [item]
        images += [item for item in items if not is_text(item)]
    return images


def as_turns(messages: Sequence[Any], images: Sequence[Any] = ()) -> list[Turn]:
    """Chat messages as turns; every turn of the assistant becomes a target.

    The convention is that of TRL and ``datasets``: a message has a ``role`` and a ``content``, a
    string or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. A part of type
    ``image`` may carry its picture (as ``image``, ``path`` or ``url``); the others take the next
    one of ``images``. Where no message says the place of an image, they come first in the first
    turn of the user.

    Args:
        messages: The messages, in order.
        images: Pictures for the places, in order: anything that ``images.open_image`` takes.

    Raises:
        ValueError: If a message is none, or places and images differ in number; the error names
            the message (``BadImage`` for an image that cannot be opened).
    """
    return turns_of(named_messages("messages", messages), images)


def named_messages(name: str, messages: Sequence[Any]) -> list[tuple[str, Any]]:
    if not are_messages(messages):
        raise TypeError(
            f"{name}={messages!r:.80}: expected a list of messages with `role` and `content`"
        )
    return [(f"{name}[{i}]", message) for i, message in enumerate(messages)]


def turns_of(messages: Iterable[tuple[str, Any]], images: Sequence[Any]) -> list[Turn]:
    pictures = open_values(images)
    read: list[tuple[str, Any, list[Any]]] = []  # name, role and content of each message
    places = carried = 0
    for where, message in messages:
        with naming_row(where):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise TypeError(f"{message!r:.80}: expected a message with `role` and `content`")
            content = [_content_part(part, n) for n, part in enumerate(_parts(message["content"]))]
        places += sum(item is None for item in content)
        carried += sum(isinstance(item, Image.Image) for item in content)
        read.append((where, message["role"], content))
    if pictures and not places and not carried:
        first = next((content for _, role, content in read if role == "user"), None)
        if first is not None:
            first[:0] = [None] * len(pictures)
            places = len(pictures)
    if places != len(pictures):
        raise ValueError(
            f'the messages have {places} parts {{"type": "image"}} without a picture of their own '
            f"but the row has {len(pictures)} images: expected as many images as such parts"
        )
    following = iter(pictures)
    turns = []
    for where, role, content in read:
        with naming_row(where):
            items = [next(following) if item is None else item for item in content]
            turns.append(Turn(role, items, is_target=role == "assistant"))
    return turns


def are_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and len(value) > 0
        and isinstance(value[0], Mapping)
        and "role" in value[0]
    )


def _parts(content: Any) -> Sequence[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise TypeError(
            f"content={content!r:.80} ({type(content).__name__}): expected a string, or a list of "
            '{"type": "text", "text": ...} and {"type": "image"}'
        )
    return content


def _content_part(part: Any, number: int) -> str | Image.Image | None:
    """The part's text, or the picture that it carries, or None where a picture has its place."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image":
        source = part_source(part)
        return None if source is None else open_value(source, f"content[{number}]")
    raise TypeError(
        f'content[{number}]={part!r:.80}: expected {{"type": "text", "text": a string}} or '
        '{"type": "image"}'
    )


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


@contextmanager
def naming_row(where: str) -> Iterator[None]:
    """Put a name, such as ``train_rows[3]``, in front of what goes wrong with that row or value."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{error.source} of {where}", error.reason) from error
    except KeyError as error:
        raise ValueError(f"{where}: {error} is missing (a column of the row?)") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    except MemoryError as error:  # the machine's fault, not the row's
        raise MemoryError(f"{where}: {str(error) or 'no memory left'}") from error
    # A `datasets.Image` column decodes when the row is asked for, where Pillow raises nearly
    # anything; and a user's `to_example` may stumble over a row in any way.
    except Exception as error:
        raise ValueError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error


IMAGE_COLUMNS = ("image", "image_path", "image_url")
"""Where a row's one picture is looked for."""

QUESTION = "Question: What's on the picture? Answer:"
"""The tutorial's prompt text."""


def open_value(value: Any, name: str, access: ImageAccess | None = None) -> Image.Image:
    """Open a value of an image column; a string is a URL or a path, as ``open_image`` says."""
    with naming_row(name):
        return open_image(value, access)


def open_values(images: Sequence[Any]) -> list[Image.Image]:
    return [open_value(image, f"images[{i}]") for i, image in enumerate(images)]


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
