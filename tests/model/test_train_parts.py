"""Parts of a model that are trained whole, beside LoRA matrices or alone."""

import copy
import shutil

import pytest
import torch
from helpers import config_of, differences, every_family, tensors_of
from peft import LoraConfig, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES

import idefics_qlora as iq
from idefics_qlora.families import family_of
from idefics_qlora.model.adapters import trainable_parameters

WHOLE = {"device": "cpu", "quantize": False, "compute_dtype": torch.float32}


@pytest.fixture
def base(bases, family):
    """A family's tiny base that is not quantised."""
    return iq.load_model(bases(family)[0].name_or_path, **WHOLE)[0]


def one_step(folder, **changes):
    return config_of(folder, max_steps=1, global_batch_size=2, **changes)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@every_family
def test_a_whole_part_has_no_matrices(base):
    """All its weights learn, in fp32; the other parts have the recipe's adapters as before."""
    family = family_of(base)
    recipe = trained_names(iq.add_lora(copy.deepcopy(base)))
    expected = {n for n, _ in base.named_parameters() if family.part_of(n) == "vision tower"}
    model = iq.add_lora(base.half(), train_parts=["vision tower"])
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    whole = {name for name in trained_names(model) if ".modules_to_save." in name}
    plain = {n.replace(".modules_to_save.default", "") for n in whole}
    assert {name.removeprefix("base_model.model.") for name in plain} == expected
    assert trained_names(model) - whole == {
        name for name in recipe if family.part_of(name) != "vision tower"
    }


@every_family
def test_every_part_may_be_whole(base):
    """No matrices are left then; embeddings and head stay as they are."""
    family = family_of(base)
    model = iq.add_lora(base, train_parts=family.parts)
    trained = trained_names(model)
    assert all(".modules_to_save." in name for name in trained)
    assert model.peft_config["default"].target_modules == DUMMY_TARGET_MODULES
    learns = {name.replace(".modules_to_save.default", "") for name in trained}
    rest = {name.replace(".original_module", "") for name, _ in model.named_parameters()}
    rest = {n for n in rest - learns if ".modules_to_save." not in n}
    assert rest
    assert all("embed_tokens" in name or "lm_head" in name for name in rest)


@pytest.mark.parametrize("family", ["idefics3"], indirect=True)
def test_a_user_s_own_configuration_is_kept(base):
    """Its modules_to_save are trained too, its object stays as it was."""
    settings = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    model = iq.add_lora(base, settings, train_parts=["vision tower"])
    assert settings.modules_to_save == ["lm_head"]
    trained = trained_names(model)
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert any("vision_model.modules_to_save" in name for name in trained)
    assert not any("vision_model" in name and ".lora_" in name for name in trained)
    assert any(".lora_" in name for name in trained)


@every_family
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_it_trains_goes_on_and_is_loaded(base, processor, mixed, tmp_path):
    """The loss falls, a run that goes on is the untouched one to the bit, and checkpoints load with
    load_finetuned and with peft, which merges them too."""
    parts = family_of(base).parts[:-1]  # the text layers have matrices
    folder, other = tmp_path / "whole", tmp_path / "resumed"
    rows = mixed[-4:]
    settings = {"max_steps": 2, "save_steps": 1, "global_batch_size": 4, "learning_rate": 5e-3}
    model = iq.add_lora(copy.deepcopy(base), train_parts=parts)
    before = iq.evaluate(model, processor, rows)["eval_loss"]
    iq.train(model, processor, rows, config=config_of(folder, **settings))
    after = iq.evaluate(model, processor, rows)["eval_loss"]
    assert after < 0.9 * before

    shutil.copytree(folder / "checkpoint-1", other / "checkpoint-1")
    again = iq.add_lora(copy.deepcopy(base), train_parts=parts, seed=1)
    iq.train(again, processor, rows, config=config_of(other, **settings))
    assert differences(folder / "checkpoint-2", other / "checkpoint-2") == []

    loaded, _ = iq.load_finetuned(folder / "checkpoint-2", **WHOLE)
    assert iq.evaluate(loaded, processor, rows)["eval_loss"] == after
    theirs = PeftModel.from_pretrained(base, str(folder / "checkpoint-2"))
    assert iq.evaluate(theirs, processor, rows)["eval_loss"] == after
    merged = theirs.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not any(
        "lora_" in name or "modules_to_save" in name for name, _ in merged.named_modules()
    )
    assert iq.evaluate(merged, processor, rows)["eval_loss"] == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("family", ["smolvlm"], indirect=True)
