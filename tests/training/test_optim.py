"""The optimizer's states and the learning rate."""

import copy

import pytest
import torch
from helpers import config_of
from steps import snapshot, state_of, windows_of, without_dropout
from transformers import get_scheduler

from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.training.loop import train_step
from idefics_qlora.training.optim import lr_at


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", None),
        ("cosine", None),
        ("constant_with_warmup", None),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 5, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        ),
        ("warmup_stable_decay", {"num_decay_steps": 7, "decay_type": "linear"}),
    ],
)
def test_schedules_equal_transformers(kind, settings, warmup):
    """The pure function has the curves of transformers.get_scheduler, and its parameters."""
    config = config_of(
        "unused",
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=settings,
        warmup_steps=warmup,
        max_steps=10,
    )
    expected = curve_of_transformers(kind, config.learning_rate, warmup, settings)
    assert [lr_at(step, 10, config) for step in range(10)] == pytest.approx(expected, rel=1e-12)


def test_constant_has_a_warmup_if_one_is_set():
    """As in version 0.1; in transformers it would be left out without a word."""
    config = config_of("unused", lr_scheduler_type="constant", warmup_steps=3, max_steps=10)
    expected = curve_of_transformers("constant_with_warmup", config.learning_rate, 3)
    assert [lr_at(step, 10, config) for step in range(10)] == pytest.approx(expected, rel=1e-12)


def test_a_warmup_may_be_a_share_of_the_run():
    """As the Trainer counts it: so many of all steps, rounded up."""
    config = config_of("unused", warmup_ratio=0.25, max_steps=10)
    assert config.num_warmup_steps(10) == 3
    expected = curve_of_transformers("linear", config.learning_rate, 3)
    assert [lr_at(step, 10, config) for step in range(10)] == pytest.approx(expected, rel=1e-12)


def curve_of_transformers(kind, learning_rate, warmup, settings=None):
    """The learning rates of the ten steps of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = get_scheduler(kind, optimizer, warmup, 10, settings)
    rates = []
    for _ in range(10):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_the_constants_of_adamw_are_the_settings(base, processor, examples, optim):
    """After one step of a known gradient the moments and the weights are those of the formula."""
    model = without_dropout(base)
    settings = {"adam_beta1": 0.7, "adam_beta2": 0.9, "adam_epsilon": 0.5, "learning_rate": 0.1}
    state = state_of(model, config_of("unused", optim=optim, max_grad_norm=1e9, **settings))
    (name, parameter), *_ = trainable_parameters(model).items()
    before = parameter.detach().clone()
    gradient = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    parameter.grad.copy_(gradient)
    state.optimizer.touch(state.model.parameters())
    state.optimizer.step()
    # Of the first step, corrected: both means are the gradient's own.
    expected = before - 0.1 * gradient / (gradient.abs() + 0.5)
    torch.testing.assert_close(parameter.detach(), expected)
    tensors, _ = state.optimizer.state_by_name()
    keys = ("exp_avg", "exp_avg_sq") if optim == "adamw_torch" else ("state1", "state2")
    torch.testing.assert_close(tensors[f"{name}::{keys[0]}"], 0.3 * gradient)
    torch.testing.assert_close(tensors[f"{name}::{keys[1]}"], 0.1 * gradient**2)


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
