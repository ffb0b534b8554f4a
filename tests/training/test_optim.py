"""The optimizer's states and the learning rate."""

import copy

import pytest
import torch
from helpers import config_of, same
from steps import snapshot, state_of, windows_of, without_dropout
from torch.optim.optimizer import (
    register_optimizer_step_pre_hook,
)

import idefics_qlora as iq
from idefics_qlora.training.loop import train_step
from idefics_qlora.training.optim import allocate_states, lr_at, make_optimizer, optimizer_state


@pytest.mark.parametrize(
    ("kind", "warmup"), [("linear", 0), ("linear", 3), ("cosine", 3), ("constant", 3)]
)
def test_schedules_equal_transformers(kind, warmup):
    """The pure function has the curves of transformers.get_scheduler."""
    from transformers import get_scheduler

    config = config_of("unused", lr_scheduler_type=kind, warmup_steps=warmup, max_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        assert lr_at(step, 10, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_8_bit_optimizer_holds_8_bit_states(lora, processor, examples):
    """The text adapters are large enough for real 8-bit states, also on a CPU."""
    state = state_of(lora, config_of("unused"))
    train_step(state, windows_of(processor, examples, state.config)[0])
    kinds = {
        parameter.numel() >= 4096: values["state1"].dtype
        for parameter, values in state.optimizer.state.items()
    }
    assert kinds == {True: torch.uint8, False: torch.float32}


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_weights_decay(base, processor, examples, optim):
    """By the learning rate times ``weight_decay`` of themselves, beside what the gradient does."""
    before, after = {}, []
    for decay in (0.0, 0.5):
        model = without_dropout(copy.deepcopy(base))
        before = snapshot(model)
        settings = {"optim": optim, "weight_decay": decay, "learning_rate": 0.1}
        state = state_of(model, config_of("unused", **settings))
        train_step(state, windows_of(processor, examples, state.config)[0])
        after.append(snapshot(model))
    for name, tensor in before.items():
        expected = -0.1 * 0.5 * tensor
        torch.testing.assert_close(after[1][name] - after[0][name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_states_are_there_before_the_first_step(lora, processor, examples, tmp_path, optim):
    """Running out of memory for them cannot leave half an update."""
    seen = []

    def look(optimizer, *_):
        seen.append([len(optimizer.state[p]) > 1 for p in optimizer.param_groups[0]["params"]])

    hook = register_optimizer_step_pre_hook(look)
    try:
        config = config_of(
            tmp_path, max_steps=1, global_batch_size=4, precision="fp16", optim=optim
        )
        iq.train(lora, processor, examples, config=config)
    finally:
        hook.remove()
    assert len(seen) == 1
    assert all(seen[0])


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_states_made_early_are_those_made_in_time(optim):
    """The same states and the same steps, to the bit, also for what gets a gradient late."""
    ends = []
    for early in (True, False):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n)) for n in (100, 5000, 70_000)]
        config = iq.TrainConfig(output_dir="unused", optim=optim, weight_decay=0.1)
        optimizer = make_optimizer(parameters, config)
        if early:
            allocate_states(optimizer)
        for step in range(4):
            for parameter in parameters[: 2 if step < 2 else 3]:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        tensors, scalars = optimizer_state(optimizer, {p: str(p.numel()) for p in parameters})
        ends.append(({**tensors, **{str(p.numel()): p.data for p in parameters}}, scalars))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
