"""Whole runs the fast way on a GPU: what holds for a run holds with graphs as well."""

import copy
import functools
import gc
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import config_of, every_family, same
from peft import LoraConfig

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.captions import pokemon_card_example

pytestmark = pytest.mark.gpu

RUN = """
import json, os, signal, sys
import torch
import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example

folder, options = sys.argv[1], json.loads(sys.argv[2])
kill_at, looks = options.pop("kill_at", None), options.pop("looks", False)
family = options.pop("family")
torch.use_deterministic_algorithms(True)
model, processor = iq.tiny.load_model(family=family, device="cuda:0")
model = iq.add_lora(model)
rows = [pokemon_card_example(card) for card in iq.tiny.creature_cards(24, seed=1)]
for n, row in enumerate(rows):  # of many lengths, the longest shared by few
    image, *question = row.prompt
    rows[n] = iq.Example([image, "And then. " * (5 * n % 13 + 1), *question], row.completion)

def on_log(record):
    if record["step"] == kill_at and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)
    if looks and "loss" in record:
        iq.generate(model, processor, [rows[0].prompt], max_new_tokens=4)

settings = dict(
    max_steps=12, global_batch_size=8, micro_batch_size="auto", logging_steps=1, save_steps=4,
    eval_steps=4, num_workers=2, load_best_model_at_end=False, save_total_limit=None,
)
config = iq.TrainConfig(output_dir=folder, **{**settings, **options})
held_out = rows[:4] if looks else None
iq.train(model, processor, rows[4:], held_out, config=config, on_log=on_log)
"""


def run(folder, **options):
    """A run in a process of its own; its exit status."""
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder), json.dumps(options)],
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        check=False,
    ).returncode


def end_of(folder):
    """Adapter, moments and random states at the end."""
    snapshot = load_checkpoint(folder / "checkpoint-12")
    return {**snapshot.adapter, **snapshot.optimizer, **snapshot.rng}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """What a family's run comes to that nothing happens to."""

    @functools.cache
    def whole(family):
        folder = tmp_path_factory.mktemp("whole")
        assert run(folder, family=family) == 0
        return end_of(folder)

    return whole


@every_family
def test_killed_and_gone_on(wholes, family, tmp_path):
    """With dropout, graphs, mixed lengths and ``auto``, it ends like the untouched, to the bit."""
    assert run(tmp_path, family=family, kill_at=7) == -signal.SIGKILL
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-4"
    assert run(tmp_path, family=family) == 0
    assert same(end_of(tmp_path), wholes(family))


@every_family
def test_looking_changes_nothing(wholes, family, tmp_path):
    """Evaluations, and captions from ``on_log``, between the steps."""
    assert run(tmp_path, family=family, looks=True, eval_steps=1) == 0
    assert same(end_of(tmp_path), wholes(family))


@every_family
def test_the_first_steps_are_those_of_the_eager_way(family, tmp_path, cards):
    """Loss and gradient norm of 20 steps in fp16, without dropout: within 1 %."""
    base, processor = iq.tiny.load_model(family=family, device="cuda:0")
    logs = []
    for fast in (False, True):
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
        model = iq.add_lora(copy.deepcopy(base), lora)
        config = config_of(tmp_path / str(fast), max_steps=20, precision="fp16", fast=fast)
        result = iq.train(model, processor, cards, config=config)
        logs.append([record for record in result.log_history if "loss" in record])
    for eager, fast in zip(*logs, strict=True):
        assert fast["loss"] == pytest.approx(eager["loss"], rel=0.01)
        assert fast["grad_norm"] == pytest.approx(eager["grad_norm"], rel=0.01)


@every_family
def test_windows_of_every_kind(family, tmp_path, cards):
    """Without a picture, with five, of one row: losses are those of the eager way."""
    base, processor = iq.tiny.load_model(family=family, device="cuda:0")
    one = pokemon_card_example(cards[0])
    rows = [
        iq.Example(["Question: What is blue? Answer:"], " The sky."),
        iq.Example([*one.prompt[:1] * 5, "Question: What are they? Answer:"], " Five cards."),
        one,
    ] * 2
    losses = []
    for fast in (False, True):
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
        model = iq.add_lora(copy.deepcopy(base), lora)
        settings = {"global_batch_size": 1, "micro_batch_size": 1, "max_steps": 9, "fast": fast}
        config = config_of(tmp_path / str(fast), precision="fp16", **settings)
        result = iq.train(model, processor, rows, config=config)
        losses.append([record["loss"] for record in result.log_history if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@every_family
def test_two_runs_leave_nothing(family, tmp_path, cards):
    """One after the other in one process: graphs, pools and flat memory are given back."""
    model, processor = iq.tiny.load_model(family=family, device="cuda:0")
    model = iq.add_lora(model)
    held = []
    for name in ("a", "b"):
        config = config_of(tmp_path / name, precision="fp16", fast=True, max_steps=6)
        iq.train(model, processor, cards, config=config)
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[1][0] - held[0][0] < 2**20
    assert held[1][1] - held[0][1] < 100 * 2**20
