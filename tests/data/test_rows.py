"""Rows as they come: what is none is said, and every error names its row."""

import copy

import datasets
import numpy as np
import pandas as pd
import pytest
from helpers import config_of, encoded

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.rows import RowReader


def stumbling(row):
    """A to_example that fails in its own way on one row."""
    if row["completion"].startswith(" Broken"):
        raise AttributeError("no such thing")
    return iq.Example(row["prompt"], row["completion"])


def test_an_error_of_to_example_names_the_row(lora, processor, examples, tmp_path):
    """Whatever a user's function raises, the row is named."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    rows[3]["completion"] = " Broken"
    config = config_of(tmp_path, on_bad_row="raise")
    expected = r"train_rows\[3\]: cannot be read: AttributeError: no such thing"
    with pytest.raises(ValueError, match=expected):
        iq.train(lora, processor, rows, config=config, to_example=stumbling)


def test_a_dataset_dict_is_not_rows(lora, processor, examples, tmp_path):
    """Forgetting to name the split is said as such."""
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])})
    with pytest.raises(TypeError, match=r"mapping of \['train'\]: expected one of its parts"):
        iq.train(lora, processor, both, config=config_of(tmp_path))


def test_a_failing_evaluation_saves_first(lora, processor, examples, tmp_path, monkeypatch):
    """Steps since the last checkpoint are not lost to an evaluation."""

    def fails(*_):
        raise RuntimeError("the evaluation fails")

    monkeypatch.setattr("idefics_qlora.training.evaluations.mean_loss", fails)
    config = config_of(tmp_path, eval_steps=3, save_steps=4)
    with pytest.raises(RuntimeError, match="the evaluation fails"):
        iq.train(lora, processor, examples, examples[:2], config=config)
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_table_of_pandas(processor, picture):
    """A whole frame is rows, whatever its index; types stay, gaps are absent."""
    columns = {"image": [picture] * 2, "number": [3, 4], "text": ["a", None], "share": [0.5, None]}
    columns["answers"] = [np.array(["x", "y"]), None]
    frame = pd.DataFrame(columns, index=[7, 9])
    frame["number"] = frame["number"].astype("Int64")
    frame.loc[9, "number"] = pd.NA
    reader = RowReader(frame, "rows", iq.Captions(answer=" {number} {share}"), Collator(processor))
    assert len(reader) == 2
    row = {"number": 3, "text": "a", "share": 0.5, "answers": ["x", "y"]}
    assert reader.row(0) == {"image": picture, **row}
    assert reader.row(1) == {"image": picture, **dict.fromkeys(row)}
    assert reader.example(reader.row(0)).completion == " 3 0.5"
    window = reader.window((number, ..., None) for number in range(2))
    assert (window.rows, window.bad[0].row) == ((0,), "rows[1]")


def test_training_on_a_table_of_pandas(lora, processor, cards, tmp_path):
    """Trains, evaluates and compares rows as those of a list."""
    rows = [{"image": encoded(card["image"]), "text": card["name"]} for card in cards[:12]]
    results = []
    for name, kind in (("list", list), ("frame", pd.DataFrame)):
        config = config_of(tmp_path / name, max_steps=1)
        model = copy.deepcopy(lora)
        train, held_out = kind(rows[:8]), kind(rows[8:])
        results.append(iq.train(model, processor, train, held_out, config=config))
    assert results[0].training_loss == results[1].training_loss
    assert results[0].metrics["train_loss"] == results[1].metrics["train_loss"]


def test_empty_columns_of_a_table_are_absent(processor, picture):
    """`datasets` fills what a row lacks with None: text and pictures mix in one table."""
    rows = [
        {"prompt": "What?", "completion": " Nothing.", "images": None, "image": None},
        {"prompt": "What?", "completion": " This.", "images": None, "image": picture},
        {"messages": [{"role": "user", "content": "Where?"},
                      {"role": "assistant", "content": "http://www.acme.example"}], "images": None},
    ]  # fmt: skip
    reader = RowReader(rows, "rows", None, Collator(processor))
    assert [len(reader.read(i)[1]) for i in range(3)] == [0, 1, 0]


def test_a_row_that_cannot_be_decoded_is_named(processor):
    """A broken picture in a dataset's image column is found when its row is asked for."""
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no picture", "path": None}], "caption": ["x"]},
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string")}
        ),
    )
    reader = RowReader(rows, "rows", iq.Captions(answer=" {caption}"), Collator(processor))
    with pytest.raises(ValueError, match=r"rows\[0\]: cannot be read: UnidentifiedImageError"):
        reader.read(0)


@pytest.mark.parametrize("rows", [[], {}])
def test_no_rows_is_an_error(processor, rows):
    """An empty training set is found before anything is computed."""
    with pytest.raises(ValueError, match="train_rows is empty"):
        RowReader(rows, "train_rows", None, Collator(processor))


def test_rows_need_a_length(processor):
    """A generator cannot be drawn from by number."""
    with pytest.raises(TypeError, match="train_rows is a generator: expected a sequence"):
        RowReader((row for row in ()), "train_rows", None, Collator(processor))
