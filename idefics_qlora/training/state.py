"""What changes during a run, how it is taken down and put back, and what must not change then."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.checkpoint import Snapshot, checkpoint_path, step_of
from idefics_qlora.config import TrainConfig
from idefics_qlora.data.batches import Window
from idefics_qlora.data.fingerprints import Fingerprint
from idefics_qlora.files import CheckpointError
from idefics_qlora.machine import COMPUTING, environment
from idefics_qlora.model.adapters import (
    adapter_config,
    adapter_tensors,
    load_adapter,
    trainable_parameters,
)
from idefics_qlora.model.base import same_base
from idefics_qlora.training.diagnostics import Coverage
from idefics_qlora.training.optim import load_optimizer_state, lr_at, optimizer_state

logger = logging.getLogger(__name__)

_COUNTERS = (
    *("global_step", "window", "skipped_windows", "skips_in_a_row"),
    *("micro_batch_size", "growing"),
    *("num_examples", "num_images", "num_tokens", "num_bad_rows", "position", "seconds"),
    *("loss_sum", "unlogged_steps", "best_metric", "log_history", "first_nonfinite_module"),
    *("finished_step", "num_told"),
)
"""Fields of ``TrainState`` that a checkpoint's JSON holds as they are."""

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


@dataclass
class TrainState:
    """Everything that changes during a run."""

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
    global_step: int = 0
    """Optimizer steps done; a skipped window is none."""
    window: int = 0
    """Number of the next window."""
    skipped_windows: int = 0
    skips_in_a_row: int = 0
    micro_batch_size: int = 1
    """Examples in one forward and backward pass, for now."""
    growing: bool = False
    """Whether the micro-batch still doubles from window to window."""
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
    unlogged_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum of the losses since the last log record, kept on the device."""
    unlogged_steps: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    """Step of the saved checkpoint with the lowest ``eval_loss``."""
    log_history: list[dict[str, Any]] = field(default_factory=list)
    num_told: int = 0
    """Records of the history that ``on_log`` has had."""
    finished_step: int = 0
    """The last step after which all that was due has been done. If it is not the last one, an
    evaluation or ``on_log`` failed, and the step is finished after a restart."""
    first_nonfinite_module: str | None = None
    """Where the first overflow was, if in a forward pass."""
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

    def snapshot(self, rng: dict[str, Tensor] | None = None) -> Snapshot:
        """All that :meth:`restore` needs to go on exactly here.

        Args:
            rng: Random states to go on with; by default the present ones.
        """
        tensors, scalars = optimizer_state(self.optimizer, self._parameter_names())
        best = None if self.best_step is None else checkpoint_path(Path(), self.best_step).name
        return Snapshot(
            adapter=adapter_tensors(self.model),
            adapter_config=adapter_config(self.model),
            optimizer=tensors,
            rng=rng_tensors(self.device) if rng is None else rng,
            state={
                "run": self.run,
                **{name: getattr(self, name) for name in _COUNTERS},
                "best_checkpoint": best,
                "unlogged_loss": self.unlogged_loss.item(),  # sync
                "total_steps": self.total_steps,
                "scaler": self.scaler.state_dict(),
                "optimizer": scalars,
                "config": self.config.to_json(),
                **{
                    name: value.to_json() if isinstance(value, Fingerprint) else value
                    for name, value in self.origin.items()
                },
                "environment": environment(),
            },
        )

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
            self._put_back(snapshot, source)
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

    def _put_back(self, snapshot: Snapshot, source: Path) -> None:
        state = snapshot.state
        has_run = "run" in state  # 0.1 had none, and kept no account of these two
        done = {"finished_step": state["global_step"], "num_told": len(state["log_history"])}
        state = {**done, **state}
        if not all(record["step"] <= state["global_step"] for record in state["log_history"]):
            raise ValueError("its history goes beyond it")
        if state["position"] is not None:
            _ = [state["position"][key] for key in ("epoch", "row", "stream")]
        load_adapter(self.model, snapshot.adapter, str(source))
        names = self._parameter_names()
        tensors, scalars = snapshot.optimizer, state["optimizer"]
        load_optimizer_state(self.optimizer, names, tensors, scalars, complete=has_run)
        scaler = state["scaler"]
        if bool(scaler) != (state["config"]["precision"] == "fp16"):
            raise ValueError(f"scaler={scaler} with {state['config']['precision']}")
        if scaler:
            if not all(isinstance(value, (int, float)) for value in scaler.values()):
                raise TypeError(f"scaler={scaler}")
            self.scaler.load_state_dict(scaler)
        micro_batch = self.micro_batch_size, self.growing
        for name in _COUNTERS:
            setattr(self, name, state[name])
        if state["config"]["micro_batch_size"] != self.config.micro_batch_size:
            self.micro_batch_size, self.growing = micro_batch
        self.unlogged_loss.fill_(state["unlogged_loss"])
        self.run = state.get("run", self.run)
        best = state["best_checkpoint"]
        self.best_step = None if best is None else step_of(best)
        if (self.best_step is None) != (self.best_metric is None):
            raise ValueError(f"best_checkpoint={best!r} with best_metric={self.best_metric!r}")
        try:
            restore_rng(snapshot.rng, self.device)
        except RuntimeError as error:
            raise ValueError(f"random states that are none: {error}") from error

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

    def _parameter_names(self) -> dict[Parameter, str]:
        # An adapter goes by peft's usual name in a checkpoint, whatever the user calls it.
        name = re.escape(self.model.active_adapter)
        own = re.compile(rf"(\.lora_\w+|\.modules_to_save)\.{name}(?=\.|$)")
        trainable = trainable_parameters(self.model)
        return {p: own.sub(r"\1.default", name) for name, p in trainable.items()}


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
