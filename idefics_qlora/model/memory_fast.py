"""What a forward and a backward pass of the fast way take, found out on tensors without data.

Shapes: B examples of a micro-batch, M packed rows of text.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from idefics_qlora.data.batches import Batch
from idefics_qlora.model.fused import FusedBlocks
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.lora_linear import FastLinears
from idefics_qlora.model.memory_trace import (
    Bytes,
    materialize,
    quantized_tensors,
    storage_bytes,
    total_bytes,
)
from idefics_qlora.model.precision import set_activation_checkpointing
from idefics_qlora.model.shapes import Shape, shape_of

MAX_MICRO_BATCH = 1024
"""Where the search for the largest micro-batch ends."""


def fast_passes(
    model: PeftModel, config: PretrainedConfig, dtype: torch.dtype, text_tokens: int, images: int,
    nested: bool,
) -> dict[str, Any]:  # fmt: skip
    """What passes take the fast way: the fields of an estimate."""
    traced_in = torch.bfloat16 if dtype == torch.float16 else dtype
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cpu"):
            materialize(model, traced_in, nested)
        trace, activations, moments = FastTrace(model, traced_in), [], []
        for recompute in (False, True):
            set_activation_checkpointing(model, recompute)
            between, most = trace.passes(text_tokens, images)
            per_example = between.per_example + between.per_row * text_tokens
            activations.append(Bytes(between.fixed, per_example))
            moments.append(_worst(most, text_tokens))
        set_activation_checkpointing(model, False)
        copies = trace.casts()
        trace.close()
    for parameter in trace.parameters:
        parameter.grad = None
    return {
        "copies": copies,
        "kept": activations[0],
        "inputs": activations[1],
        "moments": moments[0],
        "moments_recomputed": moments[1],
    }


def _worst(moments: list[Bytes], text_tokens: int) -> tuple[Bytes, ...]:
    """Those of the moments at which some micro-batch takes the most."""
    sizes = [(n, packed_rows(n, text_tokens)) for n in range(1, MAX_MICRO_BATCH + 1)]
    worst = (max(moments, key=lambda moment: moment.of(*size)) for size in sizes)
    return tuple(dict.fromkeys(worst))


def packed_rows(micro_batch: int, text_tokens: int) -> int:
    """Rows that the tokens of a micro-batch are packed into, all of one length."""
    if micro_batch == 0:
        return 0
    return shape_of(micro_batch, micro_batch * text_tokens, text_tokens, 1, 1, 1).rows


class FastTrace(FastPath):
    """The fast path over a model without data, on the CPU's fake tensors in bf16 or fp32.

    On a GPU's, autograd could not go back without one. fp16 takes what bf16 takes.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype, graphs=False)
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.begin_window()

    def _install(self) -> None:
        self._reached = {True: []}  # nobody asks
        self.linears = FastLinears(self.model)
        self.blocks = FusedBlocks(self.model, self.linears, self.architecture)

    def casts(self) -> int:
        """Bytes of the copies of A and B in the compute dtype, and of joined biases."""
        copies = [(g.a, g.b, g.frozen_bias) for g in self.linears.used()]
        return total_bytes(storage_bytes([t for three in copies for t in three if t is not None]))

    def passes(self, text_tokens: int, images: int) -> tuple[Bytes, list[Bytes]]:
        """What is in use between a forward and a backward pass, and where the most may be.

        One trace answers for every B, because the number of examples in it is a large prime, that
        of rows is a multiple of another, and nothing else is of either.
        """
        examples, rows = 1009, 1013 * text_tokens
        images = max(1, images)  # as the collator has it
        length = shape_of(1, text_tokens, text_tokens, 1, 1, 1).length
        vision = self.architecture.traced_vision(self.base.config, examples, text_tokens, images)
        of_images = images * self.architecture.tokens_of_an_image(self.base)
        targets = examples * max(1, text_tokens - of_images) if of_images else rows
        shape = Shape(examples, length, rows, targets, images, examples * images)
        groups = self.linears.used()
        known = [*self.model.parameters(), *self.model.buffers(), *quantized_tensors(self.model)]
        known += [p.grad for p in self.parameters if p.grad is not None]
        known += [t for g in groups for t in (g.a, g.b, g.frozen_bias) if t is not None]
        with _Live(known, examples, rows) as live:
            vision = vision.map(torch.empty_like)
            ids = torch.empty(examples, text_tokens, dtype=torch.int64)
            batch = Batch(input_ids=ids, attention_mask=ids, labels=ids, vision=vision)
            self._pass(shape, self._inputs(batch, shape, 1, [images] * examples, None))
        return live.between, live.most


class _Live(TorchDispatchMode):
    """Keeps account of the memory that operations take, until it is free again."""

    def __init__(self, known: list[Tensor], examples: int, rows: int) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._examples, self._rows = examples, rows
        self._now = [0, 0, 0]
        """Fixed, per example, and per row."""
        self._most: list[tuple[int, ...]] = []
        self._between: tuple[int, ...] | None = None
        self._taken = False

    @property
    def most(self) -> list[Bytes]:
        """None of these takes less than another for every B."""
        return [Bytes(*moment) for moment in self._most]

    @property
    def between(self) -> Bytes:
        """When the backward pass begins."""
        assert self._between is not None
        return Bytes(*self._between)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._between is None and torch._C._current_graph_task_id() != -1:
            self._between = tuple(self._now)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage())
        return result

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        kind = 2 if size % self._rows == 0 else 1 if size % self._examples == 0 else 0
        part = size // (1, self._examples, self._rows)[kind]
        if kind == 0:
            part = -(-part // 512) * 512
        self._now[kind] += part
        self._taken = True
        weakref.finalize(storage, self._free, key, kind, part)

    def _free(self, key: int, kind: int, part: int) -> None:
        if self._taken:  # the most of a while
            self._taken, now = False, tuple(self._now)
            if not any(all(a >= b for a, b in zip(old, now, strict=True)) for old in self._most):
                self._most = [
                    old for old in self._most if any(a > b for a, b in zip(old, now, strict=True))
                ]
                self._most.append(now)
        self._known.discard(key)
        self._now[kind] -= part
