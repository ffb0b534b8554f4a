"""Each check finds the fault that is planted, and is silent on a healthy run."""

import copy
import json
import logging
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version

import helpers
import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.formats import pokemon_card_example
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.families import FAMILIES
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.training.diagnostics import check_labels

config_of = partial(helpers.config_of, max_steps=2, global_batch_size=4)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


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


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that has begun to read cards, and held-out cards."""
    model, processor = iq.tiny.load_model(device="cpu")
    model = iq.add_lora(model)
    config = iq.TrainConfig(
        output_dir=tmp_path_factory.mktemp("taught"),
        max_steps=24,
        global_batch_size=16,
        micro_batch_size=16,
        learning_rate=8e-3,
        load_best_model_at_end=False,
        num_workers=0,
    )
    torch.manual_seed(0)
    cards = iq.tiny.creature_cards(400, seed=0)
    iq.train(model, processor, cards, config=config, to_example=pokemon_card_example)
    return model, processor, iq.tiny.creature_cards(24, seed=1, split="held_out")


def test_a_model_that_looks(taught):
    """Its loss is lower with the own picture, beyond the interval; its texts read the picture."""
    model, processor, cards = taught
    before = torch.get_rng_state()
    use = iq.image_use(
        model, processor, cards, to_example=pokemon_card_example, fields=iq.tiny.card_fields
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert use.looks
    assert use.num_rows == 24
    assert use.loss["own"] < min(use.loss["another"], use.loss["blank"])
    assert 0 < use.gain[1] < use.gain[0] < use.gain[2]
    assert use.gain[0] == pytest.approx(use.loss["another"] - use.loss["own"], rel=1e-6)
    texts = iq.generate(model, processor, [pokemon_card_example(card).prompt for card in cards])
    right = [
        iq.tiny.card_fields(text).get("name") == card["name"]
        for text, card in zip(texts, cards, strict=True)
    ]
    assert use.fields["name"]["own"] == pytest.approx(sum(right) / len(right))
    assert use.fields.keys() == iq.tiny.FIELDS.keys()
    assert str(use).startswith("This model looks at the pictures")
    again = iq.image_use(model, processor, cards, to_example=pokemon_card_example)
    assert again.gain == use.gain
    other = iq.image_use(model, processor, cards, to_example=pokemon_card_example, seed=1)
    assert other.loss["own"] == use.loss["own"]
    assert other.gain != use.gain


def test_a_model_that_does_not_look(taught, tmp_path, caplog):
    """With its pictures hidden from the text it answers as well with any: said in a sentence."""
    model, processor, cards = taught
    blind = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "alpha" in name:  # the gates of the cross-attention
                parameter.zero_()
    use = iq.image_use(blind, processor, cards, to_example=pokemon_card_example)
    assert not use.looks
    assert use.gain[0] == pytest.approx(0.0, abs=1e-6)
    assert str(use).startswith("This model does not look at the pictures")
    config = config_of(
        tmp_path,
        eval_image_use=True,
        eval_steps=2,
        allow_dead_parts=FAMILIES["idefics"].parts,
        max_steps=2,
    )
    result = iq.train(
        blind, processor, cards, cards[:4], config=config, to_example=pokemon_card_example
    )
    (record,) = [r for r in result.log_history if "eval_loss" in r]
    assert record["eval_looks"] == 0.0
    assert record["eval_loss_another_image"] == pytest.approx(record["eval_loss"], rel=1e-5)
    assert any("does not look at the pictures" in text for text in warnings_of(caplog))


def test_a_model_that_all_but_ignores_pictures(taught):
    """Gates nearly shut: a gain above its 95 % interval's zero, and yet too little to matter."""
    model, processor, cards = taught
    dim = copy.deepcopy(model)
    for name, parameter in dim.named_parameters():
        if "alpha" in name:
            parameter.data *= 0.003
    use = iq.image_use(dim, processor, cards, to_example=pokemon_card_example)
    assert use.gain[1] > 0
    assert not use.looks
    assert str(use).startswith("This model hardly looks at the pictures")


def test_rows_that_share_a_picture_are_one_witness(taught):
    """Four pictures asked about eight times each tell no more than four rows do."""
    model, processor, cards = taught
    use = iq.image_use(model, processor, cards[:4] * 8, to_example=pokemon_card_example)
    assert use.num_rows == 32
    assert use.gain[1] > 0.1
    assert str(use).startswith("32 rows cannot tell")


