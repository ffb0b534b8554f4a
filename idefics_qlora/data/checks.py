"""Mistakes in rows that pass in silence: found on the first rows, before training starts.

Each finding is a kind, by which warnings are counted, and one line. None of them changes what is
learnt: what is an error in every row is raised where rows become examples.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from idefics_qlora.data.example import PICTURE_ENDING, Example, PromptItem, Turn

REPEATED_ROWS = 8
"""First rows that ``to_example`` is given a second time."""
SMALL_SIDE = 16
"""Pixels of a side below which a picture is an icon or a placeholder."""
SAME_PICTURES = 4
"""Rows with a picture from which on it is odd that all show the same."""
EXTREME_SHAPE = 8
"""Long side over short side of a picture, as a multiple of that of what the model sees, from which
on little is left of it."""


class Finding(NamedTuple):
    """Something that may be a mistake."""

    kind: str
    line: str


# --- texts ----------------------------------------------------------------------------------------

_PICTURE_NAME = re.compile(rf"(?<=\w){PICTURE_ENDING}(?![a-z0-9])|<PIL\.\S+")
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer


def text_findings(prompt: Sequence[PromptItem], forged: re.Pattern[str]) -> Iterator[Finding]:
    """What is odd in the texts of a prompt.

    Args:
        prompt: Items of a prompt.
        forged: Finds what would be read as a control token.
    """
    texts = list(_texts(prompt))
    for text in texts:
        yield from _typed_tokens(text, forged)
    for text in texts:
        if found := _PICTURE_NAME.search(text):
            name = text[: found.end()].split()[-1]
            yield Finding(
                "a picture's name as text",
                f"the prompt's text has {name!r:.80}, of which the model sees the letters "
                "alone: a picture is an item of its own, such as pathlib.Path(...)",
            )
            return
    if len(texts) == sum(1 for _ in items_of(prompt)) and (
        found := re.match(r"\s*https?://\S+", texts[0])
    ):
        yield Finding(
            "a picture's name as text",
            f"the prompt begins with {found[0].strip()!r:.80} and has no picture: the model sees "
            "the address's letters alone; pass idefics_qlora.images.open_image(url)",
        )


def completion_findings(example: Example, forged: re.Pattern[str]) -> Iterator[Finding]:
    """What is odd in the completion, and where it follows the prompt."""
    completion, last = example.completion, example.prompt[-1]
    yield from _typed_tokens(completion, forged)
    if not isinstance(last, str) or not last.strip():
        return  # a picture, or a dialogue, whose spaces are the library's
    end, start = last.rstrip(" "), completion.lstrip(" ")
    spaces = len(last) - len(end) + len(completion) - len(start)
    border = f"between the prompt's end {end[-20:]!r} and the completion's start {start[:20]!r}"
    if spaces > 1:
        yield Finding(
            "spaces before completions",
            f"{spaces} spaces {border}: end the prompt without, begin the completion with one",
        )
    elif not spaces and _parts_words(end[-1]) and start[0].isalnum() and not _is_spaceless(start):
        yield Finding(
            "spaces before completions",
            f"no space {border}: begin the completion with one, as words of this family do",
        )


def _parts_words(character: str) -> bool:
    """Whether a word after this character has a space before it."""
    is_sign = character in ":.,;?!)]}\u2026"
    return (is_sign or character.isalnum()) and not _is_spaceless(character)


def _is_spaceless(text: str) -> bool:
    """Whether a text begins in a script that writes no spaces between words."""
    wide = unicodedata.east_asian_width(text[0]) in "WF"
    return wide or _SPACELESS.match(text) is not None


def _typed_tokens(text: str, forged: re.Pattern[str]) -> Iterator[Finding]:
    if found := forged.search(text):
        start = max(0, found.start() - 15)
        yield Finding(
            "control tokens typed in texts",
            f"{found[0]!r} is typed in the text {text[start : found.end() + 15]!r} and stays text "
            "there: the library itself writes control tokens, for each picture at its place in the "
            "prompt and at the completion's end; remove it",
        )


def items_of(prompt: Sequence[PromptItem]) -> Iterator[Any]:
    """The items of a prompt, those of its turns included."""
    for item in prompt:
        if isinstance(item, Turn):
            yield from item.content
        else:
            yield item


def _texts(prompt: Sequence[PromptItem]) -> Iterator[str]:
    return (item for item in items_of(prompt) if isinstance(item, str))


# --- pictures -------------------------------------------------------------------------------------


def picture_findings(
    pictures: Sequence[Image.Image], pixels: Sequence[Tensor]
) -> Iterator[Finding]:
    """What is odd about a row's pictures.

    Args:
        pictures: In RGB.
        pixels: The same as the model sees them, (3, H, W) uint8.
    """
    for n, (picture, square) in enumerate(zip(pictures, pixels, strict=True)):
        size = f"image {n} has {picture.width} x {picture.height} pixels"
        short, long = sorted(picture.size)
        height, width = square.shape[1:]
        if short < SMALL_SIDE:
            yield Finding(
                "tiny pictures",
                f"{size}, of which the model's {width} x {height} are made: "
                "look whether it is an icon or a placeholder",
            )
        elif long * min(height, width) > EXTREME_SHAPE * short * max(height, width):
            yield Finding(
                "pictures of extreme shape",
                f"{size} and is squashed to {'a square of ' * (height == width)}{width} x "
                f"{height}, in which little can be told: cut it into parts, or pad it",
            )
        if all(int(channel.max()) - int(channel.min()) <= 2 for channel in square):
            yield Finding(
                "pictures of one colour",
                f"image {n} has one colour, {tuple(square[:, 0, 0].tolist())}: nothing can be seen "
                "on it; look whether it is the picture that is meant",
            )


def row_name(place: tuple[str, int]) -> str:
    """A row's name in messages, such as ``train_rows[3]``."""
    return f"{place[0]}[{place[1]}]"
