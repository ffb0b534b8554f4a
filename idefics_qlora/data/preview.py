"""Looking at what a model is given, before it is trained on it."""

from __future__ import annotations

import base64
import html
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from idefics_qlora.config import LossOn
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.first_rows import FirstRows
from idefics_qlora.data.order import crop_seed
from idefics_qlora.data.rows import RowReader, Rows, class_names
from idefics_qlora.data.templates import trained_captions
from idefics_qlora.families.family import check_processor
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.images.cropping import write_png
from idefics_qlora.notices import Notices


class SeenToken(NamedTuple):
    """One token as the model gets it."""

    text: str
    """As the tokenizer writes it; ``▁`` is the space in front of a word."""
    id: int
    is_control: bool
    """Whether it is a control token, such as ``<image>``, which no text can forge."""
    is_target: bool
    """Whether the model learns to say it."""
    image: int | None
    """Number of the image that it attends to, within its example; the latest if there are more."""


@dataclass(frozen=True)
class SeenExample:
    """One row as the model gets it."""

    row: int
    tokens: tuple[SeenToken, ...]
    padding: int
    """Padding tokens behind the others, which the model ignores."""
    images: tuple[Path, ...]
    """PNG files with the images' pixels, before they are normalised."""
    notes: tuple[str, ...]
    """For each image how many tiles and tokens it is, where a family cuts images into tiles."""


@dataclass(frozen=True, repr=False)
class Preview:
    """Rows as the model gets them; prints as text, and a notebook shows it with the pictures."""

    examples: tuple[SeenExample, ...]

    def __repr__(self) -> str:
        rows = [example.row for example in self.examples]
        return f"<Preview of rows {rows}: print() shows it>"

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 100, color: bool = False) -> str:
        """The preview as text.

        Args:
            width: Columns of the terminal.
            color: Whether to use ANSI colours.
        """
        style = _Ansi(color)
        lines = []
        for example in self.examples:
            rule = "─" * max(2, width - len(_title(example)) - 5)
            lines += [style.title(f"── {_title(example)} {rule}")]
            for n, (path, note) in enumerate(zip(example.images, example.notes, strict=True)):
                lines.append(f"   image {n}  {style.faint(str(path))}{'  ' * bool(note)}{note}")
            for (is_target, image), run in _runs(example):
                name = "learnt " if is_target else "context"
                sees = "sees no image" if image is None else f"sees image {image}"
                lines += ["", f" {style.target(name) if is_target else name}  {style.faint(sees)}"]
                lines += _columns(run, width, style)
            if example.padding:
                lines += ["", f" {style.faint(f'padding  {example.padding} tokens, ignored')}"]
            lines.append("")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _STYLE + "".join(map(_example_html, self.examples))


