"""The optimizer's states and the learning rate."""

import copy

import pytest
import torch
from helpers import config_of
from steps import snapshot, state_of, windows_of, without_dropout

from idefics_qlora.training.loop import train_step
from idefics_qlora.training.optim import lr_at


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
    tensors, _ = state.optimizer.state_by_name()
    kinds = {
        tensor.numel() >= 4096: tensor.dtype
        for key, tensor in tensors.items()
        if key.endswith("::state1")
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
