"""What the first rows show is told before a run starts; sound rows give no line."""

import random
import re
from functools import partial

import datasets
import helpers
import pytest
from PIL import Image
from told import drawn, found, rows_of, told

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.data.order import epoch_order
from idefics_qlora.data.rows import RowReader

config_of = partial(helpers.config_of, max_steps=1)


def test_sound_rows_are_not_warned_of(processor, examples, cards):
    """Cards, several questions about one picture, chats, spaces where they belong: no line."""
    assert found(processor, examples, held_out=rows_of(4)) == {}
    assert found(processor, cards, pokemon_card_example) == {}
    picture = drawn(1)
    questions = [
        {"prompt": [picture, f"Question {i}? Answer: "], "completion": f"It is {i}."}
        for i in range(8)
    ]
    assert found(processor, questions + rows_of(1)) == {}
    chats = [
        {"messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"See {i}?"}]},
            {"role": "assistant", "content": "http://www.acme.example"}], "images": [drawn(i)]}
        for i in range(5)
    ]  # fmt: skip
    assert found(processor, chats) == {}
    texts = [
        ("Answer:\n", "Yes."),
        ("Answer:", "\nYes."),
        ("(", "Yes.)"),
        ("这是什么?", "一张卡。"),
    ]
    texts += [("图片里有什么\uff1a", "Card"), ("What? Answer: ", "Yes."), ("", "Yes.")]
    assert found(processor, [{"prompt": [drawn(i), p], "completion": c}
                             for i, (p, c) in enumerate(texts)]) == {}  # fmt: skip


def test_the_quickstarts_rows_are_sound(processor):
    """A thousand cards and those held out repeat none and give no warning."""
    train_rows = iq.tiny.creature_cards(1000, seed=0)
    held_out = iq.tiny.creature_cards(32, seed=1, split="held_out")
    assert found(processor, train_rows, pokemon_card_example, held_out) == {}


def test_warnings_are_told_once_and_summed_up(lora, processor, tmp_path, caplog):
    """A line at the start for each kind, with row and number, and one at the end."""
    rows = rows_of(8)
    for row in rows[3:5]:
        row["completion"] = row["completion"].strip()
    rows[6]["prompt"][0] = Image.new("RGB", (4, 4), "red")
    iq.train(lora, processor, rows, rows[:2], config=config_of(tmp_path, max_steps=2, eval_steps=2))
    lines = told(caplog)
    assert len(lines) == 5
    assert re.match(
        r"train_rows\[[34]\]: no space between .*'What is it\? Answer:'.*'Card [34]\.'"
        r".*: begin the completion with one.*\(2 of 8 rows looked at\)",
        lines[0],
    )
    summary = lines[-1]
    assert summary.startswith("4 warnings in this run")
    assert "spaces before completions (2 times); tiny pictures; pictures of one colour" in summary
    assert "evaluation rows among the training rows (2 times)" in summary


def test_one_picture_for_all_rows_is_told(processor):
    """Rows of other texts that all show the same picture; two such rows are no sign yet."""
    rows = rows_of(6)
    for row in rows:
        row["prompt"][0] = drawn(0)
    (line,) = found(processor, rows).values()
    assert line.startswith("train_rows: the 6 rows with a picture that were looked at all show")
    assert found(processor, rows[:2]) == {}


def test_missing_pictures_are_told(processor):
    """In some rows, or in all."""
    rows = rows_of(6)
    rows[4] = {"prompt": "What? Answer:", "completion": " Nothing."}
    (line,) = found(processor, rows).values()
    assert line.startswith("train_rows[4]: has no picture, though others have")
    (line,) = found(processor, rows[4:5]).values()
    assert line.startswith("train_rows: none of the 1 rows looked at has a picture")


def test_a_row_many_times_longer_is_told(lora, processor, tmp_path, caplog):
    """Among the first rows, or in a later window; with its cost and a max_length."""
    rows = rows_of(72)
    order = epoch_order(42, 0, 72).tolist()
    early, late = order[5], order[70]
    for row in (early, late):
        rows[row]["completion"] += " And on it goes." * 40
    lines = found(processor, [rows[row] for row in order[:64]])
    (line,) = lines.values()
    length, median, proposal = map(
        int, re.search(r"has (\d+) text.*median of (\d+).*max_length=(\d+)", line).groups()
    )
    assert length > 5 * median
    assert median < proposal < length / 2
    tokens = Collator(processor, max_length=proposal).tokens([iq.Example(**row) for row in rows])
    assert sum(len(row.ids) == proposal for row in tokens) == 2
    caplog.clear()
    config = config_of(tmp_path, max_steps=9)
    iq.train(lora, processor, rows, config=config)
    line, summary = told(caplog)
    assert line.startswith(f"train_rows[{early}]: has {length} text tokens")
    assert summary.endswith(": rows many times longer than the others (2 times)")


