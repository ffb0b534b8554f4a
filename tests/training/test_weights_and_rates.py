"""What could pass in silence in model and training is told, with its name and the way out."""

import copy
from functools import partial

import helpers
import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint, save_checkpoint
from idefics_qlora.model.adapters import trainable_parameters

config_of = partial(helpers.config_of, max_steps=2, global_batch_size=4)


def weights(model):
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_under_a_mode_without_gradients(base, processor, examples, tmp_path, mode):
    """Who calls train means to train: it gives the same weights as outside, and the mode stays."""
    ends = []
    for name, context in (("inside", mode), ("outside", torch.enable_grad)):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / name, eval_steps=1)
        with context():
            iq.train(model, processor, examples, examples[:2], config=config)
            assert torch.is_grad_enabled() == (name == "outside")
        ends.append(weights(model))
    assert helpers.same(*ends)


def test_inference_tensors_cannot_be_trained(base, processor, examples, tmp_path):
    """An adapter made under inference_mode is refused before anything is written."""
    with torch.inference_mode():
        model = iq.add_lora(base)
    with pytest.raises(ValueError, match=r"lora_A.* made under torch.inference_mode\(\).*outside"):
        iq.train(model, processor, examples, config=config_of(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def spoil_norm(model):
    module = "model.layers.1.input_layernorm"
    model.get_base_model().get_submodule(module).weight.data[3] = torch.nan
    return module


def spoil_quantised(model):
    """What quantising a checkpoint with one NaN in this layer gives."""
    from bitsandbytes.functional import quantize_4bit

    module = "model.vision_model.encoder.layers.0.mlp.fc1"
    weight = model.get_base_model().get_submodule(module).weight
    values = torch.randn(weight.quant_state.shape)
    values[0, 0] = torch.nan
    _, weight.quant_state = quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    return module


def spoil_adapter(model):
    name, parameter = next(iter(trainable_parameters(model).items()))
    parameter.data[0, 0] = torch.inf
    return name.removeprefix("base_model.model.").removesuffix(".weight")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("spoil", [spoil_norm, spoil_quantised, spoil_adapter])
def test_a_weight_that_is_not_finite_is_named(
    lora, processor, examples, tmp_path, spoil, precision
):
    """In any precision the module is told before the first window, not a row or a scale."""
    module = spoil(lora)
    with pytest.raises(ValueError, match=f"before training: {module};"):
        iq.train(lora, processor, examples, config=config_of(tmp_path, precision=precision))


def test_values_beyond_fp16_are_named(processor, examples, tmp_path):
    """A weight that is finite in fp32 and infinite in the run's precision is a fault of the two."""
    base, _ = iq.tiny.load_model(device="cpu", compute_dtype=torch.float32)
    model = iq.add_lora(base)
    base.get_submodule("model.norm").weight.data[0] = 1e5
    with pytest.raises(ValueError, match=r"before training: model\.norm;.*precision='bf16'"):
        iq.train(model, processor, examples, config=config_of(tmp_path, precision="fp16"))


def test_a_checkpoint_that_is_not_finite_is_named(base, processor, examples, tmp_path):
    """On resume the checkpoint is named; an adapter that it replaces need not be finite."""
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, examples, config=config_of(tmp_path / "run"))
    spoil_adapter(model)
    config = config_of(tmp_path / "run", max_steps=3)
    assert iq.train(model, processor, examples, config=config).global_step == 3
    snapshot = load_checkpoint(tmp_path / "run" / "checkpoint-3")
    next(iter(snapshot.adapter.values()))[0, 0] = torch.nan
    save_checkpoint(tmp_path / "bad" / "checkpoint-3", snapshot)
    config = config_of(tmp_path / "bad", max_steps=4)
    with pytest.raises(ValueError, match=r"lora_.*bad/checkpoint-3 holds them: delete it"):
        iq.train(iq.add_lora(base), processor, examples, config=config)


@pytest.mark.parametrize(
    ("rate", "optim", "told"),
    [(1e-10, "paged_adamw_8bit", True), (1e-8, "adamw_torch", True), (1e-5, "adamw_torch", False)],
)
def test_a_rate_with_which_nothing_moves_is_told(
    lora, processor, examples, tmp_path, caplog, rate, optim, told
):
    """Once, after the first step, with the rate; and it is true: the loss does not move."""
    config = config_of(
        *(tmp_path,), max_steps=4, eval_steps=1, learning_rate=rate, optim=optim, augment=False
    )
    before = iq.evaluate(lora, processor, examples[:8])["eval_loss"]
    result = iq.train(lora, processor, examples[:8], config=config)
    after = iq.evaluate(lora, processor, examples[:8])["eval_loss"]
    said = [text for text in caplog.messages if text.startswith("learning_rate=")]
    assert len(said) == told
    assert result.global_step == 4
    if told:
        assert f"learning_rate={rate:g} is so small that nothing moves: in 4 steps" in said[0]
        assert abs(after - before) < 1e-3 * before
    assert ("learning_rate too small" in caplog.text) == told
