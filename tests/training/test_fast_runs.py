"""Whole runs the fast way: what users do to a model meanwhile, and what is left of it afterwards.

The same runs as with ``fast=False``, to rounding; without dropout, so that they can be compared.
"""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, every_family, same, tensors_of
from micro_batches import QKV, text_model_of
from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.model.adapters import adapter_tensors, trainable_parameters

STEPS = 3


def adapted(base, **changes):
    settings = {"r": 8, "lora_alpha": 16, "target_modules": QKV, "lora_dropout": 0.0}
    return iq.add_lora(copy.deepcopy(base), LoraConfig(**{**settings, **changes}))


def settings_of(folder, fast=True, **changes):
    settings = {
        "max_steps": STEPS,
        "global_batch_size": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # Adam's first step would make signs of rounding
        "save_steps": 1,
        "save_total_limit": None,
        "fast": fast,
    }
    return config_of(folder, **{**settings, **changes})


def trained(model, processor, rows, folder, act=None, **changes):
    """Train; ``act`` is done to the model after the first step. What the log says of each step."""

    def on_log(record):
        if act is not None and record["step"] == 1 and "loss" in record:
            act(model)

    result = iq.train(model, processor, rows, config=settings_of(folder, **changes), on_log=on_log)
    return [r for r in result.log_history if "loss" in r]


def check_equal(model, other, logs=()):
    """Equal weights and losses, to rounding."""
    ours, theirs = adapter_tensors(model), adapter_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=2e-6, msg=name)
    for a, b in zip(*logs, strict=True) if logs else ():
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.fixture(scope="session")
def rows(examples):
    return examples[:12]


def counting(calls):
    return lambda *_: calls.append(1)


class Wrapped:
    """Replaces a module's forward by one that counts and calls the old one."""

    def __init__(self, module):
        self.module, self.calls, self.before = module, 0, module.forward
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.before(*args, **kwargs)


def layers_of(model):
    inner = text_model_of(model.get_base_model())
    return {
        "decoder layer": inner.layers[0],
        "norm": inner.norm,
        "adapter layer": inner.layers[0].self_attn.q_proj,
        "text model": inner,
        "linear layer": inner.layers[0].mlp.up_proj,
    }


MODULES = ["decoder layer", "norm", "adapter layer", "text model", "linear layer"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_replaced_forward_is_run_and_kept(base, processor, rows, tmp_path, name, when):
    """Somebody's own forward of a module is what training runs, and still there afterwards."""
    model, wrapped = adapted(base), []

    def wrap(model):
        wrapped.append(Wrapped(layers_of(model)[name]))

    if when == "before":
        wrap(model)
    trained(model, processor, rows, tmp_path, wrap if when == "meanwhile" else None)
    (mine,) = wrapped
    assert mine.calls == 2 * (STEPS if when == "before" else STEPS - 1)  # micro-batches
    assert layers_of(model)[name].forward is mine
    before = mine.calls
    iq.generate(model, processor, [rows[0]], max_new_tokens=2)
    assert mine.calls > before


@every_family
def test_a_base_as_it_is_loaded_goes_the_fast_way(base, processor, rows, tmp_path, caplog):
    """What a family mends of a base when it is loaded is not taken for somebody's own forward."""
    caplog.set_level("INFO")
    trained(adapted(base), processor, rows, tmp_path)
    assert "own layers" not in caplog.text


@every_family
def test_hooks_of_all_modules_run(base, processor, rows, tmp_path):
    """A hook on every module sees the inner layers, which fused blocks do not call."""
    model, seen = adapted(base), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(id(m)))
    try:
        trained(model, processor, rows, tmp_path, max_steps=1)
    finally:
        handle.remove()
    assert id(text_model_of(model.get_base_model()).layers[0].mlp.act_fn) in seen


