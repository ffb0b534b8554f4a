"""What a model says of held-out rows, and what metrics make of it."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import torch

from idefics_qlora.data.batches import Collator
from idefics_qlora.data.windows import Question
from idefics_qlora.durable import write_whole
from idefics_qlora.evaluation.generation import generate_from_tokens
from idefics_qlora.evaluation.metrics import GREATER_IS_BETTER, missing_package
from idefics_qlora.families.family import Model
from idefics_qlora.notices import with_words

logger = logging.getLogger(__name__)

Metric: TypeAlias = Callable[[list[str], list[list[str]]], "float | Mapping[str, float]"]
"""Scores predictions by the references of each: one number, or several with their names."""

AT_ONCE = 64
"""Rows that are answered in one batch where memory allows: a token of many rows takes hardly longer
than one of few."""

RECORDED = {
    "eval_loss": False,
    **dict.fromkeys(("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")),
    **dict.fromkeys(("eval_bad_rows", "eval_generate_s", "eval_samples")),
}
"""What an evaluation records beside metrics, and whether the greater is the better."""
RECORDED_OF_IMAGE_USE = {
    **dict.fromkeys(("eval_loss_another_image", "eval_loss_blank_image")),
    **{"eval_image_gain": True, "eval_looks": True},
}
"""The same, with ``eval_image_use``."""


def metric_problems(metrics: Any) -> Iterator[str]:
    """What is wrong with the names and functions of metrics."""
    if not isinstance(metrics, Mapping):
        yield (
            f"metrics={metrics!r:.80}: expected names and functions, such as "
            '{"cider": iq.metrics.cider_d}'
        )
        return
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.strip():
            yield f"metrics has the name {name!r}: expected a text, such as 'cider'"
        elif f"eval_{name}" in {*RECORDED, *RECORDED_OF_IMAGE_USE}:
            yield f"metrics[{name!r}]: eval_{name} is recorded already: expected another name"
        if not callable(metric):
            yield (
                f"metrics[{name!r}]={metric!r:.80}: expected a function (predictions, references) "
                "-> number, or numbers by name"
            )
        elif missing := missing_package(metric):
            yield f"metrics[{name!r}]: {missing}"


def reference_problems(
    metrics: Mapping[str, Metric], right: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Which metrics of ours cannot score rows, told before a model has said anything.

    Args:
        metrics: Functions by name; those of the user's own are not called.
        right: For each row that will be scored, by its name, the right answers.
    """
    names = list(right)
    if not names:
        return
    for name, metric in metrics.items():
        if greater_is_better(metric) is None:
            continue
        try:
            metric([several[0] for several in right.values()], [[*s] for s in right.values()])
        except Exception as error:
            told = re.sub(r"references\[(\d+)\]", lambda found: names[int(found[1])], str(error))
            yield f"metrics[{name!r}] cannot score {names[0].partition('[')[0]}: {told}"


def greater_is_better(metric: Any) -> bool | None:
    """Whether more of a metric is better; ``None`` if it is none of ours."""
    while isinstance(metric, partial):
        metric = metric.func
    return True if metric in GREATER_IS_BETTER else None


