"""What a forward pass of the real model saves, found out on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

# Not public, but what PyTorch's own compiler traces with: tensors that claim to be on a GPU, so
# that autocast and dropout behave as there, without a GPU.
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from idefics_qlora.families import family_of_config
from idefics_qlora.model.adapters import add_lora, lora_configuration
from idefics_qlora.model.base_weights import linear4bit_layers


@dataclass(frozen=True)
class Bytes:
    """Bytes that grow with the micro-batch.

    ``fixed + per_example * micro_batch + per_row * rows``; rows of text are packed and padded
    the fast way, and nothing is counted by rows where they are not.
    """

    fixed: int
    per_example: int
    per_row: int = 0

    def of(self, micro_batch: int, rows: int = 0) -> int:
        """Bytes for a micro-batch of so many examples, in so many rows."""
        return self.fixed + self.per_example * micro_batch + self.per_row * rows

    def __add__(self, other: Bytes) -> Bytes:
        fixed, per_example = self.fixed + other.fixed, self.per_example + other.per_example
        return Bytes(fixed, per_example, self.per_row + other.per_row)


def model_on_meta(
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantize: bool,
    lora: LoraConfig | Literal["makers"] | None,
    train_parts: Sequence[str] = (),
) -> PeftModel:
    """The model with adapters that a run would train, on the meta device."""
    import bitsandbytes as bnb  # loads its native library

    family = family_of_config(config)
    with torch.device("meta"):
        base = family.model_class()(config)
        if quantize:
            for name, module in list(base.named_modules()):
                if type(module) is nn.Linear and not any(
                    part in name for part in family.not_quantized
                ):
                    layer = bnb.nn.Linear4bit(
                        module.in_features,
                        module.out_features,
                        bias=module.bias is not None,
                        compute_dtype=dtype,
                        quant_type="nf4",
                    )
                    layer.weight = bnb.nn.Params4bit(  # DoRA begins with the weights' norms
                        _packed(layer), quant_state=_quant_state(layer, dtype), bnb_quantized=True
                    )
                    parent, _, child = name.rpartition(".")
                    setattr(base.get_submodule(parent), child, layer)
            base.is_loaded_in_4bit = True  # as load_model leaves it; peft chooses its layers by it
        configuration = lora_configuration(base, lora)
        # Initial values computed from the weights (PiSSA, LoftQ, ...) need weights.
        configuration.init_lora_weights = True
        return add_lora(base, configuration, train_parts=train_parts).train()


def materialize(model: nn.Module, dtype: torch.dtype, nested: bool = True) -> None:
    """Move a model from the meta device to the current one, in the dtypes of training.

    Args:
        model: As :func:`model_on_meta` gave it.
        dtype: Of what is neither packed nor trained.
        nested: Whether the scales of quantised weights are quantised themselves.
    """
    for layer in linear4bit_layers(model).values():
        weight: Any = Parameter(_packed(layer), requires_grad=False)
        weight.compress_statistics, weight.quant_type = True, "nf4"
        weight.quant_state = _quant_state(layer, dtype, nested)
        layer.weight = weight
        # peft (for DoRA) knows quantised weights by their class, which no tensor without data can
        # have; a layer with this attribute is asked for them itself.
        layer.W_q, layer.dequantize = None, partial(_dequantized, layer)
    made: dict[Parameter, Parameter] = {}  # head and embeddings may be one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                of = torch.float32 if parameter.requires_grad else dtype
                if parameter not in made:
                    value = torch.empty(parameter.shape, dtype=of)
                    made[parameter] = Parameter(value, parameter.requires_grad)
                setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _packed(module: Any) -> Tensor:
    """An NF4 weight as bitsandbytes stores it: two values per byte."""
    return torch.empty(-(-num_weights(module) // 2), 1, dtype=torch.uint8)


def _quant_state(module: Any, dtype: torch.dtype, nested: bool = True) -> Any:
    """The scales of its blocks, as bitsandbytes makes them."""
    from bitsandbytes.functional import QuantState

    blocks = -(-num_weights(module) // 64)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
    )
    if nested:
        state.nested, state.offset = True, torch.empty(())
        state.state2 = QuantState(
            absmax=torch.empty(-(-blocks // 256)),
            code=torch.empty(256),
            blocksize=256,
            dtype=torch.float32,
        )
    return state


def _dequantized(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


def num_weights(module: Any) -> int:
    """Number of weights of a linear layer."""
    return int(module.in_features * module.out_features)


def quantized_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that quantised weights are made of."""
    tensors = []
    for module in linear4bit_layers(model).values():
        state = module.weight.quant_state
        tensors += [module.weight, state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


@dataclass
class _Saved:
    """Bytes that one forward pass leaves for the backward pass."""

    kept: int
    """Everything that is saved."""
    inputs: int
    """The inputs of the layers that can be recomputed, and what is saved outside of them."""
    inside: list[int]
    """For each such layer what recomputing it brings back."""
    largest: int
    """The largest tensor saved by a layer."""


@dataclass
class _Recorder:
    """Notes which memory a forward pass saves, and in which layer.

    What is saved for a result that is not used in the end (DoRA's product of its matrices) is given
    back before the backward pass, so it counts only as long as the graph holds on to it.
    """

    known: dict[Any, int]
    """Memory that is there anyway: weights and the batch."""
    saved: list[tuple[int | None, weakref.ref[_Handle]]] = field(default_factory=list)
    """For each saved tensor the number of its layer, and what the graph holds of it."""
    num_layers: int = 0
    inputs: dict[Any, int] = field(default_factory=dict)
    in_layer: bool = False

    def pack(self, tensor: Tensor) -> _Handle:
        handle = _Handle(tensor)
        if tensor.untyped_storage() not in self.known:
            layer = self.num_layers - 1 if self.in_layer else None
            self.saved.append((layer, weakref.ref(handle)))
        return handle

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.inputs.update(storage_bytes(tensors))
        self.num_layers += 1
        self.in_layer = True

    def leave(self, *_: Any) -> None:
        self.in_layer = False

    def result(self) -> _Saved:
        """What is saved; to be asked while the graph is there."""
        by_layer: dict[int | None, list[Tensor]] = {n: [] for n in (None, *range(self.num_layers))}
        for layer, handle in self.saved:
            if (held := handle()) is not None:
                by_layer[layer].append(held.tensor)
        saved = {layer: storage_bytes(tensors) for layer, tensors in by_layer.items()}
        outside = {**saved.pop(None), **self.inputs}
        everything = storage_bytes([tensor for tensors in by_layer.values() for tensor in tensors])
        return _Saved(
            kept=total_bytes(everything),
            inputs=total_bytes(outside),
            inside=[
                total_bytes({s: size for s, size in layer.items() if s not in outside})
                for layer in saved.values()
            ],
            largest=max((size for layer in saved.values() for size in layer.values()), default=0),
        )


class _Handle:
    """A saved tensor, as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def traced_forward(
    model: PeftModel,
    config: PretrainedConfig,
    micro_batch: int,
    text_tokens: int,
    images: int,
    dtype: torch.dtype,
) -> _Saved:
    """What a micro-batch leaves for the backward pass; all shapes as in training."""
    images = max(1, images)  # as the collator has it
    family = family_of_config(config)
    batch = family.traced_inputs(config, micro_batch, text_tokens, images, dtype)
    present = [*model.parameters(), *model.buffers(), *batch.values()]
    recorder = _Recorder(storage_bytes(present))
    hooks = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            hooks.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(recorder.leave))
    with (
        FusedAttentionMode(),
        _cuda_autocast(dtype),
        saved_tensors_hooks(recorder.pack, lambda handle: handle.tensor),
    ):
        output = family.traced_forward(model, batch)
        saved = recorder.result()
    del output  # and with it the graph
    for hook in hooks:
        hook.remove()
    return saved


@contextmanager
def _cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)``, which switches itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class FusedAttentionMode(TorchFunctionMode):
    """Attention saves what the GPU's fused kernels save.

    PyTorch chooses the kernel by asking the GPU, and without one takes a product that saves the
    whole matrix of scores.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return FusedAttention.apply(query, key, value)


class FusedAttention(torch.autograd.Function):
    """(B, H, T, D) each; saved are query, key, value, output, and a statistic per row in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An output of the right shape; what is in it does not matter."""
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        row_statistic = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_statistic)
        return output


def storage_bytes(tensors: list[Tensor]) -> dict[Any, int]:
    """Memory behind tensors, each piece once however many views share it, and its bytes."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage: storage.nbytes() for storage in storages}


def total_bytes(storages: dict[Any, int]) -> int:
    """Bytes of memory, each piece rounded up to 512 bytes as the CUDA allocator does."""
    return sum(-(-size // 512) * 512 for size in storages.values())
