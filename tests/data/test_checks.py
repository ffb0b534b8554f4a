"""Plausible mistakes in texts and pictures are told."""

import re

import pytest
from PIL import Image
from told import drawn, found, rows_of, told

import idefics_qlora as iq


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [("What? Answer:", "Yes.", "no space between"), ("What? Answer: ", " Yes.", "2 spaces between"),
     ("The card is", "red", "no space between"), ("What?", "  Yes.", "2 spaces between")],
)  # fmt: skip
def test_spaces_at_the_border_are_told(processor, prompt, completion, expected):
    """A missing space makes another word, a doubled one a token of its own."""
    (line,) = found(processor, [{"prompt": [drawn(0), prompt], "completion": completion}]).values()
    assert line.startswith(f"train_rows[0]: {expected}")


@pytest.mark.parametrize("where", ["prompt", "completion", "turn"])
@pytest.mark.parametrize("token", ["<image>", "</s>", "<end_of_utterance>"])
def test_typed_control_tokens_are_told(processor, where, token):
    """They stay text, which is hardly what was meant."""
    row = {
        "prompt": {"prompt": [drawn(0), f"{token} What?"], "completion": " Yes."},
        "completion": {"prompt": [drawn(0), "What?"], "completion": f" Yes.{token}"},
        "turn": {"messages": [{"role": "user", "content": f"What? {token}"},
                              {"role": "assistant", "content": "Yes."}], "images": [drawn(0)]},
    }[where]  # fmt: skip
    assert re.match(rf"train_rows\[0\]: '{token}' is typed in the text .* and stays text",
                    found(processor, [row])["control tokens typed in texts"])  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["Look at cards/a.png: what is it?", "https://x.example/a.jpg What?", "https://x.example/7 Eh?",
     f"{Image.new('RGB', (2, 2))} What?"],
    ids=["path", "url-with-ending", "url", "picture"],
)  # fmt: skip
def test_a_picture_within_a_text_is_told(base, processor, text, caplog):
    """Also in a turn of a chat, and in what is to be generated from."""
    kind = "a picture's name as text"
    assert kind in found(processor, [{"prompt": [text], "completion": " Yes."}])
    turns = [{"role": "user", "content": text}]
    answer = {"role": "assistant", "content": "Yes."}
    assert kind in found(processor, [{"messages": [*turns, answer]}])
    caplog.clear()
    iq.generate(base, processor, [[drawn(0), "What?"], turns, turns], max_new_tokens=1)
    (line,) = told(caplog)
    assert line.startswith("prompts[1]: the prompt")


def test_odd_pictures_are_told(processor):
    """A few pixels, an extreme shape, one colour: each with its size or colour."""
    rows = rows_of(6)
    rows[2]["prompt"] = [drawn(2), drawn(3, (9, 30)), "What? Answer:"]
    rows[3]["prompt"][0] = drawn(4, (900, 100))
    rows[4]["prompt"][0] = Image.new("RGB", (64, 64), (1, 2, 3))
    lines = found(processor, rows)
    assert lines["tiny pictures"].startswith("train_rows[2]: image 1 has 9 x 30 pixels")
    assert lines["pictures of extreme shape"].startswith("train_rows[3]: image 0 has 900 x 100")
    assert lines["pictures of one colour"].startswith(
        "train_rows[4]: image 0 has one colour, (1, 2, 3)"
    )
    assert len(lines) == 3
