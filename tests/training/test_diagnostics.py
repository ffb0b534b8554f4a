"""Each check finds the fault that is planted, and is silent on a healthy run."""

import copy
import logging
import re
from functools import partial

import helpers
import pytest
import torch
from helpers import warnings_of

import idefics_qlora as iq
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.training.diagnostics import check_labels

config_of = partial(helpers.config_of, max_steps=2, global_batch_size=4)


def test_a_healthy_run_is_told_in_two_lines(lora, processor, examples, tmp_path, caplog):
    """Every adapter has a gradient and moves, the labels are right: no warning, two lines."""
    with caplog.at_level(logging.INFO, "idefics_qlora"):
        result = iq.train(lora, processor, examples, config=config_of(tmp_path))
    assert warnings_of(caplog) == []
    parts = re.findall(
        r"(cross-attention|perceiver|text layers|vision tower) (\d+) of (\d+)", caplog.text
    )
    assert len(parts) == 4
    assert all(alive == every != "0" for _, alive, every in parts)
    assert re.search(r"labels of the first window: \d+% of \d+ tokens are learnt", caplog.text)
    assert result.fp16_ledger is None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_usual_preparation_kills_the_vision_tower(
    base, processor, examples, tmp_path, monkeypatch
):
    """Reentrant checkpointing, as peft's preparation switches it on: the dead part is named, before
    a weight has moved. (The loop would switch it off; here it is kept from that.)"""
    prefix = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{prefix}_checkpointing_enable")({"use_reentrant": True})
    base.enable_input_require_grads()
    model = iq.add_lora(base)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    monkeypatch.setattr("idefics_qlora.training.run.set_activation_checkpointing", lambda *_: None)
    with pytest.raises(iq.DeadAdapters, match=r"no adapter of the vision tower got a gradient"):
        iq.train(model, processor, examples, config=config_of(tmp_path))
    after = trainable_parameters(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def cut_off(model, part):
    """The output of a part's adapters no longer depends on them."""
    for name, module in model.named_modules():
        if part in name and name.endswith("lora_B.default"):
            module.register_forward_hook(lambda _, __, output: output.detach())


def test_a_dead_part_can_be_allowed(lora, processor, examples, tmp_path, caplog):
    """Who means it says so, and is told which adapters never moved."""
    cut_off(lora, "perceiver_resampler")
    with pytest.raises(iq.DeadAdapters, match=r"perceiver.*allow_dead_parts=\('perceiver',\)"):
        iq.train(lora, processor, examples, config=config_of(tmp_path / "a"))
    config = config_of(tmp_path / "b", allow_dead_parts=("perceiver",))
    iq.train(lora, processor, examples, config=config)
    assert "perceiver 0 of" in caplog.text
    assert re.search(r"\d+ adapters never moved: model\.perceiver_resampler", caplog.text)


def test_one_dead_module_is_named(lora, processor, examples, tmp_path, caplog):
    """A single layer without gradient is a warning with its name."""
    cut_off(lora, "layers.1.self_attn.q_proj")
    iq.train(lora, processor, examples, config=config_of(tmp_path))
    assert any("without: " in text and "q_proj" in text for text in warnings_of(caplog))
    assert any("never moved" in text and "q_proj" in text for text in warnings_of(caplog))


def test_text_alone_accuses_nobody(lora, processor, examples, tmp_path):
    """Rows without pictures give the vision tower nothing to learn: that is no fault."""
    rows = [iq.Example(["What is it?"], f" It is {i}.") for i in range(8)]
    assert iq.train(lora, processor, rows, config=config_of(tmp_path)).global_step == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_coverage_with_and_without_recomputation(
    lora, processor, examples, tmp_path, caplog, recompute
):
    """Every adapted module gets its gradient either way."""
    config = config_of(tmp_path, gradient_checkpointing=recompute, max_steps=1)
    with caplog.at_level(logging.INFO, "idefics_qlora"):
        iq.train(lora, processor, examples, config=config)
    assert "adapters with a gradient:" in caplog.text
    assert "without:" not in caplog.text


@pytest.fixture
def window(processor, examples):
    collator = Collator(processor)
    reader = RowReader(examples, "train_rows", None, collator)
    return Windows(reader, seed=42, global_batch_size=4, augment=False)[0], collator


def plant(window, field, change):
    window = copy.deepcopy(window)
    change(window.batch.tensors()[field])
    return window


def test_sound_labels_are_summed_up(window, caplog):
    """A healthy window gives a line and no warning."""
    assert re.match(r"labels of the first window: \d+% of \d+ tokens", check_labels(*window))
    assert warnings_of(caplog) == []


def on_padding(labels, window):
    labels[3, -1] = window.batch.input_ids[3, -1]


def on_image(labels, window):
    place = int((window.batch.input_ids[3] == window.batch.input_ids[3].max()).nonzero()[0])
    labels[3, place] = window.batch.input_ids[3, place]


def on_another_token(labels, window):
    place = int((labels[3] != IGNORE).nonzero()[0])
    labels[3, place] += 1


@pytest.mark.parametrize(
    ("field", "change", "fault"),
    [
        ("labels", lambda t, w: t[3].fill_(IGNORE), "has no target token"),
        ("labels", on_padding, "has padding among its targets"),
        ("labels", on_image, "has image or begin tokens among its targets"),
        ("labels", on_another_token, "has other labels"),
        ("image_attention_mask", lambda t, w: t[3].fill_(False), "has words behind an image"),
    ],
)
def test_wrong_labels_are_named(window, field, change, fault):
    """Each planted fault is found, and the error names the row."""
    window, collator = window
    broken = plant(window, field, lambda tensor: change(tensor, window))
    with pytest.raises(ValueError, match=rf"train_rows\[{window.batch_rows[3]}\] {fault}"):
        check_labels(broken, collator)


def test_cut_completions_are_told(processor, examples, tmp_path, lora, caplog):
    """A max_length that cuts off every end token is a warning, not a silent endless talker."""
    longest = max(len(t.ids) for t in Collator(processor).tokens(examples[:8]))
    config = config_of(tmp_path, max_length=longest - 12)
    iq.train(lora, processor, examples[:8], config=config)
    assert any("learn no end token" in text for text in warnings_of(caplog))


def test_frozen_adapters_count_as_dead(lora, processor, examples, tmp_path):
    """Whoever switches an adapter's gradient off is told that its part learns nothing."""
    for name, parameter in lora.named_parameters():
        if "vision_model" in name and ".lora_" in name:
            parameter.requires_grad_(False)
    with pytest.raises(iq.DeadAdapters, match="vision tower"):
        iq.train(lora, processor, examples, config=config_of(tmp_path))