@pytest.mark.parametrize("fast", [True, False])
def test_what_no_gradient_reaches_is_left_alone(base, processor, rows, tmp_path, fast):
    """A trained bias behind which there is no loss does not decay, and has taken no step."""
    model = adapted(base, bias="all")
    name, bias = next(
        (n, p) for n, p in trainable_parameters(model).items() if "post_layernorm.bias" in n
    )
    with torch.no_grad():
        bias.fill_(1.0)
    trained(model, processor, rows, tmp_path, fast=fast, weight_decay=0.1)
    assert (bias == 1.0).all()
    state = load_checkpoint(tmp_path / f"checkpoint-{STEPS}").optimizer
    steps = {key: int(t) for key, t in state.items() if key.endswith("::step")}
    assert steps[f"{name}::step"] == 0
    assert set(steps.values()) == {0, STEPS}


@every_family
def test_windows_with_and_without_pictures(base, processor, rows, tmp_path):
    """Where there is none, nothing of vision is updated or decays, as the slow way."""
    texts = [iq.Example(["Question: What is it?"], f" It is {n}.") for n in ("one", "two")]
    logs, models = [], []
    for fast in (True, False):
        torch.manual_seed(0)
        models.append(adapted(base))
        settings = {"global_batch_size": 1, "micro_batch_size": 1, "max_steps": 6}
        settings |= {"fast": fast, "weight_decay": 0.1}
        folder = tmp_path / str(fast)
        logs.append(trained(models[-1], processor, [*texts, *rows[:2]], folder, **settings))
    check_equal(*models, logs)
    steps = [
        {n: int(t) for n, t in load_checkpoint(f).optimizer.items() if n.endswith("::step")}
        for f in (tmp_path / str(fast) / "checkpoint-6" for fast in (True, False))
    ]
    assert steps[0] == steps[1]


VARIANTS = {
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only", "target_modules": ["fc1", "q_proj"]},
    "saved modules": {"modules_to_save": ["input_layernorm"]},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj"]},
    "ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 4}},
}


@every_family
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_learns_the_same(base, processor, rows, tmp_path, name):
    """Steps with weight decay and 8-bit or PyTorch's states are those of the slow way."""
    logs, models = [], []
    for fast in (True, False):
        torch.manual_seed(0)
        models.append(adapted(base, **VARIANTS[name]))
        folder = tmp_path / str(fast)
        logs.append(trained(models[-1], processor, rows, folder, fast=fast, weight_decay=0.1))
    check_equal(*models, logs)


def moved(model):
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.clone()


def without_gradients(model):
    model.zero_grad(set_to_none=True)


def with_stale_gradients(model):
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.full_like(parameter, 3.0)


@pytest.mark.parametrize("act", [moved, without_gradients, with_stale_gradients])
@pytest.mark.parametrize("fast", [True, False])
def test_what_a_callback_moves_is_found(base, processor, rows, tmp_path, act, fast):
    """Parameters and gradients that are elsewhere after a step change nothing in the next."""
    models = []
    for name, acting in (("undisturbed", None), ("disturbed", act)):
        models.append(adapted(base))
        trained(models[-1], processor, rows, tmp_path / name, acting, fast=fast)
    assert same(*(tensors_of(tmp_path / n / "checkpoint-3") for n in ("undisturbed", "disturbed")))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@every_family
def test_a_rate_of_dropout_may_change(base, processor, rows, tmp_path):
    """Dropout that a callback switches off is off in the next window."""
    model = adapted(base, lora_dropout=0.5)
    logs = trained(model, processor, rows, tmp_path, without_dropout, max_steps=2)
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = adapted(base, lora_dropout=0.5)
    without_dropout(again)
    assert trained(again, processor, rows, tmp_path, max_steps=2)[1]["loss"] == logs[1]["loss"]


