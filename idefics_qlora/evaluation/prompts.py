"""Rows as prompts, read ahead of the model that answers them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Literal, NamedTuple

from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from idefics_qlora.data.bad_rows import BadRow
from idefics_qlora.data.batches import Collator, Tokens
from idefics_qlora.data.captions import (
    Captions,
    has_picture,
    has_picture_ending,
    meant_picture,
)
from idefics_qlora.data.checks import Finding, text_findings
from idefics_qlora.data.example import Example, ToExample
from idefics_qlora.data.pace import FEWEST
from idefics_qlora.data.rows import RowReader, Rows, RowStream
from idefics_qlora.data.templates import question_findings
from idefics_qlora.data.workers import Loading
from idefics_qlora.images.access import is_url

TOGETHER = 8
"""Rows at most that are read, and cross from a loader process, at once."""


class Prompt(NamedTuple):
    """A row as the model gets it."""

    name: str
    tokens: Tokens
    pixels: list[Tensor]
    findings: list[Finding]


class Prompts(NamedTuple):
    """Some rows, in order."""

    prompts: list[Prompt | BadRow]
    broken: str = ""
    """Why there is no row after these, where that is not the end."""


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and (has_picture(value, None) or bool(meant_picture(value)))


def _is_picture(value: Any) -> bool:
    """Whether this is a picture, or would be one in a row."""
    if isinstance(value, (str, os.PathLike)):
        return is_url(text := os.fsdecode(value)) or has_picture_ending(text)
    return isinstance(value, (bytes, Image))


def loading_prompts(
    rows: Rows | Iterable[Any],
    to_example: ToExample | None,
    collator: Collator,
    num_workers: int | Literal["auto"],
    together: int = TOGETHER,
    trained: Captions | None = None,
) -> Loading[Prompts]:
    """The rows as prompts, in order, read ahead by loader processes.

    Args:
        rows: Rows as in training, prompts, or anything that gives some of these one by one.
        to_example: As in ``train``; it may return prompts.
        collator: Tokenises and prepares images.
        num_workers: Processes. ``auto``: few, and none where what is given could not be shared
            between processes: prompts with opened pictures, and iterators.
        together: Rows that are read at once.
        trained: With what the model was trained.
    """
    if _is_row(rows):
        raise TypeError(f"prompts={rows!r:.80} is one row: put it into a list")
    if _is_picture(rows):
        raise TypeError(
            f"prompts={rows!r:.80} is one picture: expected a list of rows, such as "
            '[{"image": path}, ...]'
        )
    if isinstance(rows, (str, os.PathLike)):
        raise TypeError(
            f"prompts={rows!r:.80}: expected a list of rows or prompts; rows that a folder or a "
            "file holds are read by load_rows(path)"
        )
    are_prompts = isinstance(rows, (list, tuple)) and to_example is None
    if are_prompts and isinstance(rows[0], (Mapping, Example)):  # type: ignore[index]
        are_prompts = False
    if isinstance(rows, (list, tuple)) and are_prompts:
        shown = f"[{rows[0]!r:.80}{', ...' if len(rows) > 1 else ''}]"
        if all(map(_is_picture, rows)):
            raise ValueError(
                f'prompts={shown}: pictures alone are rows, [{{"image": path}}, ...], and asked '
                "what the model was trained with; to ask otherwise, pass prompts, "
                '[[image, "Question: ... Answer:"], ...]'
            )
        if all(isinstance(item, str) or _is_picture(item) for item in rows):
            raise ValueError(
                f"prompts={shown}: expected a list of prompts, each a list of images and texts; "
                'one alone is passed as [[image, "Question: ... Answer:"]]'
            )
    name = "prompts" if are_prompts else "rows"
    reader = RowReader(rows, name, to_example, collator, once=True, trained=trained)
    if num_workers == "auto":
        num_workers = FEWEST  # a row is read many times faster than it is answered
        if are_prompts or (isinstance(rows, Sized) and len(rows) <= 2 * together):
            num_workers = 0
        if reader.is_stream and not isinstance(rows, RowStream):
            num_workers = 0
    kind = _Streamed if reader.is_stream else _Numbered
    return Loading(kind(reader, together), num_workers=num_workers)


class _Reading:
    def __init__(self, reader: RowReader, together: int) -> None:
        self.reader = reader
        self.together = together

    def read(self, number: int, row: Any) -> Prompt | BadRow:
        collator = self.reader.collator

        def convert(row: Any) -> Prompt:
            prompt = self.reader.prompt(row)
            (tokens,) = collator.prompt_tokens([prompt])
            findings = [
                *text_findings(prompt, collator.forged),
                *question_findings(prompt, self.reader.trained),
            ]
            name = f"{self.reader.name}[{number}]"
            pixels = collator.pixels(prompt)
            return Prompt(name, collator.placed(tokens, pixels), pixels, findings)

        return self.reader.attempt(number, row, convert)


class _Numbered(_Reading, Dataset[Prompts]):
    def __len__(self) -> int:
        return -(-len(self.reader) // self.together)

    def __getitem__(self, index: int) -> Prompts:
        first = index * self.together
        last = min(first + self.together, len(self.reader))
        return Prompts([self.read(number, ...) for number in range(first, last)])


class _Streamed(_Reading, IterableDataset[Prompts]):
    def __iter__(self) -> Iterator[Prompts]:
        rows = iter(self.reader.stream())
        number = 0
        while True:
            prompts: list[Prompt | BadRow] = []
            try:
                for row in islice(rows, self.together):
                    prompts.append(self.read(number, row))
                    number += 1
            except Exception as error:
                name = f"{self.reader.name}[{number}]"
                reason = f"{name}: the stream breaks off: {type(error).__name__}: {error}"
                yield Prompts(prompts, reason)
                return
            if not prompts:
                return
            yield Prompts(prompts)