class Answers:
    """Asks a model what it says of rows, many at once, and keeps the texts.

    Args:
        model: The base, or the base with an adapter.
        collator: Made the questions.
        max_new_tokens: Tokens at most per answer.
        file: Receives each answer at once, as a line of JSON.
    """

    def __init__(
        self, model: Model, collator: Collator, max_new_tokens: int, file: TextIO | None = None
    ) -> None:
        self._model, self._collator, self._file = model, collator, file
        self._max_new_tokens = max_new_tokens
        self._batch_size = AT_ONCE
        self._waiting: list[Question] = []
        self.seconds = 0.0
        """Time that it took to generate."""
        self.lines: list[dict[str, Any]] = []
        """For each row its number ``row``, the ``prediction`` and the ``references``."""

    def ask(self, questions: Sequence[Question], note: Callable[[str], None]) -> None:
        """Ask, as soon as there are enough for a batch; ``note`` is told how far it has come."""
        # A copy: what a loader worker has sent keeps a file open for each tensor.
        self._waiting += [
            Question(q.row, q.tokens, [image.clone() for image in q.pixels], q.references)
            for q in questions
        ]
        while len(self._waiting) >= AT_ONCE:
            self._answer(note)

    def finish(self, note: Callable[[str], None]) -> None:
        """Ask the rest."""
        while self._waiting:
            self._answer(note)

    def _answer(self, note: Callable[[str], None]) -> None:
        asked, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
        started = time.perf_counter()
        texts = self._generate(asked, lambda words: note(f"answering {len(asked)} rows, {words}"))
        note("")
        self.seconds += time.perf_counter() - started
        for question, text in zip(asked, texts, strict=True):
            line = {"row": question.row, "prediction": text.strip()}
            self.lines.append({**line, "references": [*question.references]})
            if self._file is not None:
                self._file.write(line_of(self.lines[-1]))
        if self._file is not None:
            self._file.flush()

    def _generate(self, asked: Sequence[Question], note: Callable[[str], None]) -> list[str]:
        """The answers; in smaller batches from now on if memory does not suffice."""
        tokens, pixels = [q.tokens for q in asked], [q.pixels for q in asked]
        while True:
            size = min(self._batch_size, len(asked))
            try:
                return generate_from_tokens(
                    self._model, self._collator, tokens, pixels, size, self._max_new_tokens, note
                )
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._batch_size = size // 2
            torch.cuda.empty_cache()  # here, where the failed try's tensors are gone
            logger.info("out of memory: answers are generated %d at a time", self._batch_size)

    def scores(self, metrics: Mapping[str, Metric], where: str = "") -> dict[str, float]:
        """What each metric gives, as ``eval_<name>`` or ``eval_<name>_<key>``, and the time.

        Args:
            metrics: Functions by name.
            where: Which evaluation it is, for messages, such as ``after step 20``.

        Raises:
            Exception: Of a metric, of its own type, with its name.
            TypeError: If one gives neither a number nor numbers by name.
            ValueError: If a number is not finite, or there is nothing to score.
        """
        record = {"eval_generate_s": self.seconds}
        if metrics and not self.lines:
            raise ValueError(f"metrics {where}: no row could be read, so there is nothing to score")
        for name, metric in metrics.items():
            called = " ".join(filter(None, (f"metrics[{name!r}]", where)))
            predictions = [line["prediction"] for line in self.lines]
            references = [[*line["references"]] for line in self.lines]
            try:
                given = metric(predictions, references)
            except Exception as error:
                raise with_words(error, f"raised by {called}") from error
            for key, value in _numbers(given, called).items():
                full = f"eval_{name}_{key}" if key else f"eval_{name}"
                if full in {*record, *RECORDED, *RECORDED_OF_IMAGE_USE}:
                    raise ValueError(f"{called} gave {key!r}, but {full} is recorded already")
                record[full] = value
        return record


def _numbers(given: Any, called: str) -> dict[str, float]:
    """What a metric gave, by key (empty for the only one), as finite numbers."""
    if isinstance(given, Mapping):
        if not given or not all(isinstance(key, str) and key for key in given):
            raise TypeError(f"{called} gave {given!r:.80}: expected numbers by name")
        values = dict(given)
    else:
        values = {"": given}
    numbers = {}
    for key, value in values.items():
        words = f"{called} gave {value!r:.80}" + (f" for {key!r}" if key else "")
        plain = _plain(value)
        if not isinstance(plain, Real):
            raise TypeError(
                f"{words} ({type(value).__name__}): expected a number, or numbers by name"
            )
        if not math.isfinite(plain):
            raise ValueError(f"{words}: expected a finite number")
        numbers[key] = float(plain)
    return numbers


def _plain(value: Any) -> Any:
    """The number in a tensor or an array of one; anything else as it is."""
    if isinstance(value, Real):
        return value
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return value


def keep_answers(file: Path, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Put the answers of an evaluation behind those of earlier ones, whatever was there.

    Answers of this step and of later ones are left out, for a run that goes on from an earlier
    step gives them again. A file that cannot be written is reported: it does not end a run.
    """
    try:
        earlier = []
        for line in file.read_text().splitlines() if file.exists() else ():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] < step:
                    earlier.append(f"{line}\n")
        new = (line_of({"step": step, **line}) for line in lines)
        write_whole(file, "".join((*earlier, *new)).encode())
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be written: %s", file, error)


def line_of(record: Mapping[str, Any]) -> str:
    """A line of JSON, of ASCII alone: a model may say half a character."""
    return json.dumps(record) + "\n"
