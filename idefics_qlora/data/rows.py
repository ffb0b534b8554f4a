"""Rows: read as tokens and pixels, every error with the name of its row."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from numbers import Integral
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from PIL import Image
from torch import Tensor

from idefics_qlora.data.bad_rows import BadRow
from idefics_qlora.data.batches import Collator, Tokens
from idefics_qlora.data.captions import Captions, pokemon_card_example
from idefics_qlora.data.example import Example, PromptItem, ToExample, naming_row, prompt_images
from idefics_qlora.data.fingerprints import Fingerprint, hash_given, hash_tensors, mark_origins
from idefics_qlora.data.formats import as_example, prompt_of
from idefics_qlora.data.frames import FrameRows
from idefics_qlora.data.windows import Question, Window
from idefics_qlora.images.access import BadImage, ImageAccess


@runtime_checkable
class NumberedRows(Protocol):
    """Anything with a length and rows by number: a list, a ``datasets.Dataset``, ..."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class RowStream(Protocol):
    """Rows one after the other, resumable: a ``datasets.IterableDataset``."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]:
        """Where the last iteration is, as JSON values."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Let the next iteration begin there."""

    def set_epoch(self, epoch: int, /) -> None:
        """Let the next iteration be that of this epoch."""


T = TypeVar("T")

Rows: TypeAlias = NumberedRows | RowStream


Look: TypeAlias = Callable[[Any, Example, Tokens, list[Image.Image], list[Tensor]], None]
"""Looks at a row, its example, and its tokens, pictures and pixels."""


