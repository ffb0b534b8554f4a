"""Runs that version 0.1 began go on, and end as 0.1 ended them; see ``runs_0_1/write.py``."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import without_clocks
from runs_0_1 import write

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.model.adapters import adapter_tensors

HERE = Path(__file__).parent / "runs_0_1"
LAST = "checkpoint-4"
TOLERANCE = {"fp32": 2e-4, "fp16": 1e-2, "stream": 1e-5}
"""Relative to a tensor's norm, since other libraries and another CPU than wrote the runs round in
another order. Adam divides by a gradient's size, so that where one is nearly zero, rounding becomes
part of a step; at fp32's high learning rate another number of threads alone makes 4e-5. fp16 rounds
at 5e-4, and a CPU that computes in it itself makes 3e-3. A step more or less makes 1e-1."""


@pytest.fixture(autouse=True)
def as_many_threads():
    """Another number of threads than wrote the runs adds up, and rounds, in another order."""
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:  # else whoever runs the tests has chosen
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def assert_equal(ours, theirs, tolerance):
    """Tensors by name: to the bit (0), or nearly: relative to the norm, 8 bits to half a level."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if not tolerance:
            assert torch.equal(ours[name], tensor), name
        elif tensor.dtype.is_floating_point:
            assert (ours[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-6, name
        else:
            assert (ours[name].int() - tensor.int()).abs().float().mean() <= 0.5, name


@pytest.mark.parametrize(("name", "start"), [("fp32", 2), ("fp32", 3), ("fp16", 2), ("stream", 2)])
def test_a_run_of_0_1_goes_on(name, start, tmp_path):
    """From a checkpoint of 0.1, and with its best, to the end that 0.1 itself came to."""
    for step in range(2, start + 1):
        if (checkpoint := HERE / name / f"checkpoint-{step}").is_dir():
            shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    result = write.train(name, tmp_path, write.rows_of(HERE / "rows"), fast=False)
    theirs, ours = load_checkpoint(HERE / name / LAST), load_checkpoint(tmp_path / LAST)
    tolerance = TOLERANCE[name]
    assert_equal(ours.adapter, theirs.adapter, tolerance)
    assert_equal(ours.optimizer, theirs.optimizer, tolerance)
    assert_equal(ours.rng, theirs.rng, 0.0)
    assert ours.state["best_checkpoint"] == theirs.state["best_checkpoint"]
    best = theirs.state["best_checkpoint"]
    assert result.best_checkpoint == (best and tmp_path / best)
    there, here = (without_clocks(run.state["log_history"]) for run in (theirs, ours))
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


def test_other_rows_are_still_told_from_those_of_0_1(tmp_path):
    """The old fingerprint is compared by its old rule: another picture is another row."""
    shutil.copytree(HERE / "fp32" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    shutil.copytree(HERE / "rows", tmp_path / "rows")
    shutil.copy(HERE / "rows" / "3.png", tmp_path / "rows" / "4.png")
    with pytest.raises(ValueError, match="train_rows: other content"):
        write.train("fp32", tmp_path / "run", write.rows_of(tmp_path / "rows"))


def test_a_setting_that_0_1_lacks_was_its_default(tmp_path):
    """A run of 0.1 does not go on with another beta than AdamW's, though it does not name one."""
    shutil.copytree(HERE / "fp32" / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="adam_beta1: was 0.9, now 0.5"):
        write.train("fp32", tmp_path, write.rows_of(HERE / "rows"), fast=False, adam_beta1=0.5)


def test_an_adapter_of_0_1_loads(tmp_path):
    """``load_finetuned`` takes a checkpoint of 0.1, with its base where it is now."""
    model, _ = iq.load_finetuned(HERE / "fp16" / LAST, base=iq.tiny.BASE, device="cpu")
    theirs = load_checkpoint(HERE / "fp16" / LAST).adapter
    assert_equal(adapter_tensors(model), theirs, tolerance=0.0)


def test_the_runs_are_those_of_0_1():
    """Nobody has written them anew: each checkpoint says 0.1.0 and has no key of a later one."""
    states = sorted(HERE.glob("*/checkpoint-*/state.json"))
    assert len(states) == 7
    for file in states:
        state = json.loads(file.read_text())
        assert state["environment"]["versions"]["idefics_qlora"] == "0.1.0"
        assert "run" not in state
