"""The model card: what it says of where a model comes from, and that data stays data."""

import re

import pytest
import yaml
from helpers import config_of
from hub import SHA
from huggingface_hub import ModelCard

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.sharing.card import Facts, hub_name, model_card


@pytest.mark.parametrize("path", ["/a/models--me--b/snapshots/" + SHA, "me/b"])
def test_a_base_of_the_cache_is_known_by_its_name(path):
    """Where the Hub's cache lies says what it is."""
    assert hub_name(path)[0] == "me/b"
    for path in ("/data/me/b", "./b", "../b", "~/b"):
        assert hub_name(path) == (None, None)


def test_each_checkpoint_has_a_card_that_may_be_edited(run):
    """Written with the rest, known to no manifest: a changed or missing card is no damage."""
    for number in (1, 2):
        checkpoint = run / f"checkpoint-{number}"
        card = ModelCard.load(checkpoint / "README.md")
        assert card.data.library_name == "peft"
        assert f"after {number} steps" in card.text
        assert f'iq.load_finetuned("{checkpoint.name}")' in card.text
        pictures = re.findall(r"\]\((\.\./eval_samples/[^)]*)\)", card.text)
        assert len(pictures) == 2
        assert all((checkpoint / picture).is_file() for picture in pictures)
        assert not re.search(r"/tmp|idefics_qlora/tiny", card.content)
    (run / "checkpoint-1" / "README.md").write_text("mine")
    (run / "checkpoint-2" / "README.md").unlink()
    assert iq.latest_checkpoint(run).name == "checkpoint-2"
    load_checkpoint(run / "checkpoint-1")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "the base's weights in 4 bits"),
        ({"base_weights": "dequantized"}, "the base's weights in 4 bits"),
        ({"quantize": False}, "the base's weights not quantised"),
    ],
)
def test_a_card_says_whether_the_base_was_quantised(given, told, cards, tmp_path):
    """As it was loaded for training; of a checkpoint that does not know, nothing is claimed."""
    model, processor = iq.tiny.load_model(device="cpu", **given)
    config = config_of(tmp_path / "run", max_steps=1, global_batch_size=2)
    iq.train(iq.add_lora(model), processor, cards[:2], config=config)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert f"Trained with `idefics_qlora`, {told}." in (checkpoint / "README.md").read_text()
    upload = iq.push(checkpoint, "me/x", base="someone/base", dry_run=True)
    assert f"Trained with `idefics_qlora`, {told}." in upload.files["README.md"].decode()
    text = model_card(Facts(), "x", is_on_hub=False, pictures="")
    assert "Trained with `idefics_qlora`.\n" in text


def test_a_card_holds_data_as_data():
    """A text of the data set makes no table, no picture and no script of the card."""
    sample = {"row": "r", "images": [], "target": "a | b\n# c", "text": "<script>![x](y)`"}
    text = model_card(Facts(samples=[sample]), "x", is_on_hub=False, pictures="")
    assert r"| a \| b # c | &lt;script&gt;!\[x\](y)\` |" in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["pipeline_tag"] == "image-text-to-text"
    assert "license" not in header
    assert "base_model" not in header
