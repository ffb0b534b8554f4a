"""Plausible mistakes in rows and texts are told before a run starts, and sound rows are not."""

import datetime
import io
import logging
import random
import re
from functools import partial

import datasets
import helpers
import numpy as np
import pytest
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.first_rows import FirstRows, tell_same_rows
from idefics_qlora.data.formats import pokemon_card_example
from idefics_qlora.data.order import epoch_order
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.same_rows import digest, digest_of
from idefics_qlora.notices import Notices

config_of = partial(helpers.config_of, max_steps=1)


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


def told(caplog):
    """The warnings logged so far, which are then forgotten."""
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return lines


def found(processor, rows, to_example=None, held_out=None, name="train_rows"):
    """The warnings about some rows, by kind."""
    collator = Collator(processor)
    notices = Noted()
    sides = []
    for side, side_rows in ((name, rows), ("eval_rows", held_out)):
        if side_rows is None:
            continue
        reader = RowReader(side_rows, side, to_example, collator)
        sides.append(FirstRows(reader))
        order = () if reader.is_stream else range(len(reader))
        _, bad = reader.first_rows(order, 64, sides[-1].looking)
        assert not bad
        sides[-1].tell(notices, 2)
    tell_same_rows(sides[0], sides[1] if held_out else None, notices)
    assert notices.lines.keys() == notices.counts.keys()
    return notices.lines


class Noted(Notices):
    """Keeps the first line of each kind."""

    def __init__(self):
        super().__init__()
        self.lines = {}

    def warn(self, kind, message, number=1):
        self.lines.setdefault(kind, message)
        super().warn(kind, message, number)


def drawn(seed, size=(120, 160)):
    """A picture of its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def rows_of(number, **changes):
    """Sound rows, each with its own picture and text."""
    return [
        {"prompt": [drawn(i), "What is it? Answer:"], "completion": f" Card {i}.", **changes}
        for i in range(number)
    ]


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


@pytest.mark.parametrize("kind", ["list", "examples", "table", "stream"])
def test_rows_that_repeat_are_told(processor, kind):
    """In lists and tables beyond the first rows; their share among the evaluation rows."""
    names = [{"image": drawn(i), "text": f"Card {i}", "id": i} for i in range(100)]
    rows, held_out = names[:90], [names[80], names[95], {**names[3], "id": 500}, names[96]]
    rows[85] = {**names[70], "id": 85}
    held_out_of_90 = True
    to_example = iq.Captions(answer=" {text}")
    if kind == "examples":
        rows, held_out = ([to_example(row) for row in part] for part in (rows, held_out))
        to_example = None
    elif kind in ("table", "stream"):
        rows, held_out = map(datasets.Dataset.from_list, (rows, held_out))
        assert isinstance(rows.features["image"], datasets.Image)
    if kind == "stream":
        rows, held_out_of_90 = rows.to_iterable_dataset(), False
    lines = found(processor, rows, to_example, held_out)
    leak = lines["evaluation rows among the training rows"]
    if held_out_of_90:
        assert leak.startswith("eval_rows[0] is the same as train_rows[80]; 2 of 4")
        assert lines["repeated training rows"].startswith(
            "train_rows[85] is the same as train_rows[70]; 1 of 90"
        )
    else:  # of a stream, the first 64 rows
        assert leak.startswith("eval_rows[2] is the same as train_rows[3]; 1 of 4")
        assert "(25%)" in leak


def test_encoded_pictures_are_compared_as_the_model_gets_them(processor, tmp_path):
    """The same picture in another file is the same row, among the first rows."""
    rows = rows_of(4)
    for i, name in ((1, "a.png"), (3, "b.bmp")):
        drawn(7).save(tmp_path / name)
        rows[i] = {"prompt": "What?", "completion": " Yes.", "image": str(tmp_path / name)}
    (line,) = found(processor, rows).values()
    assert line.startswith("train_rows[3] is the same as train_rows[1]; 1 of 4 training rows")


def test_one_picture_under_two_names_is_one(processor):
    """Encoded in a table, beyond the first rows: the bytes count, not the file's name."""
    rows = []
    for i in range(80):
        encoded = io.BytesIO()
        drawn(min(i, 78), (32, 32)).save(encoded, "PNG")
        picture = {"bytes": encoded.getvalue(), "path": f"{i}.png"}
        rows.append({"image": picture, "text": f"Card {min(i, 78)}"})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for kind in (rows, datasets.Dataset.from_list(rows, features=features)):
        (line,) = found(processor, kind, iq.Captions(answer=" {text}")).values()
        assert line.startswith("train_rows[79] is the same as train_rows[78]; 1 of 80")


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


class Row:
    """A user's own class: what its objects hold cannot be told from outside."""

    def __init__(self, number):
        self.number = number


def test_rows_of_unknown_kinds_are_not_called_the_same(lora, processor, tmp_path, caplog):
    """Objects that cannot be compared are not compared; dates and the like are."""
    pictures = [card["image"] for card in iq.tiny.creature_cards(8, seed=0)]
    rows = [Row(i) for i in range(8)]

    def to_example(row):
        return iq.Example([pictures[row.number], "What? Answer:"], f" number {row.number}")

    config = config_of(tmp_path, global_batch_size=2)
    iq.train(lora, processor, rows, config=config, to_example=to_example)
    assert "the same as" not in caplog.text
    days = [datetime.date(2020, 1, 1 + i) for i in range(2)]
    assert digest(days[0]) != digest(days[1])
    assert digest_of(rows[0]) is None


@pytest.mark.parametrize("form", [None, "numpy"])
def test_classes_have_names_in_every_form(processor, form):
    """``with_format("numpy")`` gives numbers of another type, which are numbers all the same."""
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"label": [0, 1]}, features=features).with_format(form)
    reader = RowReader(rows, "rows", iq.Captions(answer=" A {label}."), Collator(processor))
    picture = Image.new("RGB", (8, 8))
    assert reader.example({**rows[1], "image": picture}).completion == " A dog."


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,iVBORw0KGgo=", "/data/my cats/a 1.jpg", "C:\\my cats\\a.png"]
)
def test_a_picture_written_as_text_is_an_error(text):
    """Neither an encoded picture nor a path with spaces is taken for words."""
    with pytest.raises(ValueError, match="a string is text for the model"):
        iq.Example([text, "What? Answer:"], " That.")
    iq.Example(["Look at cats/a 1.jpg: what is it? Answer:"], " That.")
