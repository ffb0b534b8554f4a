"""Recipes and parts of the families, by a file of settings and by the memory command."""

import json
from pathlib import Path

import pytest
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.families import family_of


@pytest.fixture
def settings(successor, tmp_path, monkeypatch):
    """Writes a file of settings for one step from a family's base, whose ``lora`` is given."""
    monkeypatch.chdir(tmp_path)
    settings = config_of("run", max_steps=1, global_batch_size=2).to_json()
    names = ("output_dir", "max_steps", "global_batch_size", "precision", "num_workers")
    names += ("load_best_model_at_end", "fast")

    def write(lora, base=None, **model):
        model = {"base": base or successor[0].name_or_path, "device": "cpu", **model}
        train = {name: settings[name] for name in names}
        sections = {"model": model, "lora": lora, "data": {"train": "tiny"}, "train": train}
        Path("run.yaml").write_text(json.dumps(sections, default=str))
        return ["train", "--config", "run.yaml"]

    return write


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_makers_recipe(settings, base):
    """As ``add_lora(model, "makers")``."""
    assert cli.main(settings({"recipe": "makers"})) == 0
    model, _ = iq.load_finetuned("run/checkpoint-1", device="cpu", trainable=True)
    assert trained(model) == trained(iq.add_lora(base, "makers"))
    assert model.active_peft_config.r == 8
    # The run's own file makes the same once more.
    assert cli.main(["train", "--config", "run/config.yaml", "--data.train", "tiny",
                     "--model.device", "cpu", "--train.output_dir", "again"]) == 0  # fmt: skip
    again, _ = iq.load_finetuned("again/checkpoint-1", device="cpu", trainable=True)
    assert trained(again) == trained(model)


def test_parts_that_are_trained_whole(settings, successor):
    """As ``add_lora(model, train_parts=[...])``, beside a configuration of one's own."""
    part = family_of(successor[0]).parts[1]
    lora = {"r": 2, "train_parts": [part]}
    assert cli.main(settings(lora, quantize=False)) == 0
    options = {"device": "cpu", "quantize": False}
    model, _ = iq.load_finetuned("run/checkpoint-1", trainable=True, **options)
    base, _ = iq.load_model(successor[0].name_or_path, **options)
    assert trained(model) == trained(iq.add_lora(base, train_parts=[part]))
    assert model.active_peft_config.r == 2


def test_mistakes_are_told_before_anything_is_loaded(settings, capsys, family):
    """All at once: what the recipe decides, unknown parts, parts in 4 bits, a family without."""
    lora = {"recipe": "makers", "r": 4, "train_parts": ["head"]}
    assert cli.main(settings(lora)) == 2
    told = capsys.readouterr().err
    assert "3 problems" in told
    assert "line 1: lora.r=4: lora.recipe=makers decides it: leave one of them out" in told
    assert f"lora.train_parts=['head']: expected parts of {family}, 'vision tower', " in told
    assert "lora.train_parts=['head']: weights in 4 bits learn nothing: model.quantize" in told
    assert cli.main(settings({"recipe": "makers"}, base="tiny")) == 2
    assert "lora.recipe='makers': those of idefics published none" in capsys.readouterr().err
    assert not Path("run").exists()


def test_memory_is_told_before(successor, capsys):
    """Of the recipe, and of parts that are trained whole: as ``estimate_memory`` has it."""
    name, parts = successor[0].name_or_path, ["vision tower", "text layers"]
    for told, asked in (
        (["--lora", "makers"], {"lora": "makers"}),
        (["--no-quantize", "--train-parts", *parts], {"quantize": False, "train_parts": parts}),
    ):
        assert cli.main(["memory", name, *told]) == 0
        assert capsys.readouterr().out == f"{iq.estimate_memory(name, **asked)}\n"


def test_adapters_of_the_makers_are_counted(base):
    """To the byte: their matrices, with gradients and moments."""
    estimate = iq.estimate_memory(base.name_or_path, lora="makers", optim="adamw_torch")
    model = iq.add_lora(base, "makers")
    sizes = [p.nbytes for p in model.parameters() if p.requires_grad]
    assert estimate.adapters == estimate.gradients == sum(-(-n // 512) * 512 for n in sizes)
    assert estimate.optimizer == 2 * sum(sizes)