def test_pictures_are_needed_to_tell(base, processor, examples):
    """Fewer than two rows with pictures cannot be compared."""
    rows = [examples[0], iq.Example(["What?"], " Nothing.")]
    with pytest.raises(ValueError, match="1 of 2 rows have a picture: expected two or more"):
        iq.image_use(base, processor, rows)


def test_rows_with_several_pictures_are_exchanged(base, processor, examples, picture):
    """A row keeps its number of pictures, all of them from other rows."""
    rows = [
        iq.Example([examples[0].prompt[0], picture, "Two?"], " Yes."),
        examples[1],
        iq.Example(["None?"], " No."),
    ]
    assert iq.image_use(base, processor, rows).num_rows == 2


def test_rows_that_share_a_picture_get_others(base, processor, examples, picture):
    """Several questions about one picture are not exchanged among themselves."""
    shared = [iq.Example([picture, f"Question {i}?"], " Yes.") for i in range(3)]
    use = iq.image_use(base, processor, [*shared, examples[0]])
    assert use.gain[0] != 0.0
    with pytest.raises(ValueError, match="all rows show the same pictures"):
        iq.image_use(base, processor, shared)


def test_frozen_adapters_count_as_dead(lora, processor, examples, tmp_path):
    """Whoever switches an adapter's gradient off is told that its part learns nothing."""
    for name, parameter in lora.named_parameters():
        if "vision_model" in name and ".lora_" in name:
            parameter.requires_grad_(False)
    with pytest.raises(iq.DeadAdapters, match="vision tower"):
        iq.train(lora, processor, examples, config=config_of(tmp_path))


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
    config = config_of(tmp_path, precision="fp16", max_steps=30)
    with pytest.raises(FloatingPointError, match=rf"overflow \(first in {name}\)"):
        iq.train(lora, processor, examples, config=config)


def test_samples_are_captioned_at_every_evaluation(lora, processor, cards, tmp_path):
    """The same rows, with picture, target, text and step, in the history and in the checkpoint."""
    config = config_of(
        tmp_path, eval_samples=2, eval_steps=1, save_steps=1, load_best_model_at_end=True
    )
    result = iq.train(
        lora, processor, cards, cards[:3], config=config, to_example=pokemon_card_example
    )
    records = [r for r in result.log_history if "eval_samples" in r]
    assert [r["step"] for r in records] == [1, 2]
    for record in records:
        rows = [sample["row"] for sample in record["eval_samples"]]
        assert rows == ["eval_rows[0]", "eval_rows[1]"]
        for sample, card in zip(record["eval_samples"], cards, strict=False):
            assert sample["target"].startswith(f" This is {card['name']}.")
            assert isinstance(sample["text"], str)
            (file,) = sample["images"]
            assert iq.images.open_image(tmp_path / file).size == (64, 64)
    saved = load_checkpoint(tmp_path / "checkpoint-2").state["log_history"]
    assert [r for r in saved if "eval_samples" in r] == records


def test_evaluation_extras_do_not_change_training(base, processor, cards, tmp_path):
    """Captioning and the image check leave the weights to the bit."""
    ends = []
    for extras in ({}, {"eval_image_use": True, "eval_samples": 2}):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / str(len(extras)), eval_steps=1, precision="fp16", **extras)
        iq.train(model, processor, cards, cards[:3], config=config, to_example=pokemon_card_example)
        ends.append([p.detach().clone() for p in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_fp16_ledger(lora, processor, examples, tmp_path):
    """Scale, skips, the module that overflowed and the advice are in the log and in the result."""
    config = config_of(tmp_path / "healthy", precision="fp16")
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
    config = config_of(tmp_path / "ill", precision="fp16")
    result = iq.train(lora, processor, examples, config=config)
    assert result.fp16_ledger["first_nonfinite_module"] == name
    assert result.fp16_ledger["skipped_windows"] == 1
    assert "precision='bf16'" in result.fp16_ledger["advice"]
    record = next(r for r in result.log_history if "loss" in r)
    assert (record["loss_scale"], record["skipped_windows"]) == (32768.0, 1)


def test_the_environment_is_reported(lora, processor, examples, tmp_path):
    """As JSON values, on the command line, and in every checkpoint; without names of places."""
    report = iq.environment()
    assert report["versions"]["torch"] == version("torch")
    assert json.loads(json.dumps(report)) == report
    done = subprocess.run(
        [sys.executable, "-m", "idefics_qlora.environment"],
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(done.stdout)
    assert printed["versions"] == report["versions"]
    assert done.stderr == ""
    iq.train(lora, processor, examples, config=config_of(tmp_path, max_steps=1))
    state = load_checkpoint(tmp_path / "checkpoint-1").state
    assert state["environment"] == report
