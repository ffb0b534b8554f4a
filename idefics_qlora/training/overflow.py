"""fp16 gradients that overflow: how often, where first, and what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idefics_qlora.checkpoint import checkpoints
from idefics_qlora.data.batches import Batch
from idefics_qlora.data.windows import Window
from idefics_qlora.families.family import Model
from idefics_qlora.model.loss import predictions
from idefics_qlora.model.precision import DTYPES, autocast
from idefics_qlora.training.divergence import Divergence, divergence
from idefics_qlora.training.micro_batch import size_for
from idefics_qlora.training.parts import restore_rng, rng_tensors
from idefics_qlora.training.saving import Saving
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)


def first_nonfinite_module(model: Model, batches: Iterable[Batch]) -> str | None:
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
                predictions(model, batch)
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


def fp16_ledger(state: TrainState) -> dict[str, Any] | None:
    """What a run in fp16 has to tell at its end; otherwise ``None``."""
    if not state.scaler.is_enabled():
        return None
    share = state.skipped_windows / max(1, state.window)
    advice = "nothing to do: a few skipped windows at the start are usual"
    if state.diverged is not None:
        advice = f"{state.diverged}: lower learning_rate"
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


class OverflowReports:
    """Tells of the windows that a run skips, and ends it if they are too many in a row."""

    def __init__(self, state: TrainState, folder: Path, saving: Saving) -> None:
        self._state, self._folder, self._saving = state, folder, saving

    def report(self, window: Window) -> None:
        """Tell of a window whose fp16 gradients overflowed.

        Raises:
            FloatingPointError: If it is one of too many in a row; the state is saved, unless
                training has diverged.
        """
        state = self._state
        logger.warning(
            "window %d skipped: its fp16 gradients overflowed; loss scale now %g",
            *(state.window - 1, state.scaler.get_scale()),
        )
        # The first skip is mostly a matter of scale; several in a row are not.
        tell = state.skipped_windows == 1 or state.skips_in_a_row in (3, MAX_SKIPS_IN_A_ROW)
        diverged = divergence(state, window) if tell else None
        if tell and state.first_nonfinite_module is None:
            self._explain_overflow(window, diverged)
        if diverged:
            state.diverged = str(diverged)
            if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
                # Not saved: it would be of no use, and might take a sound checkpoint's place.
                raise FloatingPointError(self._way_back(diverged))
            logger.warning("%s: lower learning_rate", diverged)
        if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            error = endless_overflow(state)
            state.skips_in_a_row = 0  # a resumed run may try as often again
            self._saving.save()  # the lower scale as well, though the step may be saved already
            raise error

    def _explain_overflow(self, window: Window, diverged: Divergence | None) -> None:
        # The pass is done again to say where it was, with the same dropout masks.
        state = self._state
        rng = rng_tensors(state.device)
        restore_rng(state.window_rng, state.device)
        try:
            with autocast(state.device, DTYPES[state.config.precision]):
                batches = window.to(state.device).micro_batches(size_for(state, window))
                state.first_nonfinite_module = first_nonfinite_module(state.model, batches)
        except Exception as error:  # an explanation must not end a run
            logger.warning("where it overflowed cannot be told: %s", error)
            return
        finally:
            restore_rng(rng, state.device)
        if state.first_nonfinite_module is not None:
            logger.warning(
                "the first module with an output that is not finite is %s",
                state.first_nonfinite_module,
            )
        elif not diverged:
            logger.warning(
                "its forward pass is finite: the loss scale was too large, as is usual at first"
            )

    def _way_back(self, diverged: Divergence) -> str:
        """What to do after training has diverged: not to go on from where it had already."""
        state = self._state
        newest_first = checkpoints(self._folder)[::-1]
        best = self._saving.best_checkpoint
        sound = diverged.sound(([] if best is None else [best]) + newest_first)
        anew = ""
        if sound is not None:
            anew = (
                f", or with {sound.name}'s adapter: load_finetuned({str(sound)!r}, trainable=True)"
            )
        broken = ""
        if newest_first and diverged.sound(newest_first[:1]) is None:
            broken = f"; do not go on from the newest, {newest_first[0].name}: it is broken already"
        return (
            f"{state.skips_in_a_row} windows in a row had fp16 gradients that overflow (step "
            f"{state.global_step}), because {diverged}. Lower learning_rate="
            f"{state.config.learning_rate:g} and start anew in another output_dir, from the "
            f"beginning{anew}{broken}"
        )
