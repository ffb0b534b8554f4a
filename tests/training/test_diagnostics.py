"""Each check finds the fault that is planted, and is silent on a healthy run."""

import copy
import logging
import re
from functools import partial

import helpers
import pytest
import torch
from helpers import every_family, warnings_of

import idefics_qlora as iq
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.families import family_of
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.training.diagnostics import check_labels

config_of = partial(helpers.config_of, max_steps=2, global_batch_size=4)


@every_family
def test_a_healthy_run_is_told_in_two_lines(lora, processor, examples, tmp_path, caplog):
    """Every adapter has a gradient and moves, the labels are right: no warning, two lines."""
    with caplog.at_level(logging.INFO, "idefics_qlora"):
        result = iq.train(lora, processor, examples, config=config_of(tmp_path))
    assert warnings_of(caplog) == []
    adapted = {
        family_of(lora).part_of(name) for name, p in lora.named_parameters() if p.requires_grad
    }
    parts = re.findall(rf"({'|'.join(adapted)}) (\d+) of (\d+)", caplog.text)
    assert len(parts) == len(adapted) >= 2
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


@every_family
def test_a_dead_part_can_be_allowed(lora, processor, examples, tmp_path, caplog):
    """Who means it says so, and is told which adapters never moved."""
    cut_off(lora, "vision_model")
    dead = r"vision tower.*allow_dead_parts=\('vision tower',\)"
    with pytest.raises(iq.DeadAdapters, match=dead):
        iq.train(lora, processor, examples, config=config_of(tmp_path / "a"))
    config = config_of(tmp_path / "b", allow_dead_parts=("vision tower",))
    iq.train(lora, processor, examples, config=config)
    assert "vision tower 0 of" in caplog.text
    assert re.search(r"\d+ adapters never moved: model\.vision_model", caplog.text)


@every_family
def test_one_dead_module_is_named(lora, processor, examples, tmp_path, caplog):
    """A single layer without gradient is a warning with its name."""
    cut_off(lora, "layers.1.self_attn.q_proj")
    iq.train(lora, processor, examples, config=config_of(tmp_path))
    assert any("without: " in text and "q_proj" in text for text in warnings_of(caplog))
    assert any("never moved" in text and "q_proj" in text for text in warnings_of(caplog))


@every_family
def test_text_alone_accuses_nobody(lora, processor, examples, tmp_path):
    """Rows without pictures give the vision tower nothing to learn: that is no fault."""
    rows = [iq.Example(["What is it?"], f" It is {i}.") for i in range(8)]
    assert iq.train(lora, processor, rows, config=config_of(tmp_path)).global_step == 2


@every_family
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


@every_family
def test_sound_labels_are_summed_up(window, caplog):
    """A healthy window gives a line and no warning."""
    assert re.match(r"labels of the first window: \d+% of \d+ tokens", check_labels(*window))
    assert warnings_of(caplog) == []


def on_padding(labels, window):
    labels[3, -1] = window.batch.input_ids[3, -1]


def on_image(labels, window):
    place = int(window.batch.vision.sees()[3].any(dim=1).nonzero()[0])  # its first token
    labels[3, place] = window.batch.input_ids[3, place]


def on_another_token(labels, window):
    place = int((labels[3] != IGNORE).nonzero()[0])
    labels[3, place] += 1


def blind(window):
    """Nothing of the row sees its pictures."""
    tensors = [t for t in vars(window.batch.vision).values() if isinstance(t, torch.Tensor)]
    (sees,) = [t for t in tensors if t.dtype == torch.bool and t.dim() == 3]
    sees[3] = False


@every_family
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda labels, _: labels[3].fill_(IGNORE), "has no target token"),
        (on_padding, "has padding among its targets"),
        (on_image, "has image or begin tokens among its targets"),
        (on_another_token, "has other labels"),
        (lambda _, window: blind(window), "has words behind an image"),
    ],
)
def test_wrong_labels_are_named(window, change, fault):
    """Each planted fault is found, and the error names the row."""
    window, collator = window
    broken = copy.deepcopy(window)
    change(broken.batch.labels, broken)
    with pytest.raises(ValueError, match=rf"train_rows\[{window.batch_rows[3]}\] {fault}"):
        check_labels(broken, collator)


@every_family
def test_cut_completions_are_told(processor, examples, tmp_path, lora, caplog):
    """A max_length that cuts off every end token is a warning, not a silent endless talker."""
    longest = Collator(processor)(examples[:8]).input_ids.shape[1]
    config = config_of(tmp_path, max_length=longest - 12)
    iq.train(lora, processor, examples[:8], config=config)
    assert any("learn no end token" in text for text in warnings_of(caplog))


@every_family
def test_frozen_adapters_count_as_dead(lora, processor, examples, tmp_path):
    """Whoever switches an adapter's gradient off is told that its part learns nothing."""
    for name, parameter in lora.named_parameters():
        if "vision_model" in name and ".lora_" in name:
            parameter.requires_grad_(False)
    with pytest.raises(iq.DeadAdapters, match="vision tower"):
        iq.train(lora, processor, examples, config=config_of(tmp_path))
