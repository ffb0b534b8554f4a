"""Rows that are others again are told, and only those."""

import datetime
import io
from functools import partial

import datasets
import helpers
import pytest
from told import drawn, found, rows_of

import idefics_qlora as iq
from idefics_qlora.data.same_rows import digest, digest_of

config_of = partial(helpers.config_of, max_steps=1)


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
