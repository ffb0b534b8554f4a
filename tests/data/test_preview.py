"""What is shown of a batch is what the model gets."""

import os
import sys

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

import idefics_qlora as iq
from idefics_qlora.data import preview as preview_module
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.formats import as_example
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader


@pytest.fixture
def rows(cards, picture):
    """A caption and a dialogue with two pictures and hostile text."""
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who\n<image>?"}]},
        {"role": "assistant", "content": "A <b>creature</b> \x1b[31m."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A gradient."},
    ]
    return [cards[0], {"messages": chat, "images": [cards[1]["image"], picture]}]


@pytest.fixture
def preview(instruct_processor, rows, tmp_path):
    return iq.preview_batch(instruct_processor, rows, image_dir=tmp_path / "png")


def test_it_shows_the_very_batch(preview, instruct_processor, rows):
    """Ids, targets and the images that tokens see are those of the tensors."""
    collator = Collator(instruct_processor)
    batch = collator([as_example(row) for row in rows])
    for b, shown in enumerate(preview.examples):
        length = len(shown.tokens)
        assert [t.id for t in shown.tokens] == batch.input_ids[b, :length].tolist()
        assert [t.is_target for t in shown.tokens] == (batch.labels[b, :length] != IGNORE).tolist()
        seen = torch.zeros_like(batch.vision.image_attention_mask[b])
        for t, token in enumerate(shown.tokens):
            if token.image is not None:
                seen[t, token.image] = True
        assert torch.equal(seen, batch.vision.image_attention_mask[b])
        assert length + shown.padding == batch.input_ids.shape[1]
        for n, path in enumerate(shown.images):
            with Image.open(path) as image:
                assert torch.equal(F.pil_to_tensor(image), batch.vision.pixel_values[b, n])


def test_the_text_is_complete(preview):
    """Each token with its id below it, in order, marked without colours where it is learnt."""
    text = str(preview)
    paths = [str(path) for shown in preview.examples for path in shown.images]  # are never cut
    lines = [line for line in text.splitlines() if not line.endswith(tuple(paths))]
    assert max(map(len, lines)) <= 100
    for shown in preview.examples:
        assert f"row {shown.row}: {len(shown.tokens)} tokens" in text
        assert all(str(path) in text for path in shown.images)
    # Below a part's heading, lines of tokens and of ids take turns until the next empty line.
    parts = [part.splitlines() for part in text.split("\n\n")]
    parts = [lines for lines in parts if lines[0].startswith((" context", " learnt"))]

    def ids(parts):
        return [int(word) for lines in parts for line in lines[2::2] for word in line[3:].split()]

    tokens = [token for shown in preview.examples for token in shown.tokens]
    assert ids(parts) == [token.id for token in tokens]
    learnt = [lines for lines in parts if lines[0].startswith(" learnt")]
    assert ids(learnt) == [token.id for token in tokens if token.is_target]
    assert all(line.startswith(" ┃ ") for lines in learnt for line in lines[1:])
    assert "sees no image" in text
    assert "sees image 1" in text
    assert "padding" in text


def test_a_program_without_a_console_has_its_preview(processor, rows, tmp_path, monkeypatch):
    """Where there is no stdout, as under ``pythonw``, nothing is printed and the page is given."""
    monkeypatch.setattr(sys, "stdout", None)
    assert iq.preview_batch(processor, rows, image_dir=tmp_path)._repr_html_()


def test_what_it_prints(instruct_processor, rows, tmp_path, monkeypatch, capsys):
    """Colours for a terminal that wants them; nothing twice in a notebook; a short repr."""

    def printed(is_terminal, no_color):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
        monkeypatch.setitem(os.environ, "NO_COLOR", no_color)
        preview = iq.preview_batch(instruct_processor, rows, image_dir=tmp_path)
        return preview, capsys.readouterr().out

    preview, out = printed(is_terminal=False, no_color="")
    assert "\x1b" not in out
    assert repr(preview) == "<Preview of rows [0, 1]: print() shows it>"
    assert "\x1b[1;32m" in printed(is_terminal=True, no_color="")[1]
    assert "\x1b" not in printed(is_terminal=True, no_color="1")[1]
    monkeypatch.setattr(preview_module, "_in_notebook", lambda: True)
    assert printed(is_terminal=True, no_color="")[1] == ""
    monkeypatch.delitem(os.environ, "NO_COLOR")


def test_data_cannot_move_the_cursor_or_make_markup(preview):
    """Escape sequences and tags of the data are shown, not obeyed."""
    text = preview.text(color=False)
    assert "\x1b" not in text
    assert "⏎" in text
    html = preview._repr_html_()
    assert "<b>" not in html
    assert "<image>" not in html
    assert "&lt;image&gt;" in html
    assert html.count("data:image/png;base64,") == 3
    assert html.count('class="t learnt') == 2 + sum(  # the legends
        token.is_target for shown in preview.examples for token in shown.tokens
    )
    odd = preview_module._visible("\u200b\x1b")
    assert odd == "\\u200b\\x1b"
    assert preview_module._cells("漢é") == 3


def test_the_settings_of_a_training(processor, rows, examples, tmp_path):
    """loss_on, max_length and the crops of the first epoch are those that training uses."""
    options = {"image_dir": tmp_path, "indices": [3]}
    (shown,) = iq.preview_batch(processor, examples, loss_on="all", **options).examples
    assert sum(t.is_target for t in shown.tokens) == len(shown.tokens) - 4  # <s>, image tokens
    assert shown.row == 3
    length = len(shown.tokens) - 2
    (shown,) = iq.preview_batch(processor, examples, max_length=length, **options).examples
    assert len(shown.tokens) == length
    (shown,) = iq.preview_batch(processor, examples, augment=True, seed=7, **options).examples
    reader = RowReader(examples, "rows", None, Collator(processor))
    whole = Windows(reader, seed=7, global_batch_size=40, augment=True)
    pixels = whole[0].batch.vision.pixel_values
    with Image.open(shown.images[0]) as image:
        assert (F.pil_to_tensor(image) == pixels[:, 0]).flatten(1).all(1).any()


def test_mistakes_are_named(processor, rows):
    """A bad row as in training, and rows that are not there."""
    with pytest.raises(ValueError, match=r"rows\[0\]: .*no known format"):
        iq.preview_batch(processor, [{"txt": "x"}])
    for indices in ([], [2], [-1]):
        with pytest.raises(ValueError, match="expected row numbers, from 0 to 1"):
            iq.preview_batch(processor, rows, indices=indices)
