"""The blocks of a model computed with few operations, for the loop's forward and backward passes.

Past 400 lines: the operations, what every kind of model has (vision layers, gated MLPs, norms, the
ends), and how it is put into a model are read together. What is a family's own is in
``fused_idefics.py`` and ``fused_successors.py``, each an :class:`Architecture`.

:func:`install` gives the blocks of a model a forward that runs inside :meth:`FusedBlocks.active`
and is the block's own elsewhere: in evaluation, in generation, and wherever a block is not what is
known here (hooks inside, a trained norm, dropout, another activation). Each block decides for
itself; its adapters take :mod:`~idefics_qlora.model.lora_linear` where they can.

What is different from the model's own way, and equal to rounding: query, key and value of a layer
are one product, so are gate and up; norms, SwiGLU and RoPE are single kernels where Triton runs;
sums stay in the compute dtype (autocast lets the vision tower's grow to fp32); attention is told
"causal" instead of a mask, since padding is on the right; logits and loss are computed for targets
alone.

Shapes: B examples, T tokens, H heads (G of key and value), D width, R rows with a target, V
vocabulary with the additional tokens.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig
from transformers.models.idefics.modeling_idefics import (
    IdeficsDecoupledEmbedding,
    IdeficsDecoupledLinear,
    IdeficsRMSNorm,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from idefics_qlora.families.family import Vision
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

    def __init__(self, model: nn.Module, linears: FastLinears, architecture: Architecture) -> None:
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
            make = architecture.blocks.get(type(module))
            if make is None:
                continue
            groups = len(linears.more)
            try:
                plan = make(self, module)
            except Unfit as reason:
                self.others[name] = str(reason)
                del linears.more[groups:]  # its layers are computed each by itself
                continue
            module.fused_plan = plan
            module.__dict__["forward"] = MethodType(_forward, module)
            self.blocks.append(module)
        base = getattr(model, "get_base_model", lambda: model)()
        for path in architecture.lone_norms:
            norm = _get(base, path)
            if norm is not None and why_not_norm(norm) is None:
                norm.fused_plan = LoneNorm(self, norm)
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
            Unfit: If one of them cannot be computed here.
        """
        for layer in layers:
            check = why_not if isinstance(layer, BaseTunerLayer) else why_not_linear
            reason = check(layer)
            if reason is not None:
                raise Unfit(f"a linear layer: {reason}")
            if has_hooks(layer):
                raise Unfit("a linear layer has hooks")
        rates = {
            layer.lora_dropout[name].p if isinstance(layer.lora_dropout[name], nn.Dropout) else 0.0
            for layer in layers
            if isinstance(layer, BaseTunerLayer)
            for name in layer.active_adapters
            if name in layer.lora_A
        }
        if len(rates) > 1:
            raise Unfit("its linear layers differ in their dropout")
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


