"""The first rows of a run, looked at while they are read before it starts."""

from __future__ import annotations

import contextlib
import copy
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

from PIL import Image
from torch import Tensor

from idefics_qlora.data.batches import Tokens
from idefics_qlora.data.captions import QUESTION, Captions
from idefics_qlora.data.checks import (
    REPEATED_ROWS,
    SAME_PICTURES,
    Finding,
    completion_findings,
    picture_findings,
    row_name,
    text_findings,
)
from idefics_qlora.data.example import Example
from idefics_qlora.data.pace import Reading
from idefics_qlora.data.rows import Look, RowReader
from idefics_qlora.data.same_rows import Unread, digest, digest_of, same_unread
from idefics_qlora.data.templates import question_findings
from idefics_qlora.notices import Notices


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


@dataclass(frozen=True)
class _Seen:
    """What is kept of a row that was looked at."""

    name: str
    key: bytes
    """Equal for rows of which the model gets the same."""
    pictures: frozenset[bytes]
    length: int
    right: tuple[str, ...]
    """All right answers."""


class FirstRows:
    """Looks at rows while they are read for the first time, then tells what it found.

    Args:
        reader: Reads them.
        trained: With what the model was trained that gets them.
    """

    def __init__(self, reader: RowReader, trained: Captions | None = None) -> None:
        self.reader, self.trained = reader, trained
        self.ask_default = True
        """Whether all rows have ended their prompt with the default question."""
        self.seen: dict[int, _Seen] = {}
        self.found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        """By kind: name of the row and line."""
        self.lengths: Lengths | None = None
        """What lengths are usual, once that was told."""
        self.errors: list[str] = []
        self._asked_at = 0.0
        self._seconds: list[float] = []
        self.num_pictures = self.num_decoded = 0
        """Pictures that this library has decoded; the others were decoded before it got them."""
        self._pixel_bytes: list[int] = []
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
        self._asked_at = time.perf_counter()
        return partial(self._look, index, before, row)

    def reading(self) -> Reading | None:
        """What a row takes to be read; ``None`` if none could be."""
        if not self._seconds:
            return None
        seconds = self._seconds[1:] or self._seconds  # the first loads decoders as well
        number = len(self._seconds)
        return Reading(sum(seconds) / len(seconds), sum(self._pixel_bytes) / number)

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
        self._seconds.append(time.perf_counter() - self._asked_at)
        self._pixel_bytes.append(sum(square.nbytes for square in pixels))
        marks = (getattr(picture, "idefics_qlora_origin", None) for picture in pictures)
        self.num_pictures += len(pictures)
        self.num_decoded += sum(isinstance(mark, (list, bytes, bytearray)) for mark in marks)
        collator = self.reader.collator
        name = f"{self.reader.name}[{index}]"
        squares = [digest(square) for square in pixels]
        key = digest([tokens.ids, squares])
        self.seen[index] = _Seen(name, key, frozenset(squares), len(tokens.ids), example.right)
        findings = [
            *text_findings(example.prompt, collator.forged),
            *completion_findings(example, collator.forged),
            *picture_findings(pictures, pixels),
            *question_findings(example.prompt, self.trained),
        ]
        self.ask_default &= example.prompt[-1] == QUESTION
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
            if isinstance(value := row.get(column), Integral) and (number := int(value)) >= 0:
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
            f"{row_name(place)} is the same as {row_name(earlier)}; {len(leaked)} of {number} "
            f"evaluation rows looked at ({len(leaked) / number:.0%}) are training rows: their loss "
            "tells what was learnt by heart; hold out other rows",
            len(leaked),
        )
