"""Mistakes in rows that pass in silence: found on the first rows, before training starts.

Each finding is a kind, by which warnings are counted, and one line. None of them changes what is
learnt: what is an error in every row is raised where rows become examples.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from idefics_qlora.data.batches import Tokens
from idefics_qlora.data.example import PICTURE_ENDING, Captions, Example, PromptItem, Turn
from idefics_qlora.data.windows import Look, RowReader, Rows
from idefics_qlora.notices import Notices

REPEATED_ROWS = 8
"""First rows that ``to_example`` is given a second time."""
COMPARED_ROWS = 20_000
"""Rows of each kind that are compared with each other as they are, unread."""
COMPARED_BYTES = 2**27
"""Bytes of pictures that are compared at most."""
ID_COLUMNS = frozenset({"id", "_id", "idx", "index", "row_id", "uuid", "__index_level_0__"})
"""Columns that differ between rows that are otherwise the same."""
SMALL_SIDE = 16
"""Pixels of a side below which a picture is an icon or a placeholder."""
SAME_PICTURES = 4
"""Rows with a picture from which on it is odd that all show the same."""
EXTREME_SHAPE = 8
"""Long side over short side, from which on little is left of a picture squashed to a square."""


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
        pixels: The same as the model's square, (3, S, S) uint8.
    """
    for n, (picture, square) in enumerate(zip(pictures, pixels, strict=True)):
        size = f"image {n} has {picture.width} x {picture.height} pixels"
        short, long = sorted(picture.size)
        if short < SMALL_SIDE:
            yield Finding(
                "tiny pictures",
                f"{size}, of which the model's {square.shape[-1]} x {square.shape[-1]} are made: "
                "look whether it is an icon or a placeholder",
            )
        elif long > EXTREME_SHAPE * short:
            yield Finding(
                "pictures of extreme shape",
                f"{size} and is squashed to a square of {square.shape[-1]} x {square.shape[-1]}, "
                "in which little can be told: cut it into parts, or pad it",
            )
        if all(int(channel.max()) - int(channel.min()) <= 2 for channel in square):
            yield Finding(
                "pictures of one colour",
                f"image {n} has one colour, {tuple(square[:, 0, 0].tolist())}: nothing can be seen "
                "on it; look whether it is the picture that is meant",
            )


