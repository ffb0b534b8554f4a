"""A few held-out rows, and what the model says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from idefics_qlora.data.batches import Collator
from idefics_qlora.data.example import Example
from idefics_qlora.data.rows import RowReader
from idefics_qlora.evaluation.generation import generate_from_tokens
from idefics_qlora.families.family import Model
from idefics_qlora.images.cropping import write_png
from idefics_qlora.progress import counting

MAX_NEW_TOKENS = 64
SIDE = 320
"""Pixels of the longer side of a picture that is kept for people, at most."""


@dataclass(frozen=True)
class Sample:
    """A row of which a model is to say something."""

    index: int
    name: str
    """Such as ``eval_rows[3]``."""
    example: Example
    pixels: list[Tensor]
    """Its images as the model sees them, (3, H, W) uint8."""
    pictures: list[Image.Image]
    """Its images as the row has them, made small."""


def read_samples(reader: RowReader, indices: Iterable[int], number: int) -> list[Sample]:
    """The first rows that can be read; a bad one is noted when its batch is evaluated.

    Args:
        reader: The rows.
        indices: Numbers of rows.
        number: Rows at most.
    """
    samples: list[Sample] = []
    for index in indices:
        if len(samples) == number:
            break
        try:
            example = reader.example(reader.row(index))
            pictures = reader.collator.pictures(example.prompt)
            pixels = reader.collator.squares(pictures, None)
        except Exception:
            continue
        samples.append(
            Sample(index, f"{reader.name}[{index}]", example, pixels, [*map(_small, pictures)])
        )
    return samples


def _small(picture: Image.Image) -> Image.Image:
    """A copy for people to look at, undistorted."""
    scale = min(1.0, SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def captions(
    model: Model, collator: Collator, samples: Sequence[Sample], batch_size: int
) -> list[str]:
    """What a model says of each sample, greedily."""
    pixels = [sample.pixels for sample in samples]
    prompts = collator.prompt_tokens([sample.example.prompt for sample in samples])
    tokens = [collator.placed(*pair) for pair in zip(prompts, pixels, strict=True)]
    with counting("captioning", len(samples), "samples") as counted:
        return generate_from_tokens(
            model, collator, tokens, pixels, batch_size, MAX_NEW_TOKENS, counted.note
        )


class EvalSamples:
    """The same few held-out rows, captioned at every evaluation.

    Args:
        reader: The held-out rows.
        number: Rows to caption, from the first that can be read.
        folder: The run's folder; the pictures go to ``eval_samples`` in it, as the model sees them.
    """

    def __init__(self, reader: RowReader, number: int, folder: Path) -> None:
        self._collator = reader.collator
        self._samples = read_samples(reader, range(len(reader)), number)
        self._rows: list[dict[str, Any]] = []
        for sample in self._samples:
            number_of = range(len(sample.pixels))
            files = [f"eval_samples/row-{sample.index}-image-{n}.png" for n in number_of]
            for file, image in zip(files, sample.pixels, strict=True):
                write_png(image, folder / file)
            row = {"row": sample.name, "images": files, "target": sample.example.completion}
            self._rows.append(row)

    def caption(self, model: Model, batch_size: int) -> list[dict[str, Any]]:
        """For each row its name, its pictures' files, the text to be said, and what is said."""
        texts = captions(model, self._collator, self._samples, batch_size)
        return [{**row, "text": text} for row, text in zip(self._rows, texts, strict=True)]
