"""The same few held-out rows, captioned at every evaluation."""

import copy
from functools import partial

import helpers
import torch
from helpers import every_family
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.data.rows import RowReader
from idefics_qlora.evaluation.samples import read_samples
from idefics_qlora.model.adapters import trainable_parameters

config_of = partial(helpers.config_of, max_steps=2, global_batch_size=4)


@every_family
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
            (seen,) = Collator(processor).pixels([card["image"]])
            assert iq.images.open_image(tmp_path / file).size == (seen.shape[2], seen.shape[1])
    saved = load_checkpoint(tmp_path / "checkpoint-2").state["log_history"]
    assert [r for r in saved if "eval_samples" in r] == records


def test_pictures_for_people_are_small_and_undistorted(processor):
    """Beside what the model sees; a large photograph is made small at once, in its own shape."""
    images = [Image.new("RGB", size, "red") for size in ((1000, 500), (3, 2000), (20, 30))]
    example = iq.Example([*images, "What?"], " Red.")
    (sample,) = read_samples(RowReader([example], "rows", None, Collator(processor)), [0], 1)
    assert [picture.size for picture in sample.pictures] == [(320, 160), (1, 320), (20, 30)]
    assert {tuple(pixels.shape) for pixels in sample.pixels} == {(3, 64, 64)}


@every_family
def test_evaluation_extras_do_not_change_training(base, processor, cards, tmp_path):
    """Captioning and the image check leave the weights to the bit."""
    ends = []
    for extras in ({}, {"eval_image_use": True, "eval_samples": 2}):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / str(len(extras)), eval_steps=1, precision="fp16", **extras)
        iq.train(model, processor, cards, cards[:3], config=config, to_example=pokemon_card_example)
        ends.append([p.detach().clone() for p in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
