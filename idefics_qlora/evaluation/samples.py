"""The same few held-out rows, captioned at every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from idefics_qlora.data.rows import RowReader
from idefics_qlora.evaluation.generation import generate_from_tokens
from idefics_qlora.families.family import Model
from idefics_qlora.images.cropping import write_png
from idefics_qlora.progress import counting


class EvalSamples:
    """The same few held-out rows, captioned at every evaluation.

    Args:
        reader: The held-out rows.
        number: Rows to caption, from the first that can be read.
        folder: The run's folder; the pictures go to ``eval_samples`` in it, as the model sees them.
    """

    MAX_NEW_TOKENS = 64

    def __init__(self, reader: RowReader, number: int, folder: Path) -> None:
        self.collator = reader.collator
        self.rows: list[dict[str, Any]] = []
        self.pixels: list[list[Tensor]] = []
        prompts = []
        for index in range(len(reader)):
            if len(self.rows) == number:
                break
            try:
                example = reader.example(reader.row(index))
                pixels = self.collator.pixels(example.prompt)
            except Exception:
                continue  # it is noted when its batch is evaluated
            files = [f"eval_samples/row-{index}-image-{n}.png" for n in range(len(pixels))]
            for file, image in zip(files, pixels, strict=True):
                write_png(image, folder / file)
            name = f"{reader.name}[{index}]"
            self.rows.append({"row": name, "images": files, "target": example.completion})
            self.pixels.append(pixels)
            prompts.append(example.prompt)
        self.tokens = [
            self.collator.placed(*pair)
            for pair in zip(self.collator.prompt_tokens(prompts), self.pixels, strict=True)
        ]

    def caption(self, model: Model, batch_size: int) -> list[dict[str, Any]]:
        """For each row its name, its pictures' files, the text to be said, and what is said."""
        with counting("captioning", len(self.rows), "samples") as counted:
            texts = generate_from_tokens(
                model,
                self.collator,
                self.tokens,
                self.pixels,
                batch_size,
                self.MAX_NEW_TOKENS,
                counted.note,
            )
        return [{**row, "text": text} for row, text in zip(self.rows, texts, strict=True)]
