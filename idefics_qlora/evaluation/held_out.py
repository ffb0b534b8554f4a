"""The loss on held-out rows."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idefics_qlora.config import LossOn, OnBadRow, check_whole
from idefics_qlora.data.bad_rows import MAX_BAD_SHARE, BadRows
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.captions import Captions
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.order import EvalBatches
from idefics_qlora.data.rows import RowReader, Rows
from idefics_qlora.data.templates import question_findings, trained_captions
from idefics_qlora.data.windows import Window
from idefics_qlora.data.workers import Loading
from idefics_qlora.evaluation.predictions import Answers, Metric, metric_problems
from idefics_qlora.families import check_model_and_processor, family_of
from idefics_qlora.families.family import Model, Processor
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.model.loss import predictions
from idefics_qlora.model.precision import evaluation_mode
from idefics_qlora.notices import Notices, advising
from idefics_qlora.progress import counting

FEW_ROWS = 64
"""Bad rows are counted against at least as many: one dead picture of ten must not stop a run."""


def evaluate(
    model: Model,
    processor: Processor,
    rows: Rows,
    *,
    to_example: ToExample | None = None,
    batch_size: int = 2,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    max_new_tokens: int = 50,
    predictions_file: str | os.PathLike[str] | None = None,
    on_bad_row: OnBadRow = "skip",
    num_workers: int = 0,
    access: ImageAccess = DEFAULT_ACCESS,
) -> dict[str, Any]:
    """Loss of a model on held-out rows, and how good its answers are.

    The mode of every module (training or evaluation) is restored, and no random number is drawn,
    so an evaluation does not change what training does next.

    Args:
        model: The base, or the base with an adapter.
        processor: The base's processor.
        rows: Rows to evaluate on.
        to_example: As in ``train``. ``None``: rows with a picture that say nothing of what is asked
            become examples by the templates that the model was trained with
            (``model.trained_templates``), if it was by ``Captions``.
        batch_size: Examples in one forward pass.
        loss_on: Which text tokens are targets.
        max_length: Text tokens of an example at most, as in :class:`~idefics_qlora.TrainConfig`.
        metrics: Functions by name, as in ``train``, over the answers to all rows.
        max_new_tokens: Tokens at most per answer.
        predictions_file: Receives a line of JSON for each row, with its number ``row``, the
            ``prediction`` and the ``references``; overwritten.
        on_bad_row: What to do with a row that cannot be read: ``skip`` or ``raise``.
        num_workers: Processes that load batches ahead.
        access: As in ``train``.

    Returns:
        ``eval_loss`` (cross-entropy per target token over all rows together, in nats),
        ``eval_runtime`` (s), ``eval_samples_per_second`` and ``eval_steps_per_second`` (batches);
        ``eval_bad_rows`` if any rows were left out. With ``metrics`` or a ``predictions_file`` also
        ``eval_<name>`` of each metric, ``eval_<name>_<key>`` of one that gives a dictionary, and
        ``eval_generate_s`` (s), which ``eval_runtime`` does not contain.

    Raises:
        TypeError: If model and processor are swapped, or a metric gives no number.
        ValueError: If there are no rows, or a row is bad and ``on_bad_row`` says so, or more than
            5 % are, as soon as that is certain. If a metric cannot be one, or gives a number that
            is not finite.
        torch.OutOfMemoryError: If the GPU's memory does not suffice; the message says what to
            lower.
    """
    check_model_and_processor(model, processor)
    collator = Collator(
        processor, loss_on, family_of(model).num_embeddings(model), max_length, access
    )
    check_whole(batch_size=batch_size, max_new_tokens=max_new_tokens)
    if problems := list(metric_problems(metrics or {})):
        raise ValueError("\n".join(problems))
    trained = trained_captions(model)
    reader = RowReader(rows, "rows", to_example, collator, trained=trained)
    if isinstance(to_example, Captions):
        for kind, line in question_findings([to_example.question], trained):
            Notices().warn(kind, f"to_example {line}")
    reader.need_length()
    asks = bool(metrics) or predictions_file is not None
    batches = EvalBatches(reader, batch_size, num_asked=len(reader) if asks else 0)
    device = next(model.parameters()).device
    loading = Loading(batches, num_workers=num_workers, pin=device.type == "cuda")
    sizes: dict[str, Any] = {"batch_size": batch_size} | (
        {"max_new_tokens": max_new_tokens} if asks else {}
    )
    with (
        nullcontext() if predictions_file is None else Path(predictions_file).open("w") as file,
        advising("the evaluation", **sizes),
    ):
        answers = Answers(model, collator, max_new_tokens, file)
        bad_rows, number = BadRows(on_bad_row), len(reader)
        record = mean_loss(model, loading, device, bad_rows, answers, num_rows=number)
    return record | (answers.scores(metrics or {}) if asks else {})


def mean_loss(
    model: Model,
    loading: Loading[Window],
    device: torch.device,
    bad_rows: BadRows,
    answers: Answers,
    row_losses: dict[int, float] | None = None,
    num_rows: int | None = None,
) -> dict[str, Any]:
    """Loss per target token over all windows together; otherwise as :func:`evaluate`.

    Args:
        model: As there.
        loading: The windows.
        device: The model's.
        bad_rows: Takes down the rows that cannot be used.
        answers: Asked the questions of each window; its time is not counted.
        row_losses: Receives the loss per target token of each row, by its number.
        num_rows: Rows in all, to end as soon as it is certain that too many of them are bad.
    """
    started = time.perf_counter()
    num_batches = num_examples = num_targets = num_bad = 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    of_rows: list[tuple[tuple[int, ...], Tensor, Tensor]] = []  # numbers, losses, targets
    with (
        evaluation_mode(model),
        loading as windows,
        counting("evaluating", loading.total, "batches") as counted,
    ):
        for window in windows:
            counted.advance()
            num_bad += len(window.bad)
            bad_rows.note(window.bad)
            if num_rows and num_bad > MAX_BAD_SHARE * max(num_rows, FEW_ROWS):
                num_seen = num_bad + num_examples + len(window.rows)
                bad_rows.check_share(num_bad, num_seen)  # whatever follows
            if window.batch is None:
                continue
            num_batches += 1
            num_examples += len(window.rows)
            num_targets += window.num_targets
            batch = window.batch.to(device)
            predicted = predictions(model, batch)
            total += predicted.summed()
            if row_losses is not None:
                numbers, labels = window.batch_rows, window.batch.labels
                targets = (labels[:, 1:] != IGNORE).sum(1)
                of_rows.append((numbers, predicted.by_example(len(numbers)), targets))
            del batch, predicted  # before there is another
            if window.questions:
                total.item()  # sync
                asked = time.perf_counter()
                answers.ask(window.questions, counted.note)
                started += time.perf_counter() - asked
        total.item()  # sync
        asked = time.perf_counter()
        answers.finish(counted.note)
        started += time.perf_counter() - asked
    bad_rows.check_share(num_bad, num_bad + num_examples, FEW_ROWS if num_examples else 0)
    loss = total.item() / num_targets  # sync
    if row_losses is not None:
        for numbers, losses, targets in of_rows:
            row_losses.update(zip(numbers, (losses.cpu() / targets).tolist(), strict=True))
    seconds = time.perf_counter() - started
    record = {
        "eval_loss": loss,
        "eval_runtime": seconds,
        "eval_samples_per_second": num_examples / seconds,
        "eval_steps_per_second": num_batches / seconds,
    }
    return record | ({"eval_bad_rows": num_bad} if num_bad else {})
