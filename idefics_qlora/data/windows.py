"""Windows: which rows an optimizer step sees.

A window is the unit of training: the ``global_batch_size`` examples of one optimizer step. Item
``w`` of :class:`Windows` is a pure function of ``(rows, seed, w)``; the number of worker processes,
the micro-batch size or a restart do not change it. Of a stream, whose rows have no numbers, window
``w`` has the rows that follow those of window ``w - 1``, and says where it ended.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from idefics_qlora.data.batches import Batch, Collator, Tokens
from idefics_qlora.data.example import (
    Captions,
    Example,
    PromptItem,
    ToExample,
    Turn,
    as_example,
    naming_row,
)
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.opening import BadImage, mark_origin, origin


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


Rows: TypeAlias = NumberedRows | RowStream


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learnt from."""

    row: str
    """Its name, such as ``train_rows[3]``."""
    source: str
    """What could not be opened, if it was a picture; else the row's name."""
    reason: str

    def error(self) -> ValueError:
        """What is wrong, as an exception that names the row."""
        if self.source == self.row:
            return ValueError(f"{self.row}: {self.reason}")
        return BadImage(f"{self.source} of {self.row}", self.reason)


@dataclass(frozen=True)
class Window:
    """What one optimizer step sees: all examples of a window, the longest first."""

    batch: Batch | None
    """``None`` if every row was bad."""
    rows: tuple[int, ...]
    """Row number of each example that could be read, in the order of the window."""
    batch_rows: tuple[int, ...]
    """Row number of each example of ``batch``."""
    lengths: tuple[int, ...]
    """Text tokens of each example of ``batch``."""
    images: tuple[int, ...]
    """Images of each example of ``batch``."""
    num_targets: int
    """Target tokens of the whole window: what its loss is divided by."""
    bad: tuple[BadRow, ...] = ()
    """Rows that were left out: the window is smaller by them, nothing takes their place."""
    position: dict[str, Any] | None = None
    """Where a stream of rows is after this window, as JSON values."""

    def micro_batches(self, size: int) -> list[Batch]:
        """The window in parts of ``size`` examples, each cut to its own longest example.

        Neighbours have similar lengths, so little is padding. The parts share the window's memory.
        """
        if self.batch is None:
            return []
        return [
            self.batch.part(
                slice(start, start + size),
                num_tokens=self.lengths[start],
                num_images=max(1, *self.images[start : start + size]),
            )
            for start in range(0, len(self.rows), size)
        ]

    def to(self, device: torch.device) -> Window:
        """The window on ``device``; from pinned memory the copies do not wait."""
        return self if self.batch is None else replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> Window:
        """The window in page-locked memory (a ``DataLoader`` calls this)."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


Look: TypeAlias = Callable[[Any, Example, Tokens, list[Image.Image], list[Tensor]], None]
"""Looks at a row, its example, and its tokens, pictures and pixels."""


class RowReader:
    """Rows as tokens and pixels; every error names the row.

    Args:
        rows: Training or evaluation rows.
        name: What to call them in errors, such as ``train_rows``.
        to_example: The user's conversion of a row, or ``None``.
        collator: Tokenises and prepares images.

    Raises:
        TypeError: If the rows have neither numbers nor a resumable stream's methods.
        ValueError: If there are none.
    """

    def __init__(
        self, rows: Rows, name: str, to_example: ToExample | None, collator: Collator
    ) -> None:
        self.is_stream = not isinstance(rows, NumberedRows) and isinstance(rows, RowStream)
        if hasattr(rows, "iloc"):
            raise TypeError(
                f"{name} is a table of pandas, whose items are columns: expected rows, such as "
                'table.to_dict("records")'
            )
        if isinstance(rows, dict) and rows:
            raise TypeError(
                f"{name} is a mapping of {sorted(map(str, rows))}: expected one of its parts, such "
                f"as rows[{next(iter(rows))!r}]"
            )
        if not self.is_stream and not isinstance(rows, NumberedRows):
            raise TypeError(
                f"{name} is a {type(rows).__name__}: expected a sequence of rows with a length, "
                "such as a list or a datasets.Dataset, or a datasets.IterableDataset"
            )
        if isinstance(rows, NumberedRows) and len(rows) == 0:
            raise ValueError(f"{name} is empty: there is no row to learn or to evaluate")
        self.rows = rows
        self.class_names = class_names(rows)
        # What a stream's own iteration would decode, outside of any row's error handling.
        self._features = getattr(rows, "features", None) if self.is_stream else None
        self.name = name
        self.to_example = to_example
        self.collator = collator

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]  # not asked of a stream

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
            _, tokens, pixels = self._convert(self.rows[index], crop_seed, look)  # type: ignore[index]
            return tokens, pixels

    def window(
        self, rows: Iterable[tuple[int, Any, int | None]], position: dict[str, Any] | None = None
    ) -> Window:
        """Some rows, the longest first.

        Args:
            rows: For each its number, the row itself (``...`` to have it looked up), and the seed
                of its crops.
            position: Where a stream is after them.
        """
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
            images=tuple(len(pixels) for *_, pixels in read),
            num_targets=0 if batch is None else batch.num_targets,
            bad=tuple(bad),
            position=position,
        )

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
        if self.class_names and isinstance(self.to_example, Captions | None):
            row = dict(row)
            for column, names in self.class_names.items():
                if isinstance(row.get(column), int):
                    with naming_row(f"{column}={row[column]}"):
                        row[column] = names.int2str(row[column])
        return as_example(row, self.to_example, self.collator.access)

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
        name = f"{self.name}[{number}]"
        try:
            with naming_row(name):
                decoded = self.rows[number] if row is ... else self.decoded(row)  # type: ignore[index]
                if marked:
                    mark_origins(decoded, self._encoded(number) if row is ... else row)
                return self._convert(decoded, crop_seed, look)
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
        if look is not None:
            look(row, example, tokens, pictures, pixels)
        return example, tokens, pixels


def class_names(rows: Rows) -> dict[str, Any]:
    """The columns of classes of a table of ``datasets``, whose rows hold their numbers alone."""
    features = getattr(rows, "features", None)
    # A ClassLabel, told without importing datasets, which takes seconds.
    columns = features.items() if isinstance(features, dict) else ()
    return {column: feature for column, feature in columns if hasattr(feature, "int2str")}


@dataclass(frozen=True)
class Fingerprint:
    """What tells rows from others: how many there are, and what the first ones are made of."""

    number: int | None
    """Rows; ``None`` for a stream."""
    given: tuple[str | None, ...]
    """Hashes of the first rows as the user gave them (``None``: bad), in the order of their use:
    texts and encoded pictures, which no version of a decoder changes."""
    tensors: tuple[str | None, ...]
    """Hashes of what is made of them, tokens and pixels, as runs of 0.1 kept them."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"version": 2, "number": self.number, "first": list(self.given)}

    def fits(self, kept: dict[str, Any]) -> bool:
        """Whether a checkpoint's rows can be these; a row that is bad now and then may be."""
        first = self.given if kept.get("version", 1) == 2 else self.tensors
        pairs = zip(kept["first"], first, strict=False)
        return kept["number"] == self.number and all(
            x == y or x is None or y is None for x, y in pairs
        )


