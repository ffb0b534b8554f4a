"""The blocks of IDEFICS computed with few operations, for the loop's forward and backward passes.

Past 400 lines: one family's blocks and ends, each short. In ``model/`` only this file,
``graphs.py``, which runs them, and ``memory_fast.py`` know IDEFICS.

:func:`install` gives the blocks of a model (decoder, cross-attention and vision layers, perceiver,
last norm) a forward that runs inside :meth:`FusedBlocks.active` and is the block's own elsewhere:
in evaluation, in generation, and wherever a block is not what this module knows (hooks inside, a
trained norm, dropout, another activation). Each block decides for itself; its adapters take
:mod:`~idefics_qlora.model.lora_linear` where they can.

What is different from the model's own way, and equal to rounding: query, key and value of a layer
are one product, so are gate and up; norms, SwiGLU and RoPE are single kernels where Triton runs;
sums stay in the compute dtype (autocast lets the vision tower's grow to fp32); attention is told
"causal" instead of a mask, since padding is on the right, and gets no image mask where one image is
all there is (tokens before it are gated anyway); logits and loss are computed for targets alone.

Shapes: B examples, T tokens, N images per example, L latents per image, H heads, D width, R rows
with a target, V vocabulary with the additional tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.idefics import modeling_idefics as idefics
from transformers.models.idefics import perceiver, vision

from idefics_qlora.model import kernels
from idefics_qlora.model.lora_linear import (
    FastLinears,
    Group,
    compute_dtype,
    has_hooks,
    has_other_forward,
    linear,
    linear_backward,
    linear_forward,
    take_back,
    why_not,
    why_not_linear,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B examples of different lengths are, one after the other without padding.

    M rows, of which the last may be no token; S = B T slots.
    """

    examples: int
    length: int
    """T, the room for each example where attention needs them apart."""
    slot_of: Tensor
    """int64 (M,): the slot b T + t of each row; -1: it is no token."""
    row_at: Tensor
    """int64 (S,): the row of each slot; -1: padding."""

    @classmethod
    def of(cls, is_token: Tensor, rows: int) -> Packing:
        """For a mask (B, T) of padding on the right, and M rows, at least as many as tokens."""
        flat = is_token.flatten().bool()
        number = flat.cumsum(0)  # of tokens so far
        row_at = torch.where(flat, number - 1, -1)
        order = torch.argsort((~flat).to(torch.uint8), stable=True)  # the tokens first
        if rows > len(order):
            order = F.pad(order, (0, rows - len(order)))
        is_row = torch.arange(rows, device=flat.device) < number[-1]
        examples, length = is_token.shape
        return cls(examples, length, torch.where(is_row, order[:rows], -1), row_at)

    def rows(self, slots: Tensor) -> Tensor:
        """The rows (M, D) of what is in slots (S, D); zeros where a row is no token."""
        return take(slots, self.slot_of, self.row_at)

    def slots(self, rows: Tensor) -> Tensor:
        """Rows (M, D) in their slots (S, D); zeros on padding."""
        return take(rows, self.row_at, self.slot_of)


