"""What changes during a run, how it is taken down and put back, and what must not change then."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from idefics_qlora.checkpoint import Snapshot, checkpoint_path, step_of
from idefics_qlora.config import TrainConfig
from idefics_qlora.data.fingerprints import Fingerprint
from idefics_qlora.data.windows import Window
from idefics_qlora.durable import CheckpointError
from idefics_qlora.machine import COMPUTING, environment
from idefics_qlora.model.adapters import adapter_config
from idefics_qlora.model.base import same_base
from idefics_qlora.training.diagnostics import Coverage
from idefics_qlora.training.optim import lr_at
from idefics_qlora.training.parts import (
    AdapterPart,
    Counters,
    OptimizerPart,
    Part,
    RandomStatesPart,
    ScalerPart,
    UnloggedLossPart,
)

logger = logging.getLogger(__name__)

FREE_FIELDS = frozenset(
    {
        *("output_dir", "resume", "save_steps", "save_total_limit", "on_save_error"),
        *("eval_image_use", "eval_samples", "allow_dead_parts"),
        *("on_bad_row", "logging_steps", "eval_steps", "eval_batch_size", "load_best_model_at_end"),
        *("micro_batch_size", "gradient_checkpointing", "num_workers", "loader_timeout_s"),
        *("max_steps", "num_train_epochs", "precision"),  # told of by ``_tell_changes``
    }
)
"""Settings that do not change the mathematics of a step; a resumed run may change them."""


def new_run() -> str:
    """An id for a run; no generator that training uses is touched."""
    return secrets.token_hex(8)


@dataclass(kw_only=True)
class TrainState(Counters):
    """Everything that changes during a run; what of it must survive a restart is in ``PARTS``."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    total_steps: int
    device: torch.device
    run: str = field(default_factory=new_run)
    """The run's id, drawn at its start; all its checkpoints have it."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of ``base``, ``train_rows`` and ``eval_rows``."""
    unlogged_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum of the losses since the last log record, kept on the device."""
    best_step: int | None = None
    """Step of the saved checkpoint with the lowest ``eval_loss``."""
    coverage: Coverage | None = None
    """Which adapters the first gradient reached (of this process's part of the run)."""
    window_rng: dict[str, Tensor] = field(default_factory=dict)
    """The random states before the last window."""
    half_updated: bool = False
    """Whether a step is between its first change of a weight and its last change of a counter."""

    @property
    def num_seen(self) -> int:
        """Rows seen, the bad ones included."""
        return self.num_examples + self.num_bad_rows

    def __post_init__(self) -> None:
        self.growing = self.config.micro_batch_size == "auto"
        if self.config.micro_batch_size != "auto":
            self.micro_batch_size = self.config.micro_batch_size

    def advance(self, window: Window) -> None:
        """Count a window that was used, skipped or found empty."""
        self.window += 1
        self.position = window.position
        self.num_examples += len(window.rows)
        self.num_images += sum(window.images)
        self.num_tokens += sum(window.lengths)
        self.num_bad_rows += len(window.bad)

    def parts(self) -> list[Part]:
        """All that must survive a restart."""
        return [part(self) for part in PARTS.values()]

    def snapshot(self, rng: dict[str, Tensor] | None = None) -> Snapshot:
        """All that :meth:`restore` needs to go on exactly here.

        Args:
            rng: Random states to go on with; by default the present ones.
        """
        taken: dict[str, dict[str, Any]] = {}
        for part in self.parts():
            for where, content in part.state_dict().items():
                taken.setdefault(where, {}).update(content)
        if rng is not None:
            taken["rng"] = rng
        taken["state"] |= {
            "total_steps": self.total_steps,
            "config": self.config.to_json(),
            **{
                name: value.to_json() if isinstance(value, Fingerprint) else value
                for name, value in self.origin.items()
            },
            "environment": environment(),
        }
        return Snapshot(**taken)

    def restore(self, snapshot: Snapshot, source: Path) -> None:
        """Go on where :meth:`snapshot` was taken.

        Raises:
            ValueError: If a setting, the rows or the base differ in a way that would change the
                mathematics; the message lists all that differ.
            CheckpointError: If the checkpoint lacks something, or has it of another kind. Some of
                it may have been put back then.
        """
        with _needing_all_of(source):
            problems = self._differences(snapshot)
        if problems:
            raise ValueError(
                f"{source} is of a run that computes something else:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
                + "\nContinue with the old values, or start anew in another output_dir"
            )
        with _needing_all_of(source):
            for part in self.parts():
                part.load_state_dict(snapshot)
            self._tell_changes(snapshot.state, source)

    def _differences(self, snapshot: Snapshot) -> list[str]:
        """What differs so that another run would result."""
        old, new = snapshot.state["config"], self.config.to_json()
        problems = [
            f"{name}: {old[name]!r} there, {new[name]!r} here"
            for name in new
            if name in old and name not in FREE_FIELDS and old[name] != new[name]
        ]
        old_lora, new_lora = snapshot.adapter_config, adapter_config(self.model)
        problems += [
            f"LoRA {name}: {old_lora.get(name)!r} there, {new_lora[name]!r} here"
            for name in new_lora
            # peft's own version and the base's address may change
            if name not in ("peft_version", "base_model_name_or_path")
            and old_lora.get(name, new_lora[name]) != new_lora[name]
        ]
        origin = snapshot.state
        if not same_base(origin["base"], self.origin["base"]):
            problems.append(f"base model: {origin['base']} there, {self.origin['base']} here")
        there, here = origin["train_rows"], self.origin["train_rows"]
        if not here.fits(there):
            what = f"{there['number']} rows there, {here.number} here"
            same_number = there["number"] == here.number
            problems.append(f"train_rows: {'other content' if same_number else what}")
        return problems

    def _tell_changes(self, state: dict[str, Any], source: Path) -> None:
        """Tell what differs from how the checkpoint was made, though the run goes on."""
        there, here = state["eval_rows"], self.origin["eval_rows"]
        if there is not here and (there is None or here is None or not here.fits(there)):
            logger.warning(
                "eval_rows differ from those of %s: the evaluation losses before and after cannot "
                "be compared, and the best checkpoint so far is forgotten",
                source,
            )
            self.best_metric = self.best_step = None
        installed = environment()["versions"]
        for name in COMPUTING:
            if installed[name] != (then := state["environment"]["versions"].get(name)):
                logger.warning(
                    "%s was %s when %s was saved and is %s now: the run goes on, but not "
                    "necessarily to the bit",
                    *(name, then, source, installed[name]),
                )
        precision = state["config"]["precision"]
        if precision != self.config.precision:
            # An fp16 run that overflows without end has to be able to go on in bf16.
            logger.warning(
                "precision was %s and is %s now: the run goes on, but not as it would have",
                *(precision, self.config.precision),
            )
        self._tell_new_length(state)

    def _tell_new_length(self, origin: dict[str, Any]) -> None:
        then, step = origin["total_steps"], origin["global_step"]
        if then == self.total_steps or self.config.lr_scheduler_type == "constant":
            return
        logger.warning(
            "the run was to have %d steps and is to have %d now: the %s schedule is stretched, so "
            "the learning rate of step %d is %g instead of %g",
            then,
            self.total_steps,
            self.config.lr_scheduler_type,
            step,
            lr_at(step, self.total_steps, self.config),
            lr_at(step, then, self.config),
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


class CountersPart:
    """All fields of :class:`Counters`."""

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The fields as they are."""
        return {"state": {f.name: getattr(self._state, f.name) for f in fields(Counters)}}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Set them; a micro-batch that is set otherwise now stays as it is set."""
        # 0.1 kept no account of these two
        done = {
            "finished_step": saved.state["global_step"],
            "num_told": len(saved.state["log_history"]),
        }
        state = {**done, **saved.state}
        if not all(record["step"] <= state["global_step"] for record in state["log_history"]):
            raise ValueError("its history goes beyond it")
        if state["position"] is not None:
            _ = [state["position"][key] for key in ("epoch", "row", "stream")]
        micro_batch = self._state.micro_batch_size, self._state.growing
        for counter in fields(Counters):
            setattr(self._state, counter.name, state[counter.name])
        if state["config"]["micro_batch_size"] != self._state.config.micro_batch_size:
            self._state.micro_batch_size, self._state.growing = micro_batch


class RunPart:
    """The run's id."""

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The id."""
        return {"state": {"run": self._state.run}}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Be that run; 0.1 had no ids."""
        self._state.run = saved.state.get("run", self._state.run)


class BestPart:
    """Which checkpoint is the best."""

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The name of its folder."""
        step = self._state.best_step
        best = None if step is None else checkpoint_path(Path(), step).name
        return {"state": {"best_checkpoint": best}}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Remember its step; there is one if there is a best loss."""
        best, metric = saved.state["best_checkpoint"], saved.state["best_metric"]
        self._state.best_step = None if best is None else step_of(best)
        if (self._state.best_step is None) != (metric is None):
            raise ValueError(f"best_checkpoint={best!r} with best_metric={metric!r}")


PARTS: dict[str, Callable[[TrainState], Part]] = {
    "run": RunPart,
    "counters": CountersPart,
    "best": BestPart,
    "unlogged_loss": lambda state: UnloggedLossPart(state.unlogged_loss),
    "scaler": lambda state: ScalerPart(state.scaler),
    "adapter": lambda state: AdapterPart(state.model),
    "optimizer": lambda state: OptimizerPart(state.model, state.optimizer),
    "random states": lambda state: RandomStatesPart(state.device),
}
"""Every part of a run that must survive a restart, registered here and nowhere else."""
