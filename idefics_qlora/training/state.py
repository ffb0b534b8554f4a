"""What changes during a run, and how it is taken down and put back."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
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
from idefics_qlora.machine import environment
from idefics_qlora.model.execution import Execution
from idefics_qlora.sharing.card import facts_of, model_card
from idefics_qlora.training.best import Criterion
from idefics_qlora.training.diagnostics import Coverage
from idefics_qlora.training.flat import FlatAdamW
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


def new_run() -> str:
    """An id for a run; no generator that training uses is touched."""
    return secrets.token_hex(8)


@dataclass(kw_only=True)
class TrainState(Counters):
    """Everything that changes during a run; what of it must survive a restart is in ``PARTS``."""

    model: PeftModel
    optimizer: FlatAdamW
    execution: Execution
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
    """Step of the saved checkpoint whose evaluation is the best."""
    criterion: Criterion = field(default_factory=Criterion)
    """How evaluations are compared."""
    coverage: Coverage | None = None
    """Which adapters the first gradient reached (of this process's part of the run)."""
    window_rng: dict[str, Tensor] = field(default_factory=dict)
    """The random states before the last window."""
    is_unchanged: bool = False
    """Whether the last window's passes are known to be set up for the next one's."""
    half_updated: bool = False
    """Whether a step is between its first change of a weight and its last change of a counter."""

    @property
    def stopped_early(self) -> bool:
        """Whether there have been enough evaluations without a gain."""
        judged = self.log_history[self.judged_from :]
        return self.global_step < self.total_steps and self.criterion.is_over(judged)

    @property
    def is_over(self) -> bool:
        """Whether no further step is to be done."""
        return self.global_step >= self.total_steps or self.stopped_early

    @property
    def num_seen(self) -> int:
        """Rows seen, the bad ones included."""
        return self.num_examples + self.num_bad_rows

    def __post_init__(self) -> None:
        size = self.config.micro_batch_size
        self.growing = size == "auto"
        # On a GPU the first window decides (``micro_batch.py``).
        self.micro_batch_size = min(2, self.config.global_batch_size) if size == "auto" else size

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
        """All that :meth:`load` needs to go on exactly here.

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
        name = checkpoint_path(Path(), self.global_step).name
        facts = facts_of(taken["adapter_config"], taken["state"])
        card = model_card(facts, name, is_on_hub=False, pictures="../eval_samples/")
        return Snapshot(**taken, card=card)

    def load(self, snapshot: Snapshot) -> None:
        """Be as when :meth:`snapshot` was taken.

        Raises:
            ArithmeticError, AttributeError, LookupError, TypeError, ValueError: If the snapshot
                lacks something, or has it of another kind. Some of it may have been put back then.
        """
        for part in self.parts():
            part.load_state_dict(snapshot)


class CountersPart:
    """All fields of :class:`Counters`."""

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The fields as they are."""
        return {"state": {f.name: getattr(self._state, f.name) for f in fields(Counters)}}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Set them; a micro-batch that is set otherwise now stays as it is set."""
        # 0.1 kept no account of these
        done = {
            "diverged": None,
            "finished_step": saved.state["global_step"],
            "num_told": len(saved.state["log_history"]),
            "judged_from": 0,
            "too_large": [],
        }
        state = {**done, **saved.state}
        if not all(record["step"] <= state["global_step"] for record in state["log_history"]):
            raise ValueError("its history goes beyond it")
        if state["position"] is not None:
            _ = [state["position"][key] for key in ("epoch", "row", "stream")]
        pairs = state["too_large"]
        if not all(len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs):
            raise ValueError(f"too_large={pairs}")
        micro_batch = self._state.micro_batch_size, self._state.growing
        for counter in fields(Counters):
            setattr(self._state, counter.name, state[counter.name])
        if state["config"]["micro_batch_size"] != self._state.config.micro_batch_size:
            self._state.micro_batch_size, self._state.growing = micro_batch
            self._state.too_large = []


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