def preview_batch(
    processor: Any,
    rows: Rows,
    to_example: ToExample | None = None,
    *,
    indices: Sequence[int] | None = None,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    augment: bool = False,
    seed: int = 42,
    image_dir: str | os.PathLike[str] | None = None,
    access: ImageAccess = DEFAULT_ACCESS,
) -> Preview:
    """Show what the model gets of some rows: every token, what is learnt, what sees which image.

    It is read from the very tensors of a batch, and printed; a notebook shows the returned object,
    with the pictures, when it is the last value of a cell. What looks like a mistake is told in the
    log, as before a training.

    Args:
        processor: The base's processor, as ``load_model`` returns it.
        rows: Training or evaluation rows.
        to_example: Converts a row to an example, as in ``train``; with the processor of
            ``load_finetuned`` as in ``evaluate``.
        indices: Rows to show, in one batch. ``None``: the first two.
        loss_on: As in ``TrainConfig``.
        max_length: As in ``TrainConfig``.
        augment: Crop the images as in the first epoch of a training with ``seed``. ``False``: as
            in an evaluation.
        seed: Seed of the training whose crops are shown.
        image_dir: Folder for the images as PNG files. ``None``: a new temporary folder.
        access: As in ``train``.

    Returns:
        The rows as the model gets them; ``str()`` gives the text without colours.

    Raises:
        TypeError: If ``processor`` is none (but the model, perhaps).
        ValueError: If a row is bad; the message names it.
    """
    check_processor(processor)
    collator = Collator(processor, loss_on, max_length=max_length, access=access)
    names = class_names(rows)
    if not hasattr(rows, "__len__"):  # a stream: as far as it is to be shown
        rows = list(islice(iter(rows), max(indices or [1]) + 1))
    trained = trained_captions(processor)
    reader = RowReader(rows, "rows", to_example, collator, trained=trained)
    reader.class_names = names
    shown = list(range(min(2, len(reader))) if indices is None else indices)
    if not shown or not all(0 <= i < len(reader) for i in shown):
        raise ValueError(f"indices={shown}: expected row numbers, from 0 to {len(reader) - 1}")
    seen = FirstRows(reader, trained)
    read = [
        reader.read(i, crop_seed(seed, 0, i) if augment else None, seen.looking(i, ...))
        for i in shown
    ]
    tokens, pixels = zip(*read, strict=True)
    batch = collator.collate(tokens, pixels)

    folder = Path(image_dir or tempfile.mkdtemp(prefix="idefics_qlora-preview-")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for b, row in enumerate(shown):
        length = int(batch.attention_mask[b].sum())
        ids = batch.input_ids[b, :length].tolist()
        sees = batch.vision.sees()[b, :length]  # (T, N)
        images = (sees * torch.arange(1, sees.shape[1] + 1)).amax(dim=1).sub(1).tolist()
        targets = (batch.labels[b, :length] != IGNORE).tolist()
        texts = collator.tokenizer.convert_ids_to_tokens(ids)
        examples.append(
            SeenExample(
                row=row,
                tokens=tuple(
                    SeenToken(
                        text, i, i in collator.control_ids, target, None if image < 0 else image
                    )
                    for text, i, target, image in zip(texts, ids, targets, images, strict=True)
                ),
                padding=batch.input_ids.shape[1] - length,
                images=tuple(
                    write_png(batch.vision.image(b, n), folder / f"row-{row}-image-{n}.png")
                    for n in range(len(pixels[b]))
                ),
                notes=tuple(
                    f"{tiles}, {end - start:,} tokens"
                    if (tiles := batch.vision.described(b, n))
                    else ""
                    for n, (start, end) in enumerate(tokens[b].images)
                ),
            )
        )
    preview = Preview(tuple(examples))
    if sys.stdout is not None and not _in_notebook():  # a program without a console has none
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(preview.text(shutil.get_terminal_size((100, 24)).columns, color))
    seen.tell(Notices())
    return preview


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _title(example: SeenExample) -> str:
    targets = sum(token.is_target for token in example.tokens)
    images = len(example.images)
    return (
        f"row {example.row}: {len(example.tokens)} tokens, {targets} learnt, "
        f"{images} image{'' if images == 1 else 's'}"
    )


def _runs(example: SeenExample) -> Iterator[tuple[tuple[bool, int | None], list[SeenToken]]]:
    """The tokens in parts that are learnt or not and see the same image."""
    for key, run in groupby(example.tokens, lambda token: (token.is_target, token.image)):
        yield key, list(run)


def _visible(text: str) -> str:
    """A token's text without what would move the cursor or be invisible."""
    known = {"<0x0A>": "⏎", "\n": "⏎", "<0x09>": "⇥", "\t": "⇥"}
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return known.get(text, escaped or "∅")


def _cells(text: str) -> int:
    """Columns of a terminal that a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


class _Ansi:
    def __init__(self, color: bool) -> None:
        self.color = color

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text.strip() else text

    def title(self, text: str) -> str:
        return self._paint("1", text)

    def faint(self, text: str) -> str:
        return self._paint("2", text)

    def target(self, text: str) -> str:
        return self._paint("1;32", text)

    def control(self, text: str) -> str:
        return self._paint("36", text)


def _columns(run: Sequence[SeenToken], width: int, style: _Ansi) -> list[str]:
    """Tokens with their ids below them, wrapped; learnt ones behind a bar."""
    bar = style.target("┃") if run[0].is_target else " "
    lines: list[str] = []
    upper = lower = ""
    used = 0
    for token in run:
        text, number = _visible(token.text), str(token.id)
        cells = max(_cells(text), len(number))
        if used and used + cells > width - 4:
            lines += [f" {bar} {upper}".rstrip(), f" {bar} {lower}".rstrip()]
            upper = lower = ""
            used = 0
        paint = style.control if token.is_control else str
        upper += paint(text) + " " * (cells - _cells(text) + 2)
        lower += style.faint(number) + " " * (cells - len(number) + 2)
        used += cells + 2
    return [*lines, f" {bar} {upper}".rstrip(), f" {bar} {lower}".rstrip()]


_HUES = ("#3b82f6", "#f59e0b", "#a855f7", "#ef4444", "#14b8a6", "#ec4899")
"""Colours of images and of what sees them."""

_STYLE = """<style>
.iq-preview {font: 13px/1.35 system-ui, sans-serif; margin: 0 0 1.5em}
.iq-preview h4 {margin: 0 0 .5em; font-size: 1em}
.iq-preview figure {display: inline-block; margin: 0 .75em .5em 0}
.iq-preview img {display: block; width: 112px; border: 3px solid}
.iq-preview figcaption, .iq-preview small {opacity: .65; font-size: 11px}
.iq-preview .t {display: inline-block; margin: 0 2px 5px 0; padding: 1px 4px; text-align: center;
 border-radius: 3px; border-bottom: 3px solid transparent; background: rgba(128, 128, 128, .13)}
.iq-preview .t code {display: block; font: 12px/1.3 ui-monospace, monospace; white-space: pre;
 background: none; color: inherit; padding: 0}
.iq-preview .learnt {background: rgba(34, 197, 94, .32)}
.iq-preview .control code {font-style: italic; opacity: .7}
</style>"""


def _hue(image: int | None) -> str:
    return "transparent" if image is None else _HUES[image % len(_HUES)]


def _example_html(example: SeenExample) -> str:
    figures = "".join(
        f'<figure><img alt="image {n}" style="border-color: {_hue(n)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" '
        f'title="{html.escape(str(path))}"><figcaption>image {n}{", " * bool(note)}{note}'
        "</figcaption></figure>"
        for n, (path, note) in enumerate(zip(example.images, example.notes, strict=True))
    )
    tokens = []
    for position, token in enumerate(example.tokens):
        classes = "t" + " learnt" * token.is_target + " control" * token.is_control
        sees = "sees no image" if token.image is None else f"sees image {token.image}"
        learnt = "learnt" if token.is_target else "context"
        tokens.append(
            f'<span class="{classes}" style="border-bottom-color: {_hue(token.image)}" '
            f'title="position {position}, {learnt}, {sees}">'
            f"<code>{html.escape(_visible(token.text))}</code><small>{token.id}</small></span>"
        )
    padding = f"<small>and {example.padding} of padding, ignored</small>" * (example.padding > 0)
    legend = (
        '<small><span class="t learnt">green</span> is learnt; the line below a token has the '
        "colour of the image that it sees</small>"
    )
    return (
        f'<div class="iq-preview"><h4>{_title(example)}</h4>{figures}'
        f"<div>{''.join(tokens)}{padding}</div>{legend}</div>"
    )