class FusedBlocks:
    """The blocks of a model that are computed here, and those that are not (:func:`install`)."""

    def __init__(self, model: nn.Module, linears: FastLinears) -> None:
        self.model, self.linears = model, linears
        self.is_active = False
        self.num_images = 1
        """Images per example of the present micro-batch."""
        self.packing: Packing
        """How the rows of its text lie."""
        self.blocks: list[nn.Module] = []
        self.others: dict[str, str] = {}
        """Blocks that are computed the model's own way, and why."""
        self._rotation: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        for name, module in model.named_modules():
            make = _BLOCKS.get(type(module))
            if make is None:
                continue
            groups = len(linears.more)
            try:
                plan = make(self, module)
            except _Unfit as reason:
                self.others[name] = str(reason)
                del linears.more[groups:]  # its layers are computed each by itself
                continue
            module.fused_plan = plan
            module.__dict__["forward"] = MethodType(_forward, module)
            self.blocks.append(module)
        # The norm after the last layer, and the one in front of the vision tower.
        base = getattr(model, "get_base_model", lambda: model)()
        inner = getattr(base, "model", None)
        for norm in (getattr(inner, "norm", None), _get(inner, "vision_model.pre_layrnorm")):
            if norm is not None and _norm_reason(norm) is None:
                norm.fused_plan = _LoneNorm(self, norm)
                norm.__dict__["forward"] = MethodType(_forward, norm)
                self.blocks.append(norm)

    def report(self) -> str:
        """One line for the log."""
        count = len(self.blocks)
        text = f"{count} of {count + len(self.others)} blocks are fused"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.others.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text += f"; not {names[0]}{more}: {reason}"
        return text

    def uninstall(self) -> None:
        """Give every block its own forward back."""
        for module in self.blocks:
            take_back(module)
            del module.fused_plan
        self.blocks = []

    @contextmanager
    def active(self, packing: Packing, num_images: int) -> Iterator[None]:
        """Let the blocks be computed here: those of the text over packed rows (M, D)."""
        self.is_active, self.num_images, self.packing = True, num_images, packing
        self._rotation = None
        try:
            yield
        finally:
            self.is_active = False

    def group(self, *layers: nn.Module) -> Group:
        """Layers with one input as one product.

        Raises:
            _Unfit: If one of them cannot be computed here.
        """
        for layer in layers:
            check = why_not if isinstance(layer, BaseTunerLayer) else why_not_linear
            reason = check(layer)
            if reason is not None:
                raise _Unfit(f"a linear layer: {reason}")
            if has_hooks(layer):
                raise _Unfit("a linear layer has hooks")
        rates = {
            layer.lora_dropout[name].p if isinstance(layer.lora_dropout[name], nn.Dropout) else 0.0
            for layer in layers
            if isinstance(layer, BaseTunerLayer)
            for name in layer.active_adapters
            if name in layer.lora_A
        }
        if len(rates) > 1:
            raise _Unfit("its linear layers differ in their dropout")
        group = Group(layers, stream=2**20 + len(self.linears.more))
        self.linears.more.append(group)
        return group

    def rotation(self, length: int, module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, D / 2) of positions 0 ... T - 1, once per pass.

        They are rounded to the compute dtype, as the model's own are.
        """
        key = (length, module.inv_freq.shape, module.attention_scaling, dtype)
        if self._rotation is None or self._rotation[0] != key:
            positions = torch.arange(length, device=module.inv_freq.device)
            angles = positions[:, None] * module.inv_freq.float()
            scaling = module.attention_scaling
            cos = (angles.cos() * scaling).to(dtype).float()
            sin = (angles.sin() * scaling).to(dtype).float()
            self._rotation = key, cos, sin
        return self._rotation[1:]


def install(model: nn.Module, linears: FastLinears) -> FusedBlocks:
    """Prepare the blocks of an IDEFICS model; they run here inside :meth:`FusedBlocks.active`."""
    blocks = FusedBlocks(model, linears)
    logger.info("%s", blocks.report())
    return blocks


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    plan = self.__dict__.get("fused_plan")  # none: it is over
    if plan is None or not plan.blocks.is_active:
        return type(self).forward(self, *args, **kwargs)
    if _recomputes(self):
        return self._gradient_checkpointing_func(partial(plan, **kwargs), *args)
    return plan(*args, **kwargs)


def _recomputes(block: Any) -> bool:
    """Whether a block is recomputed in the backward pass, and it is its forward that sees to it.

    In older versions of transformers it was the call, outside of the forward that is replaced here.
    """
    is_on = getattr(block, "gradient_checkpointing", False) and block.training
    return bool(is_on) and type(block).__call__ is nn.Module.__call__


class _Unfit(Exception):
    """A block is not one that is known here; the message says why."""


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _norm_reason(norm: nn.Module) -> str | None:
    if type(norm) not in (nn.LayerNorm, idefics.IdeficsRMSNorm):
        return f"a {type(norm).__name__}"
    if any(p.requires_grad for p in norm.parameters()):
        return "a norm is trained"
    if has_other_forward(norm):
        return "a norm's forward was replaced"
    return "a norm has hooks" if has_hooks(norm) else None


def _check(block: nn.Module, norms: list[nn.Module], dropout: float = 0.0) -> None:
    for norm in norms:
        if reason := _norm_reason(norm):
            raise _Unfit(reason)
    if dropout:
        raise _Unfit(f"dropout {dropout} of the base")
    if has_other_forward(block):
        raise _Unfit("its forward was replaced")
    names = {name for name, module in block.named_modules() if name and has_hooks(module)}
    if names:
        raise _Unfit(f"hooks on its {sorted(names)[0]}")
    trained = [
        name
        for name, parameter in block.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and not name.endswith("bias")
    ]
    if trained:
        raise _Unfit(f"its {trained[0]} is trained")


def _check_attention(attention: Any) -> None:
    if attention.config._attn_implementation != "sdpa":
        raise _Unfit(f"attention is {attention.config._attn_implementation!r}")
    if attention.dropout:
        raise _Unfit("dropout in its attention")


# --- operations ----------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, norm: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        layer = type(norm) is nn.LayerNorm
        eps = norm.eps if layer else norm.variance_epsilon
        bias = norm.bias if layer else None
        x = x.contiguous()
        total, out, mean, rstd = kernels.norm(x, residual, norm.weight, bias, eps, layer, dtype)
        ctx.save_for_backward(total, norm.weight, mean, rstd)
        ctx.layer, ctx.added = layer, residual is not None
        ctx.set_materialize_grads(False)
        return total.view_as(total) if total is x else total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> Any:
        total, weight, mean, rstd = ctx.saved_tensors
        if grad is None:
            result = grad_total
        else:
            past = None if grad_total is None else grad_total.contiguous()
            result = kernels.norm_backward(
                grad.contiguous(), past, total, weight, mean, rstd, ctx.layer
            )
        return result, result if ctx.added else None, None, None


def add_norm(x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """The sum of both (or ``x``) and its norm, which is in the compute dtype."""
    dtype = compute_dtype(x)
    if kernels.usable(x):
        if residual is not None:
            residual = residual.contiguous()
        return _Norm.apply(x, residual, norm, dtype)
    total = x if residual is None else x + residual
    with torch.autocast(x.device.type, enabled=False):
        value, weight = total.float(), norm.weight.float()
        if type(norm) is nn.LayerNorm:
            bias = None if norm.bias is None else norm.bias.float()
            result = F.layer_norm(value, norm.normalized_shape, weight, bias, norm.eps)
        else:
            result = F.rms_norm(value, tuple(weight.shape), weight, norm.variance_epsilon)
    return total, result.to(dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return kernels.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return kernels.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (..., I) of both side by side (..., 2 I)."""
    if kernels.usable(gate_up):
        rows = gate_up.view(-1, gate_up.shape[-1])
        return _SwiGLU.apply(rows).view(*gate_up.shape[:-1], -1)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _taken(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _taken(grad, ctx.saved_tensors[1]), None, None


def _taken(x: Tensor, index: Tensor) -> Tensor:
    if kernels.usable(x):
        return kernels.take(x.contiguous(), index)
    return x.index_select(0, index.clamp(min=0)).mul_((index >= 0)[:, None])


def take(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows of ``x`` (M, D) by number, none twice; zeros where it is -1.

    ``inverse`` says for each row of ``x`` where it went, -1: nowhere.
    """
    return _Take.apply(x, index, inverse)


def _as_heads(rows: Tensor, examples: int, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Rows (B T, parts H D) as ``parts`` views (B, H, T, D)."""
    return (
        rows.view(examples, -1, parts, heads, rows.shape[-1] // (parts * heads))
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )


class _QueryKeyValue(torch.autograd.Function):
    """The product of a group of three, RoPE, and the way from rows to slots, if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group,
        seed: Tensor,
        heads: int,
        packing: Packing | None,
        rotation: tuple[Tensor, Tensor] | None,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.packing, ctx.rotation = packing, rotation
        y = linear_forward(ctx, x, group, seed, leaves)
        if packing is None:
            return _as_heads(y, x.shape[0], 3, heads)
        assert rotation is not None
        if kernels.usable(y):
            q, k, v = _as_heads(y, 1, 3, heads)
            y = kernels.heads(q, k, v, packing.row_at, *rotation, back=False)
            return _as_heads(y, packing.examples, 3, heads)
        q, k, v = _as_heads(_taken(y, packing.row_at), packing.examples, 3, heads)
        _rotate_in_place(q, *rotation)
        _rotate_in_place(k, *rotation)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        packing: Packing | None = ctx.packing
        cos, sin = ctx.rotation or (None, None)
        index = None if packing is None else packing.slot_of
        if kernels.usable(q):
            q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
            grad = kernels.heads(q, k, v, index, cos, sin, back=True)
        else:
            examples, heads, length, _ = q.shape
            grad = q.new_empty(examples * length, ctx.group.outputs)
            parts = _as_heads(grad, examples, 3, heads)
            for part, value in zip(parts, (q, k, v), strict=True):
                part.copy_(value)
            if cos is not None and sin is not None:
                _rotate_in_place(parts[0], cos, -sin)
                _rotate_in_place(parts[1], cos, -sin)
            if index is not None:
                grad = _taken(grad, index)
        grad_x, *grads = linear_backward(ctx, grad)
        return (grad_x, None, None, None, None, None, *grads)


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    first, second = a * cos - b * sin, b * cos + a * sin
    x[..., :half], x[..., half:] = first, second


def _gated(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(residual, x, scale.to(x.dtype))


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of (B, H, T, D), its result as (B, T, H D)."""
    if q.device.type == "cpu" and q.dtype == torch.float16:  # slow, and summed in fp16
        mask = options.pop("attn_mask", None)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, **options
            ).to(q.dtype)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, **options)
    return attended.transpose(1, 2).flatten(2)


# --- blocks --------------------------------------------------------------------------------------


class _Block:
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        self.blocks, self.module = blocks, module

    def linear(self, x: Tensor, group: Group) -> Tensor:
        return linear(x, group, self.blocks.linears.seed)

    def query_key_value(
        self,
        x: Tensor,
        group: Group,
        heads: int,
        packing: Packing | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        seed = self.blocks.linears.seed
        seed = torch.zeros(1, dtype=torch.int64) if seed is None else seed
        return _QueryKeyValue.apply(x, group, seed, heads, packing, rotation, *group.leaves())


class _LoneNorm(_Block):
    def __call__(self, x: Tensor) -> Tensor:
        return add_norm(x, None, self.module)[1]


class _GatedMLP:
    def __init__(self, blocks: FusedBlocks, mlp: Any) -> None:
        self.gate_up = blocks.group(mlp.gate_proj, mlp.up_proj)
        self.down = blocks.group(mlp.down_proj)
        self.is_silu = type(mlp.act_fn) is nn.SiLU or type(mlp.act_fn).__name__ == "SiLUActivation"
        self.act = mlp.act_fn

    def __call__(self, x: Tensor, seed: Tensor | None) -> Tensor:
        gate_up = linear(x, self.gate_up, seed)
        if self.is_silu:
            hidden = swiglu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        return linear(hidden, self.down, seed)


class _Decoder(_Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention = module.self_attn
        _check(module, [module.input_layernorm, module.post_attention_layernorm], module.dropout)
        _check_attention(attention)
        if attention.qk_layer_norms or attention.is_cross_attention or attention.head_dim % 2:
            raise _Unfit("self-attention of another kind")
        self.qkv = blocks.group(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.o_proj)
        self.mlp = _GatedMLP(blocks, module.mlp)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, attention = self.module, self.module.self_attn
        packing = self.blocks.packing
        residual, x = add_norm(hidden_states, None, module.input_layernorm)
        rotation = self.blocks.rotation(packing.length, attention.rotary_emb, x.dtype)
        q, k, v = self.query_key_value(x, self.qkv, attention.num_heads, packing, rotation)
        # Causal is all it takes: no token has padding before it.
        x = _attend(q, k, v, is_causal=True, scale=attention.scaling)
        x = self.linear(packing.rows(x.flatten(0, 1)), self.out)
        residual, x = add_norm(x, residual, module.post_attention_layernorm)
        return residual + self.mlp(x, self.blocks.linears.seed)


class _CrossAttention(_Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention = module.cross_attn
        norms = [module.input_layernorm, module.post_attention_layernorm]
        if attention.qk_layer_norms:
            norms += [attention.q_layer_norm, attention.k_layer_norm]
        _check(module, norms, module.config)  # its config is the dropout
        _check_attention(attention)
        self.q = blocks.group(attention.q_proj)
        self.kv = blocks.group(attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.o_proj)
        self.mlp = _GatedMLP(blocks, module.mlp)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert image_hidden_states is not None
        assert cross_attention_gate is not None
        module, attention = self.module, self.module.cross_attn
        packing, heads = self.blocks.packing, attention.num_heads
        residual, x = add_norm(hidden_states, None, module.input_layernorm)
        q = self.linear(x, self.q).view(-1, heads, attention.head_dim)
        kv = self.linear(image_hidden_states, self.kv)
        k, v = kv.view(packing.examples, -1, 2, heads, attention.head_dim).unbind(2)
        if attention.qk_layer_norms:
            q = add_norm(q, None, attention.q_layer_norm)[1]
            k = add_norm(k, None, attention.k_layer_norm)[1]
        q = packing.slots(q.flatten(1)).view(packing.examples, packing.length, heads, -1)
        # With one image, a token sees all of it or nothing, and is gated then.
        mask = None if self.blocks.num_images == 1 else image_attention_mask
        mask = mask if mask is None else mask.to(q.dtype)
        x = _attend(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=attention.scaling
        )
        x = self.linear(packing.rows(x.flatten(0, 1)), self.out)
        gate = torch.tanh(module.alpha_cross_attn).view(-1) * cross_attention_gate[:, None]
        x = _gated(x, residual, gate)
        residual, x = add_norm(x, None, module.post_attention_layernorm)
        x = self.mlp(x, self.blocks.linears.seed)
        return _gated(x, residual, torch.tanh(module.alpha_dense).view(-1))


class _Vision(_Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention, mlp = module.self_attn, module.mlp
        _check(module, [module.layer_norm1, module.layer_norm2])
        _check_attention(attention)
        if attention.head_dim % 2:
            raise _Unfit("heads of an odd width")
        self.qkv = blocks.group(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.out_proj)
        self.up = blocks.group(mlp.fc1)
        self.down = blocks.group(mlp.fc2)

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if attention_mask is not None:
            return type(self.module).forward(self.module, hidden_states, attention_mask, **kwargs)
        module, attention = self.module, self.module.self_attn
        residual, x = add_norm(hidden_states, None, module.layer_norm1)
        q, k, v = self.query_key_value(x, self.qkv, attention.num_heads)
        x = self.linear(_attend(q, k, v, scale=attention.scale), self.out)
        residual, x = add_norm(x, residual, module.layer_norm2)
        x = module.mlp.activation_fn(self.linear(x, self.up))
        return residual + self.linear(x, self.down)


class _PerceiverAttention(_Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        norms = [module.context_layer_norm, module.latents_layer_norm]
        if module.qk_layer_norms:
            norms += [module.q_layer_norm, module.k_layer_norm]
        _check(module, norms)
        self.q = blocks.group(module.q_proj)
        self.kv = blocks.group(module.k_proj, module.v_proj)
        self.out = blocks.group(module.output_proj)

    def __call__(self, context: Tensor, latents: Tensor) -> Tensor:
        module = self.module
        context = add_norm(context, None, module.context_layer_norm)[1]
        latents = add_norm(latents, None, module.latents_layer_norm)[1]
        examples, heads = context.shape[0], module.n_heads
        q = self.linear(latents, self.q).view(examples, -1, heads, module.head_dim)
        kv = self.linear(torch.cat([context, latents], dim=-2), self.kv)
        k, v = kv.view(examples, -1, 2, heads, module.head_dim).unbind(2)
        if module.qk_layer_norms:
            q = add_norm(q, None, module.q_layer_norm)[1]
            k = add_norm(k, None, module.k_layer_norm)[1]
        x = _attend(*(t.transpose(1, 2) for t in (q, k, v)), scale=module.qk_scale)
        return self.linear(x, self.out)


class _PerceiverMLP(_Block):
    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        _check(module, [module.ln])
        self.up, self.down = blocks.group(module.fc), blocks.group(module.c_proj)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = add_norm(hidden_states, None, self.module.ln)[1]
        return self.linear(self.module.act(self.linear(x, self.up)), self.down)


_BLOCKS: dict[type, Callable[[FusedBlocks, Any], _Block]] = {
    idefics.IdeficsDecoderLayer: _Decoder,
    idefics.IdeficsGatedCrossAttentionLayer: _CrossAttention,
    vision.IdeficsVisionEncoderLayer: _Vision,
    perceiver.IdeficsPerceiverAttention: _PerceiverAttention,
    perceiver.IdeficsMLP: _PerceiverMLP,
}


# --- the ends ------------------------------------------------------------------------------------


def why_not_embedding(embedding: nn.Module) -> str | None:
    """Why :func:`embed` cannot take a model's embedding; ``None`` if it can."""
    if type(embedding) is not idefics.IdeficsDecoupledEmbedding:
        return f"the embedding is a {type(embedding).__name__}"
    if any(p.requires_grad for p in embedding.parameters()):
        return "the embedding is trained"
    if has_hooks(embedding) or embedding.max_norm is not None:
        return "the embedding has hooks"
    return None


def embed(embedding: Any, input_ids: Tensor) -> Tensor:
    """Embeddings (B, T, D) of token ids; the model's own look-up waits for the GPU."""
    size = embedding.num_embeddings
    if not embedding.num_additional_embeddings:
        return F.embedding(input_ids, embedding.weight)
    usual = F.embedding(input_ids.clamp(max=size - 1), embedding.weight)
    more = F.embedding((input_ids - size).clamp(min=0), embedding.additional_embedding.weight)
    return torch.where((input_ids >= size)[..., None], more, usual)


def why_not_head(head: nn.Module) -> str | None:
    """Why :func:`target_loss` cannot take a model's head; ``None`` if it can."""
    if type(head) is not idefics.IdeficsDecoupledLinear or head.bias is not None:
        return f"the head is a {type(head).__name__}"
    if any(p.requires_grad for p in head.parameters()):
        return "the head is trained"
    return "the head has hooks" if has_hooks(head) else None


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, head: Any, labels: Tensor) -> Tensor:
        ctx.shape = hidden.shape
        hidden = hidden.index_select(0, rows)
        dtype = compute_dtype(hidden)
        work = torch.float32 if hidden.device.type == "cpu" and dtype == torch.float16 else dtype
        weights = [head.weight]
        if head.out_additional_features:
            weights.append(head.additional_fc.weight)
        classes = sum(w.shape[0] for w in weights)
        # Rows begin at multiples of 16 bytes, which products over them need to be quick.
        padded = -(-classes // 8) * 8
        logits = torch.empty(hidden.shape[0], padded, dtype=work, device=hidden.device)
        logits = logits[:, :classes]
        start = 0
        with torch.autocast(hidden.device.type, enabled=False):
            for weight in weights:
                part = logits[:, start : start + weight.shape[0]]
                torch.mm(hidden.to(dtype).to(work), weight.detach().to(dtype).to(work).T, out=part)
                start += weight.shape[0]
            if kernels.usable(hidden):
                losses, lse = kernels.cross_entropy(logits, labels)
            else:
                if work != dtype:
                    logits = logits.to(dtype)
                value = logits.float()
                lse = torch.logsumexp(value, dim=-1)
                target = value.gather(1, labels.clamp(min=0)[:, None])[:, 0]
                losses = torch.where(labels >= 0, lse - target, 0.0)
        ctx.save_for_backward(logits, labels, lse, rows)
        ctx.weights, ctx.dtypes = weights, (hidden.dtype, dtype, work)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, labels, lse, rows = ctx.saved_tensors
        hidden_dtype, dtype, work = ctx.dtypes
        with torch.autocast(logits.device.type, enabled=False):
            if kernels.usable(logits):
                # In place: the logits are of no use any more.
                kernels.cross_entropy_backward(logits, labels, lse, grad.float().reshape(1))
                value = logits
            else:
                value = (logits.float() - lse[:, None]).exp()
                value[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= 1
                value = (value * (grad.float() * (labels >= 0))[:, None]).to(dtype)
            result, start = None, 0
            for weight in ctx.weights:
                part = value[:, start : start + weight.shape[0]].to(work)
                w = weight.detach().to(dtype).to(work)
                result = part @ w if result is None else result.addmm_(part, w)
                start += weight.shape[0]
        assert result is not None
        grad_hidden = torch.zeros(ctx.shape, dtype=hidden_dtype, device=grad.device)
        grad_hidden.index_copy_(0, rows, result.to(hidden_dtype))
        return grad_hidden, None, None, None


def target_loss(hidden: Tensor, rows: Tensor, head: Any, labels: Tensor) -> Tensor:
    """The summed cross-entropy of some hidden states under a head, in nats, fp32.

    Its backward pass works once.

    Args:
        hidden: (B T, D).
        rows: int64 (R,): which of them predict; none twice.
        head: The model's head (:func:`why_not_head`).
        labels: int64 (R,): what each has to predict; -100: nothing.
    """
    return _TargetLoss.apply(hidden, rows, head, labels)


def hidden_states(
    model: Any,
    blocks: FusedBlocks,
    embeddings: Tensor,
    pixels: Tensor,
    picture_at: Tensor,
    image_mask: Tensor,
) -> Tensor:
    """The last hidden states (M, D) of an IDEFICS model over packed rows.

    Args:
        model: The base (not ``peft``'s wrapper).
        blocks: Its blocks, active.
        embeddings: (M, D).
        pixels: (P, 3, S, S), normalised.
        picture_at: (P,): where among all B N images each is; the others pad.
        image_mask: (B, T, N) bool: which image a token attends to.
    """
    inner, packing = model.model, blocks.packing
    examples, _, images = image_mask.shape
    features = inner.vision_model(pixel_values=pixels.to(inner.dtype))
    features = features.last_hidden_state
    if inner.config.use_resampler:
        features = inner.perceiver_resampler(features)
    latents = features.shape[1]
    if len(features) < examples * images:  # nobody attends to the others
        none = features.new_zeros(examples * images, *features.shape[1:])
        features = none.index_copy(0, picture_at, features)
    features = features.reshape(examples, images * latents, -1)
    sees = image_mask.repeat_interleave(latents, dim=2)[:, None]  # (B, 1, T, N L)
    # In the dtype of attention: the least number of a larger one would be rounded to -inf, and
    # a token that sees no image have no finite score.
    dtype = compute_dtype(features)
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    mask = mask.masked_fill(~sees, torch.finfo(dtype).min)
    gate = image_mask.any(dim=2).to(features.dtype)  # (B, T)
    gate_of_rows = gate.flatten()[packing.slot_of.clamp(min=0)]  # whatever where there is no token
    # For blocks that are not fused.
    length = packing.length
    causal = torch.ones(length, length, dtype=torch.bool, device=gate.device).tril()[None, None]
    positions = torch.arange(length, device=gate.device)[None]

    def run(block: Any, x: Tensor, mask: Tensor, *args: Any, **options: Any) -> Tensor:
        if hasattr(block, "fused_plan"):
            if "cross_attention_gate" in options:
                options["cross_attention_gate"] = gate_of_rows
            return block(x, mask, *args, **options)
        padded = packing.slots(x).view(packing.examples, length, -1)
        return packing.rows(block(padded, mask, *args, **options).flatten(0, 1))

    x = embeddings
    for n, layer in enumerate(inner.layers):
        if n % inner.cross_layer_interval == 0:
            block = inner.gated_cross_attn_layers[n // inner.cross_layer_interval]
            x = run(
                block, x, causal, features, image_attention_mask=mask, cross_attention_gate=gate
            )
        x = run(layer, x, causal, position_ids=positions)
    result: Tensor = inner.norm(x)
    return result
