"""One question about some pictures, two answers: the base's, and that with the adapter."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria

from idefics_qlora.data.batches import Collator, Tokens
from idefics_qlora.data.captions import QUESTION, Captions, columns_of
from idefics_qlora.data.example import PromptItem, Turn, as_prompt
from idefics_qlora.evaluation.generation import generate_from_tokens
from idefics_qlora.families import family_of
from idefics_qlora.families.family import Processor
from idefics_qlora.images.access import BadImage
from idefics_qlora.images.opening import open_image
from idefics_qlora.model.adapters import without_adapter
from idefics_qlora.reporting.folder import RunFolder, mappings, read_run


@dataclass(frozen=True)
class HeldOut:
    """A held-out row whose prompt is pictures and one question."""

    images: tuple[Path, ...]
    question: str
    right: str
    """What was to be said."""


@dataclass(frozen=True)
class Asked:
    """How a run asks its model, as far as its folder tells."""

    question: str = QUESTION
    """Empty if each row has its own."""
    is_dialogue: bool = False
    """Whether a question is a turn of a dialogue, as in rows of questions and answers."""
    max_length: int | None = None
    """Tokens of an example at most, in training."""
    rows: tuple[HeldOut, ...] = ()


def asked_by(checkpoint: Path, trained: Captions | None = None) -> Asked:
    """How the run asks that left a checkpoint.

    Args:
        checkpoint: The run's folder, one of its checkpoints, or an adapter's of which no run is
            known.
        trained: The conversion with which the adapter says that it was trained.
    """
    asked = Asked()
    for folder in (checkpoint, checkpoint.absolute().parent):
        with suppress(ValueError):
            asked = _asked(read_run(folder))
            break
    if trained is not None and not columns_of("question", trained.question):
        return replace(asked, question=trained.text({}), is_dialogue=False)
    return asked


def _asked(run: RunFolder) -> Asked:
    entries = [row for row in mappings(run.gallery.get("rows")) if _question_of(row)]
    dialogues = {row.get("dialogue") is True for row in entries}
    is_dialogue = dialogues == {True}
    questions = {_question_of(row) for row in entries}
    question = QUESTION
    if questions:
        question = questions.pop() if len(questions) == 1 else ""
    whole = {sample.get("row"): sample for sample in run.samples}  # those of the last evaluation
    rows = []
    for entry in entries:
        kept = _pictures(run.path, entry)
        images = _pictures(run.path, whole.get(entry.get("row"), {})) or kept
        if len(kept) == len(images) and any(map(_is_squeezed, images, kept)):
            images = kept  # the model squeezes them itself
        same_way = (entry.get("dialogue") is True) == is_dialogue
        if images and same_way and not (entry.get("more_images") and images[0].suffix == ".webp"):
            right = entry.get("right")
            told = str(right[0]).strip() if isinstance(right, list) and right else ""
            rows.append(HeldOut(images, _question_of(entry), told))
    max_length = run.setting.get("max_length")
    return Asked(
        question,
        is_dialogue,
        max_length if isinstance(max_length, int) else None,
        tuple(rows),
    )


def _question_of(entry: dict[str, Any]) -> str:
    """The one text that a row of the gallery asks; empty if there are several or none."""
    question = entry.get("question", entry.get("prompt"))  # older runs have all texts alone
    return question if isinstance(question, str) else ""


def _pictures(run: Path, entry: dict[str, Any]) -> tuple[Path, ...]:
    """Files of the pictures of a row, if all of them are there, in the run's folder."""
    names = entry.get("images")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    folder = run.resolve()
    files = [(folder / name).resolve() for name in names]
    # What a folder from elsewhere names is not shown unless it lies in it.
    if not all(file.is_relative_to(folder) and file.is_file() for file in files):
        return ()
    return tuple(files)


def _is_squeezed(file: Path, kept: Path) -> bool:
    """Whether a picture has other proportions than as the row has it."""
    wide = []
    for each in (file, kept):
        with (
            suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
            Image.open(each, formats=("PNG", "WEBP")) as picture,
        ):
            wide.append(picture.width / picture.height)
    return len(wide) == 2 and not 0.9 < wide[0] / wide[1] < 1.1


@dataclass(frozen=True)
class Question:
    """Pictures and a text as the model gets them."""

    tokens: Tokens
    pixels: list[Tensor]
    """(3, H, W) uint8, one for each picture."""
    notes: list[str]
    """What may be a mistake."""


