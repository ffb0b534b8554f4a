"""The memory estimate, against counted bytes of real models and graphs, and a GPU's peaks."""

import dataclasses
import json
import subprocess
import sys
import weakref

import bitsandbytes as bnb
import memory as benchmark
import pytest
import torch
from helpers import every_family
from peft import LoraConfig
from random_model import configuration, random_4bit_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import idefics_qlora as iq
from idefics_qlora.model import memory
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.memory import estimate_memory, main
from idefics_qlora.model.precision import set_activation_checkpointing, set_compute_dtype
from idefics_qlora.training.flat import FlatAdamW

TEXT_TOKENS, IMAGES = 61, 2


def recipe(**changes):
    """The recipe's adapters, without dropout: a CPU keeps its mask in another dtype than a GPU."""
    settings = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    return LoraConfig(**{**settings, **changes})


def rounded(tensors):
    """Bytes of tensors, rounded up as the GPU's allocator does."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def small(request):
    """A small architecture that trains in fp32, where a CPU's graph is a GPU's; its estimate."""
    config, lora = configuration("small"), recipe(use_dora=request.param)
    model = iq.add_lora(random_4bit_model(config, torch.device("cpu")), lora)
    set_compute_dtype(model, torch.float32)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)  # from the micro-batch before
    estimate = estimate_memory(
        config,
        text_tokens=TEXT_TOKENS,
        images=IMAGES,
        precision="fp32",
        lora=lora,
        nested_constants=True,
        fast=False,
    )
    assert estimate.adapters == rounded(trainable_parameters(model).values())
    return model.train(), estimate


@pytest.fixture(scope="module")
def nine_billion():
    """The estimate for idefics-9b at the measured length, through its own layers."""
    return estimate_memory(configuration("9b"), text_tokens=97, nested_constants=True, fast=False)


@pytest.fixture(scope="module")
def fast_nine_billion():
    """The same by the fast way."""
    return estimate_memory(configuration("9b"), text_tokens=97, nested_constants=True)


def random_batch(micro_batch, text_tokens=TEXT_TOKENS, images=IMAGES):
    return {
        "input_ids": torch.randint(0, 1000, (micro_batch, text_tokens)),
        "attention_mask": torch.ones(micro_batch, text_tokens, dtype=torch.int64),
        "pixel_values": torch.randn(micro_batch, images, 3, 56, 56),
        "image_attention_mask": torch.ones(micro_batch, text_tokens, images, dtype=torch.bool),
    }


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operations allocate, until it is freed."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


@every_family
def test_weights_are_counted_to_the_byte(base):
    """NF4 weights with their statistics, and the rest, as in a model that was really loaded."""
    estimate = estimate_memory(base.name_or_path, nested_constants=True)
    layers = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    quantized = []
    for layer in layers:
        state = layer.weight.quant_state
        quantized += [layer.weight, state.absmax, state.offset, state.code]
        quantized += [state.state2.absmax, state.state2.code]
    assert estimate.quantized_weights == rounded(quantized)
    rest = [p for p in base.parameters() if p.dtype != torch.uint8]
    assert estimate.other_weights == rounded([*rest, *base.buffers()])


@every_family
def test_adapters_and_optimizer_are_counted_to_the_byte(lora, tmp_path):
    """Adapters, their gradients and the 8-bit states, as in a step that was really made."""
    name = lora.get_base_model().name_or_path
    estimate = estimate_memory(name)
    trainable = list(trainable_parameters(lora).values())
    assert estimate.adapters == estimate.gradients == rounded(trainable)

    optimizer = FlatAdamW(trainable_parameters(lora), iq.TrainConfig(output_dir=tmp_path))
    tensors, _ = optimizer.state_by_name()
    states = [t for key, t in tensors.items() if not key.rpartition("::")[2].startswith("qmap")]
    assert estimate.optimizer == sum(t.nbytes for t in states)
    plain = estimate_memory(name, optim="adamw_torch")
    assert plain.optimizer == 2 * sum(p.nbytes for p in trainable)


@every_family
def test_unquantised_weights_are_counted(base):
    """quantize=False: every frozen weight in the compute dtype, none in 4 bits."""
    estimate = estimate_memory(base.name_or_path, quantize=False)
    model, _ = iq.load_model(base.name_or_path, device="cpu", quantize=False)
    assert estimate.quantized_weights == 0
    assert estimate.other_weights == rounded([*model.parameters(), *model.buffers()])


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_kept_activations_are_the_saved_tensors(small, micro_batch):
    """Within 2 %, what a real graph saves for its backward pass."""
    model, estimate = small
    batch = random_batch(micro_batch)
    there = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage() for tensor in there}
    saved = weakref.WeakValueDictionary()  # what a graph that is given up held goes with it

    def pack(tensor):
        held = Held(tensor)
        if tensor.untyped_storage() not in known:
            saved[id(held)] = held
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        logits = model(**batch, use_cache=False).logits
    storages = {held.tensor.untyped_storage() for held in saved.values()}
    saved = {storage: storage.nbytes() for storage in storages}
    assert estimate.kept.of(micro_batch) == pytest.approx(
        sum(saved.values()) + logits.nbytes, rel=0.02
    )


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_a_real_backward_pass(small, checkpointing, micro_batch):
    """Within 2 % between forward and backward; at the peak rather too much than too little."""
    model, estimate = small
    set_activation_checkpointing(model, checkpointing)
    batch = random_batch(micro_batch)
    labels = batch["input_ids"].clone()
    there = [*model.parameters(), *(p.grad for p in trainable_parameters(model).values())]
    with LiveBytes([*there, *model.buffers(), *batch.values(), labels]) as live:
        logits = model(**batch, use_cache=False).logits
        between = live.now
        summed_cross_entropy(logits, labels).backward()
    assert estimate.activations(checkpointing).of(micro_batch) == pytest.approx(between, rel=0.02)
    peak = estimate.peak(micro_batch, checkpointing) - estimate.static
    # A layer's temporaries are added up as if all existed at once; beside real weights, as in the
    # cases below, what that exaggerates is small.
    too_much = 1.4 if model.active_peft_config.use_dora else 1.2
    assert 0.98 * live.peak < peak < too_much * live.peak


@pytest.mark.parametrize(
    ("micro_batch", "checkpointing", "gib"),
    [(2, False, 7.4), (8, False, 14.5), (16, False, 23.9), (2, True, 5.3)],
)
def test_idefics_9b_needs_what_was_measured(nine_billion, micro_batch, checkpointing, gib):
    """The peaks of docs/measurements.md, taken on a GPU, within 5 %."""
    assert nine_billion.peak(micro_batch, checkpointing) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(("micro_batch", "gib"), [(2, 6.5), (16, 15.9), (32, 26.7), (64, 48.4)])
def test_the_fast_way_needs_what_was_measured(fast_nine_billion, micro_batch, gib):
    """The peaks of docs/speed.md, taken on a GPU, within 2 %."""
    assert fast_nine_billion.peak(micro_batch) / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batch", "gib"), [(2, 18.3), (16, 27.8)])
def test_a_base_in_16_bits_needs_what_was_measured(micro_batch, gib):
    """The same with the weights dequantised once for all."""
    estimate = estimate_memory(configuration("9b"), text_tokens=97, base_weights="dequantized")
    assert estimate.peak(micro_batch) / 2**30 == pytest.approx(gib, rel=0.02)


def test_what_cannot_go_the_fast_way_is_estimated_as_it_goes():
    """Trained token embeddings: both ways are the model's own layers."""
    lora = recipe(modules_to_save=["lm_head"])
    ways = [estimate_memory(iq.tiny.BASE, lora=lora, fast=fast) for fast in (True, False)]
    assert ways[0] == ways[1]
    assert not ways[0].fast


