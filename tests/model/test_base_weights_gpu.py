"""What the base's weights take on a GPU in each form, against the estimate; and that they agree."""

import copy
import gc

import memory as benchmark
import pytest
import torch
from micro_batches import QKV, a_batch, adapted, check_equal, gradient, images_of, lengths_of
from random_model import configuration, random_4bit_model

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.model.base_weights import dequantize, linear4bit_layers, unnest
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.memory import estimate_memory
from idefics_qlora.model.precision import autocast

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda:0")
FORMS = {
    "nested": {"nested_constants": True},
    "unnested": {"nested_constants": False},
    "dequantized": {"base_weights": "dequantized"},
}
"""The forms of a base, as estimate_memory is told them."""


@pytest.fixture(scope="module")
def config():
    """idefics-9b with 8 of its 32 text layers: 2.7 billion weights."""
    config = configuration("9b")
    config.num_hidden_layers = 8
    return config


def allocated():
    """Bytes in use; what lies about is gone, and cuBLAS' workspace will be allocated anew."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture
def base_in(config):
    """Builds a random base in one of the forms; the memory is free again after the test."""

    def build(form):
        allocated()
        model = random_4bit_model(config, GPU)
        change = {"nested": lambda _: None, "unnested": unnest, "dequantized": dequantize}[form]
        change(model)
        return model

    yield build
    allocated()


@pytest.fixture
def large_processor(config):
    """The tiny base's processor, for pictures of the large one's size."""
    _, processor = iq.tiny.load_model(device="cpu")
    side = config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    return processor


@pytest.mark.parametrize("form", FORMS)
def test_weights_take_what_is_estimated(config, base_in, form):
    """What is allocated for the loaded base, within 2 %: 16 bits release the packed values."""
    before = allocated()
    model = base_in(form)
    taken = allocated() - before
    estimate = estimate_memory(config, **FORMS[form])
    assert bool(linear4bit_layers(model)) == (form != "dequantized")
    assert estimate.quantized_weights + estimate.other_weights == pytest.approx(taken, rel=0.02)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_takes_what_is_estimated(config, base_in, large_processor, form, micro_batch):
    """The peak of two real training steps, within 5 %."""
    before = allocated()
    model = iq.add_lora(base_in(form))
    row = benchmark.example(large_processor, 97, 1)
    text_tokens = len(Collator(large_processor).tokens([row])[0].ids)
    torch.cuda.reset_peak_memory_stats()
    assert benchmark.train(model, large_processor, row, micro_batch, precision="fp16")
    measured = torch.cuda.max_memory_allocated() - before
    estimate = estimate_memory(config, text_tokens=text_tokens, precision="fp16", **FORMS[form])
    assert estimate.peak(micro_batch) == pytest.approx(measured, rel=0.05)


def test_dequantizing_needs_little_beyond_its_result(config, base_in):
    """The layers change one after the other: never both forms of all of them at once."""
    model = base_in("nested")
    torch.cuda.reset_peak_memory_stats()
    dequantize(model)
    peak = torch.cuda.max_memory_allocated()
    largest = max(p.nbytes for p in model.parameters())
    assert peak < allocated() + 2 * largest


@pytest.fixture
def three(processor, cards, monkeypatch):
    """The tiny base on the GPU with adapters, in each form; a micro-batch."""
    monkeypatch.setattr("idefics_qlora.model.base_weights.MOST_OF_FREE_MEMORY", 0)
    base, _ = iq.tiny.load_model(device=GPU)
    assert all(layer.weight.quant_state.nested for layer in linear4bit_layers(base).values())
    models = {}
    for form in FORMS:
        other = copy.deepcopy(base)
        if form != "nested":
            {"unnested": unnest, "dequantized": dequantize}[form](other)
        torch.manual_seed(0)
        models[form] = adapted(other, precision="fp16", target_modules=QKV)
    return models, a_batch(processor, cards[:4]).to(GPU)


def test_logits_agree(three):
    """The models' own forward pass in 16 bits, to rounding."""
    models, batch = three
    logits = {}
    for form, model in models.items():
        with torch.no_grad(), autocast(GPU, torch.float16):
            logits[form] = model.eval()(**batch.inputs(), use_cache=False).logits.float()
    for form in ("unnested", "dequantized"):
        error = (logits[form] - logits["nested"]).norm() / logits["nested"].norm()
        assert error < 0.01, form


@pytest.mark.parametrize("graphs", [False, True])
def test_fast_losses_and_gradients_agree(three, graphs):
    """The fast path, eagerly and replayed, to rounding."""
    models, batch = three
    number = int((batch.labels != -100).sum())
    results = {}
    for form, model in models.items():
        path = FastPath(model, torch.float16, graphs=graphs)
        for _ in range(3):
            model.zero_grad()
            path.begin_window()
            loss = path.micro_batch_backward(
                batch, number, lengths=lengths_of(batch), images=images_of(batch)
            )
            results[form] = loss.clone(), gradient(model).clone()
        path.close()
    for form in ("unnested", "dequantized"):
        check_equal(results[form], results["nested"], 0.05)


def test_generation_agrees(processor, cards):
    """Greedy texts of both forms; rounding may turn a tie in a few of them."""
    prompts = [[card["image"], "Question: What's on the picture? Answer:"] for card in cards[:6]]
    texts = []
    for base_weights in ("4bit", "dequantized"):
        model, _ = iq.tiny.load_model(device=GPU, base_weights=base_weights)
        texts.append(iq.generate(model, processor, prompts, max_new_tokens=12))
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 4, texts


def test_a_base_saved_on_a_gpu_comes_back(tmp_path, processor):
    """Packed and un-nested on the GPU: the same tensors there and on a CPU."""
    model, _ = iq.tiny.load_model(device=GPU)
    assert not any(layer.weight.quant_state.nested for layer in linear4bit_layers(model).values())
    iq.save_quantized(model, processor, tmp_path / "base")
    for device in (GPU, torch.device("cpu")):
        again = iq.load_model(tmp_path / "base", device=device)[0].state_dict()
        assert again.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again[name].cpu(), tensor.cpu()), name
