"""Overflows in fp16 and values that are not finite: where first, how often, what to do."""

import copy
from functools import partial

import helpers
import pytest
import torch
from helpers import same

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.model.adapters import adapter_tensors, trainable_parameters
from idefics_qlora.model.loss import summed_cross_entropy

config_of = partial(helpers.config_of, max_steps=6, global_batch_size=4, precision="fp16")


def test_the_search_for_an_overflow_changes_nothing(lora, processor, examples, tmp_path):
    """It sees the dropout masks of the window that overflowed, and the next window's are those it
    would have had without."""
    passes = []

    def before(module, _):
        passes.append([module.training and torch.is_grad_enabled(), torch.get_rng_state()])

    def after(_, __, output):
        passes[-1].append(torch.get_rng_state())

    def overflow(_, __, output):
        return output * torch.inf if len(passes) in (1, 3) else output  # and when searched for

    lora.get_base_model().register_forward_pre_hook(before)
    lora.get_base_model().register_forward_hook(after)
    lora.get_submodule(
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default"
    ).register_forward_hook(overflow)
    config = config_of(tmp_path, max_steps=1)
    result = iq.train(lora, processor, examples, config=config)
    assert result.metrics["skipped_windows"] == 1
    assert [is_training for is_training, *_ in passes] == [True, True, False, True, True]
    first, second, searched, third, _ = passes
    assert torch.equal(searched[1], first[1])
    assert torch.equal(third[1], second[2])


def test_the_first_bad_module_is_named(lora, processor, examples, tmp_path, caplog):
    """Among all modules the one that overflows first is found, once."""
    victim_name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default"
    module = lora.get_submodule(victim_name)
    module.register_forward_hook(lambda _, __, output: output * torch.inf)
    config = config_of(tmp_path)
    with pytest.raises(FloatingPointError, match=r"25 windows in a row.*precision='bf16'"):
        iq.train(lora, processor, examples, config=config)
    assert caplog.text.count("the first module with an output that is not finite is") == 1
    assert victim_name in caplog.text
    # What is saved knows the fallen scale, and a restart may try as often again.
    state = load_checkpoint(iq.latest_checkpoint(tmp_path)).state
    assert state["scaler"]["scale"] < 1
    assert (state["window"], state["skips_in_a_row"]) == (25, 0)


def test_what_is_not_finite_can_be_replayed(base, processor, examples, tmp_path):
    """In fp32 the run stops before the update, and its dump leads to the same window again."""
    config = config_of(tmp_path, precision="fp32")

    def broken_at(window):
        model = iq.add_lora(copy.deepcopy(base))
        calls = [0]

        def hook(_, __, output):
            calls[0] += 1
            if calls[0] > 2 * window:  # two micro-batches a window
                output.logits = output.logits * torch.nan

        model.get_base_model().register_forward_hook(hook)
        return model

    with pytest.raises(FloatingPointError, match="(?s)window 2 .rows.*failed-window-2") as caught:
        iq.train(broken_at(2), processor, examples, config=config)
    dump = tmp_path / "failed-window-2"
    assert load_checkpoint(dump).state["global_step"] == 2
    assert str(dump) in str(caught.value)
    again = config_of(tmp_path, precision="fp32", resume=dump)
    rows = str(caught.value).split("(rows ")[1].split(")")[0]
    with pytest.raises(FloatingPointError) as replayed:
        iq.train(broken_at(0), processor, examples, config=again)
    assert f"window 2 (rows {rows})" in str(replayed.value)
    model = iq.add_lora(copy.deepcopy(base))
    assert iq.train(model, processor, examples, config=again).global_step == 6
    # With the same dropout: it ends like a run in which nothing was wrong.
    whole = iq.add_lora(copy.deepcopy(base))
    config = config_of(tmp_path / "whole", precision="fp32")
    iq.train(whole, processor, examples, config=config)
    assert same(adapter_tensors(model), adapter_tensors(whole))


def test_an_infinite_loss_is_an_overflow(lora, processor, examples, tmp_path, monkeypatch):
    """In fp16 a loss that is not finite skips the window, though every gradient is finite."""
    real, losses = summed_cross_entropy, []

    def infinite_once(logits, labels):
        losses.append(real(logits, labels))
        return losses[-1] + (torch.inf if len(losses) == 1 else 0.0)

    monkeypatch.setattr("idefics_qlora.model.loss.summed_cross_entropy", infinite_once)
    config = config_of(tmp_path, max_steps=1)
    result = iq.train(lora, processor, examples, config=config)
    assert result.metrics["skipped_windows"] == 1
    assert result.training_loss < 20


def test_endless_overflow_stops_with_advice(lora, processor, examples, tmp_path):
    """After 25 skipped windows in a row the run says what to do."""
    victim = next(iter(trainable_parameters(lora).values()))
    victim.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    config = config_of(tmp_path, global_batch_size=1, micro_batch_size=1)
    with pytest.raises(FloatingPointError, match="25 windows in a row.*precision='bf16'"):
        iq.train(lora, processor, examples, config=config)


def test_a_later_overflow_is_named_too(lora, processor, examples, tmp_path):
    """The first skip may be a matter of scale; a forward pass that overflows later is found."""
    name = "base_model.model.model.layers.0.mlp"
    victim = next(iter(trainable_parameters(lora).values()))
    steps = []
    victim.register_hook(
        lambda g: torch.full_like(g, torch.inf) if not steps and not steps.append(1) else g
    )
    state = {"calls": 0}

    def overflow(_, __, output):
        state["calls"] += 1
        return output * torch.inf if state["calls"] > 12 else output

    lora.get_submodule(name).register_forward_hook(overflow)
    config = config_of(tmp_path, max_steps=30)
    with pytest.raises(FloatingPointError, match=rf"overflow \(first in {name}\)"):
        iq.train(lora, processor, examples, config=config)


def test_the_fp16_ledger(lora, processor, examples, tmp_path):
    """Scale, skips, the module that overflowed and the advice are in the log and in the result."""
    config = config_of(tmp_path / "healthy", max_steps=2)
    ledger = iq.train(lora, processor, examples, config=config).fp16_ledger
    assert ledger == {
        "loss_scale": 65536.0,
        "skipped_windows": 0,
        "skips_in_a_row": 0,
        "first_nonfinite_module": None,
        "advice": "nothing to do: a few skipped windows at the start are usual",
    }
    name = "base_model.model.model.layers.0.mlp"
    calls = []

    def overflow_once(_, __, output):
        calls.append(1)
        return output * torch.inf if len(calls) in (1, 2, 3) else output

    lora.get_submodule(name).register_forward_hook(overflow_once)
    config = config_of(tmp_path / "ill", max_steps=2)
    result = iq.train(lora, processor, examples, config=config)
    assert result.fp16_ledger["first_nonfinite_module"] == name
    assert result.fp16_ledger["skipped_windows"] == 1
    assert "precision='bf16'" in result.fp16_ledger["advice"]
    record = next(r for r in result.log_history if "loss" in r)
    assert (record["loss_scale"], record["skipped_windows"]) == (32768.0, 1)
