"""AdamW over flat memory: all parameters are views of one tensor, all gradients of another.

An adapter has hundreds of small matrices, and an optimizer that takes them one by one costs a
kernel, and with bitsandbytes a wait for the GPU, for each. Laid side by side they are cleared,
checked, clipped and updated by a few kernels. No number changes by that: every parameter begins at
a multiple of :data:`BLOCK` elements, so that no 8-bit block holds elements of two, and a parameter
that no gradient has reached is left alone, with its moments and its step, as if its ``grad`` were
``None``.

More than 400 lines, most of them about what must not change: the states of single parameters,
their blocks, and what others do to a parameter meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from idefics_qlora.config import TrainConfig

BLOCK = 256
"""Elements that share a scale in an 8-bit state of bitsandbytes."""
NOTHING = -0.0
"""What a sum of gradients begins with: with 0.0, a gradient of -0.0 would become 0.0, which
bitsandbytes' 8-bit states tell apart on a GPU."""
MIN_8_BIT = 4096
"""Elements from which on bitsandbytes keeps a tensor's state in 8 bits."""
MIN_PAGED = 100_000
"""Elements from which on bitsandbytes pages a state."""


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over an adapter that it moves into flat memory.

    Equal to bitsandbytes' ``PagedAdamW8bit``, or PyTorch's ``AdamW``, over the single parameters:
    to the bit on a CPU, and on a GPU where every parameter's size is a multiple of 256 (a LoRA of
    rank 16 is). As with bitsandbytes, tensors under 4,096 elements have states of 32 bits, and
    larger states are paged on a GPU. All states are there from the beginning.

    ``param_groups`` holds the flat tensors, so ``GradScaler.unscale_`` and ``GradScaler.step`` take
    it for an optimizer with one or two parameters. The kernels of bitsandbytes run on CUDA's
    default stream: call :meth:`step` on it.

    Args:
        parameters: The trainable fp32 parameters by name, all on one device; in the order in which
            the norm is taken. Their memory is replaced (:meth:`link`).
        config: Gives ``optim``, ``learning_rate``, ``weight_decay`` and AdamW's constants.
    """

    # GradScaler.step hands found_inf over and leaves it to us to look at it, instead of waiting for
    # the GPU itself and then not saying what it saw.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, parameters: Mapping[str, Parameter], config: TrainConfig) -> None:
        self._touched = bytearray(len(parameters))
        device = next(iter(parameters.values())).device
        # A kernel more costs a GPU time. On a CPU the tail of a tensor is computed by other
        # instructions than the rest, so there every parameter keeps a tail of its own.
        self._merge = device.type == "cuda"
        kinds: dict[type[_Moments], dict[str, int]] = {}
        for number, (name, parameter) in enumerate(parameters.items()):
            kind: type[_Moments] = _TorchMoments
            if config.optim == "paged_adamw_8bit":
                kind = _Moments8bit if parameter.numel() >= MIN_8_BIT else _Moments32bit
            kinds.setdefault(kind, {})[name] = number
        self._buffers = [
            _Buffer(kind, {name: (i, parameters[name]) for name, i in numbers.items()})
            for kind, numbers in kinds.items()
        ]
        slots = [slot for buffer in self._buffers for slot in buffer.slots]
        self._slots = sorted(slots, key=lambda slot: slot.number)
        settings = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        super().__init__([buffer.weights for buffer in self._buffers], settings)
        self.link(parameters)

    def link(self, parameters: Mapping[str, Parameter]) -> None:
        """Make every parameter and its gradient a view of the flat memory, where it is not.

        ``model.half()``, ``zero_grad(set_to_none=True)``, a copied or loaded parameter and much
        else give it memory of its own, which this optimizer would not see. Its value is taken from
        there; a gradient there is dropped.

        Args:
            parameters: The same names and shapes as at first.

        Raises:
            ValueError: If they are others.
        """
        shapes = {slot.name: tuple(slot.weight.shape) for slot in self._slots}
        other = {name: tuple(p.shape) for name, p in parameters.items()}
        if shapes != other:
            names = sorted(k for k in shapes.keys() | other.keys() if shapes.get(k) != other.get(k))
            raise ValueError(
                f"the trainable parameters are no longer those that the optimizer was made for: "
                f"{names[0]} had the shape {shapes.get(names[0])} and has {other.get(names[0])} "
                f"(and {len(names) - 1} more); do not change the adapter while it is trained"
            )
        for slot in self._slots:
            slot.link(parameters[slot.name], self._touched)

    def __enter__(self) -> FlatAdamW:
        return self

    def __exit__(self, *_: object) -> None:
        """Give every parameter memory of its own, without gradient: an ordinary model again.

        The optimizer is of no use then.
        """
        for slot in self._slots:
            slot.release()
        for buffer in self._buffers:
            _spare_paged.extend(t for t in buffer.moments.flat() if hasattr(t, "is_paged"))

    def touch(self, parameters: Iterable[Tensor]) -> None:
        """Say that a backward pass has reached these parameters, without running any hooks."""
        reached = set(map(id, parameters))
        for slot in self._slots:
            if id(slot.parameter) in reached:
                self._touched[slot.number] = 1

    def reserve(self) -> None:
        """Have what :meth:`step` needs for a moment, so that it cannot run out half-way.

        On a GPU, PyTorch's AdamW takes the root of a state; what is freed here stays with the
        process and has the right size. bitsandbytes works in place.
        """
        for buffer in self._buffers:
            if buffer.weights.is_cuda and isinstance(buffer.moments, _TorchMoments):
                torch.empty_like(buffer.weights)

    def is_unchanged(self) -> bool:
        """Whether all parameters and gradients lie in flat memory."""
        return all(slot.is_linked() for slot in self._slots)

    def begin_window(self) -> None:
        """Clear all gradients, and take over what a callback has moved or deleted meanwhile.

        Without that a window would be learnt where the model does not see it: CUDA graphs add to
        the ``.grad`` there is, and :meth:`step` changes flat memory.
        """
        for slot in self._slots:
            if not slot.is_linked():
                slot.link(slot.parameter, self._touched)
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients; they stay where they are, whatever ``set_to_none`` is."""
        for buffer in self._buffers:
            buffer.gradients.fill_(NOTHING)
        self._touched[:] = bytes(len(self._touched))

    def spoil_unless_finite(self, loss: Tensor) -> None:
        """Let a loss that is not finite count as a gradient that is not, without a sync."""
        self._buffers[0].gradients[0] += loss - loss

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients; without a sync.

        Returns:
            Scalar fp32 on the device: their L2 norm before, the norm of the parameters' norms as
            ``clip_grad_norm_`` takes it, so equal to that to the bit.
        """
        norm = get_total_norm([slot.gradient for slot in self._slots if self._touched[slot.number]])
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for buffer in self._buffers:
            buffer.gradients.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> bool:  # type: ignore[override]
        """Update what a gradient has reached.

        Returns:
            Whether it did; ``False`` if ``GradScaler.step``, which returns it, called this and the
            gradients were not finite: then nothing has changed, not by a bit.
        """
        # All that needs no answer from the GPU is done before it is waited for.
        runs = [(buffer, *run) for buffer in self._buffers for run in self._runs(buffer)]
        if self.found_inf is not None and self.found_inf.item():  # sync
            return False
        for buffer, part, step in runs:
            buffer.update(part, step, self.param_groups[0])
        for slot in self._slots:
            slot.step += self._touched[slot.number]
        return True

    def state_by_name(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """The moments under the parameters' names and in their shapes, as checkpoints hold them.

        Returns:
            Tensors as ``{"<parameter>::<key>": tensor}``, and what is no tensor as ``{parameter:
            {key: value}}``. The tensors share the optimizer's memory: what is to be kept beyond the
            next step must be copied.
        """
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, dict[str, Any]] = {}
        self._wait()
        for buffer in self._buffers:
            moments = buffer.moments
            for slot in buffer.slots:
                for key, tensor in moments.tensors(slot).items():
                    tensors[f"{slot.name}::{key}"] = tensor
                if moments.step_is_tensor:
                    tensors[f"{slot.name}::step"] = torch.tensor(float(slot.step))
                else:
                    scalars[slot.name] = {"step": slot.step}
        return tensors, scalars

    def load_state_by_name(
        self,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Mapping[str, Any]],
        complete: bool = False,
    ) -> None:
        """Put a state from :meth:`state_by_name` back, or one of the single parameters.

        Args:
            tensors: As they were returned.
            scalars: As they were returned.
            complete: Whether every parameter must have a state. In 0.1 one that no gradient had
                reached had none.

        Raises:
            ValueError: If a state is missing, or belongs to other parameters or another optimizer;
                nothing is loaded.
        """
        by_name: dict[str, dict[str, Any]] = {name: dict(v) for name, v in scalars.items()}
        for key, tensor in tensors.items():
            name, _, entry = key.rpartition("::")
            by_name.setdefault(name, {})[entry] = tensor
        if unknown := by_name.keys() - {slot.name for slot in self._slots}:
            raise ValueError(
                f"the optimizer state belongs to other parameters: {sorted(unknown)[:3]}"
            )
        if complete and (missing := sorted({s.name for s in self._slots} - by_name.keys())):
            raise ValueError(f"the optimizer has no state of {missing[:3]}")
        for buffer in self._buffers:
            for slot in buffer.slots:
                if slot.name in by_name:
                    buffer.moments.check(slot, by_name[slot.name])
        self._wait()
        for buffer in self._buffers:
            for slot in buffer.slots:
                state = by_name.get(slot.name)
                buffer.moments.load(slot, state)
                slot.step = 0 if state is None else int(state["step"])

    def _runs(self, buffer: _Buffer) -> list[tuple[slice, int]]:
        """What the next step updates: parts of the flat memory, and the number of that step.

        Parameters that adjoin and have had equally many steps are one part.
        """
        runs: list[tuple[slice, int]] = []
        before: _Slot | None = None
        for slot in buffer.slots:
            if not self._touched[slot.number]:
                before = None
                continue
            start = slot.start
            if self._merge and before is not None and before.step == slot.step:
                start = runs.pop()[0].start
            runs.append((slice(start, slot.end if self._merge else slot.stop), slot.step + 1))
            before = slot
        return runs

    def _wait(self) -> None:
        """Let the GPU finish before the CPU touches paged memory."""
        if any(getattr(t, "is_paged", False) for b in self._buffers for t in b.moments.flat()):
            torch.cuda.synchronize()  # sync


@dataclass
class _Slot:
    """A parameter's place in flat memory."""

    name: str
    number: int
    """Its place in the order of the parameters."""
    start: int
    weight: Tensor
    """View of the flat weights, in the parameter's shape."""
    gradient: Tensor
    """View of the flat gradients, likewise."""
    step: int = 0
    """Updates so far; those that did not reach it are none."""
    parameter: Any = None
    hook: Any = None

    @property
    def stop(self) -> int:
        return self.start + self.weight.numel()

    @property
    def end(self) -> int:
        """Where its last block ends; from ``stop`` on all is zero."""
        return -(-self.stop // BLOCK) * BLOCK

    def __post_init__(self) -> None:
        self.addresses = self.weight.data_ptr(), self.gradient.data_ptr()

    def is_linked(self) -> bool:
        parameter, (weight, gradient) = self.parameter, self.addresses
        grad = parameter.grad
        return grad is not None and (parameter.data_ptr(), grad.data_ptr()) == (weight, gradient)

    def link(self, parameter: Parameter, touched: bytearray) -> None:
        if not _same_memory(parameter, self.weight):
            self.weight.copy_(parameter.detach())
            parameter.grad = None  # it might be of another dtype or device
            parameter.data = self.weight
        grad = parameter.grad
        if grad is None or not _same_memory(grad, self.gradient) or self.parameter is not parameter:
            # A view of its own, which model.half() may turn into something else.
            parameter.grad = self.gradient.view_as(self.gradient)
            _unhook(self.parameter)
            _unhook(parameter)  # of an optimizer before this one
            self.parameter = parameter
            note = partial(_note, touched, self.number, self.gradient)
            self.hook = parameter.register_post_accumulate_grad_hook(note)
            self.parameter.flat_hook = self.hook

    def release(self) -> None:
        if getattr(self.parameter, "flat_hook", None) is not self.hook:
            return  # the next optimizer has it
        _unhook(self.parameter)
        self.parameter.grad = None
        if _same_memory(self.parameter, self.weight):
            self.parameter.data = self.weight.clone()


def _note(touched: bytearray, number: int, gradient: Tensor, parameter: Tensor) -> None:
    """Called by autograd when a gradient has reached a parameter."""
    touched[number] = 1
    assert parameter.grad is not None
    if not _same_memory(parameter.grad, gradient):
        # Somebody had deleted the view, and autograd took new memory.
        gradient += parameter.grad
        parameter.grad = gradient.view_as(gradient)


def _unhook(parameter: Any) -> None:
    if hasattr(parameter, "flat_hook"):
        parameter.flat_hook.remove()
        del parameter.flat_hook


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.device == b.device


class _Buffer:
    """Weights, gradients and moments of parameters whose moments are of one kind."""

    def __init__(
        self, kind: type[_Moments], parameters: Mapping[str, tuple[int, Parameter]]
    ) -> None:
        starts, size = [], 0
        for _, parameter in parameters.values():
            starts.append(size)
            size += -(-parameter.numel() // BLOCK) * BLOCK
        device = next(iter(parameters.values()))[1].device
        self.weights = torch.zeros(size, device=device)  # zeros between the parameters stay zeros
        self.weights.grad = self.gradients = torch.full((size,), NOTHING, device=device)
        self.moments = kind(size, device)
        self.slots = [
            _Slot(
                name, number, start, _view(self.weights, start, p), _view(self.gradients, start, p)
            )
            for start, (name, (number, p)) in zip(starts, parameters.items(), strict=True)
        ]

    def update(self, part: slice, step: int, group: Mapping[str, Any]) -> None:
        self.moments.update(self.weights[part], self.gradients[part], part, step, group)


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    return flat[start : start + like.numel()].view(like.shape)


class _Moments(ABC):
    """Flat moments of one kind."""

    step_is_tensor = False

    @abstractmethod
    def __init__(self, size: int, device: torch.device) -> None:
        """Zeros for so many elements."""

    @abstractmethod
    def flat(self) -> Iterable[Tensor]:
        """The flat tensors."""

    @abstractmethod
    def tensors(self, slot: _Slot) -> dict[str, Tensor]:
        """Those of one parameter: views, under the names of the optimizer that has them singly."""

    @abstractmethod
    def update(
        self, weights: Tensor, gradients: Tensor, part: slice, step: int, group: Mapping[str, Any]
    ) -> None:
        """One step of a part of the flat memory."""

    def check(self, slot: _Slot, state: Mapping[str, Any]) -> None:
        expected = {key: tuple(t.shape) for key, t in self.tensors(slot).items()}
        found = {key: tuple(t.shape) for key, t in state.items() if key != "step"}
        if found != expected or "step" not in state:
            raise ValueError(
                f"the optimizer state of {slot.name} has {found}: expected a step and {expected}; "
                "it is of another optimizer or another adapter"
            )

    def load(self, slot: _Slot, state: Mapping[str, Any] | None) -> None:
        for key, tensor in self.tensors(slot).items():
            if state is not None:
                tensor.copy_(state[key])
            elif not key.startswith("qmap"):
                tensor.zero_()


class _Moments8bit(_Moments):
    """bitsandbytes' block-wise 8-bit states, paged on a GPU when they are large."""

    def __init__(self, size: int, device: torch.device) -> None:
        from bitsandbytes import functional

        self._update = functional.optimizer_update_8bit_blockwise
        self._prefetch = functional.prefetch_tensor
        self.state1, self.state2 = _bytes(size, device), _bytes(size, device)
        self.absmax1, self.absmax2 = torch.zeros(2, size // BLOCK, device=device).unbind()
        self.qmap1 = functional.create_dynamic_map(signed=True).to(device)
        self.qmap2 = functional.create_dynamic_map(signed=False).to(device)

    def flat(self) -> Iterable[Tensor]:
        return (self.state1, self.state2)

    def tensors(self, slot: _Slot) -> dict[str, Tensor]:
        blocks = slice(slot.start // BLOCK, slot.end // BLOCK)
        return {
            "state1": _view(self.state1, slot.start, slot.weight),
            "qmap1": self.qmap1,
            "state2": _view(self.state2, slot.start, slot.weight),
            "qmap2": self.qmap2,
            "absmax1": self.absmax1[blocks],
            "absmax2": self.absmax2[blocks],
        }

    def update(
        self, weights: Tensor, gradients: Tensor, part: slice, step: int, group: Mapping[str, Any]
    ) -> None:
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        state1, state2 = _paged_part(self.state1, part), _paged_part(self.state2, part)
        if hasattr(self.state1, "is_paged"):
            self._prefetch(state1)
            self._prefetch(state2)
        self._update(
            "adam",
            gradients,
            weights,
            state1,
            state2,
            *group["betas"],
            *(0.0, 0.0),  # of other optimizers
            group["eps"],
            step,
            group["lr"],
            self.qmap1,
            self.qmap2,
            self.absmax1[blocks],
            self.absmax2[blocks],
            group["weight_decay"],
        )

    def load(self, slot: _Slot, state: Mapping[str, Any] | None) -> None:
        super().load(slot, state)
        # The rest of the last block shares its scale: there the byte 0 would be a large number.
        self.state1[slot.stop : slot.end] = int(self.qmap1.abs().argmin())  # sync
        self.state2[slot.stop : slot.end] = int(self.qmap2.abs().argmin())  # sync


def _bytes(size: int, device: torch.device) -> Tensor:
    if device.type != "cuda" or size < MIN_PAGED:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    from bitsandbytes import functional

    for i, paged in enumerate(_spare_paged):
        if (paged.numel(), paged.page_deviceid) == (size, device.index):
            del _spare_paged[i]
            break
    else:
        paged = functional.get_paged(size, dtype=torch.uint8, device=device)
    functional.fill(paged, 0)  # sync
    return paged


_spare_paged: list[Any] = []
"""Paged memory that is no longer in use: bitsandbytes has no way to give it back."""


def _paged_part(tensor: Tensor, part: slice) -> Tensor:
    """Part of a tensor that is perhaps paged, which a view would forget."""
    view: Any = tensor[part]
    if hasattr(tensor, "is_paged"):
        view.is_paged = tensor.is_paged
        view.page_deviceid = tensor.page_deviceid  # type: ignore[attr-defined]
    return view


class _Moments32bit(_Moments):
    """bitsandbytes' states of small tensors."""

    def __init__(self, size: int, device: torch.device) -> None:
        from bitsandbytes import functional

        self._update = functional.optimizer_update_32bit
        self.state1, self.state2 = torch.zeros(2, size, device=device).unbind()

    def flat(self) -> Iterable[Tensor]:
        return (self.state1, self.state2)

    def tensors(self, slot: _Slot) -> dict[str, Tensor]:
        return {
            "state1": _view(self.state1, slot.start, slot.weight),
            "state2": _view(self.state2, slot.start, slot.weight),
        }

    def update(
        self, weights: Tensor, gradients: Tensor, part: slice, step: int, group: Mapping[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        self._update(
            "adam",
            gradients,
            weights,
            self.state1[part],
            beta1,
            group["eps"],
            step,
            group["lr"],
            self.state2[part],
            beta2,
            weight_decay=group["weight_decay"],
        )


class _TorchMoments(_Moments):
    """PyTorch's own, in fp32."""

    step_is_tensor = True

    def __init__(self, size: int, device: torch.device) -> None:
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, size, device=device).unbind()

    def flat(self) -> Iterable[Tensor]:
        return (self.exp_avg, self.exp_avg_sq)

    def tensors(self, slot: _Slot) -> dict[str, Tensor]:
        return {
            "exp_avg": _view(self.exp_avg, slot.start, slot.weight),
            "exp_avg_sq": _view(self.exp_avg_sq, slot.start, slot.weight),
        }

    def update(
        self, weights: Tensor, gradients: Tensor, part: slice, step: int, group: Mapping[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            [weights],
            [gradients],
            [self.exp_avg[part]],
            [self.exp_avg_sq[part]],
            [],
            [torch.tensor(float(step - 1))],  # it counts itself
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
