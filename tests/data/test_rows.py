"""Rows as they come: bad ones among them, and streams without an end."""

import copy
import json

import datasets
import pytest
import torch
from helpers import config_of, same

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import EvalBatches, StreamedWindows, Windows, epoch_order
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.workers import Loading
from idefics_qlora.model.adapters import adapter_tensors


@pytest.fixture
def rows(examples):
    """Forty rows, of which number 5 has no picture and number 30 breaks to_example."""
    rows = [{"prompt": example.prompt, "completion": example.completion} for example in examples]
    rows[5] = {**rows[5], "prompt": [{"path": "gone.png"}, "What is it?"]}
    return rows


def stumbling(row):
    """A to_example that fails in its own way on one row."""
    if row["completion"].startswith(" Broken"):
        raise AttributeError("no such thing")
    return iq.Example(row["prompt"], row["completion"])


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


def test_an_error_of_to_example_names_the_row(lora, processor, examples, tmp_path):
    """Whatever a user's function raises, the row is named."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    rows[3]["completion"] = " Broken"
    config = config_of(tmp_path, on_bad_row="raise")
    expected = r"train_rows\[3\]: cannot be read: AttributeError: no such thing"
    with pytest.raises(ValueError, match=expected):
        iq.train(lora, processor, rows, config=config, to_example=stumbling)


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


def stream_of(examples, shards=1):
    """The examples as a datasets.IterableDataset of rows with pictures."""
    rows = [
        {"image": example.prompt[0], "question": example.prompt[1], "text": example.completion}
        for example in examples
    ]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


CAPTIONS = iq.Captions(question="{question}", answer="{text}")


def test_a_stream_gives_its_rows_in_order(processor, examples):
    """Window after window, over the epoch's border, with or without a worker, from any position."""
    reader = RowReader(stream_of(examples[:10]), "train_rows", CAPTIONS, Collator(processor))
    options = {"seed": 1, "global_batch_size": 4, "augment": True}

    def windows(position, number, num_workers=0):
        streamed = StreamedWindows(reader, **options, position=position)
        with Loading(streamed, num_workers=num_workers) as loading:
            return [next(loading) for _ in range(number)]

    whole = windows(None, 6)
    assert [window.rows for window in whole[:3]] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 0, 1)]
    for again in (windows(None, 6, num_workers=2), windows(None, 6)):
        for a, b in zip(whole, again, strict=True):
            assert (a.rows, a.position) == (b.rows, b.position)
            assert torch.equal(a.batch.vision.pixel_values, b.batch.vision.pixel_values)
    for start in range(1, 5):
        rest = windows(json.loads(json.dumps(whole[start - 1].position)), 6 - start)
        for a, b in zip(whole[start:], rest, strict=True):
            assert a.rows == b.rows
            assert torch.equal(a.batch.input_ids, b.batch.input_ids)
            assert torch.equal(a.batch.vision.pixel_values, b.batch.vision.pixel_values)


@pytest.mark.slow
def test_a_run_over_a_stream_resumes_exactly(base, processor, examples, tmp_path):
    """Interrupted at any step, also behind an epoch's end, it ends with the untouched adapter."""

    def run(folder, steps, num_workers=0, seed=42):
        model = iq.add_lora(copy.deepcopy(base), seed=seed)
        config = config_of(
            tmp_path / folder, max_steps=steps, global_batch_size=4, num_workers=num_workers,
            lr_scheduler_type="constant", save_steps=10,
        )  # fmt: skip
        stream = stream_of(examples[:10], shards=2)
        result = iq.train(model, processor, stream, config=config, to_example=CAPTIONS)
        return adapter_tensors(model), result

    whole, result = run("whole", 6)
    assert result.metrics["epoch"] == 2.0
    for stop in (1, 3, 5):
        run(str(stop), stop, num_workers=1)
        resumed, _ = run(str(stop), 6, seed=stop)
        assert same(resumed, whole)


def test_what_a_stream_cannot_do_is_said(lora, processor, examples, tmp_path):
    """It has no length and no end: steps must be given, and evaluation needs rows with a length."""
    stream = stream_of(examples[:4])
    config = config_of(tmp_path, max_steps=None)
    with pytest.raises(ValueError, match="max_steps=None: a stream of rows has no length"):
        iq.train(lora, processor, stream, config=config, to_example=CAPTIONS)
    with pytest.raises(TypeError, match=r"rows is a stream: expected rows with a length"):
        EvalBatches(RowReader(stream, "rows", None, Collator(processor)), 2)


def test_a_dataset_dict_is_not_rows(lora, processor, examples, tmp_path):
    """Forgetting to name the split is said as such."""
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])})
    with pytest.raises(TypeError, match=r"mapping of \['train'\]: expected one of its parts"):
        iq.train(lora, processor, both, config=config_of(tmp_path))


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


class BreaksOff:
    """A stream that ends with an error of its own."""

    def __iter__(self):
        yield from ({"prompt": ["What?"], "completion": f" {i}."} for i in range(70))
        raise OSError("the connection is gone")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def set_epoch(self, epoch):
        pass


def test_a_stream_that_breaks_off_is_saved_and_named(lora, processor, tmp_path):
    """What was learnt until then is kept, and the error says where."""
    config = config_of(tmp_path, max_steps=20)
    expected = r"train_rows\[70\]: the stream breaks off: OSError: the connection is gone"
    with pytest.raises(ValueError, match=expected):
        iq.train(lora, processor, BreaksOff(), config=config)
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-8"


def test_one_dead_evaluation_row_does_not_stop_a_run(lora, processor, rows, tmp_path):
    """A small held-out set may have a bad row; if all are bad, the run does not start."""
    config = config_of(tmp_path, eval_steps=2, load_best_model_at_end=True, save_steps=2)
    result = iq.train(lora, processor, rows, rows[3:8], config=config)
    records = [r for r in result.log_history if "eval_loss" in r]
    assert [r["eval_bad_rows"] for r in records] == [1, 1]
    with pytest.raises(ValueError, match="1 of 1 rows seen cannot be read"):
        iq.train(lora, processor, rows, rows[5:6], config=config_of(tmp_path / "b"))


def test_a_failing_evaluation_saves_first(lora, processor, examples, tmp_path, monkeypatch):
    """Steps since the last checkpoint are not lost to an evaluation."""

    def fails(*_):
        raise RuntimeError("the evaluation fails")

    monkeypatch.setattr("idefics_qlora.training.evaluations.mean_loss", fails)
    config = config_of(tmp_path, eval_steps=3, save_steps=4)
    with pytest.raises(RuntimeError, match="the evaluation fails"):
        iq.train(lora, processor, examples, examples[:2], config=config)
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_table_of_pandas_is_not_rows(lora, processor, tmp_path):
    """Its items are columns: said with the way out."""
    import pandas as pd

    table = pd.DataFrame({"prompt": ["a"], "completion": [" b"]})
    with pytest.raises(TypeError, match=r"to_dict\(\"records\"\)"):
        iq.train(lora, processor, table, config=config_of(tmp_path))


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


def test_a_stream_can_be_looked_at(processor, examples, tmp_path):
    """The preview takes its first rows."""
    shown = iq.preview_batch(processor, stream_of(examples[:4]), CAPTIONS, image_dir=tmp_path)
    assert [example.row for example in shown.examples] == [0, 1]
