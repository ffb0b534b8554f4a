"""How much GPU memory a training run will take, from the configuration alone.

Nothing is downloaded but ``config.json``, and nothing is computed: the model is built from tensors
that have shapes and dtypes but no data, the library's own :func:`~idefics_qlora.add_lora` puts the
adapters on, and one forward pass under the GPU's autocast rules tells which tensors the backward
pass would keep. So the estimate follows the installed versions of ``transformers``, ``peft`` and
``bitsandbytes`` instead of a formula that would have to be kept in step with them.

    python -m idefics_qlora.memory HuggingFaceM4/idefics-9b --text-tokens 200
"""

from __future__ import annotations

import copy
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

# Not public, but what PyTorch's own compiler traces with: tensors that claim to be on a GPU, so
# that autocast and dropout behave as there, without a GPU.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.modeling_layers import GradientCheckpointingLayer

from idefics_qlora.config import Optim, Precision, check_choice, check_whole
from idefics_qlora.model.loading import DTYPES, NOT_QUANTIZED, add_lora, load_config

CARDS = (16, 24, 40, 80)
"""Nominal sizes of common cards in GB."""

CONTEXT_BYTES = 700 * 2**20
"""Outside PyTorch's allocator: the CUDA context and the code of the kernels."""

FRAGMENTATION = 1.05
"""The allocator reserves more than is in use, because freed blocks do not fit what comes next."""

WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS allocates through PyTorch for its products on Hopper; less on older cards."""

MAX_MICRO_BATCH = 1024
"""Where the search for the largest micro-batch ends."""

LOSS_BYTES = 12
"""Per logit, while the loss goes back: fp32 log-probabilities and two fp32 gradients of them."""


@dataclass(frozen=True)
class Bytes:
    """Bytes that grow with the micro-batch: ``fixed + per_example * micro_batch``."""

    fixed: int
    per_example: int

    def of(self, micro_batch: int) -> int:
        """Bytes for a micro-batch of so many examples."""
        return self.fixed + self.per_example * micro_batch

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.fixed + other.fixed, self.per_example + other.per_example)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GPU memory of a training run, in bytes; ``print`` it for a table."""

    name: str
    """The checkpoint."""
    text_tokens: int
    """Text tokens per example, the longest of a micro-batch: the others are padded to it."""
    images: int
    """Images per example."""
    micro_batch: int
    """Examples in one forward and backward pass, unless :meth:`peak` is told otherwise."""
    gradient_checkpointing: bool
    """Whether layers are recomputed, unless :meth:`peak` is told otherwise."""
    precision: Precision
    """Arithmetic of forward and backward."""

    quantized_weights: int
    """NF4 weights and the statistics of their double quantisation."""
    other_weights: int
    """Frozen weights and buffers that are not quantised, in the compute dtype."""
    adapters: int
    """Trainable parameters, fp32."""
    gradients: int
    """Their gradients, fp32."""
    optimizer: int
    """Both moments of AdamW, as if none of them were paged out."""

    kept: Bytes
    """Saved for the backward pass when all activations are kept, and the logits."""
    inputs: Bytes
    """The same with activation checkpointing: the layers' inputs instead of what is inside them."""
    loss: Bytes
    """Needed beyond that while the loss goes back to the logits."""
    layer: Bytes
    """Needed beyond that while a layer goes back: a dequantised weight and some gradients."""
    recomputed: Bytes
    """Activations of the largest layer while it is recomputed."""

    @property
    def static(self) -> int:
        """Bytes in use whatever the micro-batch is."""
        weights = self.quantized_weights + self.other_weights + self.adapters
        return weights + self.gradients + self.optimizer + WORKSPACE_BYTES

    def activations(self, gradient_checkpointing: bool | None = None) -> Bytes:
        """Bytes that a micro-batch keeps from the forward to the backward pass.

        Args:
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.
        """
        if gradient_checkpointing is None:
            gradient_checkpointing = self.gradient_checkpointing
        return self.inputs if gradient_checkpointing else self.kept

    def peak(
        self, micro_batch: int | None = None, gradient_checkpointing: bool | None = None
    ) -> int:
        """The most bytes in use, to be compared with ``torch.cuda.max_memory_allocated``.

        What exists for a moment only, while the loss or a layer goes back, is an upper bound.

        Args:
            micro_batch: Examples in one pass; the estimate's own by default.
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.
        """
        if micro_batch is None:
            micro_batch = self.micro_batch
        if gradient_checkpointing is None:
            gradient_checkpointing = self.gradient_checkpointing
        layer = self.layer + self.recomputed if gradient_checkpointing else self.layer
        passing = max(self.loss.of(micro_batch), layer.of(micro_batch))
        return self.static + self.activations(gradient_checkpointing).of(micro_batch) + passing

    def largest_micro_batch(
        self, card_gb: float, gradient_checkpointing: bool | None = None
    ) -> int:
        """The most examples in one pass for which a card's memory suffices.

        700 MiB are left for the CUDA context, and 5 % of the peak for fragmentation. A GB is
        counted as 10^9 bytes, which allows for what error correction and the driver take.

        Args:
            card_gb: Size of the card in GB.
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.

        Returns:
            The number, 0 if not even one example fits; at most 1024.
        """
        available = (card_gb * 10**9 - CONTEXT_BYTES) / FRAGMENTATION
        return bisect_right(
            range(1, MAX_MICRO_BATCH + 1),
            available,
            key=lambda micro_batch: self.peak(micro_batch, gradient_checkpointing),
        )

    def __str__(self) -> str:
        def line(label: str, *cells: str) -> str:
            return f"  {label:<32}" + "".join(f"{cell:>12}" for cell in cells)

        def gib(*numbers: int) -> list[str]:
            return [f"{number / 2**30:.2f}" for number in numbers]

        both = (False, True)
        plural = "" if self.images == 1 else "s"
        lines = [
            f"{self.name}: {self.text_tokens} text tokens and {self.images} image{plural} per "
            f"example, {self.precision}",
            line("weights and optimizer", "GiB"),
            line("4-bit weights", *gib(self.quantized_weights)),
            line(f"other weights ({self.precision})", *gib(self.other_weights)),
            line("adapters (fp32)", *gib(self.adapters)),
            line("their gradients (fp32)", *gib(self.gradients)),
            line("optimizer", *gib(self.optimizer)),
            line("with cuBLAS' workspace", *gib(self.static)),
            line("activations", "kept", "recomputed"),
            line("per example", *gib(*(self.activations(c).per_example for c in both))),
            line(
                f"peak at micro-batch {self.micro_batch}",
                *gib(*(self.peak(gradient_checkpointing=c) for c in both)),
            ),
            line("largest micro-batch that fits", "kept", "recomputed"),
        ]
        for card in CARDS:
            fitting = [self.largest_micro_batch(card, c) for c in both]
            lines.append(line(f"{card} GB", *(str(number or "none") for number in fitting)))
        return "\n".join(lines)


