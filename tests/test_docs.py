"""The pages show code that runs."""

import re
from pathlib import Path

import pytest

import idefics_qlora as iq

DATA = Path(__file__).parents[1] / "docs" / "data.md"


def test_the_data_page_runs(cards, tmp_path, monkeypatch, capsys):
    """Every block of Python, one after the other, in a folder with the two pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "cards").mkdir()
    for name, card in zip("ab", cards, strict=False):
        card["image"].save(tmp_path / "cards" / f"{name}.png")
    blocks = re.findall(r"```python\n(.*?)```", DATA.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(DATA), "exec"), names)
        assert isinstance(names["preview"], iq.Preview)
    assert isinstance(names["text"], str)
    assert capsys.readouterr().out.count("── row ") == 8


@pytest.mark.parametrize("family", ["processor", "instruct_processor"])
def test_the_data_page_shows_the_dialogues_as_they_are(family, request):
    """The two written dialogues are what each kind of checkpoint gets."""
    processor = request.getfixturevalue(family)
    page = DATA.read_text(encoding="utf-8")
    dialogues = re.findall(r"```text\n(<s>.*?)\n```", page, re.DOTALL)
    messages = re.search(r'"messages": \[.*?\n        \]', page, re.DOTALL)
    row = eval("{" + messages[0] + "}")
    picture = iq.tiny.creature_cards(1, seed=0)[0]["image"]
    example = iq.examples.as_example({**row, "images": [picture, picture]})
    (tokens,) = iq.batches.Collator(processor).tokens([example])
    text = processor.tokenizer.decode(tokens.ids).replace("<fake_token_around_image>", "")
    assert text == dialogues[family == "processor"]
