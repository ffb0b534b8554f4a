"""The square that a vision tower sees: whole, or a seeded crop."""

import pytest
import torch
from helpers import textured

from idefics_qlora.images import cropping
from idefics_qlora.images.cropping import full_image, random_crop


def test_crop_depends_on_its_seed_alone(picture):
    """The same seed gives the same crop, and the global generators are left as they were."""
    picture = picture.resize((160, 160))
    before = torch.get_rng_state()
    first = random_crop(picture, 64, seed=1)
    torch.rand(5)
    again = random_crop(picture, 64, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, random_crop(picture, 64, seed=2))
    assert not torch.equal(first, full_image(picture, 64))
    torch.set_rng_state(before)
    random_crop(picture, 64, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(160, 120), (2400, 2000)])  # a large one has no memory to share
def test_sharing_the_pictures_memory_changes_nothing(size, monkeypatch):
    """A crop is the same to the bit, however its pixels came from Pillow."""
    picture = textured(size[0], seed=0).resize(size)

    def without(*_):
        raise TypeError

    shared = random_crop(picture, 64, seed=1)
    monkeypatch.setattr("pyarrow.array", without)
    assert torch.equal(shared, random_crop(picture, 64, seed=1))
    monkeypatch.setattr(cropping.RandomResizedCrop, "get_params", lambda image, *_: (5, 9, 80, 70))
    expected = full_image(picture.crop((9, 5, 79, 85)), 64)
    assert torch.equal(random_crop(picture, 64, seed=1), expected)


def test_full_image_equals_the_processor(picture, processor):
    """Evaluation pictures are, to the bit, what the base's own processor makes of them."""
    expected = processor.image_processor(
        [picture], do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    assert torch.equal(full_image(picture, 64), expected[0])
