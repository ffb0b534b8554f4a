"""What fails in a step, in an evaluation or in a row: the state before it is kept, and said.

Exceptions are raised by hooks in real runs; what a run makes of them is all that is tested.
"""

import contextlib
import copy
import re

import pytest
import torch
from helpers import config_of, same, tensors_of
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils.data import get_worker_info

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.order import epoch_order
from idefics_qlora.model.adapters import trainable_parameters

SETTINGS = {
    "max_steps": 4,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "precision": "fp16",
    "save_steps": 4,
    "logging_steps": 4,
}


class Nth:
    """A hook that does something when it is called for the n-th time."""

    def __init__(self, n, act):
        self.n, self.act, self.calls = n, act, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.n:
            self.act()


def raising(error):
    def act():
        raise error

    return act


class Clipping(TorchFunctionMode):
    """Calls something whenever the norm of the whole gradient is taken."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.vector_norm:
            self.call()
        return function(*args, **(kwargs or {}))


LAST = "checkpoint-4"


@pytest.fixture(scope="session")
def whole(loaded, examples, tmp_path_factory):
    """The end of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    base, processor = loaded
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, examples, config=config_of(folder, **SETTINGS))
    return tensors_of(folder / LAST)


def rows_of(window):
    return sorted(int(row) for row in epoch_order(42, 0, 40)[4 * window : 4 * window + 4])


def rows_in(message):
    return sorted(map(int, re.search(r"rows \[([^]]*)\]", message)[1].split(",")))


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        ("forward", KeyError("some key")),
        ("backward", ValueError("some value")),
        ("clipping", torch.OutOfMemoryError("CUDA out of memory")),
        ("clipping", RuntimeError("something else")),
    ],
)
def test_a_step_that_fails(base, processor, examples, tmp_path, whole, moment, error):
    """The window's rows are named, the state before it is saved, and a new start ends like a run
    that nothing happened to, also with the same model."""
    model = iq.add_lora(copy.deepcopy(base))
    fail = Nth(3 if moment == "clipping" else 6, raising(error))  # two micro-batches a window
    if moment == "forward":
        hook = model.get_base_model().register_forward_pre_hook(fail)
    elif moment == "backward":
        hook = next(iter(trainable_parameters(model).values())).register_hook(fail)
    config = config_of(tmp_path / "run", **SETTINGS)
    watched = Clipping(fail) if moment == "clipping" else contextlib.nullcontext()
    with pytest.raises(type(error)) as caught, watched:
        iq.train(model, processor, examples, config=config)
    message = str(caught.value)
    assert error.args[0] in message
    assert "in window 2 (rows" in message
    assert rows_in(message) == rows_of(2)
    assert ("lower micro_batch_size" in message) == isinstance(error, torch.OutOfMemoryError)
    assert "step 2) is kept" in message
    assert load_checkpoint(iq.latest_checkpoint(tmp_path / "run")).state["window"] == 2
    if moment != "clipping":
        hook.remove()
    iq.train(model, processor, examples, config=config)
    assert same(tensors_of(tmp_path / "run" / LAST), whole)


def test_half_an_update_is_not_saved(base, processor, examples, tmp_path, whole):
    """What fails while weights and counters change spoils the state: the run goes on before it."""
    model = iq.add_lora(copy.deepcopy(base))
    config = config_of(tmp_path / "run", **{**SETTINGS, "save_steps": 2})
    hook = register_optimizer_step_post_hook(Nth(4, raising(RuntimeError("too late"))))
    try:
        with pytest.raises(RuntimeError, match=r"too late; in window 3 .*goes on from step 2"):
            iq.train(model, processor, examples, config=config)
    finally:
        hook.remove()
    assert iq.latest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    iq.train(model, processor, examples, config=config)
    assert same(tensors_of(tmp_path / "run" / LAST), whole)


def test_a_failing_save_does_not_hide_the_failure(lora, processor, examples, tmp_path):
    """Two things go wrong: the first is raised, and tells of the second."""

    def no_room():
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("a file where the folder was")
        raise RuntimeError("the first")

    lora.get_base_model().register_forward_pre_hook(Nth(6, no_room))
    config = config_of(tmp_path / "run", **SETTINGS)
    with pytest.raises(RuntimeError, match=r"the first; in window 2 .*could not be saved"):
        iq.train(lora, processor, examples, config=config)


