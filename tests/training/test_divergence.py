"""What is said of values that are not finite fits their cause: the rate, the precision or a row."""

import copy
import dataclasses
import re
from functools import partial

import helpers
import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.checkpoint import checkpoints
from idefics_qlora.model.adapters import trainable_parameters, without_adapter

config_of = partial(
    helpers.config_of,
    max_steps=6,
    global_batch_size=2,
    eval_steps=1,
    save_steps=1,
    load_best_model_at_end=True,
    save_total_limit=2,
)


def test_a_rate_far_too_high_is_named_first(base, processor, examples, tmp_path):
    """Training that has diverged is told from fp16's limits; what is broken is not gone on from."""
    config = config_of(tmp_path, precision="fp16", learning_rate=100.0, warmup_steps=1)
    with pytest.raises(FloatingPointError, match="25 windows in a row") as caught:
        iq.train(iq.add_lora(base), processor, examples, examples[:2], config=config)
    said = str(caught.value)
    assert re.search(r"training has diverged.*Lower learning_rate=100 and start anew in ano", said)
    assert "precision" not in said
    assert "goes on from the newest checkpoint" not in said
    newest = checkpoints(tmp_path)[-1].name
    assert f"do not go on from the newest, {newest}: it is broken already" in said
    # The way out leads out: the checkpoint that it names gives a finite loss, the newest does not.
    sound = re.search(r"load_finetuned\('(.*?)', trainable=True\)", said).group(1)
    assert sound.endswith("checkpoint-1")  # its step's learning rate was 0
    for folder, finite in ((sound, True), (checkpoints(tmp_path)[-1], False)):
        model, _ = iq.load_finetuned(folder, trainable=True, device="cpu")
        loss = iq.evaluate(model, processor, examples[:2])["eval_loss"]
        assert torch.tensor(loss).isfinite() == finite


def test_the_ledger_names_the_rate(base, processor, examples, tmp_path, caplog):
    """A run that overflowed and ended all the same is told why, also when it is started again."""
    config = config_of(tmp_path, precision="fp16", learning_rate=10.0, max_steps=2)
    config = dataclasses.replace(config, lr_scheduler_type="constant", eval_steps=2, save_steps=2)
    model = iq.add_lora(base)
    result = iq.train(model, processor, examples, examples[:2], config=config)
    assert result.fp16_ledger["skipped_windows"] > 0
    assert re.search("training has diverged.*: lower learning_rate", result.fp16_ledger["advice"])
    again = iq.train(model, processor, examples, examples[:2], config=config)
    assert again.global_step == result.global_step  # nothing was left to do
    assert again.fp16_ledger == result.fp16_ledger
    assert "as is usual at first" not in caplog.text


def test_an_overflow_of_the_base_is_no_matter_of_the_rate(base, processor, examples, tmp_path):
    """Where the base alone overflows too, precision is the advice, and the state is saved."""
    model = iq.add_lora(base)
    calls = []

    def overflow(_, __, output):
        calls.append(1)
        return output * torch.inf if len(calls) > 2 else output

    base.get_submodule("model.layers.0.mlp").register_forward_hook(overflow)
    config = config_of(tmp_path, precision="fp16", eval_steps=20, save_steps=20)
    with pytest.raises(FloatingPointError, match="set precision='bf16'.*newest checkpoint") as told:
        iq.train(model, processor, examples, examples[:2], config=config)
    assert "diverged" not in str(told.value)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_divergence_in_fp32_is_told_too(base, processor, examples, tmp_path):
    """There the run stops at once: the rate is named, not only the window's rows."""
    config = config_of(tmp_path, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="diverged.*: lower learning_rate; the state befo"):
        iq.train(iq.add_lora(base), processor, examples, examples[:2], config=config)


def test_without_its_adapter_a_model_is_its_base(base, processor, examples):
    """For a while; what was frozen in the adapter stays frozen."""
    expected = iq.evaluate(copy.deepcopy(base), processor, examples[:2])["eval_loss"]
    model = iq.add_lora(base)
    frozen, *others = trainable_parameters(model).values()
    frozen.requires_grad_(False)
    for parameter in others:
        parameter.data += 0.1
    with without_adapter(model):
        assert iq.evaluate(model, processor, examples[:2])["eval_loss"] == expected
    assert iq.evaluate(model, processor, examples[:2])["eval_loss"] != expected
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in others)
