"""Linear layers over a frozen base: one dequantisation each way, and no other pass than needed.

Past 400 lines: the operation, when a layer may take it, and how it is put into a model are read
together.

``peft`` computes a LoRA layer over 4 bits as a dozen operations: a dequantisation inside a product,
a clone, casts of both matrices, dropout, two products, a scale, a sum; and keeps most of their
results. Here a layer, or several with the same input side by side, is one operation with a backward
pass of its own. The parameters stay ``peft``'s: they are saved, loaded, merged and inspected as
before, and outside of :meth:`FastLinears.active` every layer runs ``peft``'s own code.

For one layer, with input x (M, K), frozen weight W (N, K), A (r, K), B (N, r), scaling s and
dropout D: y = x Wᵀ + D(x) Aᵀ (s B)ᵀ. Kept for the backward pass are D(x) and D(x) Aᵀ.

On a CPU fp16 means what ``cpu.py`` means by it: operands rounded to fp16, products in fp32, results
rounded once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from idefics_qlora.model import kernels

logger = logging.getLogger(__name__)

_NO_SEED = torch.zeros(1, dtype=torch.int64)


def why_not_linear(layer: Any) -> str | None:
    """Why a frozen linear layer cannot be computed here; ``None`` if it can."""
    if type(layer) not in (nn.Linear, bnb.nn.Linear4bit):
        return f"a {type(layer).__name__}"
    if layer.weight.requires_grad:
        return "its own weight is trained"
    if has_hooks(layer):
        return "it has hooks"
    if isinstance(layer, bnb.nn.Linear4bit):
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            return "its weight is not quantised yet"
        if getattr(state, "packing_format_for_cpu", False):
            return "its weight is repacked for inference"
    return None


def why_not(layer: Any) -> str | None:
    """Why a layer of an adapter goes ``peft``'s own way; ``None`` if it need not."""
    if type(layer) not in (LoraLinear, LoraLinear4bit):
        return f"a {type(layer).__module__.split('.')[-2]} {type(layer).__name__}"
    if layer.disable_adapters:
        return "its adapter is switched off"
    if layer.merged:
        return "its adapter is merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return f"{len(names)} adapters are active"
    (name,) = names
    if name in layer.lora_variant:
        return f"a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias[name] or layer.fan_in_fan_out:
        return "a bias in the adapter, or a transposed weight"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.weight.dtype != b.weight.dtype:
        return "matrices of another kind"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"a {type(dropout).__name__}"
    if any(has_hooks(module) for module in (a, b, dropout)):
        return "it has hooks"
    if has_other_forward(layer):
        return "its forward was replaced"
    return why_not_linear(layer.base_layer)


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """What is called before and after a module's forward and backward pass; the mappings stay."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


HOOKS_OF_ALL: tuple[Mapping[int, Any], ...] = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
"""What is called before and after those of every module."""


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after a module's forward or backward pass."""
    return any(hooks_of(module))


def has_other_forward(module: nn.Module) -> bool:
    """Whether somebody has given a module another forward than its class's."""
    forward = module.__dict__.get("forward")
    function = getattr(forward, "__func__", forward)
    return forward is not None and getattr(function, "__module__", None) not in _OURS


def take_back(module: nn.Module) -> None:
    """Give a module its class's forward back, unless it has somebody else's meanwhile."""
    if not has_other_forward(module):
        module.__dict__.pop("forward", None)


_OURS = frozenset(
    f"idefics_qlora.{name}"
    for name in ("families.patches", "model.cpu", "model.lora_linear", "model.fused")
)


@dataclass(frozen=True)
class _Lora:
    """The adapter of one layer of a group."""

    a: Parameter
    """(r, K)"""
    b: Parameter
    """(N, r)"""
    scaling: float
    rows: slice
    """The layer's output features among the group's."""
    ranks: slice
    """Its r among the group's."""


