"""From which checkpoint a run goes on, and what must not differ then."""

from __future__ import annotations

import os
from pathlib import Path

from idefics_qlora.checkpoint import checkpoints, resolved
from idefics_qlora.config import TrainConfig


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


FREE_FIELDS = frozenset(
    {
        *("output_dir", "resume", "save_steps", "save_total_limit", "on_save_error"),
        *("eval_image_use", "eval_samples", "allow_dead_parts"),
        *("on_bad_row", "logging_steps", "eval_steps", "eval_batch_size", "load_best_model_at_end"),
        *("micro_batch_size", "gradient_checkpointing", "num_workers", "loader_timeout_s"),
        *("max_steps", "num_train_epochs", "precision"),  # judged below
    }
)
"""Settings that do not change the mathematics of a step; a resumed run may change them."""
