"""Catching training that only looks fine: dead adapters, wrong labels, a model that does not look.

Shapes: B examples, T tokens, N images per example, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.config import TrainConfig
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.windows import Window
from idefics_qlora.families.family import Family
from idefics_qlora.training.optim import lr_at

logger = logging.getLogger(__name__)

_ADAPTED = re.compile(r"\.lora_|\.modules_to_save\.")
"""Follows a module's name in those of its trainable parameters."""


class DeadAdapters(RuntimeError):
    """A whole part of the model learns nothing; the message names it and what to do."""


@dataclass(frozen=True)
class Coverage:
    """Which adapters a step's gradient reached."""

    modules: dict[str, bool]
    """Each module that has an adapter or is trained whole, and whether any of its tensors got a
    gradient that is not zero."""
    family: Family
    """Knows the parts of the model."""

    def part_of(self, module: str) -> str:
        """The part of the model to which a module belongs."""
        return self.family.part_of(module)

    def dead_parts(self) -> list[str]:
        """Parts of the model none of whose adapters got a gradient."""
        reached = {self.part_of(name) for name, alive in self.modules.items() if alive}
        return sorted({self.part_of(name) for name in self.modules} - reached)

    def dead_modules(self) -> list[str]:
        """Modules that got no gradient."""
        return [name for name, alive in self.modules.items() if not alive]

    def __str__(self) -> str:
        every = Counter(map(self.part_of, self.modules))
        alive = Counter(self.part_of(name) for name, alive in self.modules.items() if alive)
        parts = (f"{part} {alive[part]} of {every[part]}" for part in sorted(every))
        return f"adapters with a gradient: {', '.join(parts)}"


def gradient_coverage(parameters: Mapping[str, Parameter], family: Family) -> Coverage | None:
    """Which adapted modules have a gradient; ``None`` if it is not finite and tells nothing.

    One of a module's matrices is enough: while ``lora_B`` is zero, ``lora_A`` has none.

    Args:
        parameters: The model's parameters by name, with their gradients; all but LoRA matrices and
            modules that are trained whole are passed over. A frozen one counts as one without
            gradient.
        family: The model's.
    """
    parameters = {name: p for name, p in parameters.items() if _ADAPTED.search(name)}
    if not parameters:
        return Coverage({}, family)
    with_gradient = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not with_gradient:
        return Coverage({module_of(name): False for name in parameters}, family)
    norms = torch.stack(torch._foreach_norm(list(with_gradient.values())))
    sizes = dict(zip(with_gradient, norms.tolist(), strict=True))  # sync
    if not all(np.isfinite(list(sizes.values()))):
        return None
    modules: dict[str, bool] = {}
    for name in parameters:
        module = module_of(name)
        modules[module] = modules.get(module, False) or sizes.get(name, 0.0) > 0.0
    return Coverage(modules, family)


def module_of(parameter: str) -> str:
    """Name of the adapted module that a trainable parameter belongs to."""
    return _ADAPTED.split(parameter)[0].removeprefix("base_model.model.")


def check_coverage(coverage: Coverage, allowed: Sequence[str]) -> None:
    """Tell the coverage of the first step.

    Raises:
        DeadAdapters: If a part has adapters and none of them got a gradient.
    """
    dead = [part for part in coverage.dead_parts() if part not in allowed]
    if dead:
        names = [name for name in coverage.dead_modules() if coverage.part_of(name) in dead]
        raise DeadAdapters(
            f"no adapter of the {' and the '.join(dead)} got a gradient in the first step "
            f"({coverage}; such as {names[0]}): that part would learn nothing. Usual causes: "
            "peft.prepare_model_for_kbit_training or reentrant gradient checkpointing (leave both "
            "to this library), requires_grad switched off, rows whose pictures the words do not "
            f"see; if it is meant, allow_dead_parts={tuple(dead)!r}"
        )
    if names := coverage.dead_modules():
        logger.warning("%s; without: %s", coverage, ", ".join(names[:5]))
    else:
        logger.info("%s", coverage)


def weight_marks(parameters: Mapping[str, Parameter]) -> Tensor:
    """Two numbers for each tensor that change when it does, on the device, (2, parameters)."""
    with torch.no_grad():
        tensors = [p.detach() for p in parameters.values()]
        return torch.stack(
            [torch.stack(torch._foreach_norm(tensors, 1)), torch.stack([t.sum() for t in tensors])]
        )


