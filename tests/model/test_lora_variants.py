"""Variants of LoRA that peft has: each trains and is loaded again as it was, or says why not."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import config_of
from peft import LoraConfig

import idefics_qlora as iq

VARIANTS = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "all linear layers": {"target_modules": "all-linear"},
    "OLoRA": {"init_lora_weights": "olora"},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def trained_and_loaded(base, processor, cards, folder, settings, quantize=True):
    """The adapter after two steps, and the one that a checkpoint of it gives."""
    model = iq.add_lora(base, LoraConfig(r=16, lora_alpha=32, **settings))
    config = config_of(folder, max_steps=2, global_batch_size=2, learning_rate=0.01, fast=True)
    result = iq.train(model, processor, cards[:4], config=config)
    assert result.global_step == 2
    options = {"device": "cpu", "compute_dtype": torch.float32, "quantize": quantize}
    loaded, _ = iq.load_finetuned(folder / "checkpoint-2", **options)
    return model, loaded


def loss_of(model, processor, cards):
    return iq.evaluate(model, processor, cards[:2])["eval_loss"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_is_loaded_again(name, base, processor, cards, tmp_path):
    """What docs/lora.md shows, for two steps: it learns, and the checkpoint is the model."""
    before = loss_of(base, processor, cards)
    model, loaded = trained_and_loaded(base, processor, cards, tmp_path, VARIANTS[name])
    after = loss_of(model, processor, cards)
    assert after < before
    # A base that was loaded in fp16, trained in fp32, has rounded its embeddings once.
    assert loss_of(loaded, processor, cards) == pytest.approx(after, abs=5e-3)
    assert abs(after - before) > 0.05


@pytest.mark.parametrize("start", ["pissa", "orthogonal", "mica"])
def test_what_takes_from_the_weights_needs_them_whole(start, base, processor, cards, tmp_path):
    """In 4 bits it says why not; on a base that is not quantised it trains and is loaded again."""
    with pytest.raises(ValueError, match=rf"'{start}' cannot work here: .* quantize=False"):
        iq.add_lora(base, LoraConfig(init_lora_weights=start))
    whole, _ = iq.tiny.load_model(device="cpu", quantize=False, compute_dtype=torch.float32)
    settings = {"init_lora_weights": start}
    model, loaded = trained_and_loaded(whole, processor, cards, tmp_path, settings, quantize=False)
    expected = loss_of(model, processor, cards)
    assert loss_of(loaded, processor, cards) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("eva", "what the model does with your rows"),
        ("corda", "what the model does with your rows"),
        ("loftq", "before they are quantised"),
        ("pissa_niter_4", "draws at random"),
    ],
)
def test_a_start_that_cannot_be_says_why(start, why, base):
    """Without a word EVA would begin as plain LoRA, and PiSSA with random parts load as another."""
    settings = LoraConfig()
    settings.init_lora_weights = start  # peft itself asks for scipy before it takes "loftq"
    with pytest.raises(ValueError, match=rf"'{start}' cannot work here: .*{why}.*'olora'"):
        iq.add_lora(base, settings)


def test_a_configuration_without_modules_gets_the_familys(base):
    """LoraConfig(use_dora=True) is enough; the caller's own object stays as it was."""
    settings = LoraConfig(r=4)
    model = iq.add_lora(copy.deepcopy(base), settings)
    assert settings.target_modules is None
    recipe = iq.add_lora(base).peft_config["default"]
    assert model.peft_config["default"].target_modules == recipe.target_modules
    assert {"q_proj", "k_proj", "v_proj"} <= recipe.target_modules


def test_the_page_shows_the_variants_that_are_run():
    """Each line of its table is a case of the tests above."""
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text()
    lines = re.findall(r"^\| ([\w ]+) \| `(\w+=.*?)` \|", page, re.MULTILINE)
    assert {name: eval(f"dict({text})") for name, text in lines} == VARIANTS
