"""The embedded default: cards that can be learnt and told apart, and a base that really looks."""

from collections import Counter

import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.tiny.cards import all_cards


def test_cards_depend_on_the_seed_alone():
    """The same seed gives the same rows and pixels, however many are asked for; another differs."""
    rows, longer, other = (iq.tiny.creature_cards(n, seed=s) for n, s in ((4, 3), (9, 3), (4, 4)))
    captions = [row["caption"] for row in rows]
    assert captions == [row["caption"] for row in longer[:4]]
    assert captions != [row["caption"] for row in other]
    for row, same in zip(rows, longer, strict=False):
        assert row["image"].tobytes() == same["image"].tobytes()


def test_held_out_cards_are_no_training_cards():
    """What is measured was never seen, and both splits show every value equally often."""
    training, held_out = all_cards("train"), all_cards("held_out")
    assert not set(training) & set(held_out)
    assert len(training) == 4 * len(held_out)
    for cards in (training, held_out):
        for axis in range(5):
            counts = Counter(card[axis] for card in cards)
            assert len(set(counts.values())) == 1


def test_rows_have_the_columns_of_the_card_data_set(tmp_path):
    """In memory a row carries its picture; in a directory it is a PNG of the same pixels."""
    (in_memory,) = iq.tiny.creature_cards(1, seed=5)
    assert list(in_memory) == ["id", "image_url", "caption", "name", "hp", "set_name", "image"]
    (on_disk,) = iq.tiny.creature_cards(1, seed=5, directory=tmp_path / "cards")
    assert "image" not in on_disk
    picture = iq.images.open_image(on_disk["image_url"])
    assert picture.size == (160, 216)
    assert picture.tobytes() == in_memory["image"].tobytes()


def test_a_caption_states_what_the_card_is(cards):
    """The fields read from the training text are the card's; a text about nothing states none."""
    for row in cards:
        fields = iq.tiny.card_fields(f"This is {row['name']}. {row['caption']}")
        assert fields.keys() == iq.tiny.FIELDS.keys()
        assert (fields["name"], fields["hp"]) == (row["name"], str(row["hp"]))
        assert all(fields[field] in values for field, values in iq.tiny.FIELDS.items())
    assert iq.tiny.card_fields("What a nice day.") == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"n": 361, "split": "held_out"}, "the split 'held_out' has 270 distinct ones"),
        ({"n": -1}, "asked for -1 cards"),
        ({"n": 1, "split": "test"}, "split is 'test'; expected one of"),
    ],
)
def test_impossible_requests_are_refused(arguments, reason):
    """Too many cards, or an unknown split, is an error that says what there is."""
    with pytest.raises(ValueError, match=reason):
        iq.tiny.creature_cards(**arguments)


def test_the_base_is_a_whole_idefics_in_five_megabytes(base):
    """Every part of the large model is there, open, and small enough to ship."""
    assert sum(path.stat().st_size for path in iq.tiny.BASE.iterdir()) < 5_000_000
    config = base.config
    assert config.use_resampler
    assert config.additional_vocab_size == 2
    parts = {name.split(".")[1] for name, _ in base.named_parameters()}
    assert {"vision_model", "perceiver_resampler", "gated_cross_attn_layers", "layers"} <= parts
    gates = [p for name, p in base.named_parameters() if "alpha" in name]
    assert gates
    assert all(bool((gate != 0).any()) for gate in gates)


def test_the_base_looks_at_pictures(base, processor):
    """It was pre-trained, and its answer depends on the picture: another picture, other logits."""
    collator = Collator(processor)
    cards = iq.tiny.creature_cards(2, seed=0)
    same = "Question: What's on the picture? Answer:"
    batch = collator([iq.Example([card["image"], same], " It") for card in cards])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        first, second = base(**batch.inputs()).logits[:, -1].float().softmax(-1)
    assert (first - second).abs().sum() > 0.05