def unmoved_modules(parameters: Mapping[str, Parameter], before: Tensor) -> list[str]:
    """Adapted modules none of whose tensors changed since ``before`` was taken."""
    moved = (weight_marks(parameters) != before).any(dim=0).tolist()  # sync
    modules: dict[str, bool] = {}
    for name, has_moved in zip(parameters, moved, strict=True):
        if not _ADAPTED.search(name):
            continue
        module = module_of(name)
        modules[module] = modules.get(module, False) or has_moved
    return [name for name, has_moved in modules.items() if not has_moved]


LEAST_PROGRESS = 1e-3
"""Share of the loss; a run that cannot lower it by more has too small a learning rate."""


def too_small_a_rate(
    loss: float, grad_norm: float, numbers: int, config: TrainConfig, total_steps: int
) -> str | None:
    """What to say of a learning rate with which nothing moves; ``None`` if it is large enough.

    A step of AdamW moves a number by about the learning rate. To first order a run therefore lowers
    the loss by at most the sum of its rates times the gradient's L1 norm, and that is at most its
    L2 norm times the root of how many numbers there are.

    Args:
        loss: Of the first step's window.
        grad_norm: L2 norm of its whole gradient, before clipping.
        numbers: Trainable ones.
        config: Gives the learning rate.
        total_steps: Optimizer steps of the run.
    """
    reach = sum(lr_at(step, total_steps, config) for step in range(total_steps))
    progress = reach * grad_norm * numbers**0.5
    if progress >= LEAST_PROGRESS * loss:
        return None
    return (
        f"learning_rate={config.learning_rate:g} is so small that nothing moves: in {total_steps} "
        f"steps no weight goes further than about {reach:.1g}, which lowers the loss of "
        f"{loss:.4g} by {progress:.1g} at most; LoRA is mostly trained with 1e-5 to 1e-3"
    )


def check_labels(window: Window, collator: Collator, name: str = "train_rows") -> str:
    """Look at the labels and the image mask of a window.

    Args:
        window: The first window of a run, on the CPU.
        collator: Made it.
        name: What to call the rows.

    Returns:
        A line with the shares of targets.

    Raises:
        ValueError: If a row has no target, padding or image tokens are targets, or a word behind
            an image does not see it; the message names the row.
    """
    batch = window.batch
    if batch is None:
        return "no row of the first window could be read"
    is_target = batch.labels != IGNORE
    is_token = batch.attention_mask.bool()
    never = torch.isin(batch.input_ids, collator.never_target)
    sees = batch.vision.sees().any(dim=2)  # (B, T)
    behind_image = (batch.input_ids == collator.image_id).cumsum(1) > 0
    ends = torch.isin(batch.labels, torch.tensor(collator.end_ids)).any(dim=1)
    faults = {
        "has no target token: nothing of it would be learnt": ~is_target.any(dim=1),
        "has padding among its targets: it would learn to pad": (is_target & ~is_token).any(dim=1),
        "has image or begin tokens among its targets": (is_target & never & is_token).any(dim=1),
        "has other labels than its tokens": (
            (batch.labels != batch.input_ids) & is_target
        ).any(dim=1),
        "has words behind an image that do not see it": (
            behind_image & is_token & ~sees
        ).any(dim=1),
    }  # fmt: skip
    for fault, rows in faults.items():
        if rows.any():
            row = window.batch_rows[int(rows.nonzero()[0])]
            raise ValueError(
                f"{name}[{row}] {fault} ({int(rows.sum())} of {len(rows)} rows of the first "
                "window): look at it with idefics_qlora.preview_batch"
            )
    share = is_target.sum() / is_token.sum()
    line = (
        f"labels of the first window: {share:.0%} of {int(is_token.sum())} tokens are learnt, "
        f"{int((~is_token).sum())} are padding"
    )
    if not ends.all():
        rows = [window.batch_rows[i] for i in (~ends).nonzero().flatten().tolist()]
        logger.warning(
            "%s[%d] and %d more of the first window learn no end token, because max_length cuts "
            "them: the model will not learn there when to stop",
            *(name, rows[0], len(rows) - 1),
        )
    return line