class Group:
    """Linear layers with one input, computed as one: their outputs side by side.

    Layers of a group share one dropout of their input (``peft`` draws one for each).

    Args:
        layers: ``nn.Linear``, ``Linear4bit``, or ``peft``'s LoRA layers over them, all fit for it
            (:func:`why_not`, :func:`why_not_linear`), with equal input features.
        stream: Number of the group, different for each: which random numbers its dropout draws.
    """

    def __init__(self, layers: Sequence[Any], stream: int = 0) -> None:
        self.layers = list(layers)
        self.stream = stream
        self.bases: list[Any] = [
            layer.base_layer if isinstance(layer, BaseTunerLayer) else layer for layer in layers
        ]
        self.loras: list[_Lora] = []
        self.p = 0.0
        self._dropout: nn.Module | None = None
        row = rank = 0
        for layer, base in zip(self.layers, self.bases, strict=True):
            if isinstance(layer, BaseTunerLayer):
                name = next(name for name in layer.active_adapters if name in layer.lora_A)
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                rows = slice(row, row + base.out_features)
                ranks = slice(rank, rank + a.shape[0])
                self.loras.append(_Lora(a, b, layer.scaling[name], rows, ranks))
                self._dropout = layer.lora_dropout[name]
                self.p = float(getattr(self._dropout, "p", 0.0))
                rank += a.shape[0]
            row += base.out_features
        self.inputs: int = self.bases[0].in_features
        self.outputs, self.ranks = row, rank
        self.splits = [base.out_features for base in self.bases]
        self.biases = [base.bias for base in self.bases]
        self.trained_biases = [b for b in self.biases if b is not None and b.requires_grad]
        self.frozen_bias: Tensor | None = None
        self.anchor: Tensor | None = None
        """While gradients are added to the parameters' ``.grad`` by the products themselves:
        a scalar that requires a gradient in their place."""
        self.a: Tensor | None = None
        """(ranks, K), cast once per window; ``None``: cast at each call."""
        self.b: Tensor | None = None
        """(outputs, ranks), scaled; zero where a layer's output meets another's rank."""
        self._absmax: dict[int, Tensor] = {}
        self._join_weights()

    @property
    def parameters(self) -> list[Parameter]:
        """What is trained, in the order in which :func:`linear` passes it on."""
        pairs = [p for lora in self.loras for p in (lora.a, lora.b)]
        return [*pairs, *self.trained_biases]

    def leaves(self) -> Sequence[Tensor]:
        """What autograd is given as the parameters.

        Where gradients are added directly it gets the anchor instead: its nodes for parameters may
        be those of another graph, on another stream, which a recording cannot wait for.
        """
        parameters = self.parameters
        if self.anchor is None or any(p.grad is None for p in parameters):
            return parameters
        return [self.anchor] if any(p.requires_grad for p in parameters) else []

    @property
    def is_quantized(self) -> bool:
        """Whether the frozen weights are packed in 4 bits."""
        return any(isinstance(base, bnb.nn.Linear4bit) for base in self.bases)

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return self._dropout is not None and self._dropout.training

    def _join_weights(self) -> None:
        """Let unquantised weights lie side by side in one tensor."""
        weights = [base.weight for base in self.bases]
        alike = len({(w.dtype, w.device) for w in weights}) == 1
        if self.is_quantized or len(weights) == 1 or not alike or weights[0].is_meta:
            return
        if self._joined() is None:
            joined = torch.cat([w.detach() for w in weights])
            for weight, part in zip(weights, joined.split(self.splits), strict=True):
                weight.data = part

    def _joined(self) -> Tensor | None:
        """(outputs, K): the layers' weights, if they (still) lie side by side in one tensor.

        Found out from where they lie, so that nothing but the weights themselves holds their
        memory, and a cast of them gives it back.
        """
        first, *others = (base.weight.detach() for base in self.bases)
        end, memory = first.storage_offset() + first.numel(), first.untyped_storage()
        for weight in others:
            follows = weight.storage_offset() == end and weight.dtype == first.dtype
            if not follows or memory._cdata != weight.untyped_storage()._cdata:
                return None
            end += weight.numel()
        if not all(base.weight.is_contiguous() for base in self.bases):
            return None
        return first.as_strided((self.outputs, self.inputs), (self.inputs, 1))

    def prepare(self, dtype: torch.dtype) -> None:
        """Compute what lasts beyond one pass, so that it lies in no graph's memory."""
        work = _work_dtype(self.bases[0].weight, dtype)
        self.bias(work)
        for base in self.bases:
            weight = base.weight
            if isinstance(base, bnb.nn.Linear4bit) and not _is_ours(weight):
                self._constants(weight.quant_state)

    def casts(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
        """Make the copies of A and B in ``dtype``; which (source, target, factor) fills them."""
        if not self.loras:
            return []
        device = self.loras[0].a.device
        if self.a is None or self.a.dtype != dtype or self.a.device != device:
            self.a = torch.zeros(self.ranks, self.inputs, dtype=dtype, device=device)
            self.b = torch.zeros(self.outputs, self.ranks, dtype=dtype, device=device)
        assert self.b is not None
        pairs = []
        for lora in self.loras:
            pairs.append((lora.a.detach(), self.a[lora.ranks], 1.0))
            pairs.append((lora.b.detach(), self.b[lora.rows, lora.ranks], lora.scaling))
        return pairs

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (ranks, K) and s B (outputs, ranks) in ``dtype``."""
        if self.a is not None and self.b is not None and self.a.dtype == dtype:
            return self.a, self.b
        a = torch.cat([lora.a.detach() for lora in self.loras]).to(dtype)
        b = a.new_zeros(self.outputs, self.ranks)
        for lora in self.loras:
            b[lora.rows, lora.ranks] = (lora.b.detach() * lora.scaling).to(dtype)
        return a, b

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(outputs,) in ``dtype``; ``None`` if no layer has one."""
        if all(bias is None for bias in self.biases):
            return None
        if self.frozen_bias is not None and self.frozen_bias.dtype == dtype:
            return self.frozen_bias
        parts = [
            base.weight.new_zeros(n, dtype=dtype) if bias is None else bias.detach().to(dtype)
            for base, bias, n in zip(self.bases, self.biases, self.splits, strict=True)
        ]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self.trained_biases:
            self.frozen_bias = joined
        return joined

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(outputs, K): the frozen weights in ``dtype``, dequantised."""
        if not self.is_quantized:
            if len(self.bases) == 1:
                return self.bases[0].weight.detach().to(dtype)
            if (joined := self._joined()) is not None:
                return joined.to(dtype)
            return torch.cat([base.weight.detach().to(dtype) for base in self.bases])
        if len(self.bases) == 1 and not _is_ours(self.bases[0].weight):
            return self._dequantized(self.bases[0].weight, dtype)
        device = self.bases[0].weight.device
        out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=device)
        for base, part in zip(self.bases, out.split(self.splits), strict=True):
            weight = base.weight
            if not isinstance(base, bnb.nn.Linear4bit):
                part.copy_(weight)
            elif _is_ours(weight):
                kernels.dequantize(weight, weight.quant_state, part)
            else:
                part.copy_(self._dequantized(weight, dtype))
        return out

    def _dequantized(self, weight: Any, dtype: torch.dtype) -> Tensor:
        state = weight.quant_state
        absmax = self._constants(state)
        to = torch.float32 if dtype == torch.float64 else dtype
        result = torch.ops.bitsandbytes.dequantize_4bit.default(
            weight, absmax, state.blocksize, state.quant_type, state.shape, to
        )
        return result.to(dtype)

    def _constants(self, state: Any) -> Tensor:
        """The scale of each block; un-nested once, an eighth of the packed weight's size."""
        if not state.nested:
            return state.absmax
        if id(state) not in self._absmax:
            absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
            self._absmax[id(state)] = (absmax + state.offset).float()
        return self._absmax[id(state)]

    def forward(
        self, x: Tensor, seed: Tensor, keep: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Outputs (M, outputs), and what :meth:`backward` needs, for inputs (M, K)."""
        dtype = x.dtype
        work = _work_dtype(x, dtype)
        weight = self.weight(work)
        bias = self.bias(work)
        if not self.loras:
            y = F.linear(x.to(work), weight, bias).to(dtype)
            return y, ()
        a, b = self.factors(dtype)
        dropped, mask = self._drop(x, seed)
        h = (dropped.to(work) @ a.T.to(work)).to(dtype)  # (M, ranks)
        # The small product first: the large one adds to it without a pass of its own.
        y = F.linear(h.to(work), b.to(work), bias)
        y.addmm_(x.to(work), weight.T)
        return y.to(dtype), (dropped, h, a, b, mask) if keep else ()

    def _drop(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.p == 0 or not self.training:
            return x, None
        if kernels.usable(x):
            dropped = torch.empty_like(x, memory_format=torch.contiguous_format)
            kernels.drop(x.contiguous(), seed, self.stream, self.p, dropped)
            return dropped, seed
        return torch.native_dropout(x, self.p, True)

    def _drop_gradient(self, gradient: Tensor, mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return gradient.mul_(mask).mul_(1 / (1 - self.p)) if self.p < 1 else gradient.zero_()
        kernels.drop(gradient, mask, self.stream, self.p, gradient)  # the same mask again
        return gradient

    def backward(
        self, grad: Tensor, saved: Sequence[Tensor | None], needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of input (M, K) and parameters, from that of the outputs (M, outputs)."""
        parameters = self.parameters
        dtype = grad.dtype
        work = _work_dtype(grad, dtype)
        grad_w = grad.to(work)
        grads: list[Tensor | None] = [None] * len(parameters)
        grad_x: Tensor | None = None
        if saved:
            dropped, h, a, b, mask = saved
            assert dropped is not None
            assert h is not None
            assert a is not None
            assert b is not None
            grad_h = (grad_w @ b.to(work)).to(dtype)  # (M, ranks)
            for n, lora in enumerate(self.loras):
                if lora.a.requires_grad:
                    left = grad_h[:, lora.ranks].T
                    grads[2 * n] = self._gradient(lora.a, left, dropped, 1.0)
                if lora.b.requires_grad:
                    left = grad[:, lora.rows].T
                    grads[2 * n + 1] = self._gradient(lora.b, left, h[:, lora.ranks], lora.scaling)
            if needs_input:
                grad_x = grad_h.to(work) @ a.to(work)
                if mask is not None:
                    grad_x = self._drop_gradient(grad_x, mask)
                grad_x.addmm_(grad_w, self.weight(work))
        elif needs_input:
            grad_x = grad_w @ self.weight(work)
        for n, bias in enumerate(self.trained_biases, 2 * len(self.loras)):
            rows = self._rows_of(bias)
            grads[n] = self._added(bias, grad_w[:, rows].sum(0).to(bias.dtype))
        return None if grad_x is None else grad_x.to(dtype), grads

    def _rows_of(self, bias: Parameter) -> slice:
        n = next(i for i, other in enumerate(self.biases) if other is bias)
        start = sum(self.splits[:n])
        return slice(start, start + self.splits[n])

    def _gradient(self, parameter: Parameter, a: Tensor, b: Tensor, alpha: float) -> Tensor | None:
        """The product ``alpha`` a b in the parameter's dtype, or ``None`` if it was added."""
        dtype = parameter.dtype
        if isinstance(a, FakeTensor) and self.anchor is not None and parameter.grad is not None:
            return None  # what memory takes is estimated: as by the product below, none
        if a.dtype != dtype and a.is_cuda and dtype == torch.float32:
            # fp32 out of the product itself: no overflow in fp16, no cast
            if self.anchor is not None and parameter.grad is not None and adds_products():
                add_product(parameter.grad, a, b, alpha)
                return None
            product = torch.mm(a, b, out_dtype=dtype)
            return self._added(parameter, product if alpha == 1 else product.mul_(alpha))
        product = a.to(dtype) @ b.to(dtype)
        return self._added(parameter, product if alpha == 1 else product.mul_(alpha))

    def _added(self, parameter: Parameter, gradient: Tensor) -> Tensor | None:
        if self.anchor is not None and parameter.grad is not None:
            parameter.grad.add_(gradient)
            return None
        return gradient


def _is_ours(weight: Any) -> bool:
    """Whether the kernel of our own dequantises a 4-bit weight."""
    return kernels.usable(weight) and kernels.can_dequantize(weight.quant_state)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Add ``alpha`` a b of 16-bit matrices to an fp32 one, inside the product's own kernel."""
    torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, alpha=alpha, out=total)


@lru_cache(maxsize=1)
def adds_products() -> bool:
    """Whether this PyTorch can :func:`add_product` on a GPU. Not to be asked during a capture."""
    total = torch.full((16, 16), 2.0, device="cuda")
    ones = torch.ones(16, 16, dtype=torch.float16, device="cuda")
    try:
        add_product(total, ones, ones, 0.5)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool((total == 10).all())  # sync


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products are computed in and rounded to: autocast's, else the input's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _work_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What operands rounded to ``dtype`` are held in: a CPU multiplies fp16 slowly."""
    return torch.float32 if dtype == torch.float16 and x.device.type == "cpu" else dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, seed: Tensor, *leaves: Tensor) -> Tensor:
        y = linear_forward(ctx, x, group, seed, leaves)
        return y.view(*x.shape[:-1], group.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, *grads = linear_backward(ctx, grad.reshape(-1, ctx.group.outputs))
        return (grad_x, None, None, *grads)


def linear_forward(
    ctx: Any, x: Tensor, group: Group, seed: Tensor, leaves: Sequence[Tensor]
) -> Tensor:
    """The forward pass of an operation that begins with a group: its outputs (M, outputs).

    Args:
        ctx: The operation's context.
        x: (..., K).
        group: The layers.
        seed: As in :func:`linear`.
        leaves: ``group.leaves()``, the operation's last inputs.
    """
    ctx.group, ctx.shape, ctx.dtype, ctx.leaves = group, x.shape, x.dtype, len(leaves)
    rows = x.reshape(-1, group.inputs).to(compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        y, saved = group.forward(rows, seed, any(ctx.needs_input_grad))
    ctx.save_for_backward(*saved)
    return y


def linear_backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of x and of the leaves, from that of :func:`linear_forward`'s outputs."""
    group: Group = ctx.group
    with torch.autocast(grad.device.type, enabled=False):
        grad_x, grads = group.backward(grad, ctx.saved_tensors, ctx.needs_input_grad[0])
    if grad_x is not None:
        grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
    return [grad_x, *(grads if ctx.leaves == len(grads) else [None] * ctx.leaves)]


def linear(x: Tensor, group: Group, seed: Tensor | None = None) -> Tensor:
    """The outputs (..., outputs) of a group's layers, side by side, for one input (..., K).

    Args:
        x: Any floating dtype; products are computed in autocast's dtype, else in this one.
        group: The layers.
        seed: int64 (1,) on the device: what dropout draws follows from it where Triton runs, from
            PyTorch's generator elsewhere. Not needed without dropout.
    """
    return _Linear.apply(x, group, _NO_SEED if seed is None else seed, *group.leaves())


def reached_by(loss: Tensor) -> list[Parameter]:
    """The parameters to which the backward pass of a loss gives a gradient."""
    found: dict[int, Parameter] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        parameters = [node.variable] if hasattr(node, "variable") else []
        if hasattr(node, "group"):  # adds to them itself: see :meth:`Group.leaves`
            parameters += node.group.parameters
        found.update((id(p), p) for p in parameters if p.requires_grad)
    return list(found.values())


class FastLinears:
    """The adapter layers of a model that are computed here, and those that are not.

    Made by :func:`install`. Its groups hold one layer each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.groups: dict[str, Group] = {}
        """By the name of the adapter layer."""
        self.others: dict[str, str] = {}
        """Adapter layers that go ``peft``'s own way, and why."""
        self.seed: Tensor | None = None
        """int64 (1,) on the device; of it the dropout of one micro-batch follows."""
        self.is_active = False
        self.more: list[Group] = []
        """Groups of others, whose copies are refreshed as well."""
        self._casts: kernels.Casts | None = None
        self._dtype: torch.dtype | None = None
        self._layers: list[nn.Module] = []
        for name, layer in model.named_modules():
            if isinstance(layer, AuxiliaryTrainingWrapper):
                self.others[name] = "modules_to_save or trained tokens"
            elif isinstance(layer, BaseTunerLayer):
                self._layers.append(layer)
                reason = why_not(layer)
                if reason is None:
                    self.groups[name] = Group([layer], stream=len(self.groups))
                else:
                    self.others[name] = reason
        for group in self.groups.values():
            layer = group.layers[0]
            layer.fast_group, layer.fast_linears = group, self
            layer.__dict__["forward"] = MethodType(_forward, layer)
        self._structure = self._facts()

    def report(self) -> str:
        """One line for the log: how many layers are computed here, and why others are not."""
        count = len(self.groups)
        text = f"{count} of {count + len(self.others)} adapter layers take the fast path"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.others.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text += f"; not {names[0]}{more}: {reason}"
        return text

    def uninstall(self) -> None:
        """Give every layer its own forward back."""
        for group in self.groups.values():
            layer = group.layers[0]
            take_back(layer)
            del layer.fast_group, layer.fast_linears
        self.groups, self.more, self._casts = {}, [], None

    def used(self) -> list[Group]:
        """The groups that are used: a layer's own is not where one of others has it."""
        inside = {id(layer) for group in self.more for layer in group.layers}
        alone = [g for g in self.groups.values() if id(g.layers[0]) not in inside]
        return [*alone, *self.more]

    def _facts(self) -> list[Any]:
        # Looked up in the layers' own dictionaries: this is asked before every window.
        facts: list[Any] = []
        for layer in self._layers:
            state = layer.__dict__
            facts += [state["_disable_adapters"], len(state["merged_adapters"])]
            facts += [str(state["_active_adapter"]), *state.get("scaling", {}).values()]
            for name in ("lora_A", "lora_B", "lora_dropout"):
                for module in getattr(state["_modules"].get(name), "_modules", {}).values():
                    weight = module._parameters.get("weight")
                    facts += [id(weight), module.__dict__.get("p")]
        return facts

    @property
    def is_current(self) -> bool:
        """Whether the layers are still what they were when this was made."""
        return self._structure == self._facts()

    def refresh(self, dtype: torch.dtype) -> None:
        """Cast the adapters once for all: before the first micro-batch of each window."""
        if self._casts is None or self._dtype != dtype or self._casts.stale:
            self._dtype = dtype
            for group in self.used():
                group.prepare(dtype)
            if dtype == torch.float32:  # nothing to cast
                pairs: list[tuple[Tensor, Tensor, float]] = []
            else:
                pairs = [pair for group in self.used() for pair in group.casts(dtype)]
            self._casts = kernels.Casts(pairs)
        self._casts.run()

    @contextmanager
    def active(self, *, accumulate: bool = False) -> Iterator[None]:
        """Let the layers be computed here; :meth:`refresh` must have been called since the last
        change of the adapter.

        Args:
            accumulate: Add the gradients of A and B to the parameters' ``.grad`` where there is
                one, inside the backward pass, without returning them to autograd.
        """
        anchor = None
        if accumulate:
            device = next(self.model.parameters()).device
            anchor = torch.zeros((), device=device, requires_grad=True)
        groups = self.used()
        self.is_active = True
        for group in groups:
            group.anchor = anchor
        try:
            yield
        finally:
            self.is_active = False
            for group in groups:
                group.anchor = None

    def draw_seed(self) -> Tensor:
        """A new seed for the dropout of a micro-batch, from PyTorch's generator of the device."""
        device = next(p.device for p in self.model.parameters())
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def install(model: nn.Module) -> FastLinears:
    """Prepare the adapter layers of a model; they run here inside :meth:`FastLinears.active`."""
    linears = FastLinears(model)
    logger.info("%s", linears.report())
    return linears


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    linears: FastLinears | None = self.__dict__.get("fast_linears")  # none: it is over
    if linears is None or not linears.is_active or args or kwargs:
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    return linear(x, self.fast_group, linears.seed)
