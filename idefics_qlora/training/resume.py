"""From which checkpoint a run goes on, what must be as it was, and what becomes of its folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from idefics_qlora.checkpoint import (
    STATE,
    Snapshot,
    check_step,
    checkpoint_path,
    checkpoints,
    is_of_run,
    is_ours,
    load_checkpoint,
    resolved,
    save_checkpoint,
    set_aside,
)
from idefics_qlora.config import Precision, TrainConfig, check_choice
from idefics_qlora.data.templates import known
from idefics_qlora.durable import CheckpointError
from idefics_qlora.families import family_of
from idefics_qlora.machine import COMPUTING, environment
from idefics_qlora.model.adapters import adapter_config
from idefics_qlora.model.base import same_base
from idefics_qlora.model.precision import default_precision
from idefics_qlora.training.inputs import Inputs
from idefics_qlora.training.optim import lr_at
from idefics_qlora.training.saving import checked
from idefics_qlora.training.state import TrainState, new_run

logger = logging.getLogger(__name__)


FREE_FIELDS = frozenset(
    {
        *("progress", "report_to"),
        *("output_dir", "resume", "save_steps", "save_total_limit", "on_save_error"),
        *("eval_image_use", "eval_samples", "eval_predictions", "allow_dead_parts"),
        *("eval_generate_rows", "eval_max_new_tokens"),
        *("metric_for_best_model", "greater_is_better"),
        *("early_stopping_patience", "early_stopping_threshold"),
        *("on_bad_row", "logging_steps", "eval_steps", "eval_batch_size", "load_best_model_at_end"),
        *("micro_batch_size", "gradient_checkpointing", "fast", "num_workers", "loader_timeout_s"),
        "cache_images",
        *("max_steps", "num_train_epochs", "precision"),  # told of by ``_tell_changes``
    }
)
"""Settings that do not change the mathematics of a step; a resumed run may change them."""


def checkpoints_to_resume(config: TrainConfig, output_dir: Path) -> list[Path]:
    """The checkpoints from which the run may go on, the best choice last."""
    if config.resume == "auto":
        return checkpoints(output_dir)
    if config.resume == "never":
        if existing := checkpoints(output_dir):
            raise ValueError(
                f"resume='never', but {existing[-1]} exists: choose another output_dir, delete the "
                "old run, or continue it with resume='auto'"
            )
        return []
    folder = Path(os.path.expanduser(config.resume))
    # A run may keep links to checkpoints that lie elsewhere; to others they are what they lead to.
    beside = resolved(folder.parent) / folder.name
    folder = beside if beside.parent == output_dir else resolved(folder)
    if not folder.is_dir():
        there = [path.name for path in checkpoints(folder.parent)]
        raise ValueError(
            f"resume={str(folder)!r} is no folder: expected a checkpoint, 'auto' or 'never'; "
            f"{str(folder.parent)!r} has {', '.join(there) or 'no checkpoints'}"
        )
    return [folder]


def settled(inputs: Inputs, folder: Path) -> Inputs:
    """The inputs, with what ``precision="auto"`` comes to.

    Raises:
        ValueError: As :func:`checkpoints_to_resume`.
    """
    config = inputs.config
    if config.precision != "auto":
        return inputs
    precision: Precision | None = None
    for checkpoint in reversed(checkpoints_to_resume(config, folder)):
        with suppress(OSError, LookupError, TypeError, ValueError):  # told of by ``resume``
            precision = json.loads((checkpoint / STATE).read_text())["config"]["precision"]
            check_choice("precision", precision, Precision)
            break
    else:
        device = next(inputs.model.parameters()).device
        precision = default_precision(family_of(inputs.model), device)
    assert precision is not None
    logger.info("precision='auto': %s", precision)
    return replace(inputs, config=replace(config, precision=precision))


def resume(state: TrainState, folder: Path) -> Path | None:
    """Put the state of the checkpoint back that ``config.resume`` asks for; tells which.

    Raises:
        CheckpointError: If none can be used, though there are some.
        OSError: If one cannot be read for a reason that may pass: it is not passed over.
    """
    chosen = checkpoints_to_resume(state.config, folder)
    for checkpoint in reversed(chosen):
        try:
            snapshot = load_checkpoint(checkpoint)
            check_step(checkpoint, snapshot.state)
            restore(state, snapshot, checkpoint)
            return checkpoint
        except CheckpointError as error:
            if state.config.resume != "auto":
                raise
            logger.warning("passed over: %s", error)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{checkpoint} cannot be read ({error.strerror}), though it may be whole: "
                "mend that and start again, or move it out of the folder to go on without it",
                error.filename,
            ) from error
    if damaged := [path.name for path in chosen if is_ours(path)]:
        raise CheckpointError(
            f"none of {', '.join(damaged)} in {folder} is whole, as the log says: mend or "
            "delete them, or choose another output_dir"
        )
    return None


def restore(state: TrainState, snapshot: Snapshot, source: Path) -> None:
    """Go on where the snapshot was taken.

    Args:
        state: Of a run that is about to start.
        snapshot: As :func:`~idefics_qlora.checkpoint.load_checkpoint` gave it.
        source: Where it comes from, for messages.

    Raises:
        ValueError: If a setting, the rows or the base differ in a way that would change the
            mathematics; the message lists all that differ.
        CheckpointError: If the checkpoint lacks something, or has it of another kind. Some of
            it may have been put back then.
    """
    with _needing_all_of(source):
        problems = differences(state, snapshot)
    if problems:
        raise ValueError(
            f"{source} belongs to a run with other settings or rows:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nGo on with the values that it had, or start anew in another output_dir"
        )
    with _needing_all_of(source):
        state.load(snapshot)
        _tell_changes(state, snapshot.state, source)


def differences(state: TrainState, snapshot: Snapshot) -> list[str]:
    """What differs so that another run would result."""
    old, new = snapshot.state["config"], state.config.to_json()
    # A setting that there was not yet: its default is what the run did without it.
    old = {**{f.name: f.default for f in dataclasses.fields(TrainConfig)}, **old}
    problems = [
        f"{name}: was {old[name]!r}, now {new[name]!r}"
        for name in new
        if name not in FREE_FIELDS and old[name] != new[name]
    ]
    old_lora, new_lora = snapshot.adapter_config, adapter_config(state.model)
    problems += [
        f"LoRA {name}: was {old_lora.get(name)!r}, now {new_lora[name]!r}"
        for name in new_lora
        # peft's own version and the base's address may change
        if name not in ("peft_version", "base_model_name_or_path", "revision")
        and old_lora.get(name, new_lora[name]) != new_lora[name]
    ]
    origin = snapshot.state
    if not same_base(origin["base"], state.origin["base"]):
        problems.append(f"base model: was {origin['base']}, now {state.origin['base']}")
    draft = origin.get("draft", False)  # 0.1 had none
    if draft != state.origin["draft"]:
        problems.append(f"ImageAccess.draft: was {draft}, now {state.origin['draft']}")
    for name, setting in (("image_side", "longest_edge"), ("image_splitting", "image_splitting")):
        here = state.origin[name]
        if (there := origin.get(name, here)) != here:  # 0.1 had none
            problems.append(f"load_model({setting}=...): was {there}, now {here}")
    there, here = origin["train_rows"], state.origin["train_rows"]
    if not here.fits(there):
        what = f"were {there['number']} rows, now {here.number}"
        same_number = there["number"] == here.number
        problems.append(f"train_rows: {'other content' if same_number else what}")
        then, now = (known(o.get("templates")) or {} for o in (origin, state.origin))
        problems += [  # why they differ, where both are known
            f"the rows' {name}: was {then[name]!r}, now {now[name]!r}"
            for name in then
            if name in now and then[name] != now[name]
        ]
    return problems


def _tell_changes(state: TrainState, saved: dict[str, Any], source: Path) -> None:
    """Tell what differs from how the checkpoint was made, though the run goes on."""
    then, now = saved["config"], state.config
    asked = ("eval_generate_rows", "eval_max_new_tokens")
    other_answers = state.criterion.of_answers and any(
        name in then and then[name] != getattr(now, name) for name in asked
    )
    there, here = saved["eval_rows"], state.origin["eval_rows"]
    if there is not here and (there is None or here is None or not here.fits(there)):
        logger.warning(
            "eval_rows differ from those of %s: the evaluation losses before and after cannot "
            "be compared, and the best checkpoint so far is forgotten",
            source,
        )
        _judge_anew(state)
    elif other_answers:
        logger.warning(
            "%s differ from those of %s: %s before and after cannot be compared, and the best "
            "checkpoint so far is forgotten",
            *(" and ".join(asked), source, state.criterion.key),
        )
        _judge_anew(state)
    else:
        _tell_new_criterion(state, saved, source)
    installed = environment()["versions"]
    for name in COMPUTING:
        if installed[name] != (then := saved["environment"]["versions"].get(name)):
            logger.warning(
                "%s was %s when %s was saved and is %s now: the run goes on, but not "
                "necessarily to the bit",
                *(name, then, source, installed[name]),
            )
    precision = saved["config"]["precision"]
    if precision != state.config.precision:
        # An fp16 run that overflows without end has to be able to go on in bf16.
        logger.warning(
            "precision was %s and is %s now: the run goes on, but not as it would have",
            *(precision, state.config.precision),
        )
    _tell_new_length(state, saved)


def _judge_anew(state: TrainState) -> None:
    """Compare evaluations from here on only."""
    state.best_metric = state.best_step = None
    state.judged_from = len(state.log_history)


def _tell_new_criterion(state: TrainState, saved: dict[str, Any], source: Path) -> None:
    """Look for the best checkpoint among those that are left, if another number decides now."""
    then = saved["config"].get("metric_for_best_model", "eval_loss")
    more = saved["config"].get("greater_is_better")
    criterion = state.criterion
    if then == criterion.key and more in (None, state.config.greater_is_better, criterion.greater):
        return
    state.best_metric = state.best_step = None
    for record in state.log_history[state.judged_from :]:
        value, step = record.get(criterion.key), record["step"]
        if value is None or not criterion.better(value, state.best_metric):
            continue
        if is_of_run(checkpoint_path(source.parent, step), state.run):
            state.best_metric, state.best_step = value, step
    logger.warning(
        "metric_for_best_model was %s and is %s now: of the checkpoints that are left, %s",
        *(then, criterion.key),
        "none has it, so that there is no best one yet"
        if state.best_step is None
        else f"that of step {state.best_step} is the best",
    )


def _tell_new_length(state: TrainState, saved: dict[str, Any]) -> None:
    then, step = saved["total_steps"], saved["global_step"]
    constant = state.config.lr_scheduler_type in ("constant", "constant_with_warmup")
    if then == state.total_steps or (constant and not state.config.warmup_ratio):
        return
    logger.warning(
        "the run was to have %d steps and is to have %d now: the %s schedule is stretched, so "
        "the learning rate of step %d is %g instead of %g",
        then,
        state.total_steps,
        state.config.lr_scheduler_type,
        step,
        lr_at(step, state.total_steps, state.config),
        lr_at(step, then, state.config),
    )


@contextmanager
def _needing_all_of(source: Path) -> Iterator[None]:
    """Say so if a checkpoint, though unaltered, does not hold all that is asked of it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be used: {type(error).__name__}: {error}; delete it, or go on from "
            "another checkpoint"
        ) from error


def take_over(state: TrainState, folder: Path, origin: Path) -> None:
    """Make the folder that of the run as it was at the step from which it goes on.

    In another folder it is another run from there on, with a copy of the best so far.

    Args:
        state: As its checkpoint had it.
        folder: The run's own, resolved.
        origin: The folder of the checkpoint from which the run goes on.
    """
    set_aside(folder, state.global_step)
    best = None if state.best_step is None else checkpoint_path(origin, state.best_step)
    if best is not None:
        try:
            snapshot = checked(best, state.run)
        except CheckpointError as error:
            logger.warning("the best checkpoint so far is forgotten: %s", error)
            best = state.best_step = state.best_metric = None
    if origin != folder:
        state.run = new_run()
        if best is not None:
            copied = replace(snapshot, state={**snapshot.state, "run": state.run})
            save_checkpoint(folder / best.name, copied)
    others = [f.name for f in checkpoints(folder) if not is_of_run(f, state.run)]
    if others:
        names = ", ".join(others)
        logger.warning("not of this run, or damaged, and left alone in %s: %s", *(folder, names))
