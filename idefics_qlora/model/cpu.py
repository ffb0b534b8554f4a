"""What a CPU needs to stand in for a GPU: for tests, and for trying things out."""

from __future__ import annotations

from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


def prepare_for_cpu(model: Any) -> None:
    """Let a model with 4-bit layers train on a CPU, and in fp16 at a bearable speed.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weight for inference in an evaluation,
    after which the next training forward raises, or silently gives no gradient: switched off.

    PyTorch's fp16 matrix product is about eight times slower than its fp32 one on most CPUs. Under
    fp16 autocast the linear layers therefore round their operands to fp16, multiply in fp32 and
    round the result to fp16, as a GPU's tensor cores do; so do their gradients.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, bnb.nn.Linear4bit) or type(module) is nn.Linear:
            module.__dict__["forward"] = MethodType(_forward, module)


def _forward(self: Any, x: Tensor) -> Tensor:
    in_fp16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
    if x.device.type != "cpu" or not in_fp16:
        result: Tensor = type(self).forward(self, x)
        return result
    with torch.autocast("cpu", enabled=False):
        x = x.half().float()
        bias = None if self.bias is None else self.bias.half().float()
        if isinstance(self, bnb.nn.Linear4bit):
            quant_state = self.weight.quant_state
            result = bnb.matmul_4bit(x, self.weight, quant_state=quant_state, bias=bias)
        else:
            result = nn.functional.linear(x, self.weight.half().float(), bias)
        return result.half()