# --- lengths --------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Which rows are many times longer than the others, and what such a row costs."""

    median: int
    """Text tokens."""
    proposal: int
    """A ``max_length`` that leaves nearly all rows whole."""
    told: set[str] = field(default_factory=set)
    """Names of the rows that were found."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths | None:
        """From the text tokens of some rows; ``None`` if they are too few to tell what is usual."""
        if len(lengths) < 8:
            return None
        lengths = sorted(lengths)
        usual = lengths[(len(lengths) * 9 - 1) // 10]  # nine in ten are no longer
        return cls(lengths[len(lengths) // 2], -(-int(1.25 * usual) // 16) * 16)

    def find(self, name: str, length: int, micro_batch_size: int | str) -> Iterator[Finding]:
        """Whether this row, of ``length`` text tokens, is one of them; each is told once."""
        # Short texts differ by a factor without costing anything, and where the proposal is longer
        # than that, lengths are spread: there is no row that stands out.
        if length < max(5 * self.median, self.median + 128, self.proposal) or name in self.told:
            return
        self.told.add(name)
        cost = ""
        if isinstance(micro_batch_size, int) and micro_batch_size > 1:
            cost = (
                f"a micro-batch of {micro_batch_size} with it holds {micro_batch_size * length} "
                f"tokens, about {(micro_batch_size - 1) * (length - self.median)} of them "
                "padding, and "
            )
        yield Finding(
            "rows many times longer than the others",
            f"has {length} text tokens, {length / self.median:.0f} times the median of "
            f"{self.median}: {cost or 'its micro-batch '}takes about "
            f"{length / self.median:.0f} times the memory of a usual one; max_length="
            f"{self.proposal} cuts it and leaves the others whole, or remove the row",
        )


# --- content --------------------------------------------------------------------------------------


def digest(value: Any, load: bool = True) -> bytes:
    """What tells a row, an example or a value in it from others: equal for equal content.

    Args:
        value: Of texts, numbers, pictures, arrays, and containers of them.
        load: Whether a picture that is opened but not decoded is decoded. Otherwise it is told by
            its file's name, or, without one, equal to none.
    """
    hashed = hashlib.blake2b(digest_size=16)
    _update(hashed.update, value, load)
    return hashed.digest()


def digest_of(value: Any, load: bool = True) -> bytes | None:
    """The digest, or ``None`` where a picture cannot be decoded: that is told when it is read."""
    try:
        return digest(value, load)
    except Exception:
        return None


def _update(update: Callable[[bytes], None], value: Any, load: bool) -> None:
    update(type(value).__name__.encode() + b"(")
    if isinstance(value, (bytes, bytearray)):
        update(bytes(value))
    elif isinstance(value, Mapping) and value.get("bytes") is not None:
        _update(update, value["bytes"], load)  # a picture, whatever the name of its file
    elif isinstance(value, Mapping):
        for item in value.items():
            _update(update, item, load)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(update, item, load)
    elif isinstance(value, Image.Image):
        if not load and getattr(value, "tile", None):
            update(str(getattr(value, "filename", "") or id(value)).encode())
        else:
            value.load()
            update(f"{value.mode} {value.size}".encode())
            update(value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            _update(update, getattr(value, part.name), load)
    elif isinstance(value, (np.ndarray, Tensor)):
        array = np.asarray(value)
        update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    elif isinstance(value, (str, int, float, os.PathLike)):
        update(str(value).encode(errors="surrogatepass"))
    update(b")")  # of what else there may be, the type has to do: its text may tell its address


class Unread:
    """Rows as they are, unread: lists, tuples and tables of ``datasets``, where that costs little.

    Args:
        rows: Training or evaluation rows; the first ``COMPARED_ROWS`` are looked at.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows: Any = ()
        self.light: list[Any] = []
        """Of each row, texts and numbers: rows that are equal have equal ones."""
        if isinstance(rows, (list, tuple)):
            self._rows = rows[:COMPARED_ROWS]
            self.light = [_light(row) for row in self._rows]
        elif type(rows).__module__.startswith("datasets.") and hasattr(rows, "select"):
            table: Any = rows
            table = table.with_format("arrow").select(range(min(len(table), COMPARED_ROWS)))
            texts = [
                name
                for name, kind in table.features.items()
                if hasattr(kind, "dtype") and not hasattr(kind, "decode_example")
            ]
            self._rows = table
            self.light = [_light(row) for row in table.select_columns(texts)[:].to_pylist()]

    def whole(self, index: int) -> tuple[bytes | None, int]:
        """A row's digest (``None`` if it has none), and the bytes of its pictures."""
        row = self._rows[index]
        if hasattr(row, "to_pylist"):  # a table of one row, its pictures still encoded
            (row,) = row.to_pylist()
        if isinstance(row, Mapping):
            row = {key: value for key, value in row.items() if key not in ID_COLUMNS}
        return digest_of(row, load=False), _num_bytes(row)


def _light(value: Any) -> Any:
    if isinstance(value, Example):
        return (*map(_light, items_of(value.prompt)), value.completion)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return _light(value["bytes"])
    if isinstance(value, Mapping):
        return tuple(_light(item) for key, item in value.items() if key not in ID_COLUMNS)
    if isinstance(value, (list, tuple)):
        return tuple(map(_light, value))
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, Image.Image):
        return value.size
    return value if isinstance(value, (str, int, float)) else type(value).__name__


def _num_bytes(value: Any) -> int:
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, Example):
        return sum(map(_num_bytes, items_of(value.prompt)))
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def same_unread(every: Mapping[str, Unread]) -> dict[tuple[str, int], tuple[str, int]]:
    """Rows, by name and number, that are the same as an earlier one; and which one that is."""
    alike: dict[Any, list[tuple[str, int]]] = defaultdict(list)
    for name, rows in every.items():
        for index, light in enumerate(rows.light):
            alike[light].append((name, index))
    same: dict[tuple[str, int], tuple[str, int]] = {}
    num_bytes = 0
    for group in alike.values():
        first: dict[bytes | None, tuple[str, int]] = {}
        for name, index in group if len(group) > 1 else ():
            if num_bytes > COMPARED_BYTES:
                return same
            key, size = every[name].whole(index)
            num_bytes += size
            earlier = first.setdefault(key, (name, index))
            if key is not None and earlier != (name, index):
                same[name, index] = earlier
    return same