@pytest.mark.parametrize("fast", [True, False])
def test_what_a_callback_freezes_stays(base, processor, rows, tmp_path, fast):
    """Matrices that are frozen after a step are not moved by their moments, nor do they decay."""
    model, kept = adapted(base), {}

    def freeze(model):
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.requires_grad_(False)
                kept[name] = parameter.detach().clone()

    trained(model, processor, rows, tmp_path, freeze, fast=fast, weight_decay=0.1)
    assert same(kept, {n: p for n, p in model.named_parameters() if n in kept})
    before = load_checkpoint(tmp_path / "checkpoint-1").adapter
    assert any(not torch.equal(before[n], t) for n, t in adapter_tensors(model).items())


@every_family
@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_goes_on_the_other_way(base, processor, rows, tmp_path, first):
    """From a checkpoint of either way the other goes on like the one that wrote it."""
    whole, other = adapted(base), adapted(base)
    folder = tmp_path / "whole"
    logs = [trained(whole, processor, rows, folder, fast=first)]
    for step in (2, 3):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.rename(tmp_path / f"of-the-first-{step}")
    logs.append(trained(other, processor, rows, folder, fast=not first))
    check_equal(whole, other, logs)


class Attention(TorchFunctionMode):
    """Counts what fused blocks attend to, and raises an error at one of them."""

    def __init__(self, at=0, error=None):
        super().__init__()
        self.calls, self.at, self.error = 0, at, error

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.calls += 1
            if self.calls == self.at:
                raise self.error
        return function(*args, **(kwargs or {}))


@pytest.fixture
def undisturbed(base, processor, rows, tmp_path):
    """A run with dropout that nothing happens to; calls of attention in a micro-batch."""
    with Attention() as watched:
        trained(adapted(base, lora_dropout=0.1), processor, rows, tmp_path / "whole")
    return watched.calls // (2 * STEPS)


@every_family
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_an_error_within_a_window_leaves_an_ordinary_model(
    base, processor, rows, tmp_path, undisturbed
):
    """What breaks off in a window's second micro-batch: the model works as before, and a new start
    with it ends like a run that nothing happened to."""
    model = adapted(base, lora_dropout=0.1)
    failing = Attention(3 * undisturbed + 2, RuntimeError("injected"))
    with pytest.raises(RuntimeError, match=r"injected.* in window 1 "), failing:
        trained(model, processor, rows, tmp_path / "run")
    assert not any(hasattr(m, a) for m in model.modules() for a in ("fast_group", "fused_plan"))
    for parameter in trainable_parameters(model).values():
        assert parameter.grad is None
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    (text,) = iq.generate(model, processor, [rows[0]], max_new_tokens=3)
    twin = copy.deepcopy(model)
    assert iq.generate(twin, processor, [rows[0]], max_new_tokens=3) == [text]
    twin.save_pretrained(tmp_path / "saved")
    assert not any("lora_" in name for name in twin.merge_and_unload().state_dict())
    trained(model, processor, rows, tmp_path / "run")
    whole, again = (tensors_of(tmp_path / n / "checkpoint-3") for n in ("whole", "run"))
    assert same(whole, again)


@every_family
def test_memory_that_does_not_suffice_within_a_window(base, processor, rows, tmp_path, undisturbed):
    """The window is done again in halves from its beginning: neither gradients nor random states
    of the part that was computed are left."""
    states = []
    for at in (undisturbed + 2, 2):  # in the first window's second micro-batch, or at once
        failing = Attention(at, torch.OutOfMemoryError("injected"))
        with failing:
            trained(adapted(base, lora_dropout=0.1), processor, rows, tmp_path / str(at))
        states.append(tensors_of(tmp_path / str(at) / "checkpoint-3"))
    assert same(*states)


def test_a_dequantized_base_is_saved_as_ever(processor, rows, tmp_path):
    """Merged after a fast run, which laid weights side by side, it is written and read again."""
    base, _ = iq.tiny.load_model(
        device="cpu", compute_dtype=torch.float32, base_weights="dequantized"
    )
    model = adapted(base)
    trained(model, processor, rows, tmp_path / "run", max_steps=1)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=False)
    there = type(merged).from_pretrained(tmp_path / "merged")
    ours, theirs = merged.state_dict(), there.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
