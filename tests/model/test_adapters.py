"""Adapters: where they are attached, by any name, and the base that they name."""

import copy
import shutil

import pytest
import torch
from gradients import backward, open_adapters, parts_with_gradient
from helpers import config_of, same
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from random_model import configuration
from transformers import IdeficsForVisionText2Text

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import Collator
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.model.base import base_fingerprint

STEPS = {"max_steps": 2, "save_steps": 1}


def named(base, name, **changes):
    """A recipe's adapter that peft itself attached under a name."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(**settings), adapter_name=name)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_may_have_any_name(processor, examples, tmp_path, changes):
    """It trains, is saved, loaded and resumed as one called "default", to the bit."""
    runs = {}
    for name in ("default", "cards"):
        base, _ = iq.tiny.load_model(device="cpu")
        model = named(base, name, **changes)
        iq.train(model, processor, examples, config=config_of(tmp_path / name, **STEPS))
        runs[name] = load_checkpoint(tmp_path / name / "checkpoint-2")
    assert same(runs["cards"].adapter, runs["default"].adapter)
    assert same(runs["cards"].optimizer, runs["default"].optimizer)
    loaded, _ = iq.load_finetuned(tmp_path / "cards" / "checkpoint-2", device="cpu")
    assert same(adapter_tensors(loaded), runs["cards"].adapter)

    # One run begun under one name and ended under another.
    shutil.copytree(tmp_path / "cards" / "checkpoint-1", tmp_path / "other" / "checkpoint-1")
    base, _ = iq.tiny.load_model(device="cpu")
    model = named(base, "other", **changes)
    iq.train(model, processor, examples, config=config_of(tmp_path / "other", **STEPS))
    resumed = load_checkpoint(tmp_path / "other" / "checkpoint-2")
    assert same(resumed.adapter, runs["cards"].adapter)
    assert same(resumed.optimizer, runs["cards"].optimizer)


def base_named_by(folder):
    model, _ = iq.load_finetuned(folder, base=iq.tiny.BASE, device="cpu")
    return model.active_peft_config.base_model_name_or_path


def test_the_base_is_called_by_the_name_that_leads_to_it(lora, processor, examples, tmp_path):
    """A Hub id stays where a copy of the base is used, once it is known to be one; the folder from
    which a base has moved does not. Nor does peft warn of the other name.
    """
    for number, recorded in enumerate(("HuggingFaceM4/idefics-tiny", "/gone/base", "base")):
        lora.active_peft_config.base_model_name_or_path = recorded
        config = config_of(tmp_path / str(number), max_steps=1)
        iq.train(lora, processor, examples, config=config)
        kept = recorded if "/idefics" in recorded else str(iq.tiny.BASE)
        assert base_named_by(tmp_path / str(number) / "checkpoint-1") == kept
    lora.active_peft_config.base_model_name_or_path = "HuggingFaceM4/idefics-tiny"
    lora.save_pretrained(
        tmp_path / "peft", save_embedding_layers=False
    )  # nothing tells that this base is the same
    assert base_named_by(tmp_path / "peft") == str(iq.tiny.BASE)


def test_a_relative_folder_is_recorded_as_it_is_found_from_anywhere(tmp_path, monkeypatch):
    """An adapter that is loaded from another working directory finds its base."""
    shutil.copytree(iq.tiny.BASE, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    model, _ = iq.load_model("models/tiny", device="cpu")
    recorded = iq.add_lora(model).active_peft_config.base_model_name_or_path
    assert recorded == str(tmp_path / "models" / "tiny")


def test_adapters_are_fp32_on_qkv_everywhere(lora):
    """The recipe's adapters: fp32, on q, k and v of all four parts, with its r, alpha, dropout."""
    trainable = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    config = lora.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)


def test_idefics_9b_has_the_tutorials_parameters():
    """19,750,912 trainable of 8,949,430,544, in 234 modules: the tutorial's numbers."""
    with torch.device("meta"):
        model = iq.add_lora(IdeficsForVisionText2Text(configuration("9b")))
    assert model.get_nb_trainable_parameters() == (19_750_912, 8_949_430_544)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 234


def test_the_same_seed_gives_the_same_adapter(base):
    """Adapters start reproducibly, and the global generator is not touched."""
    other = copy.deepcopy(base)
    before = torch.get_rng_state()
    first = adapter_tensors(iq.add_lora(base))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = adapter_tensors(iq.add_lora(other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_pefts_preparation_would_leave_vision_without_gradient(base, processor, examples):
    """The reason why add_lora does not call it; when this fails, peft was mended."""
    model = iq.add_lora(prepare_model_for_kbit_training(base))
    open_adapters(model)
    model.train()
    backward(model, Collator(processor)(examples[:2]))
    counts = parts_with_gradient(model)
    assert counts["vision"][0] == 0
    assert counts["self_attn"][0] == counts["self_attn"][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["input_layernorm"]},
        {"bias": "lora_only"},
        {"bias": "all"},
    ],
    ids=str,
)
def test_other_adapters_train_and_come_back(base, processor, examples, tmp_path, changes):
    """Trained copies and biases are fp32, and their checkpoint is of the base it was trained on."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **changes)
    before = base_fingerprint(base)
    model = iq.add_lora(base, config)
    assert base_fingerprint(model) == before
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    settings = iq.TrainConfig(
        output_dir=tmp_path, max_steps=1, global_batch_size=2, num_workers=0, precision="fp32",
        load_best_model_at_end=False,
    )  # fmt: skip
    iq.train(model, processor, examples, config=settings)
    assert base_fingerprint(model)["architecture"] == before["architecture"]
    again, _ = iq.load_finetuned(tmp_path / "checkpoint-1", device="cpu")
    assert iq.evaluate(again, processor, examples[:2])["eval_loss"] > 0


def test_adapters_on_adapters_are_refused(lora):
    """A notebook cell that is run twice does not stack adapters."""
    with pytest.raises(ValueError, match="has adapters already"):
        iq.add_lora(lora)
