"""Examples and turns put together by hand; what can be none is an error."""

import io
from functools import partial
from pathlib import Path

import helpers
import pytest
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.example import Turn, as_prompt
from idefics_qlora.data.rows import RowReader

config_of = partial(helpers.config_of, max_steps=1)


def test_images_may_be_given_in_every_form(picture, tmp_path):
    """Paths, bytes and mappings are images; only plain strings are text."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    path = Path(tmp_path, "a.png")
    path.write_bytes(buffer.getvalue())
    prompt = [path, buffer.getvalue(), {"path": str(path)}, Image.new("RGB", (2, 2)), "text"]
    assert iq.Example(prompt, "x").prompt == prompt


def test_turns_are_checked(picture):
    """A dialogue put together by hand goes through the same checks."""
    with pytest.raises(ValueError, match="the model learns no user turn"):
        Turn("user", "What?", is_target=True)
    with pytest.raises(TypeError, match="mixes turns with other items"):
        as_prompt([Turn("user", "What?"), picture])
    assert Turn("assistant", "https://host/a.png").content == ("https://host/a.png",)  # an answer
    with pytest.raises(TypeError, match="content=3: expected text, or a list"):
        Turn("user", 3)


@pytest.mark.parametrize("text", ["cards/a.png", " photo.JPEG ", "https://example.com/a?b=1"])
def test_a_picture_given_as_text_is_an_error(lora, processor, tmp_path, text):
    """A path or URL in a prompt would be read as letters, in training and in generation."""
    rows = [{"prompt": [text, "What?"], "completion": " A card."}]
    with pytest.raises(
        ValueError, match=r"train_rows\[0\]: the prompt text .* is (a bare URL|the path)"
    ):
        iq.train(lora, processor, rows, config=config_of(tmp_path))
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: the prompt text .* is (a bare URL|the path)"
    ):
        iq.generate(lora, processor, [["What?"], [text, "What?"]])


def test_a_name_in_a_sentence_is_text():
    """Who asks about a file's name may."""
    assert iq.Example(["What does a.png show?"], " A card.").prompt == ["What does a.png show?"]


@pytest.mark.parametrize(
    "text", ["\u200b", " \u200d\ufeff ", "\u2800", "\u3164\n", "\ufe0f", "\x00"]
)
def test_a_completion_that_cannot_be_seen_is_an_error(processor, text):
    """Zero-width characters and spaces are nothing to learn, in a completion or as a turn."""
    dialogue = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
    rows = [{"prompt": "What?", "completion": text}, {"messages": dialogue}]
    reader = RowReader(rows, "rows", None, Collator(processor))
    with pytest.raises(ValueError, match=r"rows\[0\]: .*nothing of it can be seen"):
        reader.read(0)
    with pytest.raises(ValueError, match=r"rows\[1\]: messages\[1\]: .* is empty"):
        reader.read(1)
    assert iq.Example(["What?"], f"{text}a").completion == f"{text}a"


def test_half_a_character_is_named(base, processor):
    """An unpaired surrogate is said as such, in a prompt, a completion and a turn."""
    half = "a cat \ud83d"
    rows = [
        {"prompt": half, "completion": " Yes."},
        {"prompt": "What?", "completion": half},
        {"messages": [{"role": "user", "content": half}, {"role": "assistant", "content": "Yes."}]},
    ]
    reader = RowReader(rows, "rows", None, Collator(processor))
    for i in range(len(rows)):
        with pytest.raises(
            ValueError, match=rf"rows\[{i}\].* has half a character, '\\ud83d', at position 6"
        ):
            reader.read(i)
    with pytest.raises(ValueError, match=r"prompts\[0\]: .* has half a character"):
        iq.generate(base, processor, [[half]])


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0)])
def test_a_picture_without_pixels_is_a_bad_picture(processor, size):
    """It is named with its row and size."""
    rows = [{"prompt": [Image.new("RGB", size), "What?"], "completion": " A card."}]
    reader = RowReader(rows, "rows", None, Collator(processor))
    with pytest.raises(iq.BadImage, match=rf"rows\[0\]: {size[0]} x {size[1]} pixels"):
        reader.read(0)


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,iVBORw0KGgo=", "/data/my cats/a 1.jpg", "C:\\my cats\\a.png"]
)
def test_a_picture_written_as_text_is_an_error(text):
    """Neither an encoded picture nor a path with spaces is taken for words."""
    with pytest.raises(ValueError, match="a string is text for the model"):
        iq.Example([text, "What? Answer:"], " That.")
    iq.Example(["Look at cats/a 1.jpg: what is it? Answer:"], " That.")
