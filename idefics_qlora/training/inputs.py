"""What a run is given, checked before anything is changed or written."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from idefics_qlora.config import TrainConfig
from idefics_qlora.data.bad_rows import BadRows
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import QUESTION, Captions, pokemon_card_example
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.fingerprints import Fingerprint
from idefics_qlora.data.first_rows import FirstRows, Lengths, tell_same_rows
from idefics_qlora.data.order import EvalBatches, epoch_order
from idefics_qlora.data.pace import Reading, chosen_workers
from idefics_qlora.data.rows import Look, RowReader, Rows
from idefics_qlora.data.templates import templates_of, trained_captions
from idefics_qlora.evaluation.predictions import Metric, metric_problems, reference_problems
from idefics_qlora.families import check_model_and_processor, family_of
from idefics_qlora.families.family import Processor
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.kept import kept_pictures
from idefics_qlora.model.adapters import check_trainable
from idefics_qlora.model.base import base_fingerprint
from idefics_qlora.model.base_weights import has_4_bit_values
from idefics_qlora.model.memory import optimizer_bytes
from idefics_qlora.notices import Notices
from idefics_qlora.progress import asked, counting
from idefics_qlora.training.best import Criterion, criterion_of, criterion_problems
from idefics_qlora.training.trackers import tracker_problems

logger = logging.getLogger(__name__)

ROWS_CHECKED = 64
"""Rows of each kind that are read before training starts, in the order of their use."""


@dataclass(frozen=True)
class Inputs:
    """What a run was given, checked; nothing has been changed or written yet."""

    model: PeftModel
    processor: Processor
    config: TrainConfig
    reader: RowReader
    held_out: EvalBatches | None
    total_steps: int
    origin: dict[str, Any]
    """Fingerprints of ``base``, ``train_rows`` and ``eval_rows``, and how they become what the
    model gets."""
    notices: Notices
    """What has been warned of."""
    told_bad: set[str]
    """Names of the bad rows of which the log has told."""
    lengths: Lengths | None
    """What lengths of training rows are usual."""
    reading: Reading | None
    """What a training row takes to be read."""
    metrics: Mapping[str, Metric]
    """What scores the answers to held-out rows."""
    criterion: Criterion
    """How evaluations are compared."""


def check_inputs(
    model: PeftModel,
    processor: Processor,
    train_rows: Rows,
    eval_rows: Rows | None,
    config: TrainConfig,
    to_example: ToExample | None,
    access: ImageAccess,
    metrics: Mapping[str, Metric],
) -> Inputs:
    """See that rows, model and settings go together, and read the first rows.

    Raises:
        TypeError: If model and processor are swapped.
        ValueError: If they do not; the message names the row or the field.
    """
    check_model_and_processor(model, processor)
    asked_of_evaluations = evaluation_problems(config, metrics, eval_rows is not None)
    if problems := [*tracker_problems(config), *asked_of_evaluations]:
        raise ValueError("\n".join(problems))
    check_trainable(model)
    _tell_whole(model, config)
    family = family_of(model)
    if unknown := sorted(set(config.allow_dead_parts) - set(family.parts)):
        raise ValueError(
            f"allow_dead_parts: {unknown} are none of the parts of {family.model_type}: expected "
            f"{', '.join(family.parts)}"
        )
    embeddings = family.num_embeddings(model)
    kept = kept_pictures(config.cache_images, access)
    collator = Collator(processor, config.loss_on, embeddings, config.max_length, access, kept)
    reader = RowReader(train_rows, "train_rows", to_example, collator)
    if reader.is_stream and config.max_steps is None:
        raise ValueError("max_steps=None: a stream of rows has no length, so say how many steps")
    total_steps = config.max_steps or config.total_steps(len(reader))
    if problems := list(config.too_few_steps(total_steps)):
        raise ValueError(problems[0])
    notices = Notices()
    trained = trained_captions(model)
    told_bad: set[str] = set()
    around = config, notices, trained, told_bad
    fingerprint, train_seen = _first_rows(reader, *around)
    origin: dict[str, Any] = {
        "base": base_fingerprint(model),
        "train_rows": fingerprint,
        "eval_rows": None,
        "draft": access.draft,
        "image_side": collator.reader.longest_edge,
        "image_splitting": collator.reader.splits,
        "quantize": has_4_bit_values(model.get_base_model()),
        "templates": templates_of(to_example),
    }
    if to_example in (None, pokemon_card_example) and train_seen.ask_default:
        origin["templates"] = {"question": QUESTION}
    held_out = eval_seen = None
    if eval_rows is not None:
        eval_reader = RowReader(eval_rows, "eval_rows", to_example, collator)
        num_asked = config.eval_generate_rows if metrics or config.eval_predictions else 0
        held_out = EvalBatches(eval_reader, config.eval_batch_size, num_asked)
        origin["eval_rows"], eval_seen = _first_rows(eval_reader, *around)
        right = {row.name: row.right for row in list(eval_seen.seen.values())[:num_asked]}
        if problems := list(reference_problems(metrics, right)):
            raise ValueError("\n".join(problems))
    tell_same_rows(train_seen, eval_seen, notices)
    _tell_decoded(train_seen, config, access, notices)
    return Inputs(
        model=model,
        processor=processor,
        config=config,
        reader=reader,
        held_out=held_out,
        total_steps=total_steps,
        origin=origin,
        notices=notices,
        told_bad=told_bad,
        lengths=train_seen.lengths,
        reading=train_seen.reading(),
        metrics=metrics,
        criterion=criterion_of(config, metrics),
    )


def _tell_whole(model: PeftModel, config: TrainConfig) -> None:
    """Say what parts that are trained whole take, before anything is allocated for them."""
    sizes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.requires_grad:
            sizes.setdefault(family_of(model).part_of(name), []).append(parameter.numel())
    if not sizes:
        return
    parts = (f"{part} {sum(numbers) / 1e6:.3g} M" for part, numbers in sizes.items())
    numbers = [number for part in sizes.values() for number in part]
    taken = sum(8 * number + optimizer_bytes(number, config.optim) for number in numbers)
    logger.info(
        "trained whole: parameters of %s; with gradients and moments they take %.2f GiB beside the "
        "base's own",
        *(", ".join(parts), taken / 2**30),
    )


def evaluation_problems(
    config: TrainConfig, metrics: Mapping[str, Metric], has_rows: bool
) -> Iterator[str]:
    """What is asked of evaluations that they cannot give."""
    if problems := list(metric_problems(metrics)):
        yield from problems
        return
    if has_rows:
        yield from criterion_problems(config, metrics)
        return
    if config.load_best_model_at_end:
        yield (
            f"load_best_model_at_end=True needs held-out rows to find the best checkpoint (every "
            f"eval_steps={config.eval_steps} steps), and there are no such rows: pass eval_rows, "
            "or set load_best_model_at_end=False to be given the last checkpoint"
        )
    wanted = {
        f"metrics ({', '.join(metrics)})": metrics,
        f"early_stopping_patience={config.early_stopping_patience}": config.early_stopping_patience,
        "eval_predictions=True": config.eval_predictions,
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            yield f"{what} without eval_rows: there are no evaluations; pass eval_rows, or no such"


def _tell_decoded(
    seen: FirstRows, config: TrainConfig, access: ImageAccess, notices: Notices
) -> None:
    """Warn where settings for decoding have nothing to act on."""
    settings = {"cache_images": config.cache_images is not None, "ImageAccess.draft": access.draft}
    wanted = [name for name, is_set in settings.items() if is_set]
    if wanted and seen.num_pictures and not seen.num_decoded:
        notices.warn(
            "pictures that are decoded already",
            f"{' and '.join(wanted)}: without effect on {seen.reader.name}, whose pictures come "
            "decoded, as PIL images: let to_example give their paths (as pathlib.Path), bytes, or "
            "mappings with `bytes` (datasets: cast_column(..., datasets.Image(decode=False)))",
        )


def _first_rows(
    reader: RowReader,
    config: TrainConfig,
    notices: Notices,
    trained: Captions | None,
    told_bad: set[str],
) -> tuple[Fingerprint, FirstRows]:
    """The rows' fingerprint and what was seen of them; raises if they are bad, before training."""
    order: Iterable[int] = ()
    if not reader.is_stream:
        in_order = reader.name == "eval_rows"
        order = range(len(reader)) if in_order else epoch_order(config.seed, 0, len(reader))
    seen = FirstRows(reader, trained)
    number = ROWS_CHECKED if reader.is_stream else min(ROWS_CHECKED, len(reader))
    with (
        asked(config.progress),
        counting(f"looking at {reader.name}", number, "rows") as counted,
        reader.collator.decoding_all(),
    ):

        def looking(index: int, row: Any) -> Look:
            counted.advance()
            return seen.looking(index, row)

        fingerprint, bad = reader.first_rows(map(int, order), ROWS_CHECKED, looking)
    rows = BadRows(config.on_bad_row, told=told_bad)
    rows.note(bad, tell=False)  # what ends the run tells of them itself
    number = len(fingerprint.given)
    # A few held-out rows must not stop a run, unless there are no others.
    few_held_out = reader.name == "eval_rows" and len(bad) < number
    rows.check_share(len(bad), number, ROWS_CHECKED if few_held_out else 0)
    is_eval = reader.name == "eval_rows"
    rows.tell(bad)
    seen.tell(notices, config.eval_batch_size if is_eval else config.micro_batch_size)
    return fingerprint, seen


def workers_of(inputs: Inputs, device: torch.device) -> int:
    """Processes that load windows; tells the number that ``auto`` comes to, and why."""
    if inputs.config.num_workers != "auto":
        return inputs.config.num_workers
    number, why = chosen_workers(
        inputs.reading,
        inputs.config.global_batch_size,
        on_gpu=device.type == "cuda",
        is_stream=inputs.reader.is_stream,
    )
    logger.info("num_workers='auto': %d (%s)", number, why)
    return number
