"""Count what one micro-batch of idefics-9b dispatches and keeps, without a GPU and without data.

    python benchmarks/work.py                         # the 9b architecture: about two minutes
    python benchmarks/work.py --architecture small

Tensors are fake: they have shapes and no memory. Counted is what computes, each launch of a kernel
of our own as one; views, and memory that is only taken, are counted apart. The figures are those of
bf16, whose operations are fp16's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from random_model import configuration
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from idefics_qlora.data.batches import Batch
from idefics_qlora.families.idefics import IdeficsVision
from idefics_qlora.model import kernels, lora_linear, memory_trace
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.precision import autocast
from idefics_qlora.model.shapes import Shape

VIEWS = {
    *("view", "_unsafe_view", "detach", "t", "transpose", "permute", "slice", "select", "alias"),
    *("split", "split_with_sizes", "expand", "unsqueeze", "squeeze", "unbind", "as_strided"),
    *("empty", "empty_like", "new_empty", "empty_strided", "reshape"),
}
"""Operations after which no kernel runs."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "prim":  # questions of the fake tensors
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def a_batch(examples: int, length: int, images: int, side: int) -> Batch:
    """Examples of one length, without content."""
    ids = torch.zeros(examples, length, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        vision=IdeficsVision(
            pixel_values=torch.zeros(examples, images, 3, side, side, dtype=torch.uint8),
            image_attention_mask=torch.ones(examples, length, images, dtype=torch.bool),
            pixel_mean=torch.zeros(3),
            pixel_std=torch.ones(3),
        ),
    )


@contextmanager
def counted(model: PeftModel, operations: Operations, kept: dict[Any, int]) -> Iterator[None]:
    """Count what is dispatched, and the bytes saved for the backward pass."""
    tensors = [*model.parameters(), *memory_trace.quantized_tensors(model)]
    known = set(memory_trace.storage_bytes(tensors))

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in known:
            kept[storage] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), operations:
        yield


class Attention(memory_trace.FusedAttention):
    """One operation each way."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, key and value."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def measure(run: Callable[[], Any], model: PeftModel) -> dict[str, Any]:
    """The figures of one forward and backward pass."""
    operations, kept = Operations(), {}
    with counted(model, operations, kept):
        run()
    views = sum(number for name, number in operations.names.items() if name in VIEWS)
    return {
        "operations": operations.names.total() - views,
        "views": views,
        "waits": operations.names["_local_scalar_dense"] + operations.names["nonzero"],
        "saved_bytes": sum(kept.values()),
        "most": operations.names.most_common(12),
    }


@contextmanager
def as_on_a_gpu(launches: list[str]) -> Iterator[None]:
    """Our own kernels instead of the CPU's operations; each launch is noted."""
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        put(kernels, "usable", lambda tensor: True)
        put(kernels, "_launch", lambda kernel, *_, **__: launches.append(str(kernel)))

        def gradient(
            self: Any, parameter: Tensor, a: Tensor, b: Tensor, alpha: float
        ) -> Tensor | None:
            launches.append("addmm")  # one product, added to .grad in place
            return None

        put(lora_linear.Group, "_gradient", gradient)
        yield


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Count, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="9b")
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--num-tokens", type=int, default=97)
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16
    memory_trace.FusedAttention = Attention
    config = configuration(options.architecture)
    model = memory_trace.model_on_meta(config, dtype, True, None)
    results: dict[str, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        memory_trace.materialize(model, dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        side = config.vision_config.image_size
        batch = a_batch(options.examples, options.num_tokens, 1, side)

        def before() -> None:
            # The look-up of additional tokens depends on data, which there is none of here.
            inputs = batch.inputs()
            ids = inputs.pop("input_ids")
            embeddings = torch.zeros(*ids.shape, config.hidden_size, dtype=dtype)
            with autocast(torch.device("cpu"), dtype), memory_trace.FusedAttentionMode():
                logits = model(inputs_embeds=embeddings, **inputs, use_cache=False).logits
            (summed_cross_entropy(logits, batch.labels) / 100).backward()

        results["before"] = measure(before, model)
        launches: list[str] = []
        with as_on_a_gpu(launches):
            path = FastPath(model, dtype)
            path.begin_window()
            tokens = options.examples * options.num_tokens
            shape = Shape(options.examples, options.num_tokens, tokens, tokens, 1, options.examples)
            inputs = path._inputs(batch, shape, 100, [1] * options.examples, None)
            launches.clear()
            with memory_trace.FusedAttentionMode():
                now = measure(lambda: path._pass(shape, inputs), model)
            now["operations"] += len(launches)
            now["most"] += Counter(launches).most_common(12)
            results["now"] = now
            path.close()
    for name, result in results.items():
        result["saved_gb_per_example"] = result["saved_bytes"] / options.examples / 1e9
        print(name, json.dumps(result))
    ratio = results["now"]["operations"] / results["before"]["operations"]
    results["operations_now_of_before"] = ratio
    print(f"operations now / before: {ratio:.3f}")
    return results


if __name__ == "__main__":
    main()
