"""fp16 gradients that overflow: how often, where first, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from idefics_qlora.data.batches import Batch
from idefics_qlora.training.state import TrainState


def first_nonfinite_module(model: nn.Module, batches: Iterable[Batch]) -> str | None:
    """Name of the first module, in the order of execution, with an output that is not finite.

    Runs the forward pass again, without gradients, under the caller's autocast; every module waits
    for the device, so it is for the one window that needs explaining.

    Returns:
        The module's name, or ``None`` if all outputs are finite.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def check(_: nn.Module, __: Any, output: Any) -> None:
            if not found and any(not t.isfinite().all() for t in _tensors(output)):  # sync
                found.append(name)

        return check

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch.inputs(), use_cache=False)
                if found:
                    return found[0]
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):  # a model's output
        yield from _tensors(list(output.values()))


MAX_SKIPS_IN_A_ROW = 25


def fp16_ledger(state: TrainState, diverged: str | None) -> dict[str, Any] | None:
    """What a run in fp16 has to tell at its end; otherwise ``None``."""
    if not state.scaler.is_enabled():
        return None
    share = state.skipped_windows / max(1, state.window)
    advice = "nothing to do: a few skipped windows at the start are usual"
    if diverged is not None:
        advice = f"{diverged}: lower learning_rate"
    elif state.first_nonfinite_module is not None:
        advice = (
            f"the output of {state.first_nonfinite_module} overflowed: set precision='bf16' on an "
            "Ampere GPU or newer, or 'fp32'"
        )
    elif share > 0.02 and state.skipped_windows > 3:
        advice = (
            f"{share:.0%} of the windows were skipped: set precision='bf16' on an Ampere GPU or "
            "newer, or lower learning_rate"
        )
    return {
        "loss_scale": state.scaler.get_scale(),
        "skipped_windows": state.skipped_windows,
        "skips_in_a_row": state.skips_in_a_row,
        "first_nonfinite_module": state.first_nonfinite_module,
        "advice": advice,
    }


def endless_overflow(state: TrainState) -> FloatingPointError:
    """The error that ends a run whose windows all overflow."""
    module = state.first_nonfinite_module
    where = "" if module is None else f" (first in {module})"
    return FloatingPointError(
        f"{state.skips_in_a_row} windows in a row had fp16 gradients that overflow{where}, the "
        f"loss scale has fallen to {state.scaler.get_scale():g}, and nothing is learnt (step "
        f"{state.global_step}): set precision='bf16' (on an Ampere GPU or newer) or 'fp32' and "
        "start again, which goes on from the newest checkpoint, or lower learning_rate"
    )