# --- the first rows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What is kept of a row that was looked at."""

    name: str
    key: bytes
    """Equal for rows of which the model gets the same."""
    pictures: frozenset[bytes]
    length: int


class FirstRows:
    """Looks at rows while they are read for the first time, then tells what it found.

    Args:
        reader: Reads them.
    """

    def __init__(self, reader: RowReader) -> None:
        self.reader = reader
        self.seen: dict[int, _Seen] = {}
        self.found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        """By kind: name of the row and line."""
        self.lengths: Lengths | None = None
        """What lengths are usual, once that was told."""
        self.errors: list[str] = []
        self._numbers: dict[str, list[tuple[bool, int, str]]] = defaultdict(list)
        self._to_repeat = 0 if isinstance(reader.to_example, Captions | None) else REPEATED_ROWS

    def looking(self, index: int, row: Any) -> Look:
        """What looks at a row that is about to be read; ``row`` is ``...`` if it has a number."""
        before = None
        if self._to_repeat:
            with contextlib.suppress(Exception):  # told when it is read
                if row is ...:
                    before = digest_of(self._row(index))
                else:
                    row = copy.deepcopy(row)  # the next epoch brings a new one
        return partial(self._look, index, before, row)

    def _row(self, index: int) -> Any:
        return self.reader.rows[index]  # type: ignore[index]

    def _look(
        self,
        index: int,
        before: bytes | None,
        fresh: Any,
        row: Any,
        example: Example,
        tokens: Tokens,
        pictures: list[Image.Image],
        pixels: list[Tensor],
    ) -> None:
        collator = self.reader.collator
        name = f"{self.reader.name}[{index}]"
        squares = [digest(square) for square in pixels]
        key = digest([tokens.ids, squares])
        self.seen[index] = _Seen(name, key, frozenset(squares), len(tokens.ids))
        findings = [
            *text_findings(example.prompt, collator.forged),
            *completion_findings(example, collator.forged),
            *picture_findings(pictures, pixels),
        ]
        for kind in dict.fromkeys(finding.kind for finding in findings):
            line = next(finding.line for finding in findings if finding.kind == kind)
            self.found[kind].append((name, line))
        self._note_numbers(row, example)
        if self._to_repeat:
            self._to_repeat -= 1
            again = self._row(index) if fresh is ... else fresh
            self._repeat(name, again, example, before)

    def _repeat(self, name: str, again: Any, example: Example, before: bytes | None) -> None:
        """Give ``to_example`` the row a second time."""
        first = digest_of(example)
        if first is None:
            return
        is_changed = before is not None and digest_of(again) != before
        if is_changed:
            self.found["to_example changes its row"].append(
                (name, "to_example changes its row: let it work on a copy, such as dict(row)")
            )
        try:
            if digest(self.reader.example(self.reader.decoded(again))) == first:
                return
            fault = "gives another example the second time"
        except Exception as error:
            fault = f"fails the second time ({type(error).__name__}: {error})"
            is_changed = True
        if is_changed:
            self.errors.append(
                f"{name}: to_example {fault}: it changes what it is given, and a row is used once "
                "in every epoch; let it work on a copy, such as dict(row)"
            )
        else:
            self.found["to_example is random"].append(
                (name, f"to_example {fault}: a run cannot be repeated or resumed exactly, and "
                "evaluations cannot be compared; let what it draws depend on the row alone")
            )  # fmt: skip

    def _note_numbers(self, row: Any, example: Example) -> None:
        """Note whether the completion tells the number of a class and not its name."""
        if isinstance(self.reader.to_example, Captions | None) or not isinstance(row, Mapping):
            return
        words = re.findall(r"\w+", example.completion)
        for column, names in self.reader.class_names.items():
            number = row.get(column)
            if isinstance(number, int) and number >= 0:
                name = names.int2str(number)
                tells = str(number) in words and name not in example.completion
                self._numbers[column].append((tells, number, name))

    def tell(self, notices: Notices, batch_size: int | str = 1) -> None:
        """Warn of what was found.

        Args:
            notices: Count it.
            batch_size: Examples in one forward pass.

        Raises:
            ValueError: If ``to_example`` cannot be called on a row twice.
        """
        if self.errors:
            raise ValueError(self.errors[0])
        for column, seen in self._numbers.items():
            if all(tells for tells, *_ in seen) and len({number for _, number, _ in seen}) > 1:
                _, number, name = seen[0]
                self.found["numbers of classes"].append(
                    (self.reader.name, f"the completions tell the numbers of the classes of column "
                    f"{column!r}, such as {number} for {name!r}: use rows.features[{column!r}]"
                    f".int2str(row[{column!r}]), or Captions, which does")
                )  # fmt: skip
        self._tell_pictures()
        self.lengths = Lengths.of([row.length for row in self.seen.values()])
        if self.lengths is not None:
            for row in sorted(self.seen.values(), key=lambda row: -row.length):
                for kind, line in self.lengths.find(row.name, row.length, batch_size):
                    self.found[kind].append((row.name, line))
        for kind, found in self.found.items():
            name, line = found[0]
            share = f" ({len(found)} of {len(self.seen)} rows looked at)" if len(found) > 1 else ""
            notices.warn(kind, f"{name}: {line}{share}", len(found))

    def _tell_pictures(self) -> None:
        name, number = self.reader.name, len(self.seen)
        without = [row.name for row in self.seen.values() if not row.pictures]
        if number and len(without) == number:
            self.found["no picture in any row"].append(
                (name, f"none of the {number} rows looked at has a picture: adapters of what sees "
                "will learn nothing; if pictures are meant, put them into `images` or the prompt")
            )  # fmt: skip
        elif without:
            line = "has no picture, though others have: look at its picture column, or leave it so"
            self.found["rows without a picture"] += [(row, line) for row in without]
        shown = [row.pictures for row in self.seen.values() if row.pictures]
        if len(shown) >= SAME_PICTURES and len(frozenset().union(*shown)) == 1:
            self.found["the same picture in every row"].append(
                (name, f"the {len(shown)} rows with a picture that were looked at all show the "
                "same one: there is nothing to tell rows apart by; look whether the picture is "
                "the row's own")
            )  # fmt: skip


