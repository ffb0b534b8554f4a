"""Examples and turns put together by hand."""

import io
from pathlib import Path

import pytest
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.example import Turn, as_prompt


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