def test_recomputed_layers_keep_little_the_fast_way(fast_nine_billion):
    """Activation checkpointing keeps a fraction, and its peak is that much lower."""
    estimate = fast_nine_billion
    assert 5 * estimate.inputs.per_example < estimate.kept.per_example
    assert estimate.peak(16, True) < 0.5 * estimate.peak(16, False)
    assert estimate.activations(True).of(16) < estimate.passing(16, True)


def test_idefics_9b_has_the_tutorials_adapters(nine_billion):
    """19,750,912 trainable parameters in fp32, and half a byte for most of the others."""
    assert nine_billion.adapters == 4 * 19_750_912
    assert 0.5 < nine_billion.quantized_weights / 8.6e9 < 0.53


@pytest.mark.parametrize("way", ["nine_billion", "fast_nine_billion"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(way, request):
    """The number in the table leaves the stated margin, and wastes none of a card."""
    nine_billion = request.getfixturevalue(way)
    for checkpointing in (False, True):
        number = nine_billion.largest_micro_batch(24, checkpointing)
        needed = [
            nine_billion.peak(n, checkpointing) * memory.FRAGMENTATION + memory.CONTEXT_BYTES
            for n in (number, number + 1)
        ]
        assert needed[0] <= 24e9 < needed[1]
    assert nine_billion.largest_micro_batch(4) == 0


@pytest.mark.parametrize("fast", [True, False])
def test_what_gets_no_gradient_keeps_nothing(fast):
    """With adapters in the last text layer only, pictures and lower layers are not kept."""
    config = configuration("small")
    top = recipe(target_modules=r".*model\.layers\.3\.self_attn\.q_proj")
    estimates = [
        estimate_memory(config, text_tokens=50, images=n, lora=top, fast=fast) for n in (1, 4)
    ]
    pixels = 3 * 3 * 56**2 if fast else 0  # of three images, in uint8
    more = estimates[1].kept.per_example - estimates[0].kept.per_example
    assert pixels <= more <= 1.05 * pixels
    whole = estimate_memory(config, text_tokens=50, fast=fast)
    assert estimates[0].kept.per_example < 0.5 * whole.kept.per_example
    assert estimates[0].adapters < whole.adapters


def test_a_text_without_pictures_is_estimated():
    """The collator pads such a batch with a blank picture, so it takes as much as with one."""
    none, one = (estimate_memory(iq.tiny.BASE, images=n) for n in (0, 1))
    assert dataclasses.replace(none, images=1) == one
    assert "100 text tokens and 0 images per example" in str(none)


def test_dora_adds_what_it_computes_of_whole_matrices(small):
    """Where activations are few, the matrices that DoRA makes for a moment are the peak."""
    model, _ = small
    lora = model.active_peft_config
    sizes = {"text_tokens": 8, "images": 1}
    estimate = estimate_memory(
        configuration("small"), **sizes, precision="fp32", lora=lora, fast=False
    )
    set_activation_checkpointing(model, False)
    batch = random_batch(1, **sizes)
    there = [*model.parameters(), *(p.grad for p in trainable_parameters(model).values())]
    with LiveBytes([*there, *model.buffers(), *batch.values()]) as live:
        model(**batch, use_cache=False).logits.sum().backward()
    assert 0.98 * live.peak < estimate.peak(1) - estimate.static < 1.4 * live.peak
    unquantised = estimate_memory(configuration("small"), **sizes, lora=lora, quantize=False)
    assert unquantised.adapters == estimate.adapters


def test_adapters_whose_start_depends_on_weights_are_estimated():
    """PiSSA computes its first values from the weights; their size needs none, nor the caller's."""
    settings = recipe(init_lora_weights="pissa")
    estimate = estimate_memory(configuration("small"), lora=settings)
    assert estimate.adapters == estimate_memory(configuration("small"), lora=recipe()).adapters
    assert settings.init_lora_weights == "pissa"


def test_estimating_leaves_no_trace():
    """No random number is drawn, autocast is as before, and the configuration is the caller's."""
    config = configuration("small")
    before = config.to_dict(), torch.get_rng_state()
    estimate_memory(config)
    assert config.to_dict() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not torch.is_autocast_enabled("cuda")
    assert estimate_memory(config) == estimate_memory(config)


def test_the_table_has_every_part_and_card(capsys):
    """print and the command line show the same table: parts, activations and cards."""
    printed = str(main([str(iq.tiny.BASE), "--text-tokens", "40", "--micro-batch", "3"]))
    assert capsys.readouterr().out == printed + "\n"
    for label in ("4-bit weights", "adapters", "gradients", "optimizer", "per example"):
        assert label in printed
    for label in ("peak at micro-batch 3", "16 GB", "24 GB", "40 GB", "80 GB"):
        assert label in printed
    assert printed.startswith(f"{iq.tiny.BASE}: 40 text tokens and 1 image per example, fp16")


def test_the_command_says_nothing_else():
    """No warning that the package has imported the module already."""
    command = [sys.executable, "-m", "idefics_qlora.model.memory", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "usage: python -m idefics_qlora.model.memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_tokens": 0}, "text_tokens=0: expected a whole number of at least 1"),
        ({"images": 1.5}, "images=1.5: expected a whole number of at least 0"),
        ({"images": -1}, "images=-1: expected a whole number of at least 0"),
        ({"micro_batch": -1}, "micro_batch=-1: expected a whole number"),
        ({"precision": "int8"}, "precision='int8': expected one of auto, fp16, bf16, fp32"),
        ({"optim": "sgd"}, "optim='sgd': expected one of paged_adamw_8bit, adamw_torch"),
    ],
)
def test_values_that_cannot_work_are_named(arguments, message):
    """Field, value and what is expected, before anything is built."""
    with pytest.raises(ValueError, match=message):
        estimate_memory(iq.tiny.BASE, **arguments)


