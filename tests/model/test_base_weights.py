"""The base's 4-bit values in 16 bits, and their scales in fp32: the same model in more memory."""

import copy

import pytest
import torch
from helpers import config_of
from random_model import configuration, random_4bit_model
from torch.multiprocessing.reductions import StorageWeakRef

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.model import base_weights, fused, loading
from idefics_qlora.model.adapters import adapter_tensors, trainable_parameters
from idefics_qlora.model.architectures import ARCHITECTURES
from idefics_qlora.model.base import base_fingerprint, same_base
from idefics_qlora.model.base_weights import dequantize, linear4bit_layers, unnest, unnest_if_small
from idefics_qlora.model.lora_linear import install
from idefics_qlora.model.memory import estimate_memory
from idefics_qlora.model.precision import autocast, set_compute_dtype


def rounded(tensors):
    """Bytes of tensors, rounded up as the GPU's allocator does."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)


def logits_of(model, batch, dtype=torch.float32):
    with autocast(torch.device("cpu"), dtype):
        return model(**batch.inputs(), use_cache=False).logits.float()


@pytest.fixture(scope="module")
def dequantized():
    """The tiny base in 16 bits."""
    return iq.tiny.load_model(device="cpu", base_weights="dequantized")[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantized_outputs_are_those_of_4_bits(processor, examples, dtype):
    """The same values, so the same logits to the compute dtype's rounding; others differ more."""
    batch = Collator(processor)(examples[:3])
    packed, plain, stored = (
        logits_of(
            iq.tiny.load_model(device="cpu", compute_dtype=dtype, **how)[0], batch, dtype
        ).detach()
        for how in ({}, {"base_weights": "dequantized"}, {"quantize": False})
    )
    step = torch.finfo(dtype).eps
    error = (plain - packed).norm() / packed.norm()
    assert error < 4 * step
    assert (stored - packed).norm() / packed.norm() > max(0.02, 5 * error)


def test_a_dequantized_base_is_an_ordinary_model(dequantized, base):
    """Frozen fp16 layers, biases and modes as they were; transformers and peft see no 4 bits."""
    assert not linear4bit_layers(dequantized)
    assert {p.dtype for p in dequantized.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in dequantized.parameters())
    assert not any(module.training for module in dequantized.modules())
    assert not dequantized.is_loaded_in_4bit
    assert not dequantized.is_quantized
    assert not hasattr(dequantized.config, "quantization_config")
    biases = {n: p for n, p in base.named_parameters() if n.endswith("bias")}
    assert biases
    for name, bias in biases.items():
        assert torch.equal(dequantized.get_parameter(name), bias), name


def test_adapters_fit_both_kinds(dequantized, base, processor, examples, tmp_path):
    """Same places, fp32, same fingerprint; the other kind loads what one trains, and goes on."""
    other = iq.add_lora(copy.deepcopy(dequantized))
    model = iq.add_lora(base)
    assert same_base(base_fingerprint(model), base_fingerprint(other))
    first, second = adapter_tensors(model), adapter_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(p.dtype == torch.float32 for p in trainable_parameters(other).values())

    iq.train(other, processor, examples, config=config_of(tmp_path, max_steps=2, save_steps=2))
    result = iq.train(model, processor, examples, config=config_of(tmp_path, max_steps=4))
    assert result.global_step == 4
    losses = []
    for how in ("4bit", "dequantized"):
        loaded, _ = iq.load_finetuned(
            tmp_path / "checkpoint-4", device="cpu", base_weights=how, compute_dtype=torch.float32
        )
        losses.append(iq.evaluate(loaded, processor, examples[:8])["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_both_kinds_train_alike(base, processor, examples, tmp_path):
    """Five fp32 steps over the same values: the same losses to rounding, unlike the stored ones."""
    histories = []
    for n, how in enumerate(({}, {"base_weights": "dequantized"}, {"quantize": False})):
        model, _ = iq.tiny.load_model(device="cpu", compute_dtype=torch.float32, **how)
        config = config_of(tmp_path / str(n), max_steps=5)
        result = iq.train(iq.add_lora(model), processor, examples, config=config)
        histories.append([r["loss"] for r in result.log_history if "loss" in r])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    assert histories[0] != pytest.approx(histories[2], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_precision_rounds_once_more(base, dtype):
    """fp16 values in fp32 are kept exactly, in bf16 they are within one step of the 4-bit ones."""
    plain = copy.deepcopy(base)
    dequantize(plain)
    fp16 = {name: plain.get_parameter(f"{name}.weight").clone() for name in linear4bit_layers(base)}
    set_compute_dtype(plain, dtype)
    set_compute_dtype(base, dtype)
    exact = copy.deepcopy(base)
    dequantize(exact)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    for name, before in fp16.items():
        weight, expected = (m.get_parameter(f"{name}.weight").float() for m in (plain, exact))
        if dtype == torch.float32:
            assert torch.equal(weight, before.float()), name
        step = torch.finfo(dtype if dtype == torch.bfloat16 else torch.float16).eps
        torch.testing.assert_close(weight, expected, rtol=step, atol=1e-7)


def test_a_change_of_precision_gives_memory_back(dequantized):
    """Weights that the fast path has laid side by side are held by nothing else after a cast."""
    model = iq.add_lora(copy.deepcopy(dequantized))
    linears = install(model)
    fused.install(model, linears, ARCHITECTURES[type(model.get_base_model())])
    groups = [group for group in linears.used() if len(group.bases) == 3]
    assert groups
    memory = [StorageWeakRef(base.weight.untyped_storage()) for base in groups[0].bases]
    assert len({reference.cdata for reference in memory}) == 1
    set_compute_dtype(model, torch.bfloat16)
    assert all(reference.expired() for reference in memory)
    whole = torch.cat([base.weight for base in groups[0].bases])
    assert torch.equal(groups[0].weight(torch.bfloat16), whole)


def test_scales_in_fp32_give_the_same_weights(base, processor, examples):
    """Un-nested constants: every weight and every logit equal to the bit."""
    batch = Collator(processor)(examples[:3])
    before, logits = copy.deepcopy(base), logits_of(base, batch, torch.float16)
    unnest(base)
    for model in (before, base):
        dequantized = copy.deepcopy(model)
        dequantize(dequantized)
        model.weights = [p.detach() for p in dequantized.parameters()]
    states = [layer.weight.quant_state for layer in linear4bit_layers(base).values()]
    assert not any(state.nested for state in states)
    assert {state.absmax.dtype for state in states} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(before.weights, base.weights, strict=True))
    assert torch.equal(logits, logits_of(base, batch, torch.float16))
    unnest(base)  # once is enough
    assert torch.equal(logits, logits_of(base, batch, torch.float16))


def test_scales_are_kept_in_fp32_where_memory_allows(base, monkeypatch):
    """On a GPU up to a twentieth of what is free, with PyTorch's unused blocks; on a CPU not."""
    states = [layer.weight.quant_state for layer in linear4bit_layers(base).values()]
    more = 3 * sum(state.absmax.numel() for state in states)
    free = int(more / base_weights.MOST_OF_FREE_MEMORY) + 1
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4000)
    unnest_if_small(base, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 1100, 2 * free))
    unnest_if_small(base, torch.device("cuda:0"))
    assert all(state.nested for state in states)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 1000, 2 * free))
    unnest_if_small(base, torch.device("cuda:0"))
    assert not any(state.nested for state in states)


