"""Patches of pictures have the places that the vision towers were trained with."""

import copy

import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.families.patches import patches_of

SIDES = {"idefics2": (70,), "idefics3": (26, 27), "smolvlm": (27, 32)}
"""Patches along a side of the published bases' towers."""


def tower_of(base, side, dtype):
    """Embeddings as a base has them, whose pictures have so many patches a side.

    And the list of the places that they look up.
    """
    config = copy.deepcopy(base.config.vision_config)
    config.image_size, config.hidden_size = side * config.patch_size, 2
    embeddings = type(base.model.vision_model.embeddings)(config).to(dtype)
    places = []
    embeddings.position_embedding.register_forward_pre_hook(lambda _, args: places.append(args[0]))
    return embeddings, places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_do_not_depend_on_the_dtype(base, family, dtype):
    """In 16 bits they are those in fp32, of whole pictures and of smaller ones; the own forward of
    the embeddings, in versions of transformers, gives most patches the place of a neighbour."""
    for side in SIDES[family]:
        own, expected = tower_of(base, side, torch.float32)
        ours, found = tower_of(base, side, dtype)
        is_patch = torch.ones(2, side, side, dtype=torch.bool)
        is_patch[1, side // 2 :] = is_patch[1, :, side // 3 :] = family != "idefics2"
        pixels = torch.zeros(2, 3, *[side * own.patch_size] * 2)
        type(own).forward(own, pixel_values=pixels, patch_attention_mask=is_patch)
        patches_of(ours, pixels.to(dtype), is_patch)
        assert torch.equal(*found, *expected)
        if is_patch.all():
            assert found[0][0].tolist() == list(range(side**2))


def test_a_loaded_base_does_not_use_its_own(successor, processor, examples, monkeypatch):
    """Training layer by layer, evaluation and generation see pictures as the fast way does."""
    embeddings = successor[0].model.vision_model.embeddings

    def wrong(self, pixel_values, patch_attention_mask):
        raise AssertionError

    monkeypatch.setattr(type(embeddings), "forward", wrong)
    base, _ = iq.load_model(successor[0].name_or_path, device="cpu")
    for model in (base, copy.deepcopy(base), iq.add_lora(base)):
        assert iq.evaluate(model, processor, examples[:1])["eval_loss"] > 0
    with pytest.raises(AssertionError):
        type(embeddings)(base.config.vision_config)(torch.zeros(1), torch.zeros(1))