def estimate_memory(
    checkpoint: str | os.PathLike[str] | IdeficsConfig,
    *,
    text_tokens: int = 100,
    images: int = 1,
    micro_batch: int = 2,
    gradient_checkpointing: bool = False,
    precision: Precision = "fp16",
    quantize: bool = True,
    lora: LoraConfig | None = None,
    optim: Optim = "paged_adamw_8bit",
    revision: str | None = None,
) -> MemoryEstimate:
    """Estimate the GPU memory of a training run; neither weights nor a GPU are needed.

    Args:
        checkpoint: Hub id (only its ``config.json`` is fetched), local folder, or configuration.
        text_tokens: Text tokens per example, those of image tokens included.
        images: Images per example. A micro-batch without any takes as much as with one each,
            because the model is given a blank one.
        micro_batch: Examples in one forward and backward pass. The estimate answers for every
            other number as well.
        gradient_checkpointing: Whether layers are recomputed. The estimate answers for both.
        precision: As in ``TrainConfig``.
        quantize: As in ``load_model``.
        lora: As in ``add_lora``; the recipe's by default.
        optim: As in ``TrainConfig``.
        revision: Branch, tag or commit of a Hub checkpoint.

    Returns:
        The estimate.

    Raises:
        FileNotFoundError: If a local folder, or its ``config.json``, does not exist.
        ValueError: If a value cannot work, or the checkpoint holds another architecture.
    """
    check_whole(text_tokens=text_tokens, micro_batch=micro_batch)
    check_whole(0, images=images)
    check_choice("precision", precision, Precision)
    check_choice("optim", optim, Optim)
    config = _configuration(checkpoint, revision)
    dtype = DTYPES[precision]
    model = model_on_meta(config, dtype, quantize, lora)
    with FakeTensorMode(), torch.device("cuda"):
        materialize(model, dtype)
        # Two points of a straight line; at 1, some copies would be views.
        two, three = (traced_forward(model, config, n, text_tokens, images, dtype) for n in (2, 3))

    def line(at_two: int, at_three: int) -> Bytes:
        return Bytes(3 * at_two - 2 * at_three, at_three - at_two)

    trainable = [p for p in model.parameters() if p.requires_grad]
    quantized = quantized_tensors(model)
    everything = storage_bytes([*model.parameters(), *model.buffers(), *quantized])
    adapters = total_bytes(storage_bytes(trainable))

    num_logits = text_tokens * (config.vocab_size + config.additional_vocab_size)
    logits = Bytes(0, num_logits * dtype.itemsize)
    largest = max(range(len(three.inside)), key=three.inside.__getitem__)
    # At most: the gradients of gate, up and their product beside an MLP's weight, dequantised.
    dequantized = (
        max((num_weights(m) for m in linear4bit_layers(model)), default=0) * dtype.itemsize
    )
    # At most: an identity (fp32 and cast), the product of the matrices, scaled, and the weight.
    dora = max(
        (
            4 * m.in_features**2 + dtype.itemsize * (m.in_features**2 + 4 * num_weights(m))
            for m in model.modules()
            if getattr(m, "lora_magnitude_vector", None)
        ),
        default=0,
    )
    return MemoryEstimate(
        name=getattr(config, "_name_or_path", "") or config.model_type,
        text_tokens=text_tokens,
        images=images,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        quantized_weights=total_bytes(storage_bytes(quantized)),
        other_weights=total_bytes(everything) - total_bytes(storage_bytes(quantized)) - adapters,
        adapters=adapters,
        gradients=adapters,
        optimizer=sum(_optimizer_bytes(p.numel(), optim) for p in trainable),
        kept=line(two.kept, three.kept) + logits,
        inputs=line(two.inputs, three.inputs) + logits,
        loss=Bytes(0, num_logits * LOSS_BYTES),
        layer=line(3 * two.largest, 3 * three.largest) + Bytes(max(dequantized, dora), 0),
        recomputed=line(two.inside[largest], three.inside[largest]),
    )


def _configuration(
    checkpoint: str | os.PathLike[str] | IdeficsConfig, revision: str | None
) -> IdeficsConfig:
    if isinstance(checkpoint, IdeficsConfig):
        return copy.deepcopy(checkpoint)  # building a model writes into its configuration
    return load_config(checkpoint, revision)[1]


# --- the model, without data ---------------------------------------------------------------------


def model_on_meta(
    config: IdeficsConfig, dtype: torch.dtype, quantize: bool, lora: LoraConfig | None
) -> PeftModel:
    """The model with adapters that a run would train, on the meta device."""
    import bitsandbytes as bnb  # loads its native library

    with torch.device("meta"):
        base = IdeficsForVisionText2Text(config)
        if quantize:
            for name, module in list(base.named_modules()):
                if type(module) is nn.Linear and not any(part in name for part in NOT_QUANTIZED):
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
        if lora is not None:
            # Initial values computed from the weights (PiSSA, LoftQ, ...) need weights.
            lora = copy.copy(lora)
            lora.init_lora_weights = True
        return add_lora(base, lora).train()


