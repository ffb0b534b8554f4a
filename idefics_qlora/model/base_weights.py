"""How a frozen base keeps the values of its 4-bit weights: packed, or dequantised once for all.

A packed weight's blocks of 64 values have a scale each. Double quantisation keeps the scales in
8 bits (nested constants), which saves 0.4 GB of idefics-9b and costs a look-up at each use.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedModel

BaseWeights = Literal["4bit", "dequantized"]

MOST_OF_FREE_MEMORY = 0.05
"""Scales are kept in fp32 if that takes at most this share of the GPU's free memory: idefics-9b
does it on cards of 16 GB and more, a model that fills its card does not."""


def linear4bit_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are quantised, by name."""
    import bitsandbytes as bnb  # loads its native library

    return {n: layer for n, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}


def has_4_bit_values(model: nn.Module) -> bool:
    """Whether the linear layers' weights were quantised, whether or not they are packed now."""
    loaded = getattr(model, "loaded_with", {})
    return bool(loaded.get("quantize")) or bool(linear4bit_layers(model))


def check_base_weights(base_weights: str, quantize: bool) -> None:
    """See that there are 4-bit values to dequantise.

    Raises:
        ValueError: If there are none because of ``quantize=False``.
    """
    if base_weights == "dequantized" and not quantize:
        raise ValueError(
            "base_weights='dequantized' keeps the values of the 4-bit weights, of which "
            "quantize=False makes none: leave one of the two out"
        )


def unnest(model: nn.Module) -> None:
    """Keep the scales of 4-bit weights in fp32; the weights stay equal to the bit."""
    import bitsandbytes as bnb

    for layer in linear4bit_layers(model).values():
        state = layer.weight.quant_state
        if state.nested:
            absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
            state.absmax = (absmax + state.offset).float()
            state.offset = state.state2 = None
            state.nested = False


def unnest_if_small(model: nn.Module, device: torch.device) -> None:
    """:func:`unnest` on a GPU whose free memory it takes no more than a small share of.

    On a CPU it does not pay: unpacking the 4-bit values takes nearly all of the time.
    """
    if device.type != "cuda":
        return
    states = [layer.weight.quant_state for layer in linear4bit_layers(model).values()]
    more = sum(3 * state.absmax.numel() for state in states if state.nested)  # bytes, 4 for 1
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if more <= MOST_OF_FREE_MEMORY * free:
        unnest(model)


def dequantize(model: PreTrainedModel) -> None:
    """Replace 4-bit layers by ordinary ones that hold the same values in the compute dtype.

    One after the other, so that no more is needed at a time than both kinds of one layer. The
    model is an unquantised one afterwards, to ``transformers`` and ``peft`` too.
    """
    import bitsandbytes as bnb

    for name, layer in linear4bit_layers(model).items():
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.weight = Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain.train(layer.training))
        layer.weight = layer.quant_state = None  # the packed values go now, not with the last layer
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
