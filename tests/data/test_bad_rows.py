"""Rows that cannot be read: left out, noted and counted, or an error."""

import copy
import json

import datasets
import pytest
from helpers import config_of, warnings_of

import idefics_qlora as iq
from idefics_qlora.data.bad_rows import BadRows
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows, epoch_order
from idefics_qlora.data.rows import RowReader


@pytest.fixture
def rows(examples):
    """Forty rows, of which number 5 has no picture."""
    rows = [{"prompt": example.prompt, "completion": example.completion} for example in examples]
    rows[5] = {**rows[5], "prompt": [{"path": "gone.png"}, "What is it?"]}
    return rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_is_left_out_and_noted(base, processor, rows, tmp_path, num_workers):
    """The run goes on, the window is smaller, the ledger and the counts say what was left out."""
    model = iq.add_lora(base)
    config = config_of(tmp_path, max_steps=10, num_workers=num_workers)  # 80 rows: two epochs
    result = iq.train(model, processor, rows, config=config)
    assert result.metrics["bad_rows"] == 2
    assert result.metrics["epoch"] == 2.0
    (line,) = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["row"], record["source"]) == ("train_rows[5]", "'gone.png'")
    assert "there is no such file" in record["reason"]
    counts = [record.get("bad_rows", 0) for record in result.log_history if "loss" in record]
    assert counts[0] <= 1
    assert counts[-1] == 2


def test_a_bad_row_is_told_once(lora, processor, rows, tmp_path, caplog):
    """Not when the first rows are looked at and again in a window or an evaluation; where too many
    are bad, the error that says which is all."""
    config = config_of(tmp_path / "run", max_steps=5, eval_steps=5)
    iq.train(lora, processor, rows, rows[4:8], config=config)
    told = [line.split(": ")[1] for line in warnings_of(caplog) if line.startswith("left out")]
    assert sorted(line.rpartition(" ")[2] for line in told) == ["eval_rows[1]", "train_rows[5]"]
    caplog.clear()
    config = config_of(tmp_path / "other", max_steps=5)
    with pytest.raises(ValueError, match=r"2 of 8 rows seen cannot be read[^$]*train_rows\[1\]"):
        iq.train(lora, processor, [rows[0], rows[5]] * 2 + rows[6:10], config=config)
    assert not warnings_of(caplog)


def test_nothing_takes_a_bad_rows_place(processor, rows):
    """The other rows of the window are those that it would have had anyway."""
    good = [row if i != 5 else rows[6] for i, row in enumerate(rows)]
    options = {"seed": 1, "global_batch_size": 8, "augment": True}
    with_bad, without = (
        Windows(RowReader(r, "train_rows", None, Collator(processor)), **options)
        for r in (rows, good)
    )
    for w in range(5):
        kept = tuple(row for row in without[w].rows if row != 5)
        assert with_bad[w].rows == kept
        assert len(with_bad[w].bad) == (5 in without[w].rows)


def test_raise_stops_at_the_row(lora, processor, rows, tmp_path):
    """With on_bad_row="raise" the first bad row is an error, also out of a loader worker."""
    config = config_of(tmp_path, on_bad_row="raise", num_workers=2)
    with pytest.raises(iq.BadImage, match=r"'gone.png' of train_rows\[5\]: there is no such file"):
        iq.train(lora, processor, rows, config=config)


def test_too_many_bad_rows_stop_the_run(base, processor, examples, tmp_path):
    """More than five in a hundred are no accident: the run stops, saved, with the first reasons."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples * 4]
    bad = [row for row in epoch_order(42, 0, len(rows))[64:] if row][:12]
    for row in bad:
        rows[row] = {"text": "no format"}
    config = config_of(tmp_path, max_steps=None)
    with pytest.raises(ValueError, match=r"rows seen cannot be read, more than 5%") as caught:
        iq.train(iq.add_lora(base), processor, rows, config=config)
    assert "no known format" in str(caught.value)
    assert "bad_rows.jsonl" in str(caught.value)
    assert iq.latest_checkpoint(tmp_path) is not None


def test_the_way_out_fits_the_fault(processor, tmp_path):
    """Of pictures that are not there no function is to blame; their path is told once."""
    path = tmp_path / "gone.png"
    reader = RowReader([{"image": path, "text": "A"}], "train_rows", None, Collator(processor))
    _, bad = reader.first_rows([0], 1)
    rows = BadRows("skip")
    rows.note(bad)
    with pytest.raises(ValueError, match="put the pictures there, or leave these") as caught:
        rows.check_share(1, 4)
    assert str(caught.value).count("gone.png") == 1
    assert "to_example" not in str(caught.value)


def test_evaluation_leaves_bad_rows_out(base, processor, rows):
    """The loss is that of the others, and the count says so; or it raises."""
    model, others = base, [row for i, row in enumerate(rows) if i != 5]
    metrics = iq.evaluate(model, processor, rows, batch_size=8)
    assert metrics["eval_bad_rows"] == 1
    expected = iq.evaluate(model, processor, others, batch_size=8)
    assert "eval_bad_rows" not in expected
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    with pytest.raises(iq.BadImage, match=r"rows\[5\]"):
        iq.evaluate(model, processor, rows, on_bad_row="raise")


def test_a_bad_picture_in_a_stream_spoils_its_row_only(base, processor, cards, tmp_path):
    """What a stream would decode while it iterates is decoded with its row: skipped and noted."""
    rows = [
        {"image": card["image"], "name": card["name"], "caption": card["caption"]} for card in cards
    ]
    rows[21]["image"] = {"bytes": b"no picture", "path": None}
    features = {"name": datasets.Value("string"), "caption": datasets.Value("string")}
    features = datasets.Features({"image": datasets.Image(), **features})
    table = datasets.Dataset.from_list(rows, features=features)
    stream = table.to_iterable_dataset()
    config = config_of(tmp_path, max_steps=5)
    result = iq.train(iq.add_lora(base), processor, stream, config=config)
    assert result.metrics["bad_rows"] == 1
    assert json.loads((tmp_path / "bad_rows.jsonl").read_text())["row"] == "train_rows[21]"


def test_one_dead_evaluation_row_does_not_stop_a_run(lora, processor, rows, tmp_path):
    """A small held-out set may have a bad row; if all are bad, the run does not start."""
    config = config_of(tmp_path, eval_steps=2, load_best_model_at_end=True, save_steps=2)
    result = iq.train(lora, processor, rows, rows[3:8], config=config)
    records = [r for r in result.log_history if "eval_loss" in r]
    assert [r["eval_bad_rows"] for r in records] == [1, 1]
    with pytest.raises(ValueError, match="1 of 1 rows seen cannot be read"):
        iq.train(lora, processor, rows, rows[5:6], config=config_of(tmp_path / "b"))


def test_the_ledger_is_read_again(base, processor, examples, tmp_path):
    """A restart adds no second line for a row that is known, not even behind half a line."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    rows[5] = {"text": "no format"}
    config = {"max_steps": 5}
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, config=config_of(tmp_path, **config))
    ledger = tmp_path / "bad_rows.jsonl"
    (line,) = ledger.read_text().splitlines()
    config = {"max_steps": 10}
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, config=config_of(tmp_path, **config))
    assert ledger.read_text().splitlines() == [line]