def materialize(model: nn.Module, dtype: torch.dtype) -> None:
    """Move a model from the meta device to the current one, in the dtypes of training."""
    for layer in linear4bit_layers(model):
        weight: Any = Parameter(_packed(layer), requires_grad=False)
        weight.compress_statistics, weight.quant_type = True, "nf4"
        weight.quant_state = _quant_state(layer, dtype)
        layer.weight = weight
        # peft (for DoRA) knows quantised weights by their class, which no tensor without data can
        # have; a layer with this attribute is asked for them itself.
        layer.W_q, layer.dequantize = None, partial(_dequantized, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                of = torch.float32 if parameter.requires_grad else dtype
                value = Parameter(torch.empty(parameter.shape, dtype=of), parameter.requires_grad)
                setattr(module, name, value)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _packed(module: Any) -> Tensor:
    """An NF4 weight as bitsandbytes stores it: two values per byte."""
    return torch.empty(-(-num_weights(module) // 2), 1, dtype=torch.uint8)


def _quant_state(module: Any, dtype: torch.dtype) -> Any:
    """The scales of its blocks, quantised themselves, as bitsandbytes makes them."""
    from bitsandbytes.functional import QuantState

    blocks = -(-num_weights(module) // 64)
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=QuantState(
            absmax=torch.empty(-(-blocks // 256)),
            code=torch.empty(256),
            blocksize=256,
            dtype=torch.float32,
        ),
    )


def _dequantized(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


def linear4bit_layers(model: nn.Module) -> list[Any]:
    import bitsandbytes as bnb

    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def num_weights(module: Any) -> int:
    return int(module.in_features * module.out_features)


def quantized_tensors(model: nn.Module) -> list[Tensor]:
    tensors = []
    for module in linear4bit_layers(model):
        state = module.weight.quant_state
        tensors += [module.weight, state.absmax, state.code, state.offset]
        tensors += [state.state2.absmax, state.state2.code]
    return tensors


def _optimizer_bytes(number: int, optim: str) -> int:
    if optim == "adamw_torch" or number < 4096:
        return 8 * number
    return 2 * (number + 4 * -(-number // 256))  # 8 bits each, and a scale for each block of 256


# --- its forward pass ----------------------------------------------------------------------------


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
    config: IdeficsConfig,
    micro_batch: int,
    text_tokens: int,
    images: int,
    dtype: torch.dtype,
) -> _Saved:
    """What a micro-batch leaves for the backward pass; all shapes as in training."""
    side = config.vision_config.image_size
    images = max(1, images)  # as the collator has it
    batch = {
        # Looking additional tokens up depends on their number, that is, on data.
        "inputs_embeds": torch.empty(micro_batch, text_tokens, config.hidden_size, dtype=dtype),
        "attention_mask": torch.ones(micro_batch, text_tokens, dtype=torch.int64),
        "pixel_values": torch.empty(micro_batch, images, 3, side, side),
        "image_attention_mask": torch.ones(micro_batch, text_tokens, images, dtype=torch.bool),
    }
    present = [*model.parameters(), *model.buffers(), *batch.values()]
    recorder = _Recorder(storage_bytes(present))
    hooks = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            hooks.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(recorder.leave))
    with (
        _FusedAttentionMode(),
        _cuda_autocast(dtype),
        saved_tensors_hooks(recorder.pack, lambda handle: handle.tensor),
    ):
        output = model(**batch, use_cache=False)
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


class _FusedAttentionMode(TorchFunctionMode):
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
        return _FusedAttention.apply(query, key, value)


class _FusedAttention(torch.autograd.Function):
    """(B, H, T, D) each; saved are query, key, value, output, and a statistic per row in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        row_statistic = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_statistic)
        return output


# --- counting ------------------------------------------------------------------------------------


def storage_bytes(tensors: list[Tensor]) -> dict[Any, int]:
    """Memory behind tensors, each piece once however many views share it, and its bytes."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage: storage.nbytes() for storage in storages}


def total_bytes(storages: dict[Any, int]) -> int:
    """Bytes of memory, each piece rounded up to 512 bytes as the CUDA allocator does."""
    return sum(-(-size // 512) * 512 for size in storages.values())
