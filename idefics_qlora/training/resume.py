"""From which checkpoint a run goes on, and what it makes of its folder then."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from idefics_qlora.checkpoint import (
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
from idefics_qlora.config import TrainConfig
from idefics_qlora.durable import CheckpointError
from idefics_qlora.training.saving import checked
from idefics_qlora.training.state import TrainState, new_run

logger = logging.getLogger(__name__)


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
            state.restore(snapshot, checkpoint)
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
