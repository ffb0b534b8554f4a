"""The CPU as a stand-in for a GPU: fp16 as tensor cores compute it, gradients, copies."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from gradients import backward, open_adapters
from torch import nn

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.model.cpu import prepare_for_cpu


@pytest.fixture
def layers():
    """A plain and a 4-bit layer, in fp16."""
    layers = nn.Sequential(
        nn.Linear(64, 64), Linear4bit(64, 64, compute_dtype=torch.float16, quant_type="nf4")
    ).to(torch.float16)
    layers.to("cpu")  # quantises
    prepare_for_cpu(layers)
    return layers


@pytest.mark.parametrize("kind", ["plain", "4 bits"])
def test_fp16_products_are_rounded_once(layers, kind):
    """Under fp16 autocast product and bias are added in fp32 and rounded to fp16 at the end."""
    layer = layers[kind == "4 bits"]
    weight = layer.weight
    if kind == "4 bits":
        quant_state = copy.copy(weight.quant_state)
        quant_state.dtype = torch.float32
        weight = dequantize_4bit(weight.data, quant_state)
    x = torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        result = layer(x)
    x = x.half()
    assert result.dtype == torch.float16
    exact = x.double() @ weight.double().T + layer.bias.double()
    last_place = torch.exp2(exact.abs().log2().floor() - 10)
    in_fp32 = 64 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + layer.bias.abs())
    assert ((result - exact).abs() <= last_place / 2 + in_fp32).all()
    # The control: with another rounding, before the bias, it would not be so.
    twice = (x.float() @ weight.float().T).half() + layer.bias
    assert ((twice - exact).abs() > last_place / 2 + in_fp32).any()


def test_gradients_flow_through_4_bit_layers(layers):
    """The input's gradient is the output's times the dequantised weight."""
    layer = layers[1]
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        layer(x).sum().backward()
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-2, atol=1e-3)


def test_other_precisions_are_left_alone(layers):
    """bf16 autocast and no autocast run the layers' own code."""
    x = torch.randn(8, 64)
    plain = nn.Linear(64, 64).to(torch.float16)
    plain.load_state_dict(layers[0].state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layers[0](x), plain(x))
    assert torch.equal(layers[0](x.half()), plain(x.half()))


def test_a_copy_uses_its_own_weights(layers):
    """A deep copy of a prepared model is a model of its own."""
    twin = copy.deepcopy(layers)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    x = torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        assert (twin[0](x) == 0).all()
        assert (layers[0](x) != 0).any()


def test_evaluation_does_not_break_training(lora, processor, examples):
    """On a CPU with AVX512-BF16, bitsandbytes repacks weights in an evaluation: not with us."""
    quantised = [m for m in lora.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    open_adapters(lora)
    batch = Collator(processor)(examples[:2])
    lora.eval()
    backward(lora, batch)
    before = [p.grad.clone() for p in lora.parameters() if p.requires_grad]
    lora.zero_grad()
    iq.evaluate(lora, processor, examples[:2])
    backward(lora, batch)
    after = [p.grad for p in lora.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
