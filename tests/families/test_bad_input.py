"""What goes wrong is told with the row or the file and the way out, whatever the family."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import SUCCESSORS, config_of, every_family
from pictures import painted

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.rows import RowReader

pytestmark = every_family


def another(family):
    """The next family."""
    every = ["idefics", *SUCCESSORS]
    return every[(every.index(family) + 1) % len(every)]


def test_more_images_than_max_length_allows(lora, processor, examples, tmp_path):
    """The row is named; what is cut is never an image."""
    many = iq.Example([*[painted(64, 64, n) for n in range(80)], "How many?"], " Eighty.")
    config = config_of(tmp_path, max_length=150, on_bad_row="raise")
    with pytest.raises(
        ValueError, match=r"train_rows\[1\]: .*max_length=150.*raise max_length, or remove the row"
    ):
        iq.train(lora, processor, [examples[0], many, *examples[1:8]], config=config)
    prompt = [painted(64, 64), "What?"]
    kept = RowReader([iq.Example(prompt, " That.")], "rows", None, Collator(processor)).read(0)
    assert len(kept[1]) == len(kept[0].images) == 1


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_picture_of_which_nothing_can_be_seen(lora, processor, cards, tmp_path, size):
    """Row and file are named, in training and where it is only looked at."""
    cards[0]["image"].save(tmp_path / "card.png")
    painted(*size).save(tmp_path / "thin.png")
    rows = [{"image": str(tmp_path / f"{n}.png"), "text": "A card."} for n in ("card", "thin")]
    expected = rf"thin.png' of .*train_rows\[[1357]\].*{size[0]} x {size[1]} pixels.*crop it"
    config = config_of(tmp_path / "run", on_bad_row="raise")
    with pytest.raises(iq.BadImage, match=expected):
        iq.train(lora, processor, rows * 4, config=config)
    with pytest.raises(iq.BadImage, match=r"rows\[1\].*crop it, or leave it out"):
        iq.evaluate(lora, processor, rows, on_bad_row="raise")
    with pytest.raises(ValueError, match=r"prompts\[1\].*crop it, or leave it out"):
        iq.generate(lora, processor, [["Who?"], [painted(*size), "Who?"]], max_new_tokens=1)
    assert iq.images.open_image(tmp_path / "thin.png").size == size  # meant for no model


def test_image_tokens_typed_by_a_user(base, processor):
    """They stay text: no place for an image, no forged token, and it can be computed with."""
    collator = Collator(processor)
    typed = f"See <image>{''.join(collator.reader.image_tokens)}?"
    plain, forged = (
        collator([iq.Example([painted(64, 64), text], f" It is {text}")]) for text in ("See", typed)
    )
    for ids in collator.image_ids:
        assert int((forged.input_ids == ids).sum()) == int((plain.input_ids == ids).sum())
    assert "< image>" in collator.tokenizer.decode(forged.input_ids[0])
    example = iq.Example([painted(64, 64), typed], " No.")
    assert 0 < iq.evaluate(base, processor, [example])["eval_loss"] < 30
    said = [iq.Turn("user", [painted(64, 64), typed])]
    if collator.reader.image_token in str(getattr(processor, "chat_template", "")):
        dialogue = collator([iq.Example(said, typed)])
        once = collator([iq.Example([iq.Turn("user", [painted(64, 64), "See"])], "See")])
        for ids in collator.image_ids:
            assert int((dialogue.input_ids == ids).sum()) == int((once.input_ids == ids).sum())


def test_a_processor_of_another_family(bases, family, base, processor, examples, tmp_path):
    """Before anything is computed, by every function that takes a model and a processor."""
    other = bases(another(family))[1]
    expected = (
        f"processor does not go with the model: it is a {type(other).__name__}, that of a "
        f"'{family}' model a {type(processor).__name__}; expected both of one base"
    )
    for function in (iq.evaluate, iq.generate, iq.image_use):
        with pytest.raises(ValueError, match=expected):
            function(base, other, examples[:2])
    with pytest.raises(ValueError, match=expected):
        iq.train(iq.add_lora(base), other, examples, config=config_of(tmp_path))
    assert not list(tmp_path.glob("checkpoint-*"))


def files_of(bases, family, folder):
    """A copy of the files of a family's base."""
    base = Path(bases(family)[0].name_or_path)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(".*"))
    return folder


def test_weights_of_another_family(bases, family, tmp_path):
    """A folder put together from two bases is named, and nothing is made up."""
    folder = files_of(bases, family, tmp_path / "base")
    shutil.copy(Path(bases(another(family))[0].name_or_path) / "config.json", folder)
    with pytest.raises(ValueError, match=rf"weights of {folder} are not those of the '"):
        iq.load_model(folder, device="cpu")


@pytest.mark.parametrize("quantize", [True, False])
def test_weights_of_another_size(bases, family, tmp_path, quantize):
    """transformers lets those of quantised layers pass, and computes with what is there."""
    folder = files_of(bases, family, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    how = "_proj.weight has shape" if quantize else "they have other shapes"
    with pytest.raises(ValueError, match=rf"weights of {folder} are not those of the .*{how}"):
        iq.load_model(folder, device="cpu", quantize=quantize)


def test_a_base_that_lacks_a_weight(bases, family, tmp_path):
    """transformers would make it up, with a warning among others."""
    folder = files_of(bases, family, tmp_path / "base")
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if "layers.0" in name and "q_proj.weight" in name)
    del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights of {folder} .* they lack .*q_proj"):
        iq.load_model(folder, device="cpu")


def test_a_base_of_no_known_family(bases, family, tmp_path):
    """The known ones are listed."""
    folder = files_of(bases, family, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    known = ".*".join(f"'{name}'" for name in ("idefics", *SUCCESSORS))
    with pytest.raises(ValueError, match=f"{folder} is a 'llava' model: expected .*{known}"):
        iq.load_model(folder, device="cpu")


def test_a_checkpoint_of_another_family(bases, family, lora, processor, examples, tmp_path):
    """It is neither resumed nor put upon another base; folder and way out are told."""
    iq.train(lora, processor, examples, config=config_of(tmp_path, max_steps=1))
    model, others = bases(another(family))
    other = iq.add_lora(copy.deepcopy(model))
    before = {name: p.clone() for name, p in other.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}.*checkpoint-1 .*base model.*start anew"):
        iq.train(other, others, examples, config=config_of(tmp_path, max_steps=2))
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters() if n in before)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*trained on another base.*pass the right"):
        iq.load_finetuned(tmp_path, base=model.name_or_path, device="cpu")