class _Until(StoppingCriteria):  # type: ignore[misc]
    """Ends a text at its next token once something has happened."""

    def __init__(self, happened: threading.Event) -> None:
        self._happened = happened

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ends = self._happened.is_set()
        return torch.full((len(input_ids),), ends, device=input_ids.device)


class SideBySide:
    """A base and its adapter, one model in memory; one text is generated at a time.

    Args:
        model: The base with the adapter.
        processor: The base's.
        max_length: Tokens of an example at most, as in the adapter's training.
    """

    def __init__(
        self, model: PeftModel, processor: Processor, max_length: int | None = None
    ) -> None:
        self._model, self._max_length = model, max_length
        self._collator = Collator(processor, num_embeddings=family_of(model).num_embeddings(model))
        text = model.config.get_text_config()
        self._limit: int | None = getattr(text, "max_position_embeddings", None)
        # peft leaves these in the base's layers when it switches an adapter off.
        self._keeps_biases = any(c.bias != "none" for c in model.peft_config.values())
        # Switching the adapter off is a state of the model, which two threads would share.
        self._lock = threading.Lock()
        self.ending = threading.Event()
        """When it is set, a text that is being written ends with its next token."""

    def read(
        self, images: Sequence[Path], text: str, is_dialogue: bool, max_new_tokens: int
    ) -> Question:
        """Pictures and a text as the model gets them.

        Args:
            images: Files of pictures, which stand before the text.
            text: What is asked.
            is_dialogue: Whether it is a turn of a dialogue.
            max_new_tokens: Tokens of the answer at most.

        Raises:
            ValueError: If there is no picture or no text, a picture cannot be opened, or all is
                longer than what the model can read; in words for who has asked.
        """
        if not images:
            raise ValueError("There is no picture: drop one or several, or take an example.")
        if not text.strip():
            raise ValueError("There is no question: write one.")
        items: list[Any] = [*self._opened(images), text.strip()]
        prompt: Sequence[PromptItem] = as_prompt([Turn("user", items)] if is_dialogue else items)
        pixels = self._collator.pixels(prompt)
        (tokens,) = self._collator.prompt_tokens([prompt])
        tokens = self._collator.placed(tokens, pixels)
        notes = []
        if found := self._collator.forged.search(text):
            notes.append(
                f"{found[0]!r} is read as letters: a picture's place is before the question."
            )
        if self._keeps_biases:
            notes.append(
                "The adapter has learnt biases too, which cannot be switched off: what the base "
                "says is not quite what it said before training."
            )
        number = f"{len(images)} picture{'s' * (len(images) > 1)} and the question are"
        number += f" {len(tokens.ids)} tokens"
        if self._limit is not None and len(tokens.ids) + max_new_tokens > self._limit:
            raise ValueError(
                f"The {number}, with {max_new_tokens} for the answer more than the {self._limit} "
                "that the model can read: take fewer pictures, or a shorter answer."
            )
        if self._max_length is not None and len(tokens.ids) > self._max_length:
            notes.append(
                f"The {number}, more than the adapter has learnt from "
                f"(max_length={self._max_length})."
            )
        return Question(tokens, pixels, notes)

    def _opened(self, images: Sequence[Path]) -> list[Any]:
        opened, wrong = [], []
        for image in images:
            try:
                with self._collator.opening():
                    opened.append(open_image(image))
            except BadImage as error:
                wrong.append(f"{image.name} cannot be opened: {error.reason}.")
        if wrong:
            raise ValueError(" ".join([*wrong, "Take it out, or save it in another format."]))
        return opened

    def base(self, question: Question, max_new_tokens: int) -> str:
        """What the base says, without the adapter."""
        with self._lock, without_adapter(self._model):
            return self._said(question, max_new_tokens)

    def adapter(self, question: Question, max_new_tokens: int) -> str:
        """What it says with the adapter."""
        with self._lock:
            return self._said(question, max_new_tokens)

    def _said(self, question: Question, max_new_tokens: int) -> str:
        (text,) = generate_from_tokens(
            self._model,
            self._collator,
            [question.tokens],
            [question.pixels],
            1,
            max_new_tokens,
            lambda _: None,
            stopping_criteria=[_Until(self.ending)],
        )
        return text.strip()
