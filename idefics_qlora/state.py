"""What changes during a run, and how it is taken down and put back."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.checkpoint import Snapshot
from idefics_qlora.config import TrainConfig
from idefics_qlora.model import (
    adapter_config,
    adapter_tensors,
    load_adapter,
    trainable_parameters,
)
from idefics_qlora.optim import load_optimizer_state, optimizer_state

_COUNTERS = (
    *("global_step", "window", "skipped_windows", "skips_in_a_row"),
    *("num_examples", "num_images", "num_tokens"),
    *("loss_sum", "unlogged_steps", "best_metric", "best_step", "log_history"),
)
"""Fields of ``TrainState`` that a checkpoint's JSON holds as they are."""


@dataclass
class TrainState:
    """Everything that changes during a run."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    total_steps: int
    device: torch.device
    global_step: int = 0
    """Optimizer steps done; a skipped window is none."""
    window: int = 0
    """Number of the next window."""
    skipped_windows: int = 0
    skips_in_a_row: int = 0
    num_examples: int = 0
    """Examples seen."""
    num_images: int = 0
    """Images seen."""
    num_tokens: int = 0
    """Text tokens seen."""
    loss_sum: float = 0.0
    """Sum of the losses of all logged steps."""
    unlogged_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum of the losses since the last log record, kept on the device."""
    unlogged_steps: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    """Step of the saved checkpoint with the lowest ``eval_loss``."""
    log_history: list[dict[str, float]] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        """All that :meth:`restore` needs to go on exactly here."""
        tensors, scalars = optimizer_state(self.optimizer, self._parameter_names())
        return Snapshot(
            adapter=adapter_tensors(self.model),
            adapter_config=adapter_config(self.model),
            optimizer=tensors,
            rng=rng_tensors(),
            state={
                **{name: getattr(self, name) for name in _COUNTERS},
                "unlogged_loss": self.unlogged_loss.item(),  # sync
                "total_steps": self.total_steps,
                "scaler": self.scaler.state_dict(),
                "optimizer": scalars,
                "config": self.config.to_json(),
                "versions": library_versions(),
            },
        )

    def restore(self, snapshot: Snapshot, source: str) -> None:
        """Go on where :meth:`snapshot` was taken."""
        load_adapter(self.model, snapshot.adapter, source)
        state = snapshot.state
        names = self._parameter_names()
        load_optimizer_state(self.optimizer, names, snapshot.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.unlogged_loss.fill_(state["unlogged_loss"])
        restore_rng(snapshot.rng)

    def _parameter_names(self) -> dict[Parameter, str]:
        return {p: name for name, p in trainable_parameters(self.model).items()}


def rng_tensors() -> dict[str, Tensor]:
    """States of PyTorch's generators, on the CPU and on every GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(states: dict[str, Tensor]) -> None:
    """Put the generators into the states from :func:`rng_tensors`."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda:{i}"], i)


def library_versions() -> dict[str, str]:
    """Versions of this library and of those it computes with."""
    names = ("idefics_qlora", "torch", "transformers", "peft", "bitsandbytes")
    return {name: version(name) for name in names}
