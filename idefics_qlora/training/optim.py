"""AdamW's constants, and the learning rate of each step."""

from __future__ import annotations

import math

from idefics_qlora.config import TrainConfig

BETAS = (0.9, 0.999)
EPS = 1e-8


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` (0 is the first).

    A pure function, so there is no scheduler state to save. The curves are those of
    ``transformers.get_scheduler``: a linear rise over ``warmup_steps``, then linear or half a
    cosine to 0 at ``total_steps``, or constant.

    Args:
        step: Optimizer steps done before this one; skipped fp16 updates do not count.
        total_steps: Optimizer steps of the run.
        config: Gives ``learning_rate``, ``lr_scheduler_type`` and ``warmup_steps``.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step / max(1, config.warmup_steps))
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    decay_steps = max(1, total_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, (total_steps - step) / decay_steps)
    progress = (step - config.warmup_steps) / decay_steps
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