class RowReader:
    """Rows as tokens and pixels; every error names the row.

    Args:
        rows: Training or evaluation rows.
        name: What to call them in errors, such as ``train_rows``.
        to_example: The user's conversion of a row, or ``None``.
        collator: Tokenises and prepares images.
        once: Whether rows that can be read but once will do: anything to iterate over.
        trained: With what the model was trained, for rows without a ``to_example``; ``None`` for
            rows that it is trained on.

    Raises:
        TypeError: If the rows have neither numbers nor a resumable stream's methods.
        ValueError: If there are none.
    """

    def __init__(
        self,
        rows: Rows | Iterable[Any],
        name: str,
        to_example: ToExample | None,
        collator: Collator,
        once: bool = False,
        trained: Captions | None = None,
    ) -> None:
        if isinstance(rows, (str, bytes, os.PathLike)):
            raise TypeError(
                f"{name}={rows!r:.80}: expected a list of rows or the like; rows that a folder or "
                "a file holds are read by load_rows(path)"
            )
        if hasattr(rows, "iloc"):  # a table of pandas, whose own items are columns
            rows = FrameRows(rows)
        self.is_stream = not isinstance(rows, NumberedRows) and (
            isinstance(rows, RowStream) or (once and isinstance(rows, Iterable))
        )
        if isinstance(rows, dict) and rows:
            raise TypeError(
                f"{name} is a mapping of {sorted(map(str, rows))}: expected one of its parts, such "
                f"as rows[{next(iter(rows))!r}]"
            )
        if not self.is_stream and not isinstance(rows, NumberedRows):
            raise TypeError(
                f"{name} is a {type(rows).__name__}: expected a sequence of rows with a length, "
                "such as a list or a datasets.Dataset, or a datasets.IterableDataset; of a single "
                "row, a list"
            )
        if isinstance(rows, NumberedRows) and len(rows) == 0:
            raise ValueError(f"{name} is empty: there is no row to learn or to evaluate")
        self.rows: Rows = rows  # type: ignore[assignment]  # only with `once` of another kind
        self.class_names = class_names(self.rows)
        # What a stream's own iteration would decode, outside of any row's error handling.
        self._features = getattr(rows, "features", None) if self.is_stream else None
        self.name = name
        self.to_example = to_example
        self.collator = collator
        self.trained = trained
        self._encoded_rows = None
        is_known = isinstance(to_example, Captions | None) or to_example is pokemon_card_example
        if is_known and (collator.kept is not None or collator.access.draft):
            self._encoded_rows = encoded_rows(self.rows)  # a user's function gets its row as it is

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]  # not asked of a stream

    def row(self, number: int) -> Any:
        """A row by its number.

        Pictures that ``datasets`` stores are left encoded where that saves decoding them in full.
        """
        if self._encoded_rows is not None:
            row, access = self._encoded_rows[number], self.collator.access
            if all(_can_be_opened(row[name], access) for name in picture_columns(self.rows)):
                return row
        return self.rows[number]  # type: ignore[index]

    def read(
        self, index: int, crop_seed: int | None = None, look: Look | None = None
    ) -> tuple[Tokens, list[Tensor]]:
        """Tokens and pixels of one row.

        Args:
            index: The row's number.
            crop_seed: Seed of its crops.
            look: Shown the row, if it can be read.

        Raises:
            ValueError: If the row is no valid example (``BadImage`` if an image is the reason).
        """
        with naming_row(f"{self.name}[{index}]"):
            _, tokens, pixels = self._convert(self.row(index), crop_seed, look)
            return tokens, pixels

    def window(
        self,
        rows: Iterable[tuple[int, Any, int | None]],
        position: dict[str, Any] | None = None,
        asked: Container[int] = (),
    ) -> Window:
        """Some rows, the longest first.

        Args:
            rows: For each its number, the row itself (``...`` to have it looked up), and the seed
                of its crops.
            position: Where a stream is after them.
            asked: Numbers of the rows that shall be there as questions as well.
        """
        questions: list[Question] = []
        numbers: list[int] = []
        read: list[tuple[int, Tokens, list[Tensor]]] = []
        bad: list[BadRow] = []
        for number, row, crop_seed in rows:
            one = self._read(number, row, crop_seed)
            if isinstance(one, BadRow):
                bad.append(one)
            else:
                numbers.append(number)
                read.append((number, *one[1:]))
                if number in asked:
                    questions.append(self._question(number, one[0], one[2]))
        read.sort(key=lambda item: len(item[1].ids), reverse=True)  # stable
        batch = None
        if read:
            _, tokens, pixels = zip(*read, strict=True)
            batch = self.collator.collate(tokens, pixels)
        return Window(
            batch=batch,
            rows=tuple(numbers),
            batch_rows=tuple(number for number, *_ in read),
            lengths=tuple(len(tokens.ids) for _, tokens, _ in read),
            images=tuple(sum(map(self.collator.reader.num_tiles, row)) for *_, row in read),
            num_targets=0 if batch is None else batch.num_targets,
            bad=tuple(bad),
            position=position,
            questions=tuple(questions),
        )

    def _question(self, number: int, example: Example, pixels: list[Tensor]) -> Question:
        (tokens,) = self.collator.prompt_tokens([example.prompt])
        if len(pixels) < len(prompt_images(example.prompt)):  # `max_length` cut a dialogue
            pixels = self.collator.pixels(example.prompt)
        tokens = self.collator.placed(tokens, pixels)
        return Question(number, tokens, pixels, example.right)

    def first_rows(
        self, order: Iterable[int], number: int, looking: Callable[[int, Any], Look] | None = None
    ) -> tuple[Fingerprint, list[BadRow]]:
        """Read the first rows once, before any training starts.

        Args:
            order: Numbers of the rows in the order of their use; not asked of a stream.
            number: Rows to read at most.
            looking: Given a row's number and, of a stream, the row (else ``...``) before it is
                read, what is to look at it then.

        Returns:
            What tells these rows from others, and those that are bad.

        Raises:
            ValueError: If a stream has no row.
        """
        bad: list[BadRow] = []
        given: list[str | None] = []
        tensors: list[str | None] = []
        for index, row in self._first(order, number):
            look = None if looking is None else looking(index, row)
            one = self._read(index, row, look=look, marked=True)
            if isinstance(one, BadRow):
                bad.append(one)
                given.append(None)
                tensors.append(None)
            else:
                example, tokens, pixels = one
                given.append(hash_given(example, self.collator.access))
                tensors.append(hash_tensors(self.collator.collate([tokens], [pixels])))
        if not given:
            raise ValueError(f"{self.name} is empty: there is no row to learn or to evaluate")
        num_rows = None if self.is_stream else len(self)
        return Fingerprint(num_rows, tuple(given), tuple(tensors)), bad

    def _first(self, order: Iterable[int], number: int) -> Iterator[tuple[int, Any]]:
        if not self.is_stream:
            yield from ((index, ...) for index in islice(order, number))
        else:
            stream = self.stream()
            stream.set_epoch(0)
            yield from enumerate(islice(iter(stream), number))

    def stream(self) -> Any:
        """The stream with its pictures still encoded, so that a bad one spoils its own row only."""
        if not isinstance(self.rows, RowStream):
            return self.rows
        rows: Any = copy.copy(self.rows)  # the user's object keeps its own position
        return rows if self._features is None else rows.decode(False)

    def need_length(self) -> None:
        """Raise if the rows are a stream."""
        if self.is_stream:
            raise TypeError(
                f"{self.name} is a stream: expected rows with a length, such as "
                "list(stream.take(200))"
            )

    def example(self, row: Any) -> Example:
        """A row's example, its pictures opened with the collator's access.

        The numbers of classes become their names, except for a ``to_example`` of the user's own.
        """
        with self.collator.opening():
            how = self.to_example, self.collator.access, self.trained
            return as_example(self._with_names(row), *how)

    def prompt(self, row: Any) -> Sequence[PromptItem]:
        """What a row asks, with or without its answer; otherwise as :meth:`example`."""
        with self.collator.opening():
            how = self.to_example, self.collator.access, self.trained
            return prompt_of(self._with_names(row), *how)

    def _with_names(self, row: Any) -> Any:
        if not self.class_names or not isinstance(self.to_example, Captions | None):
            return row
        row = dict(row)
        for column, names in self.class_names.items():
            if isinstance(row.get(column), Integral):
                with naming_row(f"{column}={row[column]}"):
                    row[column] = names.int2str(int(row[column]))
        return row

    def decoded(self, row: Any) -> Any:
        """A stream's row with its pictures decoded; rows with numbers are so already."""
        return row if self._features is None else self._features.decode_example(row)

    def _read(
        self,
        number: int,
        row: Any,
        crop_seed: int | None = None,
        look: Look | None = None,
        marked: bool = False,
    ) -> tuple[Example, Tokens, list[Tensor]] | BadRow:
        """A row's example, tokens and pixels, or what is wrong with it.

        Args:
            number: Its number.
            row: The row itself; ``...`` to have it looked up.
            crop_seed: Seed of its crops.
            look: Shown the row, if it can be read.
            marked: Whether its pictures shall tell what ``datasets`` decoded them from.
        """

        def convert(decoded: Any) -> tuple[Example, Tokens, list[Tensor]]:
            if marked:
                mark_origins(decoded, self._encoded(number) if row is ... else row)
            return self._convert(decoded, crop_seed, look)

        return self.attempt(number, row, convert)

    def attempt(self, number: int, row: Any, convert: Callable[[Any], T]) -> T | BadRow:
        """What is made of a row, or what is wrong with it.

        Args:
            number: Its number.
            row: The row itself; ``...`` to have it looked up.
            convert: Given the row with its pictures decoded.
        """
        name = f"{self.name}[{number}]"
        try:
            with naming_row(name):
                return convert(self.row(number) if row is ... else self.decoded(row))
        except BadImage as error:
            return BadRow(name, error.source.removesuffix(f" of {name}"), error.reason)
        except ValueError as error:
            return BadRow(name, name, str(error).removeprefix(f"{name}: "))

    def _encoded(self, number: int) -> Any:
        """A row of a ``datasets.Dataset`` as it is stored; ``None`` for rows of other kinds."""
        rows: Any = self.rows
        form = getattr(rows, "format", None)
        if not isinstance(form, dict) or form.get("type") is not None:  # it may be a transform
            return None
        return rows.with_format("arrow")[number].to_pylist()[0]

    def _convert(
        self, row: Any, crop_seed: int | None, look: Look | None
    ) -> tuple[Example, Tokens, list[Tensor]]:
        example = self.example(row)
        (tokens,) = self.collator.tokens([example])
        pictures = self.collator.pictures(example.prompt, tokens)
        pixels = self.collator.squares(pictures, crop_seed)
        tokens = self.collator.shortened(self.collator.placed(tokens, pixels))
        pictures, pixels = pictures[: len(tokens.images)], pixels[: len(tokens.images)]
        if look is not None:
            look(row, example, tokens, pictures, pixels)
        return example, tokens, pixels