def hash_given(example: Example, access: ImageAccess) -> str:
    def given(item: PromptItem) -> Any:
        if isinstance(item, Turn):
            return [item.role, item.is_target, [given(part) for part in item.content]]
        return item if isinstance(item, str) else {"image": origin(item, access)}

    values = [[given(item) for item in example.prompt], example.completion]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def hash_tensors(batch: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in (batch.input_ids, batch.labels, batch.pixel_values):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def mark_origins(decoded: Any, encoded: Any) -> None:
    """Let the pictures that ``datasets`` has decoded tell what from, wherever in a row they are."""
    if isinstance(decoded, Image.Image) and isinstance(encoded, Mapping):
        mark_origin(decoded, encoded)
    elif isinstance(decoded, Mapping) and isinstance(encoded, Mapping):
        for key, value in decoded.items():
            mark_origins(value, encoded.get(key))
    elif isinstance(decoded, list) and isinstance(encoded, list):
        for value, part in zip(decoded, encoded, strict=False):
            mark_origins(value, part)


def crop_seed(seed: int, epoch: int, row: int) -> int:
    """Seed of a row's crops in an epoch."""
    return int(np.random.SeedSequence((seed, epoch, row)).generate_state(1)[0])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in one epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


class Windows(Dataset[Window]):
    """All windows of a run, by number.

    Rows are drawn epoch after epoch, each in a permutation of its own, without a break between
    epochs: a window at the border holds the last rows of one and the first of the next.

    Args:
        reader: The training rows.
        seed: Seed of the run.
        global_batch_size: Examples per window.
        augment: Whether images are cropped at random.
    """

    def __init__(
        self, reader: RowReader, *, seed: int, global_batch_size: int, augment: bool
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.augment = augment

    def positions(self, window: int) -> list[tuple[int, int]]:
        """(epoch, row) of each example of a window, in order."""
        first = window * self.global_batch_size
        n = len(self.reader)
        return [
            (i // n, int(epoch_order(self.seed, i // n, n)[i % n]))
            for i in range(first, first + self.global_batch_size)
        ]

    def __getitem__(self, window: int) -> Window:
        return self.reader.window(
            (row, ..., crop_seed(self.seed, epoch, row) if self.augment else None)
            for epoch, row in self.positions(window)
        )


class StreamedWindows(IterableDataset[Window]):
    """The windows of a stream of rows, in its own order, epoch after epoch.

    Args:
        reader: The training rows, a stream.
        seed: Decides the crops.
        global_batch_size: Examples per window.
        augment: Whether images are cropped at random.
        position: Where to begin: the ``position`` of the window before; ``None``: at the start.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        seed: int,
        global_batch_size: int,
        augment: bool,
        position: dict[str, Any] | None,
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.augment = augment
        self.position = position

    def __iter__(self) -> Iterator[Window]:
        stream = self.reader.stream()
        epoch, number = 0, 0
        if self.position is not None:
            epoch, number = self.position["epoch"], self.position["row"]
            stream.load_state_dict(self.position["stream"])
        stream.set_epoch(epoch)
        rows = iter(stream)
        while True:
            window: list[tuple[int, Any, int | None]] = []
            while len(window) < self.global_batch_size:
                try:
                    row = next(rows)
                except StopIteration:
                    if number == 0:
                        name = self.reader.name
                        raise ValueError(f"{name} has no row in epoch {epoch}") from None
                    epoch, number = epoch + 1, 0
                    stream.set_epoch(epoch)
                    rows = iter(stream)
                    continue
                except Exception as error:
                    name = f"{self.reader.name}[{number}]"
                    raise ValueError(
                        f"{name}: the stream breaks off: {type(error).__name__}: {error}"
                    ) from error
                seed = crop_seed(self.seed, epoch, number) if self.augment else None
                window.append((number, row, seed))
                number += 1
            state = json.loads(json.dumps(stream.state_dict()))  # a copy, of JSON values
            yield self.reader.window(window, {"epoch": epoch, "row": number, "stream": state})


class EvalBatches(Dataset[Window]):
    """The rows in order, ``batch_size`` at a time, images as the checkpoint preprocesses them."""

    def __init__(self, reader: RowReader, batch_size: int) -> None:
        reader.need_length()
        self.reader = reader
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.reader) // self.batch_size)

    def __getitem__(self, index: int) -> Window:
        first = index * self.batch_size
        last = min(first + self.batch_size, len(self.reader))
        return self.reader.window((row, ..., None) for row in range(first, last))
