"""What is right and what is wrong in a text, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

# Without spaces between words, a character is one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
MAX_WORDS = 200
"""Of longer texts the first words are compared and shown."""
MAX_MISSING = 8
"""Missing words that are shown at one place; of more, their number."""


@dataclass(frozen=True)
class Part:
    """Words that follow each other."""

    kind: str
    """``right``, ``wrong`` (not in the right text here), ``missing`` (only in the right text) or
    ``rest`` (not compared)."""
    text: str


@dataclass(frozen=True)
class Marked:
    """A text with its words marked."""

    parts: list[Part]
    num_right: int
    num_words: int
    """Words of the right text."""
    num_too_many: int
    """By how many words the text is longer than the right one."""


def marked(said: str, right: Sequence[str]) -> Marked:
    """Mark the words of a text by the right text that is closest to it.

    Words are equal if they differ in upper case or in punctuation around them alone.

    Args:
        said: What a model said.
        right: The right texts, at least one.
    """
    return max((_marked(said, text) for text in right), key=_share)


def _share(text: Marked) -> float:
    wrong = sum(len(_WORD.findall(part.text)) for part in text.parts if part.kind == "wrong")
    return 2 * text.num_right / max(1, text.num_right + wrong + text.num_words)


def _marked(said: str, right: str) -> Marked:
    words, rest = _words(said)
    wanted, wanted_rest = _words(right)
    keys, wanted_keys = [_key(w) for w in words], [_key(w) for w in wanted]
    parts: list[Part] = []
    num_right = 0
    matcher = SequenceMatcher(None, keys, wanted_keys, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(Part("right", " ".join(words[a:b])))
            num_right += b - a
            continue
        if b > a:
            parts.append(Part("wrong", " ".join(words[a:b])))
        if d > c:
            few = d - c <= MAX_MISSING
            parts.append(Part("missing", " ".join(wanted[c:d]) if few else f"{d - c} words"))
    if rest:
        parts.append(Part("rest", f"... ({rest} more words)"))
    too_many = max(0, len(words) + rest - len(wanted) - wanted_rest)
    return Marked(parts, num_right, len(wanted), too_many)


def _words(text: str) -> tuple[list[str], int]:
    """The first words of a text, and the number of the others."""
    words = _WORD.findall(text)
    return words[:MAX_WORDS], max(0, len(words) - MAX_WORDS)


def _key(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word).casefold() or word
