"""Adapters by any name, and the base that they name."""

import shutil

import pytest
import torch
from helpers import config_of, same
from peft import LoraConfig, get_peft_model

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.model.adapters import adapter_tensors

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