@pytest.mark.parametrize("kind", ["nested", "unnested", "dequantized"])
def test_each_kind_is_counted_to_the_byte(base, kind):
    """The estimate's weights are the sums of a real model's tensors."""
    if kind == "unnested":
        unnest(base)
    if kind == "dequantized":
        dequantize(base)
    estimate = estimate_memory(
        iq.tiny.BASE,
        base_weights="dequantized" if kind == "dequantized" else "4bit",
        nested_constants=kind == "nested",
    )
    tensors = []
    for layer in linear4bit_layers(base).values():
        state = layer.weight.quant_state
        tensors += [layer.weight, state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert estimate.quantized_weights == rounded(tensors)
    rest = [p for p in base.parameters() if p.dtype != torch.uint8]
    assert estimate.other_weights == rounded([*rest, *base.buffers()])


@pytest.mark.slow
def test_what_idefics_9b_takes():
    """17.3 GB for its 8.6 billion weights in 16 bits; 0.4 GB for their scales in fp32."""
    config = configuration("9b")
    nested, unnested, plain = (
        estimate_memory(config, text_tokens=97, **how)
        for how in ({"nested_constants": True}, {}, {"base_weights": "dequantized"})
    )
    in_16_bits = plain.other_weights - nested.other_weights
    assert in_16_bits / 1e9 == pytest.approx(17.3, rel=0.01)
    assert (unnested.static - nested.static) / 1e9 == pytest.approx(0.4, rel=0.05)
    assert plain.quantized_weights == 0
    assert nested.kept == unnested.kept
    assert plain.adapters == nested.adapters
    # The rule of `unnest_if_small` on a card of 16 GB: 9b fits it many times over.
    more = unnested.static - nested.static
    assert more <= base_weights.MOST_OF_FREE_MEMORY * (15e9 - nested.static)


def test_a_random_model_dequantizes_like_a_loaded_one():
    """A model that transformers did not load, as the benchmarks build it."""
    model = random_4bit_model(configuration("small"), torch.device("cpu"))
    number = len(linear4bit_layers(model))
    dequantize(model)
    assert number > 40
    assert not linear4bit_layers(model)


def test_values_that_cannot_work_are_named():
    """An unknown kind, and 16-bit copies of 4-bit values that are not to be made."""
    message = "base_weights='nonsense': expected one of 4bit, dequantized"
    with pytest.raises(ValueError, match=message):
        iq.tiny.load_model(base_weights="nonsense")
    with pytest.raises(ValueError, match=message):
        estimate_memory(iq.tiny.BASE, base_weights="nonsense")
    for function in (iq.load_model, estimate_memory):
        with pytest.raises(ValueError, match="quantize=False makes none: leave one of the two out"):
            function(iq.tiny.BASE, base_weights="dequantized", quantize=False)


def test_memory_that_ends_while_dequantizing_names_the_way_out(monkeypatch):
    """The 16-bit copy may be what does not fit."""

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "dequantize", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 16 * 2**30))
    with pytest.raises(RuntimeError, match=r"1\.0 of 16\.0 GiB.*base_weights='4bit'"):
        iq.tiny.load_model(device="cpu", base_weights="dequantized")
