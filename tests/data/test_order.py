"""The order of rows: which of them a step sees, of a table or of a stream without an end."""

import copy
import json

import datasets
import pytest
import torch
from helpers import config_of, equal_batches, same

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import EvalBatches, StreamedWindows, Windows, crop_seed, epoch_order
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.workers import Loading
from idefics_qlora.model.adapters import adapter_tensors


def windows(processor, examples, **changes):
    settings = {"seed": 7, "global_batch_size": 16, "augment": True}
    reader = RowReader(examples, "train_rows", None, Collator(processor))
    return Windows(reader, **{**settings, **changes})


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_a_window_is_a_function_of_its_number(processor, examples):
    """Asked again, in another order or by worker processes: the same window to the bit."""
    first = windows(processor, examples)
    expected = [first[w] for w in range(4)]  # 40 rows: window 2 crosses into the second epoch
    again = windows(processor, examples)
    for w in (3, 1, 2, 0):
        assert equal_batches(again[w].batch, expected[w].batch)
    for workers in (0, 1, 4):
        with Loading(again, first=1, num_workers=workers) as loading:
            for w in (1, 2, 3):
                window = next(loading)
                assert window.rows == expected[w].rows
                assert equal_batches(window.batch, expected[w].batch)


def test_another_seed_gives_other_windows(processor, examples):
    """The seed decides order and crops."""
    a, b = windows(processor, examples)[0], windows(processor, examples, seed=8)[0]
    assert a.rows != b.rows


def test_every_row_has_a_crop_of_its_own():
    """In each epoch and run another: no two of 200 seeds are the same."""
    seeds = {crop_seed(run, epoch, row) for run in (1, 2) for epoch in (0, 1) for row in range(50)}
    assert len(seeds) == 200


def test_every_epoch_is_a_permutation(processor, examples):
    """Each row comes once per epoch, windows go on without a break at the border."""
    every = windows(processor, examples)
    positions = [position for w in range(5) for position in every.positions(w)]  # 80 = two epochs
    for epoch in (0, 1):
        assert sorted(row for e, row in positions if e == epoch) == list(range(40))
    orders = [[row for e, row in positions if e == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert epoch_order(7, 0, 40).tolist() == orders[0]


def test_augmentation_crops_each_epoch_anew(processor, examples):
    """A row's picture differs between epochs; without augmentation it is the processor's."""
    reader = RowReader(examples[:1], "train_rows", None, Collator(processor))
    settings = {"seed": 7, "global_batch_size": 1}
    cropped = Windows(reader, augment=True, **settings)
    pictures = [cropped[w].batch.vision.pixel_values for w in range(4)]
    assert not all(torch.equal(pictures[0], other) for other in pictures[1:])
    plain = Windows(reader, augment=False, **settings)[0].batch
    (expected,) = reader.collator.pixels(examples[0].prompt)
    assert torch.equal(plain.vision.pixel_values[0, 0], expected)


def test_evaluation_keeps_the_order(processor, examples):
    """Every row once, in order, the last batch smaller."""
    batches = EvalBatches(RowReader(examples[:7], "eval_rows", None, Collator(processor)), 3)
    sizes = [len(window.rows) for window in Loading(batches)]
    assert sizes == [3, 3, 1]
    assert sorted(batches[1].rows) == [3, 4, 5]


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


def test_a_stream_can_be_looked_at(processor, examples, tmp_path):
    """The preview takes its first rows."""
    shown = iq.preview_batch(processor, stream_of(examples[:4]), CAPTIONS, image_dir=tmp_path)
    assert [example.row for example in shown.examples] == [0, 1]