def test_spread_lengths_are_not_told(processor):
    """Where many rows are long, none stands out."""
    rows = rows_of(20)
    for i, row in enumerate(rows):
        row["completion"] += " And on it goes." * (2 * i)
    assert found(processor, rows) == {}


def test_a_picture_closed_by_to_example_is_told(lora, processor, tmp_path):
    """What a second epoch would stumble over is found before the first."""

    def closes(row):
        copied = row["prompt"][0].copy()
        row["prompt"][0].close()
        return iq.Example([copied, "What?"], row["completion"])

    rows = rows_of(4)
    for i, row in enumerate(rows):
        row["prompt"][0].save(tmp_path / f"{i}.png")
        row["prompt"][0] = Image.open(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"train_rows\[\d\]: to_example fails the second time"):
        iq.train(lora, processor, rows, config=config_of(tmp_path / "run"), to_example=closes)


def class_rows():
    """A table as `imagefolder` makes it of folders named after classes."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = [{"image": drawn(i), "label": i % 2} for i in range(6)]
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("as_stream", [False, True])
def test_classes_train_as_their_names(processor, as_stream):
    """A ClassLabel column holds numbers; the templates get the names."""
    rows = class_rows().to_iterable_dataset() if as_stream else class_rows()
    reader = RowReader(rows, "rows", iq.Captions(answer=" A {label}."), Collator(processor))
    rows_read = map(reader.decoded, reader.stream()) if as_stream else rows
    said = [reader.example(row).completion for row in rows_read]
    assert said == [" A cat.", " A dog."] * 3
    preview = iq.preview_batch(processor, rows, iq.Captions(answer=" A {label}."))
    ids = [token.id for token in preview.examples[1].tokens if token.is_target]
    assert "A dog." in processor.tokenizer.decode(ids)


def test_numbers_of_classes_are_told(processor):
    """A to_example of one's own that says the number; not one that says the name, or both."""
    rows = class_rows()

    def numbers(row):
        return iq.Example([row["image"], "What?"], f" A {row['label']}.")

    def names(row):
        return iq.Example([row["image"], "What?"], f" A {('cat', 'dog')[row['label']]}.")

    (line,) = found(processor, rows, numbers).values()
    assert "such as 0 for 'cat'" in line
    assert "rows.features['label'].int2str" in line
    assert found(processor, rows, names) == {}


def test_a_to_example_that_changes_its_row_is_told(lora, processor, tmp_path):
    """An error where the row gives something else from then on, a warning where it does not."""

    def grows(row):
        row["completion"] += " Again."
        return iq.Example(row["prompt"], row["completion"])

    def takes(row):
        return iq.Example(row.pop("prompt"), row["completion"])

    def notes(row):
        row["seen"] = True
        return iq.Example(row["prompt"], row["completion"])

    for to_example, fault in ((grows, "gives another example"), (takes, "fails the second time")):
        with pytest.raises(ValueError, match=rf"train_rows\[\d\]: to_example {fault}.*dict\(row\)"):
            iq.train(lora, processor, rows_of(4), config=config_of(tmp_path), to_example=to_example)
    (line,) = found(processor, rows_of(4), notes).values()
    assert line.startswith("train_rows[0]: to_example changes its row")
    table = datasets.Dataset.from_list(
        [{"image": drawn(i), "completion": f" Card {i}."} for i in range(4)]
    )

    def changes(row):  # a table gives a new row each time
        row["completion"] += " Once."
        return iq.Example([row.pop("image"), "What?"], row["completion"])

    assert found(processor, table, changes) == {}
    assert found(processor, table.to_iterable_dataset(), changes) == {}


def test_a_random_to_example_is_told(processor):
    """It gives another example the second time."""

    def asks(row):
        question = random.choice([f"Question {i}? Answer:" for i in range(1000)])
        return iq.Example([row["prompt"][0], question], row["completion"])

    (line,) = found(processor, rows_of(4), asks).values()
    assert "to_example gives another example the second time" in line
    assert "resumed" in line


def test_the_preview_tells_mistakes_too(processor, caplog, tmp_path):
    """Looking first shows them first."""
    rows = [{"prompt": [drawn(0), "What?"], "completion": "Yes."}]
    iq.preview_batch(processor, rows, image_dir=tmp_path)
    (line,) = told(caplog)
    assert line.startswith("rows[0]: no space between")


@pytest.mark.parametrize("form", [None, "numpy"])
def test_classes_have_names_in_every_form(processor, form):
    """``with_format("numpy")`` gives numbers of another type, which are numbers all the same."""
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"label": [0, 1]}, features=features).with_format(form)
    reader = RowReader(rows, "rows", iq.Captions(answer=" A {label}."), Collator(processor))
    picture = Image.new("RGB", (8, 8))
    assert reader.example({**rows[1], "image": picture}).completion == " A dog."