def picture_columns(rows: Rows) -> list[str]:
    """The columns of a table of ``datasets`` that hold encoded pictures and are given as such."""
    features, form = getattr(rows, "features", None), getattr(rows, "format", None)
    if not isinstance(features, dict) or not isinstance(form, dict) or form.get("type") is not None:
        return []  # no table, a stream, or one with a transform of the user's
    return [
        column
        for column, feature in features.items()
        if type(feature).__name__ == "Image" and feature.decode and feature.mode is None
    ]


def encoded_rows(rows: Rows) -> Any:
    """A table of ``datasets`` with its pictures still encoded; ``None`` for other rows."""
    table: Any = rows
    columns = picture_columns(rows)
    for column in columns:
        table = table.cast_column(column, type(table.features[column])(decode=False))
    return table if columns else None


def _can_be_opened(value: Any, access: ImageAccess) -> bool:
    """Whether a stored picture is what ``open_image`` opens as ``datasets`` does."""
    if value is None or value["bytes"] is not None:
        return True
    return access.folder is None and os.path.isfile(value["path"] or "")


def class_names(rows: Rows) -> dict[str, Any]:
    """The columns of classes of a table of ``datasets``, whose rows hold their numbers alone."""
    features = getattr(rows, "features", None)
    # A ClassLabel, told without importing datasets, which takes seconds.
    columns = features.items() if isinstance(features, dict) else ()
    return {column: feature for column, feature in columns if hasattr(feature, "int2str")}
