"""The parts of a run that must survive a restart: each can be taken down and put back by itself.

Where a part lies in a checkpoint is its own business; ``state.py`` registers every part once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.checkpoint import Snapshot
from idefics_qlora.model.adapters import (
    adapter_config,
    adapter_tensors,
    load_adapter,
    trainable_parameters,
)
from idefics_qlora.training.flat import FlatAdamW


class Part(Protocol):
    """Something that must survive a restart."""

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What the part adds to a checkpoint, by field of :class:`Snapshot`."""

    def load_state_dict(self, saved: Snapshot) -> None:
        """Be as it was when ``saved`` was taken.

        Raises:
            ArithmeticError, AttributeError, LookupError, TypeError, ValueError: If the snapshot
                lacks something that the part needs, or has it of another kind.
        """


@dataclass(kw_only=True)
class Counters:
    """What a run counts and remembers; a checkpoint's JSON holds every field as it is."""

    global_step: int = 0
    """Optimizer steps done; a skipped window is none."""
    window: int = 0
    """Number of the next window."""
    skipped_windows: int = 0
    skips_in_a_row: int = 0
    micro_batch_size: int = 1
    """Examples in one forward and backward pass at most."""
    growing: bool = False
    """Whether the micro-batch is still to be chosen by what the next window takes."""
    too_large: list[list[int]] = field(default_factory=list)
    """Text tokens and images, padding included, of micro-batches that did not fit, though usual
    ones do: with "auto", no other as large is tried."""
    num_examples: int = 0
    """Examples seen."""
    num_images: int = 0
    """Images seen."""
    num_tokens: int = 0
    """Text tokens seen."""
    num_bad_rows: int = 0
    """Rows left out of windows, counted each time."""
    position: dict[str, Any] | None = None
    """Where a stream of rows is after the last window."""
    seconds: float = 0.0
    """Time spent training so far, in all processes of the run."""
    loss_sum: float = 0.0
    """Sum of the losses of all logged steps."""
    unlogged_steps: int = 0
    best_metric: float | None = None
    """What the evaluation of the best checkpoint gave of the metric that decides."""
    judged_from: int = 0
    """Records of the history that are left out where evaluations are compared: they are of other
    rows, or of other answers."""
    log_history: list[dict[str, Any]] = field(default_factory=list)
    first_nonfinite_module: str | None = None
    """Where the first overflow was, if in a forward pass."""
    diverged: str | None = None
    """How training has diverged, if an overflow has told so."""
    finished_step: int = 0
    """The last step after which all that was due has been done. If it is not the last one, an
    evaluation or ``on_log`` failed, and the step is finished after a restart."""
    num_told: int = 0
    """Records of the history that ``on_log`` has had."""


class AdapterPart:
    """The trained weights, and what kind of adapter they are of."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The weights by peft's names."""
        return {
            "adapter": adapter_tensors(self._model),
            "adapter_config": adapter_config(self._model),
        }

    def load_state_dict(self, saved: Snapshot) -> None:
        """Load the weights; of the configuration nothing may differ, which is checked before."""
        load_adapter(self._model, saved.adapter, "of the checkpoint")


class OptimizerPart:
    """The optimizer's moments and step counts."""

    def __init__(self, model: PeftModel, optimizer: FlatAdamW) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Tensors, and numbers beside them, by parameter."""
        tensors, scalars = self._optimizer.state_by_name()
        return {"optimizer": tensors, "state": {"optimizer": scalars}}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Load them; a checkpoint of 0.1 (it had no ``run``) may lack some parameters."""
        self._optimizer.link(named_in_checkpoints(self._model))  # an adapter was loaded before
        tensors, scalars = saved.optimizer, saved.state["optimizer"]
        self._optimizer.load_state_by_name(tensors, scalars, complete="run" in saved.state)


def named_in_checkpoints(model: PeftModel) -> dict[str, Parameter]:
    """The trainable parameters by the names that their moments have in a checkpoint."""
    # An adapter goes by peft's usual name in a checkpoint, whatever the user calls it.
    name = re.escape(model.active_adapter)
    own = re.compile(rf"(\.lora_\w+|\.modules_to_save)\.{name}(?=\.|$)")
    return {own.sub(r"\1.default", name): p for name, p in trainable_parameters(model).items()}


class ScalerPart:
    """The scale of fp16 losses."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Empty unless the precision is fp16."""
        return {"state": {"scaler": self._scaler.state_dict()}}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Load it, if both the checkpoint and this process have one."""
        scaler, precision = saved.state["scaler"], saved.state["config"]["precision"]
        if bool(scaler) != (precision == "fp16"):
            raise ValueError(f"scaler={scaler} with {precision}")
        if scaler:
            if not all(isinstance(value, (int, float)) for value in scaler.values()):
                raise TypeError(f"scaler={scaler}")
            self._scaler.load_state_dict(scaler)


class UnloggedLossPart:
    """The sum of the losses since the last log record, a scalar on the device."""

    def __init__(self, loss: Tensor) -> None:
        self._loss = loss

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The sum as a number."""
        return {"state": {"unlogged_loss": self._loss.item()}}  # sync

    def load_state_dict(self, saved: Snapshot) -> None:
        """Put the number back in place."""
        self._loss.fill_(saved.state["unlogged_loss"])


class RandomStatesPart:
    """PyTorch's generators."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Their present states."""
        return {"rng": rng_tensors(self._device)}

    def load_state_dict(self, saved: Snapshot) -> None:
        """Put the generators into these states."""
        try:
            restore_rng(saved.rng, self._device)
        except RuntimeError as error:
            raise ValueError(f"random states that are none: {error}") from error


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of PyTorch's generators on the CPU and on the GPU in use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators into the states from :func:`rng_tensors`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
