"""What could pass in silence in model and training is told, with its name and the way out."""

import copy
from functools import partial

import helpers
import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.model import trainable_parameters

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