def tell_same_rows(train: FirstRows, held_out: FirstRows | None, notices: Notices) -> None:
    """Warn of evaluation rows that are training rows, and of training rows that repeat others.

    The first rows are compared as the model gets them. Rows of lists and of tables of ``datasets``
    are compared as they are, up to ``COMPARED_ROWS`` of each kind and ``COMPARED_BYTES``.
    """
    sides = [train] if held_out is None else [train, held_out]
    unread = {side.reader.name: Unread(side.reader.rows) for side in sides}
    same = same_unread(unread)
    first: dict[bytes, tuple[str, int]] = {}
    for side in sides:
        for index, row in side.seen.items():
            place = side.reader.name, index
            if (earlier := first.setdefault(row.key, place)) != place:
                same.setdefault(place, earlier)
    looked_at = {
        side.reader.name: max(len(side.seen), len(unread[side.reader.name].light)) for side in sides
    }
    train_name = train.reader.name
    repeated = {place: earlier for place, earlier in same.items() if place[0] == train_name}
    if repeated:
        place, earlier = min(repeated.items())
        notices.warn(
            "repeated training rows",
            f"{row_name(place)} is the same as {row_name(earlier)}; {len(repeated)} of "
            f"{looked_at[train_name]} training rows looked at repeat another: they weigh more than "
            "others; remove them if that is not meant",
            len(repeated),
        )
    leaked = {
        place: earlier
        for place, earlier in same.items()
        if place[0] != train_name and earlier[0] == train_name
    }
    if leaked:
        place, earlier = min(leaked.items())
        number = looked_at[place[0]]
        notices.warn(
            "evaluation rows among the training rows",
            f"{row_name(place)} is the same as {row_name(earlier)}; {len(leaked)} of {number} evaluation "
            f"rows looked at ({len(leaked) / number:.0%}) are training rows: their loss tells what "
            "was learnt by heart; hold out other rows",
            len(leaked),
        )


def row_name(place: tuple[str, int]) -> str:
    return f"{place[0]}[{place[1]}]"