def test_a_stale_gradient_is_not_learnt(base, processor, examples, tmp_path, whole):
    """What somebody's own backward pass left on the model does not enter the first window."""
    model = iq.add_lora(copy.deepcopy(base))
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    iq.train(model, processor, examples, config=config_of(tmp_path / "run", **SETTINGS))
    assert same(tensors_of(tmp_path / "run" / LAST), whole)


class Greedy:
    """Converts rows; at one of them, once training is under way, it wants more memory than is."""

    def __init__(self, number):
        self.number, self.armed = number, False

    def __call__(self, row):
        if row["number"] == self.number and (self.armed or get_worker_info() is not None):
            bytearray(2**62)
        return row["example"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_memory_for_a_row(base, processor, examples, tmp_path, whole, num_workers):
    """It is the machine's fault, so the row is not left out: it is named, and what was learnt is
    saved."""
    rows = [{"number": i, "example": example} for i, example in enumerate(examples)]
    greedy = Greedy(rows_of(2)[0])

    def arm(record):
        greedy.armed = record["step"] >= 1

    settings = {**SETTINGS, "logging_steps": 1, "num_workers": num_workers}
    config = config_of(tmp_path / "run", **settings)
    model = iq.add_lora(copy.deepcopy(base))
    with pytest.raises(MemoryError) as caught:
        iq.train(model, processor, rows, config=config, to_example=greedy, on_log=arm)
    message = str(caught.value)
    assert f"train_rows[{greedy.number}]: no memory left" in message
    assert "in window 2" in message
    assert rows_in(message) == rows_of(2)
    assert f"fewer num_workers (now {num_workers})" in message
    assert "step 2) is kept" in message
    config = config_of(tmp_path / "run", **SETTINGS)
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, config=config, to_example=lambda row: row["example"])
    assert same(tensors_of(tmp_path / "run" / LAST), whole)


@pytest.mark.parametrize("what", ["evaluation", "image_use", "samples"])
def test_no_memory_for_an_evaluation(base, processor, examples, tmp_path, whole, what):
    """The step is saved, the advice names ``eval_batch_size``, and a new start with a smaller one
    ends like a run that nothing happened to."""
    settings = {**SETTINGS, "eval_steps": 2, "save_steps": 4}
    settings |= {"eval_image_use": what == "image_use", "eval_samples": 2 * (what == "samples")}
    rows = examples[:4]

    def too_large(module, _, inputs):
        if not module.training and len(inputs["input_ids"]) > 1:
            calls.append(inputs)
            if len(calls) > {"evaluation": 0, "image_use": 2, "samples": 2}[what]:
                raise torch.OutOfMemoryError("CUDA out of memory")

    calls = []
    model = iq.add_lora(copy.deepcopy(base))
    model.get_base_model().register_forward_pre_hook(too_large, with_kwargs=True)
    message = r"the evaluation after step 2 does not fit .* lower eval_batch_size \(now 2\)"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        iq.train(model, processor, examples, rows, config=config_of(tmp_path / "run", **settings))
    assert iq.latest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    settings["eval_batch_size"] = 1
    result = iq.train(
        model, processor, examples, rows, config=config_of(tmp_path / "run", **settings)
    )
    assert result.global_step == 4
    assert same(tensors_of(tmp_path / "run" / LAST), whole)


def test_what_to_lower_is_said_outside_of_runs(base, processor, examples):
    """Of each public call the arguments that decide how much memory it takes, if above 1."""

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    base.register_forward_pre_hook(too_large)
    prompts = [example.prompt for example in examples[:2]]
    both = r"lower batch_size \(now 2\) or max_new_tokens \(now 50\), or free the GPU"
    with pytest.raises(torch.OutOfMemoryError, match=both):
        iq.generate(base, processor, prompts)
    with pytest.raises(torch.OutOfMemoryError, match=r"memory: lower max_new_tokens \(now 50\)"):
        iq.generate(base, processor, prompts, batch_size=1)
    with pytest.raises(torch.OutOfMemoryError, match=r"lower batch_size \(now 2\), or free"):
        iq.evaluate(base, processor, examples[:4])
    with pytest.raises(torch.OutOfMemoryError, match=r"shorten the longest examples"):
        iq.evaluate(base, processor, examples[:4], batch_size=1)
    with pytest.raises(torch.OutOfMemoryError, match=r"lower batch_size \(now 8\), or free"):
        iq.image_use(base, processor, examples[:4])
