"""CUDA graphs of micro-batches, which only a GPU can show; ``pytest -m gpu`` runs these alone."""

import gc
import logging
import subprocess
import sys

import pytest
import torch
from helpers import every_family
from micro_batches import QKV, a_batch, adapted, check_equal, gradient, images_of, lengths_of

import idefics_qlora as iq
from idefics_qlora.model import kernels
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.precision import autocast

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda:0")


@pytest.fixture
def make(monkeypatch, family):
    """Makes the tiny base with adapters on the GPU; also the micro-batches of a run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def model(dropout=0.0):
        base, _ = iq.tiny.load_model(family=family, device=GPU)
        return adapted(base, dropout, "fp16", target_modules=QKV)

    return model


@pytest.fixture
def batches(processor, cards):
    """Micro-batches of three shapes, each twice or more; tiles of some are padding."""
    shapes = [a_batch(processor, cards[:4]), a_batch(processor, cards[:2], longest=30)]
    shapes.append(a_batch(processor, cards[4:7], images=2))
    return [shapes[n].to(GPU) for n in (0, 1, 0, 2, 1, 0, 2, 1, 2)]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(path, batches):
    """Loss and gradient of each micro-batch."""
    results = []
    for batch in batches:
        for parameter in path.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        path.begin_window()
        number = int((batch.labels != -100).sum())
        loss = path.micro_batch_backward(
            batch, number, lengths=lengths_of(batch), images=images_of(batch)
        )
        results.append((loss, gradient(path.model).clone()))
    return results


def same(a, b):
    return all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True)
    )


@every_family
def test_gradients_are_the_models_own(make, batches):
    """Eager, while recording and replayed, loss and gradient are 0.1's to rounding."""
    model = make()
    expected = []
    for batch in batches:
        model.zero_grad()
        with autocast(GPU, torch.float16):
            logits = model(**batch.inputs(), use_cache=False).logits
        loss = summed_cross_entropy(logits, batch.labels) / (batch.labels != -100).sum()
        loss.backward()
        expected.append((loss.detach(), gradient(model)))
    path = FastPath(model, torch.float16)
    for actual, reference in zip(run(path, batches), expected, strict=True):
        check_equal(actual, reference, 0.05)
    assert path.counts.graphs == 3
    assert path.counts.replayed >= 6
    path.close()


@every_family
def test_a_graph_is_what_it_recorded(make, batches, deterministic):
    """With dropout, a run by graphs and one without are equal to the bit, and so is one that is
    resumed in the middle, when nothing has been recorded yet."""
    model = make(dropout=0.1)
    start = torch.cuda.get_rng_state()
    path = FastPath(model, torch.float16)
    whole = run(path, batches)
    path.close()
    torch.cuda.set_rng_state(start)
    eager = FastPath(model, torch.float16, graphs=False)
    assert same(run(eager, batches), whole)
    eager.close()
    torch.cuda.set_rng_state(start)
    path = FastPath(model, torch.float16)
    run(path, batches[:4])
    middle = torch.cuda.get_rng_state()
    path.close()
    torch.cuda.manual_seed(123)
    torch.cuda.set_rng_state(middle)
    path = FastPath(model, torch.float16)
    assert same(run(path, batches[4:]), whole[4:])
    path.close()
    assert not torch.equal(whole[0][1], whole[2][1])  # dropout is drawn anew


@every_family
def test_without_triton(make, batches, deterministic, monkeypatch):
    """Where Triton is missing, PyTorch's operations are recorded, dropout included."""
    monkeypatch.setattr(kernels, "usable", lambda tensor: False)
    model = make(dropout=0.1)
    start = torch.cuda.get_rng_state()
    path = FastPath(model, torch.float16)
    whole = run(path, batches)
    assert path.counts.replayed >= 6
    path.close()
    torch.cuda.set_rng_state(start)
    eager = FastPath(model, torch.float16, graphs=False)
    assert same(run(eager, batches), whole)
    eager.close()


@every_family
def test_a_recording_that_fails(make, batches, monkeypatch, caplog):
    """Something that cannot be recorded: one line says so, and training goes on eagerly; random
    numbers, memory and later runs are none the worse."""
    model = make()
    path = FastPath(model, torch.float16)
    expected = run(path, batches)
    path.close()
    kind = type(path.architecture)
    real = kind.hidden_states

    def waiting(*args):
        result = real(*args)
        result.sum().item()
        return result

    monkeypatch.setattr(kind, "hidden_states", waiting)
    path = FastPath(model, torch.float16)
    with caplog.at_level(logging.WARNING):
        for actual, reference in zip(run(path, batches), expected, strict=True):
            check_equal(actual, reference, 0.01)
    assert [r.message for r in caplog.records if "without CUDA graphs" in r.message].__len__() == 1
    assert path.counts.replayed == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    path.close()
    monkeypatch.undo()
    torch.cuda.manual_seed(5)
    numbers = torch.rand(4, device=GPU)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(4, device=GPU), numbers)
    path = FastPath(model, torch.float16)
    run(path, batches)
    assert path.counts.replayed >= 6
    path.close()


FIRST = """
import logging
import sys

import idefics_qlora as iq

model, processor = iq.tiny.load_model(device="cuda:0")
cards = iq.tiny.creature_cards(8, seed=0)
config = iq.TrainConfig(
    output_dir=sys.argv[1], max_steps=6, global_batch_size=4, micro_batch_size=4, save_steps=6,
    load_best_model_at_end=False, logging_steps=1, num_workers=0,
)
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
iq.train(iq.add_lora(model), processor, cards[:4], config=config)
"""


def test_the_first_pass_of_a_process_may_be_recorded(tmp_path):
    """What a recording needs is there, though no thread of this process has computed before."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CUDA graphs were recorded" in done.stdout, done.stdout
    assert "without CUDA graphs" not in done.stdout, done.stdout


@every_family
def test_memory_that_does_not_suffice(make, processor, cards):
    """Out of memory, eagerly or while recording, is told as such; the graphs are freed, a smaller
    micro-batch trains, and afterwards the memory is back."""
    model = make()
    small, large = (a_batch(processor, cards[:n], longest=60).to(GPU) for n in (2, 32))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    path = FastPath(model, torch.float16)
    run(path, [small] * 3)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(path, [large] * 3)
        assert not path._graphs
        run(path, [small] * 3)
        assert path._graphs
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    run(path, [large] * 3)  # with the memory there is
    path.close()
    del path
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before[0] < 2**26
    assert torch.cuda.memory_reserved() - before[1] < 100 * 2**20


@every_family
def test_gradients_that_moved_are_found(make, batches):
    """With other gradient buffers, graphs are recorded anew instead of adding to the old ones."""
    model = make()
    path = FastPath(model, torch.float16)
    expected = run(path, batches)
    for parameter in path.parameters:
        parameter.grad = None
    for actual, reference in zip(run(path, batches), expected, strict=True):
        check_equal(actual, reference, 0.01)
    path.close()


def test_dequantised_to_the_bit(make):
    """Our kernel gives bitsandbytes' numbers."""
    import bitsandbytes as bnb

    for nested in (True, False):
        weight = bnb.nn.Params4bit(
            torch.randn(256, 512), quant_type="nf4", compress_statistics=nested, requires_grad=False
        ).to(GPU)
        weight.quant_state.dtype = torch.float16
        out = torch.empty(256, 512, dtype=torch.float16, device=GPU)
        kernels.dequantize(weight, weight.quant_state, out)
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(out, expected)
