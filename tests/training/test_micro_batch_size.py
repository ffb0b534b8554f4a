"""The micro-batch: halved where memory ends, doubled while it lasts."""

import copy
from functools import partial

import helpers
import pytest
import torch
from helpers import same

import idefics_qlora as iq
from idefics_qlora.model.adapters import adapter_tensors

config_of = partial(
    helpers.config_of,
    max_steps=6,
    global_batch_size=4,
    precision="fp16",
    eval_steps=1,
    save_steps=1,
    save_total_limit=2,
)


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


def test_auto_grows_until_memory_ends(lora, processor, examples, tmp_path):
    """Doubled from window to window; after the first failure the last size that worked is kept."""
    sizes = []

    def limited(module, _, inputs):
        size = len(inputs["input_ids"])
        if module.training:
            sizes.append(size)
            if size > 4:
                raise torch.OutOfMemoryError("injected")

    lora.get_base_model().register_forward_pre_hook(limited, with_kwargs=True)
    config = config_of(tmp_path, global_batch_size=16, micro_batch_size="auto")
    result = iq.train(lora, processor, examples, config=config)
    assert sizes[:16] == [1] * 16
    assert sizes[16:24] == [2] * 8
    assert sizes[24:28] == [4] * 4
    assert sizes[28:33] == [8, 4, 4, 4, 4]
    assert set(sizes[33:]) == {4}
    assert result.metrics["micro_batch_size"] == 4