def test_another_checkpoint_is_refused(tmp_path):
    """Only IDEFICS can be estimated; a missing folder is said to be missing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama' model: expected the 'idefics'"):
        estimate_memory(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        estimate_memory(tmp_path / "missing")


def test_the_benchmark_compares_estimate_and_gpu(capsys):
    """The code that measures idefics-9b on a GPU runs here, with nothing to compare on a CPU."""
    records = benchmark.main(
        [
            *("--architectures", "small", "--micro-batches", "1", "--precision", "fp32"),
            *("--text-tokens", "40", "--images", "2"),
        ]
    )
    assert [record["gradient_checkpointing"] for record in records] == [False, True]
    assert all(record["fits"] and 35 <= record["text_tokens"] <= 45 for record in records)
    if not torch.cuda.is_available():
        assert "| 2 | 1 | recomputed |" in capsys.readouterr().out


def test_the_benchmark_prints_estimates(capsys):
    """The tables of what fits need neither weights nor a GPU."""
    arguments = ["--architectures", "small", "--text-tokens", "40", "--images", "1"]
    (record,) = benchmark.main([*arguments, "--estimate-only"])
    assert set(record["fitting"]) == set(memory.CARDS)
    assert "| 16 GB | 24 GB | 40 GB | 80 GB |" in capsys.readouterr().out
