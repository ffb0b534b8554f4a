"""``micro_batch_size="auto"`` on a GPU, with memory that is really short."""

import logging
from dataclasses import replace

import pytest
import torch
from test_gpu import memory_left

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.order import epoch_order
from idefics_qlora.training.micro_batch import available_bytes

pytestmark = pytest.mark.gpu


@pytest.fixture
def rows(cards):
    """Cards with texts of one length, about 120 tokens."""
    return [iq.Example([card["image"], "What?"], " It is." * 40) for card in cards]


def train(folder, rows, number, **changes):
    """Two windows, and an evaluation after each, of a fresh adapter on the GPU."""
    model, processor = iq.tiny.load_model(device="cuda:0")
    settings = {
        "output_dir": folder,
        "max_steps": 2,
        "global_batch_size": number,
        "eval_steps": 1,
        "save_steps": 1,
        "num_workers": 0,
    }
    config = iq.TrainConfig(**{**settings, **changes})
    return iq.train(iq.add_lora(model), processor, rows, rows[:4], config=config)


@pytest.mark.parametrize("fast", [True, False])
def test_with_memory_to_spare_it_is_the_window(rows, tmp_path, fast):
    """Nothing is accumulated where nothing need be."""
    result = train(tmp_path, rows, 32, fast=fast)
    assert result.metrics["micro_batch_size"] == 32


@pytest.mark.parametrize("fast", [True, False])
def test_with_little_memory_it_is_what_fits(rows, tmp_path, caplog, fast):
    """A part of the window, found without running out of memory, and evaluations fit beside."""
    caplog.set_level(logging.INFO)
    train(tmp_path / "warm", rows, 2, fast=fast)  # kernels are loaded
    with memory_left(700):
        result = train(tmp_path / "run", rows, 512, fast=fast)
    size = result.metrics["micro_batch_size"]
    assert 4 <= size < 512
    assert "out of memory" not in caplog.text
    assert result.global_step == 2
    state = load_checkpoint(tmp_path / "run" / "checkpoint-1").state
    assert (state["micro_batch_size"], state["growing"], state["too_large"]) == (size, False, [])


def test_a_longer_window_is_split_for_itself(rows, tmp_path, caplog):
    """Really out of memory, in a window with longer texts: the run's size stays what it was."""
    number = 64
    rows = [rows[n % len(rows)] for n in range(4 * number)]
    for n in epoch_order(42, 0, len(rows))[2 * number : 3 * number]:
        rows[n] = replace(rows[n], completion=" It is." * 600)
    with memory_left(900):
        result = train(tmp_path, rows, number, max_steps=4, eval_steps=4, save_steps=4)
    state = load_checkpoint(tmp_path / "checkpoint-4").state
    assert result.metrics["micro_batch_size"] == state["micro_batch_size"]
    assert "so are windows of that length" in caplog.text
    assert len(state["too_large"]) == 1  # the smallest of what was tried
    assert "goes on, with micro_batch_size" not in caplog.text


def test_the_limit_of_the_process_is_known():
    """What is available follows ``set_per_process_memory_fraction``, where PyTorch tells it."""
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this PyTorch does not tell the fraction")
    device = torch.device("cuda:0")
    with memory_left(300):
        assert available_bytes(device) == pytest.approx(300 * 2**20, rel=0.3)
