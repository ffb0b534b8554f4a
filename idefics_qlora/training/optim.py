"""The learning rate of each step."""

from __future__ import annotations

import math

from idefics_qlora.config import TrainConfig


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` (0 is the first).

    A pure function, so there is no scheduler state to save. The curves are those of
    ``transformers.get_scheduler``: a linear rise over the warm-up, then linear or half a cosine to
    0 at ``total_steps``, or constant (with its decay at the end). ``constant`` has a warm-up here
    if one is set, as ``constant_with_warmup`` has there.

    Args:
        step: Optimizer steps done before this one; skipped fp16 updates do not count.
        total_steps: Optimizer steps of the run.
        config: Gives ``learning_rate``, ``lr_scheduler_type``, its ``lr_scheduler_kwargs``, and
            ``warmup_steps`` or ``warmup_ratio``.
    """
    warmup_steps = config.num_warmup_steps(total_steps)
    kind, settings = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    lowest = settings.get("min_lr_ratio", 0.0)
    if step < warmup_steps:
        return config.learning_rate * (step / max(1, warmup_steps) * (1.0 - lowest) + lowest)
    if kind in ("constant", "constant_with_warmup"):
        return config.learning_rate
    decay_steps = max(1, total_steps - warmup_steps)
    if kind == "linear":
        return config.learning_rate * max(0.0, (total_steps - step) / decay_steps)
    if kind == "warmup_stable_decay":
        decay_steps, kind = settings["num_decay_steps"], settings.get("decay_type", "cosine")
    progress = max(0.0, step - (total_steps - decay_steps)) / decay_steps
    if kind == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = 1.0 - (progress if kind == "linear" else math.sqrt(progress))
    return config.learning_rate * max(0.0, factor * (1.0 - lowest) + lowest)
