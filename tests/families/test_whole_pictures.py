"""Whether pictures are cut into tiles is a setting of loading, and stays with what was trained."""

import json

import pytest
import yaml
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.batches import Collator


@pytest.fixture
def whole(successor):
    """A base that was loaded to see pictures whole, and its processor."""
    return iq.load_model(successor[0].name_or_path, device="cpu", image_splitting=False)


@pytest.fixture
def run(whole, examples, tmp_path):
    """The folder of a run with it."""
    config = config_of(tmp_path / "run", max_steps=1, global_batch_size=2)
    iq.train(iq.add_lora(whole[0]), whole[1], examples, config=config)
    return tmp_path / "run"


def tiles_of(processor, examples):
    """Of the first example's picture."""
    return Collator(processor)(examples[:1]).vision.pixel_values.shape[1]


def test_a_checkpoint_brings_it_along(whole, run, base, successor, examples):
    """Loading, and going on, which another setting cannot; an argument decides."""
    assert tiles_of(whole[1], examples) == 1 < tiles_of(successor[1], examples)
    assert load_checkpoint(run / "checkpoint-1").state["image_splitting"] is False
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["image_splitting"] is False
    model, processor = iq.load_finetuned(run / "checkpoint-1", device="cpu", trainable=True)
    assert tiles_of(processor, examples) == 1
    _, split = iq.load_finetuned(run / "checkpoint-1", device="cpu", image_splitting=True)
    assert tiles_of(split, examples) > 1
    config = config_of(run, max_steps=2, global_batch_size=2)
    with pytest.raises(ValueError, match=r"load_model\(image_splitting=...\): was False, now True"):
        iq.train(iq.add_lora(base), successor[1], examples, config=config)
    assert iq.train(model, processor, examples, config=config).global_step == 2


def test_a_processor_that_was_set_by_hand_is_known_too(base, processor, examples, tmp_path):
    """What counts is what was seen, whoever set it."""
    processor.image_processor.do_image_splitting = False
    config = config_of(tmp_path, max_steps=1, global_batch_size=2)
    iq.train(iq.add_lora(base), processor, examples, config=config)
    _, again = iq.load_finetuned(tmp_path / "checkpoint-1", device="cpu")
    assert tiles_of(again, examples) == 1


@pytest.mark.parametrize("family", ["idefics2"], indirect=True)
def test_what_is_given_away_brings_it_along(run, whole, examples, tmp_path):
    """A merged folder, and an adapter on the Hub."""
    folder = whole[0].name_or_path
    iq.merge(run, tmp_path / "merged", verify=False)
    _, merged = iq.load_model(tmp_path / "merged", device="cpu")
    upload = iq.push(run, "me/mine", base="someone/base", dry_run=True)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in upload.files.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        (arrived / name).parent.mkdir(parents=True, exist_ok=True)
        (arrived / name).write_bytes(content)
    assert json.loads((arrived / "idefics_qlora.json").read_text())["image_splitting"] is False
    _, shared = iq.load_finetuned(arrived, base=folder, device="cpu")
    assert tiles_of(merged, examples) == tiles_of(shared, examples) == 1


def test_it_is_a_setting_of_the_command_line(successor, capsys, tmp_path, monkeypatch):
    """Previewed as it will be trained."""
    monkeypatch.chdir(tmp_path)
    preview = ["preview", "--data.train", "tiny", "--rows", "[0]"]
    preview += ["--model.base", successor[0].name_or_path, "--model.image_splitting"]
    for splits, expected in (("null", True), ("false", False)):
        assert cli.main([*preview, splits]) == 0
        assert ("and the whole" in capsys.readouterr().out) is expected


def test_pictures_of_idefics_are_whole():
    """A setting that cannot act is an error."""
    with pytest.raises(ValueError, match="image_splitting=False: pictures of 'idefics' models are"):
        iq.tiny.load_model(device="cpu", image_splitting=False)
