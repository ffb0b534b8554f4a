"""The micro-batch: chosen by what fits, halved or split where memory ends, and remembered."""

import copy
import shutil
from dataclasses import replace
from functools import partial

import helpers
import pytest
import torch
from helpers import differences, every_family, same

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint, save_checkpoint
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import epoch_order
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.model.memory import estimate_memory
from idefics_qlora.training.micro_batch import available_bytes, corrected, even, largest_of

config_of = partial(
    helpers.config_of,
    max_steps=6,
    global_batch_size=4,
    precision="fp16",
    eval_steps=1,
    save_steps=1,
    save_total_limit=2,
)


@every_family
def test_out_of_memory_halves_the_micro_batch(base, processor, examples, tmp_path, caplog):
    """The window is done again in smaller parts, what the failed try had added is discarded, and
    the end is that of a run which had the smaller size from the start."""
    pairs = []

    def second_pair(module, _, inputs):
        if len(inputs["input_ids"]) == 2 and module.training:
            pairs.append(inputs)
            if len(pairs) % 2 == 0:  # after a backward pass of the same window
                raise torch.OutOfMemoryError("injected")

    results = []
    for size in (2, 1):
        model = iq.add_lora(copy.deepcopy(base))
        model.get_base_model().register_forward_pre_hook(second_pair, with_kwargs=True)
        config = config_of(tmp_path / str(size), micro_batch_size=size)
        result = iq.train(model, processor, examples, examples[:2], config=config)
        assert result.metrics["micro_batch_size"] == 1
        results.append(adapter_tensors(model))
    assert len(pairs) == 2
    assert "out of memory with 2 examples per micro-batch in window 0" in caplog.text
    assert same(*results)


@every_family
def test_out_of_memory_with_one_example_is_an_error(lora, processor, examples, tmp_path):
    """There is nothing left to halve: the error says what is needed and what can be done."""

    def too_large(*_):
        raise torch.OutOfMemoryError("injected")

    config = config_of(tmp_path)
    hook = lora.get_base_model().register_forward_pre_hook(too_large)
    expected = r"single example.*GiB.*gradient_checkpointing=True"
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        iq.train(lora, processor, examples, config=config)
    hook.remove()


def test_auto_is_two_on_a_cpu(lora, processor, examples, tmp_path):
    """Or the window, where that is smaller; measuring memory is for a GPU."""
    for number in (4, 1):
        config = config_of(
            tmp_path / str(number), global_batch_size=number, micro_batch_size="auto", max_steps=2
        )
        result = iq.train(lora, processor, examples, config=config)
        assert result.metrics["micro_batch_size"] == min(2, number)


@pytest.fixture(scope="module")
def rows(examples):
    """Eight rows, two windows in an epoch; the long one is in the second."""
    rows = [replace(row, completion=" It is.") for row in examples[:8]]
    last = epoch_order(42, 0, 8)[-1]
    rows[last] = replace(rows[last], completion=" It is." * 40)
    return rows


def train_limited(base, processor, rows, config, most):
    """Train with memory for ``most(tokens)`` examples; the (examples, fits) of all that is tried,
    by window."""
    model = iq.add_lora(copy.deepcopy(base))
    tried = [[]]

    def limited(module, _, inputs):
        if module.training:
            size, tokens = inputs["input_ids"].shape
            tried[-1].append((size, size <= most(tokens)))
            if size > most(tokens):
                raise torch.OutOfMemoryError("injected")

    def next_window(_):
        tried.append([])

    model.get_base_model().register_forward_pre_hook(limited, with_kwargs=True)
    result = iq.train(model, processor, rows, config=config, on_log=next_window)
    return tried[:-1], result


@pytest.fixture
def long_row(processor, rows):
    """Text tokens that only one row has; two rows that long do not fit into the memory."""
    *_, longest = sorted(Collator(processor)([row]).input_ids.shape[1] for row in rows)
    return longest - 20


@pytest.fixture
def for_the_long_one(long_row):
    """Memory for one long example, or for two of the others."""
    return lambda tokens: 1 if tokens >= long_row else 2


def limited_config(folder, **changes):
    settings = {"micro_batch_size": "auto", "precision": "fp32", "save_total_limit": None}
    return config_of(folder, **{**settings, **changes})


WHOLE, SPLIT = [(2, True)] * 2, [(1, True)] * 4