def test_in_16_bits_it_trains_too(base, processor, mixed, tmp_path):
    """fp16 with a scaler, activation checkpointing, and every part trained whole in fp32."""
    model = iq.add_lora(base.half(), train_parts=family_of(base).parts)
    settings = {"precision": "fp16", "gradient_checkpointing": True, "learning_rate": 2e-3}
    settings["global_batch_size"] = 4
    result = iq.train(model, processor, mixed[-4:], config=config_of(tmp_path, **settings))
    losses = [record["loss"] for record in result.log_history if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    names = tensors_of(tmp_path / "checkpoint-4")
    assert any("connector.modality_projection.proj.weight" in name for name in names)


@every_family
def test_unknown_parts_are_named(base):
    """With those that there are, and so is a name that is no list."""
    known = ", ".join(map(repr, family_of(base).parts))
    with pytest.raises(ValueError, match=rf"train_parts=\['head'\]: expected a list .*{known}"):
        iq.add_lora(base, train_parts=["head"])
    with pytest.raises(ValueError, match="train_parts='vision tower': expected a list of parts"):
        iq.add_lora(base, train_parts="vision tower")


@every_family
def test_four_bits_cannot_be_trained_whole(bases, family, tmp_path):
    """The error says how to load the base, whether a part or a module was asked for."""
    for wanted in ({"train_parts": ["vision tower"]}, {"config": LoraConfig(
        target_modules=["v_proj"], modules_to_save=["q_proj"])}):  # fmt: skip
        with pytest.raises(ValueError, match=r"_proj would be trained whole .* quantize=False"):
            iq.add_lora(copy.deepcopy(bases(family)[0]), **wanted)
    model = iq.add_lora(iq.load_model(bases(family)[0].name_or_path, **WHOLE)[0],
                        train_parts=["vision tower"])  # fmt: skip
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"would be trained whole .* load_finetuned"):
        iq.load_finetuned(tmp_path, device="cpu")
    assert iq.load_finetuned(tmp_path, device="cpu", base_weights="dequantized")


@every_family
def test_a_whole_part_without_gradient_is_dead(base, processor, mixed, tmp_path, caplog):
    """Coverage counts it as one module."""
    caplog.set_level("INFO")
    model = iq.add_lora(base, train_parts=["vision tower"])
    iq.train(model, processor, mixed, config=one_step(tmp_path / "alive"))
    assert "vision tower 1 of 1" in caplog.text
    tower = model.get_base_model().model.vision_model
    tower.register_forward_hook(
        lambda _, __, output: type(output)({k: v.detach() for k, v in output.items()})
    )
    with pytest.raises(iq.DeadAdapters, match="no adapter of the vision tower got a gradient"):
        iq.train(model, processor, mixed, config=one_step(tmp_path / "dead"))


@every_family
def test_its_memory_is_told_before(base, processor, mixed, tmp_path, caplog):
    """The estimate counts every trained tensor and its moments; the first lines tell of them."""
    caplog.set_level("INFO")
    parts = ["vision tower"]
    options = {"quantize": False, "precision": "fp32", "optim": "adamw_torch"}
    estimate = iq.estimate_memory(base.name_or_path, train_parts=parts, **options)
    weights = [*base.parameters(), *base.buffers()]
    model = iq.add_lora(base, train_parts=parts)
    trainable = list(trainable_parameters(model).values())

    def rounded(tensors):
        return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)

    assert estimate.adapters == estimate.gradients == rounded(trainable)
    assert estimate.optimizer == 2 * sum(p.nbytes for p in trainable)
    assert estimate.quantized_weights == 0
    assert estimate.other_weights >= rounded(weights)  # the base's own are there as well
    iq.train(model, processor, mixed, config=one_step(tmp_path, optim="adamw_torch"))
    whole = sum(p.numel() for n, p in model.named_parameters() if ".modules_to_save." in n)
    told = f"trained whole: parameters of vision tower {whole / 1e6:.3g} M; "
    assert f"{told}with gradients and moments they take {16 * whole / 2**30:.2f} GiB" in caplog.text