class Architecture(ABC):
    """What the fast way must know of a kind of model.

    Attributes:
        blocks: What computes the modules of a class.
        lone_norms: Where the base has norms that are in no block.
    """

    blocks: Mapping[type, Callable[[FusedBlocks, Any], Block]]
    lone_norms: tuple[str, ...]

    @abstractmethod
    def embedding(self, base: Any) -> nn.Module:
        """The embedding of the text."""

    def why_not(self, base: Any) -> str | None:
        """Why a base cannot be trained the fast way at all; ``None`` if it can."""
        if base.config._attn_implementation != "sdpa":
            return f"attention is {base.config._attn_implementation!r}"
        return why_not_embedding(self.embedding(base)) or why_not_head(base.lm_head)

    def num_images(self, vision: Vision, images: Sequence[int]) -> int:
        """N, the most images of an example.

        Args:
            vision: Of a micro-batch.
            images: Images of each example.
        """
        return max(images)

    def tokens_of_an_image(self, base: Any) -> int:
        """Rows that an image has in the text; they are never targets."""
        return 0

    def sides(self, base: Any, vision: Vision) -> tuple[int, ...]:
        """What the sizes of pictures have to do with a micro-batch's shape, without waiting."""
        return ()

    @abstractmethod
    def described(self, num_images: int, num_pictures: int) -> str:
        """N and P in words."""

    @abstractmethod
    def inputs(
        self, base: Any, vision: Vision, images: Sequence[int], num_pictures: int,
        packing: Packing, input_ids: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What :meth:`hidden_states` takes, at padded sizes; made without waiting for the device.

        Args:
            base: The model without ``peft``'s wrapper.
            vision: Of the micro-batch.
            images: Images of each example, which come before those that pad.
            num_pictures: P, how many the vision tower sees; at least as many as there are.
            packing: How the rows of text lie.
            input_ids: (M,), whatever where there is no token.
        """

    @abstractmethod
    def hidden_states(
        self, base: Any, blocks: FusedBlocks, embeddings: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The last hidden states (M, D); nothing in it waits for the device.

        Args:
            base: The model without ``peft``'s wrapper.
            blocks: Its blocks, active.
            embeddings: (M, D).
            inputs: As :meth:`inputs` made them, and maybe others.
        """

    @abstractmethod
    def traced_vision(
        self, config: PretrainedConfig, examples: int, num_tokens: int, num_images: int
    ) -> Vision:
        """Images of examples without data, ``num_images`` each."""


def install(model: nn.Module, linears: FastLinears, architecture: Architecture) -> FusedBlocks:
    """Prepare the blocks of a model; they run here inside :meth:`FusedBlocks.active`."""
    blocks = FusedBlocks(model, linears, architecture)
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


class Unfit(Exception):
    """A block is not one that is known here; the message says why."""


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


NORMS = (nn.LayerNorm, IdeficsRMSNorm, Idefics2RMSNorm, LlamaRMSNorm, MistralRMSNorm)


def why_not_norm(norm: nn.Module) -> str | None:
    """Why :func:`add_norm` cannot take a norm; ``None`` if it can."""
    if type(norm) not in NORMS:
        return f"a {type(norm).__name__}"
    if any(p.requires_grad for p in norm.parameters()):
        return "a norm is trained"
    if has_other_forward(norm):
        return "a norm's forward was replaced"
    return "a norm has hooks" if has_hooks(norm) else None


def check(block: nn.Module, norms: list[nn.Module], dropout: float = 0.0) -> None:
    """See that nothing in a block is other than its plan supposes.

    Raises:
        Unfit: If something is.
    """
    for norm in norms:
        if reason := why_not_norm(norm):
            raise Unfit(reason)
    if dropout:
        raise Unfit(f"dropout {dropout} of the base")
    if has_other_forward(block):
        raise Unfit("its forward was replaced")
    names = {name for name, module in block.named_modules() if name and has_hooks(module)}
    if names:
        raise Unfit(f"hooks on its {sorted(names)[0]}")
    trained = [
        name
        for name, parameter in block.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and not name.endswith("bias")
    ]
    if trained:
        raise Unfit(f"its {trained[0]} is trained")


def check_attention(attention: Any, dropout: float) -> None:
    """See that attention is the usual one.

    Raises:
        Unfit: If it is not.
    """
    if attention.config._attn_implementation != "sdpa":
        raise Unfit(f"attention is {attention.config._attn_implementation!r}")
    if dropout:
        raise Unfit("dropout in its attention")


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


Heads = tuple[int, int]
"""Of the query, and of key and value each: H and G."""


def _as_heads(rows: Tensor, examples: int, heads: Heads) -> tuple[Tensor, ...]:
    """Rows (B T, (H + 2 G) D) as views of query, key and value: (B, H, T, D), (B, G, T, D)."""
    number = heads[0] + 2 * heads[1]
    together = rows.view(examples, -1, number, rows.shape[-1] // number).transpose(1, 2)
    return together.split([heads[0], heads[1], heads[1]], dim=1)


class _QueryKeyValue(torch.autograd.Function):
    """The product of a group of three, RoPE, and the way from rows to slots, if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group,
        seed: Tensor,
        heads: Heads,
        packing: Packing | None,
        rotation: tuple[Tensor, Tensor] | None,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.packing, ctx.rotation, ctx.heads = packing, rotation, heads
        y = linear_forward(ctx, x, group, seed, leaves)
        if packing is None:
            return _as_heads(y, x.shape[0], heads)
        assert rotation is not None
        if kernels.usable(y):
            q, k, v = _as_heads(y, 1, heads)
            y = kernels.heads(q, k, v, packing.row_at, *rotation, back=False)
            return _as_heads(y, packing.examples, heads)
        q, k, v = _as_heads(_taken(y, packing.row_at), packing.examples, heads)
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
            examples, _, length, _ = q.shape
            grad = q.new_empty(examples * length, ctx.group.outputs)
            parts = _as_heads(grad, examples, ctx.heads)
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


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of (B, H, T, D) over (B, G, T, D), its result as (B, T, H D)."""
    if q.shape[1] != k.shape[1]:
        # As one of the GPU's kernels takes it: that for 16 bits and no mask.
        on_gpu = q.is_cuda or isinstance(q, FakeTensor)
        if on_gpu and q.dtype != torch.float32 and options.get("attn_mask") is None:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
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


class Block:
    """Computes a module; called as its forward is.

    Raises:
        Unfit: If it is not as it is supposed to be.
    """

    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        self.blocks, self.module = blocks, module

    def linear(self, x: Tensor, group: Group) -> Tensor:
        """The outputs of a group's layers, side by side."""
        return linear(x, group, self.blocks.linears.seed)

    def query_key_value(
        self,
        x: Tensor,
        group: Group,
        heads: Heads,
        packing: Packing | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Of one input, (B, H, T, D) and twice (B, G, T, D): rotated, from packed rows."""
        seed = self.blocks.linears.seed
        seed = torch.zeros(1, dtype=torch.int64) if seed is None else seed
        return _QueryKeyValue.apply(x, group, seed, heads, packing, rotation, *group.leaves())


class LoneNorm(Block):
    """A norm outside of all blocks."""

    def __call__(self, x: Tensor) -> Tensor:
        """The norm, in the compute dtype."""
        return add_norm(x, None, self.module)[1]


class GatedMLP:
    """The MLP of a decoder layer."""

    def __init__(self, blocks: FusedBlocks, mlp: Any) -> None:
        self.gate_up = blocks.group(mlp.gate_proj, mlp.up_proj)
        self.down = blocks.group(mlp.down_proj)
        self.is_silu = type(mlp.act_fn) is nn.SiLU or type(mlp.act_fn).__name__ == "SiLUActivation"
        self.act = mlp.act_fn

    def __call__(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Rows (M, D); of the seed, dropout."""
        gate_up = linear(x, self.gate_up, seed)
        if self.is_silu:
            hidden = swiglu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        return linear(hidden, self.down, seed)


class VisionLayer(Block):
    """A layer of a vision tower: CLIP's and SigLIP's are alike."""

    def __init__(self, blocks: FusedBlocks, module: Any) -> None:
        super().__init__(blocks, module)
        attention, mlp = module.self_attn, module.mlp
        check(module, [module.layer_norm1, module.layer_norm2])
        check_attention(attention, attention.dropout)
        if attention.head_dim % 2:
            raise Unfit("heads of an odd width")
        self.qkv = blocks.group(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = blocks.group(attention.out_proj)
        self.up = blocks.group(mlp.fc1)
        self.down = blocks.group(mlp.fc2)

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Patches (B, T, D), and which of them are seen."""
        module, attention = self.module, self.module.self_attn
        residual, x = add_norm(hidden_states, None, module.layer_norm1)
        number = attention.num_heads
        q, k, v = self.query_key_value(x, self.qkv, (number, number))
        x = attend(q, k, v, attn_mask=attention_mask, scale=attention.scale)
        x = self.linear(x, self.out)
        residual, x = add_norm(x, residual, module.layer_norm2)
        x = module.mlp.activation_fn(self.linear(x, self.up))
        return residual + self.linear(x, self.down)


# --- the ends ------------------------------------------------------------------------------------


def why_not_embedding(embedding: nn.Module) -> str | None:
    """Why :func:`embed` cannot take a model's embedding; ``None`` if it can."""
    if type(embedding) not in (nn.Embedding, IdeficsDecoupledEmbedding):
        return f"the embedding is a {type(embedding).__name__}"
    if any(p.requires_grad for p in embedding.parameters()):
        return "the embedding is trained"
    if has_hooks(embedding) or embedding.max_norm is not None:
        return "the embedding has hooks"
    return None


def embed(embedding: Any, input_ids: Tensor) -> Tensor:
    """Embeddings (..., D) of token ids (...); IDEFICS' own look-up waits for the GPU."""
    size = embedding.num_embeddings
    if not getattr(embedding, "num_additional_embeddings", 0):
        return F.embedding(input_ids, embedding.weight)
    usual = F.embedding(input_ids.clamp(max=size - 1), embedding.weight)
    more = F.embedding((input_ids - size).clamp(min=0), embedding.additional_embedding.weight)
    return torch.where((input_ids >= size)[..., None], more, usual)


def why_not_head(head: nn.Module) -> str | None:
    """Why :func:`target_loss` cannot take a model's head; ``None`` if it can."""
    if type(head) not in (nn.Linear, IdeficsDecoupledLinear) or head.bias is not None:
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
        if getattr(head, "out_additional_features", 0):
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