@every_family
def test_auto_splits_a_long_window_alone(
    base, processor, rows, for_the_long_one, long_row, tmp_path, caplog
):
    """The run's size stays; later windows that are as long are split before they are tried."""
    config = limited_config(tmp_path)
    windows, result = train_limited(base, processor, rows, config, for_the_long_one)
    long = [number for number, window in enumerate(windows) if window != WHOLE]
    assert windows[long[0]] == [(2, False), *SPLIT]
    assert len(long) >= 3
    assert all(windows[number] == SPLIT for number in long[1:])
    assert result.metrics["micro_batch_size"] == 2
    assert caplog.text.count("out of memory") == 1
    ((tokens, images),) = load_checkpoint(tmp_path / "checkpoint-6").state["too_large"]
    assert tokens >= 2 * long_row
    tiles = Collator(processor)(rows[:1]).vision.tensors()["pixel_values"].shape[1]
    assert images == 2 * tiles


def test_a_number_is_halved_for_good(base, processor, rows, for_the_long_one, tmp_path):
    """With an explicit micro_batch_size the run goes on with half."""
    config = limited_config(tmp_path, micro_batch_size=2)
    windows, result = train_limited(base, processor, rows, config, for_the_long_one)
    assert windows[1] == [(2, False), *SPLIT]
    assert all(window == SPLIT for window in windows[2:])
    assert result.metrics["micro_batch_size"] == 1


@every_family
def test_resumed_anywhere_the_same_windows_are_split(
    base, processor, rows, for_the_long_one, tmp_path
):
    """What did not fit is part of the state: a resumed run tries what the untouched one tries, and
    one that has forgotten it tries the long window whole again (the control)."""
    whole, _ = train_limited(
        base, processor, rows, limited_config(tmp_path / "whole", max_steps=4), for_the_long_one
    )

    def resumed(step, forget=False):
        folder = tmp_path / f"{step} {forget}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        if forget:
            snapshot = load_checkpoint(folder / f"checkpoint-{step}")
            snapshot.state["too_large"] = []
            save_checkpoint(folder / f"checkpoint-{step}", snapshot)
        windows, _ = train_limited(
            base, processor, rows, limited_config(folder, max_steps=4), for_the_long_one
        )
        assert differences(tmp_path / "whole" / "checkpoint-4", folder / "checkpoint-4") == []
        return windows

    for step in (1, 2):
        assert resumed(step) == whole[step:]
    assert resumed(2, forget=True) != whole[2:]


def test_auto_keeps_what_the_first_window_came_to(base, processor, rows, tmp_path):
    """If two do not fit in the first window, they are not tried again, in a resumed run either."""
    config = limited_config(tmp_path / "whole")
    windows, result = train_limited(base, processor, rows, config, lambda _: 1)
    assert windows == [[(2, False), *SPLIT], *[SPLIT] * 5]
    assert result.metrics["micro_batch_size"] == 1
    assert load_checkpoint(tmp_path / "whole" / "checkpoint-6").state["too_large"] == []
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    config = limited_config(tmp_path / "resumed")
    windows, _ = train_limited(base, processor, rows, config, lambda _: 1)
    assert windows == [SPLIT] * 3


def test_parts_are_even():
    """As few as possible, and then as alike as possible."""
    sizes = {(64, 40): 32, (16, 16): 16, (16, 100): 16, (16, 15): 8, (10, 4): 4, (7, 3): 3}
    assert {key: even(*key) for key in sizes} == sizes


def test_the_estimate_fills_the_room_and_a_measurement_corrects_it():
    """The largest size that fits, not one more; then as many as what was taken leaves room for."""
    estimate = estimate_memory(iq.tiny.BASE, text_tokens=40)
    room = estimate.passing(10)
    assert largest_of(estimate, room, 64) == 10
    assert largest_of(estimate, room - 1, 64) == 9
    assert largest_of(estimate, room, 8) == 8
    assert largest_of(estimate, 0, 64) == 1
    assert estimate.passing(0) < estimate.passing(1)  # what depends on no example
    assert corrected(taken=100 + 8 * 10, fixed=100, size=8, room=100 + 160) == 16
    assert corrected(taken=100 + 8 * 10, fixed=100, size=8, room=100 + 79) == 7
    assert corrected(taken=100 + 8 * 10, fixed=100, size=8, room=50) == 1


def test_available_memory_is_what_this_process_may_take(monkeypatch):
    """What is free on the GPU, at most up to the process's own limit, and PyTorch's unused blocks;
    without the limit where PyTorch does not tell it."""
    device = torch.device("cuda:0")
    for name, number in {"memory_reserved": 30, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 100))
    fraction = "get_per_process_memory_fraction"
    for limit, available in ((1.0, 60), (0.7, 50), (0.2, 10)):
        monkeypatch.setattr(torch.cuda, fraction, lambda _, limit=limit: limit, raising=False)
        assert available_bytes(device) == available
    monkeypatch.delattr(torch.cuda, fraction)
    assert available_bytes(device) == 60
