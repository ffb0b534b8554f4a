"""From rows to examples, and what is said of rows that are none."""

import io
from pathlib import Path

import pytest
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.examples import as_example, first_sentence, naming_row, pokemon_card_example


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("Mr. Mime is a card. It has 40 HP.", "Mr. Mime is a card."),
        ("Lt. Surge's Raichu of stage 1. It is rare.", "Lt. Surge's Raichu of stage 1."),
        ("Card No. 151 of the set. It is Mew.", "Card No. 151 of the set."),
        ("It hits for 30+. Then it rests.", "It hits for 30+."),
        ("It waits... Then it acts. It wins.", "It waits... Then it acts."),
        ("It is 3.5 m tall. It flies.", "It is 3.5 m tall."),
        ("No full stop at all", "No full stop at all"),
        ("Does it fly? Yes.", "Does it fly?"),
        ("  Two\n lines. More.", "Two lines."),
    ],
)
def test_first_sentence_is_not_cut_inside_a_name(caption, sentence):
    """Splitting at the first full stop would cut real captions inside names and numbers."""
    assert first_sentence(caption) == sentence


def test_pokemon_card_row(picture):
    """The tutorial's row becomes the tutorial's text."""
    row = {
        "id": "x-1",
        "image": picture,
        "image_url": None,
        "caption": "A Stage 1 card with 90 HP. It attacks.",
        "name": "Mr. Mime",
        "hp": 90,
        "set_name": "Base",
    }
    example = pokemon_card_example(row)
    assert example.prompt[1] == "Question: What's on the picture? Answer:"
    assert example.completion == " This is Mr. Mime. A Stage 1 card with 90 HP."
    assert as_example(row) == example


def test_known_formats_need_no_function(picture):
    """Examples, and mappings with prompt and completion, are taken as they are."""
    example = iq.Example([picture, "What?"], " That.")
    assert as_example(example) is example
    assert as_example({"prompt": [picture, "What?"], "completion": " That."}) == example


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, r"columns \['text'\] is no known format.*to_example="),
        ("hello", "type str is no known format"),
        ({"name": "A", "caption": ""}, "caption=''"),
        (
            {"name": "A", "caption": "B."},
            "no picture: neither `image` nor `image_path` nor `image_url` has a value",
        ),
        ({"prompt": [None, "What?"], "completion": "x"}, "the row has no image"),
        ({"prompt": ["What?"], "completion": " "}, "completion=' ' is empty"),
        ({"prompt": ["What?"], "completion": None}, "completion=None: expected a string"),
        ({"prompt": 3, "completion": "x"}, "prompt=3: expected a list of images and texts"),
        ({"prompt": [], "completion": "x"}, r"prompt=\[\] is empty"),
        ({"prompt": ["https://host/a.png"], "completion": "x"}, "bare URL.*open_image"),
        (
            {"prompt": [3.5], "completion": "x"},
            "prompt item 3.5 .float.: expected text or an image",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(row, message):
    """The error names the row, the value and what was expected."""
    with (
        pytest.raises(ValueError, match=rf"train_rows\[3\]: .*{message}"),
        naming_row("train_rows[3]"),
    ):
        as_example(row)


def test_missing_column_and_wrong_return_are_named(picture):
    """Mistakes in the user's own function point to the row as well."""
    with (
        pytest.raises(ValueError, match="rows.0.: column 'title' is missing"),
        naming_row("rows[0]"),
    ):
        as_example({}, lambda row: iq.Example([picture], row["title"]))
    with pytest.raises(ValueError, match="to_example returned"), naming_row("rows[0]"):
        as_example({}, lambda row: None)


def test_a_bad_image_names_its_row():
    """BadImage stays BadImage, with the row in it."""
    row = {"name": "A", "caption": "B.", "image_url": "no/such.png"}
    with (
        pytest.raises(iq.BadImage, match=r"'no/such.png' of image_url of train_rows\[7\]"),
        naming_row("train_rows[7]"),
    ):
        as_example(row)


def test_images_may_be_given_in_every_form(picture, tmp_path):
    """Paths, bytes and mappings are images; only plain strings are text."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    path = Path(tmp_path, "a.png")
    path.write_bytes(buffer.getvalue())
    prompt = [path, buffer.getvalue(), {"path": str(path)}, Image.new("RGB", (2, 2)), "text"]
    assert iq.Example(prompt, "x").prompt == prompt
