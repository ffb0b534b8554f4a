"""What the model learns from: prompt and completion, and how known row formats become them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from idefics_qlora.images.access import BadImage, ImageAccess
from idefics_qlora.images.opening import Source, open_image, part_source

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue in a prompt.

    How a dialogue is written depends on the base, so a turn holds no role names or control
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
        references: All right answers, where there are several (as VQA has); they change nothing in
            training. Empty: the completion is the only one.

    Raises:
        TypeError: If an item of the prompt is neither text nor an image.
        ValueError: If the prompt or the completion is empty, a text is a bare URL or path of a
            picture or no Unicode, or a dialogue ends with a turn of the assistant.
    """

    prompt: Sequence[PromptItem]
    completion: str
    references: tuple[str, ...] = ()

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
        references = self.references
        if isinstance(references, str) or not all(isinstance(text, str) for text in references):
            raise TypeError(f"references={references!r:.80}: expected a list of right answers")
        object.__setattr__(self, "references", tuple(references))

    @property
    def right(self) -> tuple[str, ...]:
        """All right answers, without white space at the ends."""
        return tuple(text.strip() for text in self.references or (self.completion,))


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

_SELECTORS = (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))
_INVISIBLE = {*"\u034f\u115f\u1160\u180b\u2800\u3164\uffa0\ufffc", *map(chr, _SELECTORS)}
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
            if re.match(r"\s*data:image/", item):
                raise ValueError(
                    f"the {name} text {item!r:.40} is a picture written out: a string is text for "
                    "the model; to show it the picture, pass its decoded bytes"
                )
            if may_be_url:
                continue
            if re.fullmatch(r"\s*https?://\S+\s*", item):
                raise ValueError(
                    f"the {name} text {item!r} is a bare URL: a string is text for the model; to "
                    "show it the picture, pass idefics_qlora.images.open_image(url)"
                )
            looks_like_a_path = r"(?:\S+|(?:~|\.{0,2}|[A-Za-z]:)[/\\][^\n]+)"
            if re.fullmatch(rf"\s*{looks_like_a_path}{PICTURE_ENDING}\s*", item):
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
    """Chat messages, each with its name for errors."""
    if not are_messages(messages):
        raise TypeError(
            f"{name}={messages!r:.80}: expected a list of messages with `role` and `content`"
        )
    return [(f"{name}[{i}]", message) for i, message in enumerate(messages)]


def turns_of(messages: Iterable[tuple[str, Any]], images: Sequence[Any]) -> list[Turn]:
    """Named messages as turns; otherwise as :func:`as_turns`."""
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
    """Whether a value is a list of chat messages."""
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
    if kind in ("image", "image_url"):
        source = part_source(part)
        if source is None and kind == "image_url":
            raise ValueError(f"content[{number}]={part!r:.80} has no picture: expected its URL")
        return None if source is None else open_value(source, f"content[{number}]")
    raise TypeError(
        f'content[{number}]={part!r:.80}: expected {{"type": "text", "text": a string}} or '
        '{"type": "image"} or {"type": "image_url", "image_url": {"url": ...}}'
    )


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


def open_value(value: Any, name: str, access: ImageAccess | None = None) -> Image.Image:
    """Open a value of an image column; a string is a URL or a path, as ``open_image`` says."""
    with naming_row(name):
        return open_image(value, access)


def open_values(images: Sequence[Any]) -> list[Image.Image]:
    """The pictures of an ``images`` column, opened; an error names the one that cannot be."""
    return [open_value(image, f"images[{i}]") for i, image in enumerate(images)]
