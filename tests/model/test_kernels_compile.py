"""Compiles for GPUs, without one, every Triton kernel that a pass of a published base launches.

The interpreter of the other tests shows what a kernel computes; this shows that a GPU's compiler
takes it, with the sizes, dtypes and alignments of the real models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import PUBLISHED

from idefics_qlora.model import kernels
from idefics_qlora.model.memory import estimate_memory

TARGETS = {75: "fp16", 90: "bf16"}
"""A T4, an H100 or H200: compute capability and what is computed in."""
BASES = [
    "HuggingFaceM4/idefics-9b",
    "HuggingFaceM4/idefics2-8b",
    "HuggingFaceM4/Idefics3-8B-Llama3",
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
]
NAMES = {
    torch.bfloat16: "16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def specialized(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a launch for: the kernel's name, types, constants, divisible by 16."""
    types, constants, divisible = {}, {}, []
    for index, name in enumerate(kernel.arg_names):
        value = args[index] if index < len(args) else options[name]
        kept = index in kernel.params and kernel.params[index].do_not_specialize
        if index >= len(args) or (type(value) is int and value == 1 and not kept):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{NAMES[value.dtype]}"
            divisible.append(index)
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
            if types[name] == "i32" and value % 16 == 0:
                divisible.append(index)
    more = {n: v for n, v in {**kernels.OPTIONS, **options}.items() if n not in kernel.arg_names}
    parts = (tuple(sorted(part.items())) for part in (types, constants, more))
    return (kernel.__name__, *parts, tuple(divisible))


@pytest.fixture(scope="module")
def launches() -> dict[tuple[Any, ...], Any]:
    """Every different launch of a forward and a backward pass, by what it is compiled for."""
    pytest.importorskip("triton")
    seen: dict[tuple[Any, ...], Any] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        seen[specialized(kernel, args, options)] = kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_launch", launch)
        for name in BASES:
            configuration = PUBLISHED[name].configuration()
            for part in (configuration.get_text_config(), configuration.vision_config):
                part.num_hidden_layers = 4  # what idefics-9b has between two cross-attentions
            estimate_memory(configuration, text_tokens=97, micro_batch=16)
    return seen


def compiled(kernel: Any, launch: tuple[Any, ...], capability: int, dtype: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    _, types, constants, options, divisible = launch
    source = ASTSource(
        fn=kernel,
        signature={name: kind.replace("*16", f"*{dtype}") for name, kind in types},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_compile_for_gpus(launches, capability, tmp_path, monkeypatch):
    """Whatever a pass of any family launches becomes machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert {name for name, *_ in launches} >= {"_norm", "_dequantize", "_drop", "_heads"}
    for launch, kernel in launches.items():
        assert compiled(kernel, launch, capability, TARGETS[capability]).asm["cubin"], launch
