"""AdamW over flat memory changes no number: it is the optimizer over single parameters.

More than 400 lines: all compare the same pair of optimizers.
"""

import copy
import gc
import weakref

import pytest
import torch
from helpers import config_of, same
from single_adamw import allocate_states, load_optimizer_state, make_optimizer, optimizer_state
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from idefics_qlora.model.adapters import adapter_tensors, trainable_parameters
from idefics_qlora.training.flat import FlatAdamW

OPTIMS = ["paged_adamw_8bit", "adamw_torch"]
LORA = {"a": (16, 512), "b": (512, 16), "c": (16, 128), "d": (128, 16), "e": (16, 256)}
"""Shapes of a LoRA: 8-bit states and such that are too small for them, in turn."""
TORN = {"a": (16, 264), "b": (4, 40), "c": (32,), "d": (4128,), "e": (65, 64)}
"""Shapes whose last block is not full."""
ODD = {"a": (7, 611), "b": (5, 13), "c": (1,), "d": (4097,), "e": (65, 64)}
"""The same, and a CPU computes the ends of these by other instructions than the rest."""


def parameters_of(shapes, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return {
        name: Parameter(torch.randn(shape, generator=generator).to(device))
        for name, shape in shapes.items()
    }


def gradients_of(shapes, number, device="cpu"):
    """Gradients of very different sizes, some elements zero."""
    generator = torch.Generator().manual_seed(number)
    gradients = {}
    for i, (name, shape) in enumerate(shapes.items()):
        gradient = torch.randn(shape, generator=generator) * 10.0 ** (i - 3)
        gradients[name] = (gradient * (gradient.abs() > 10.0 ** (i - 4))).to(device)
    return gradients


class Both:
    """The same parameters twice: with an optimizer of their own, and in flat memory."""

    def __init__(self, shapes, config, merge, device="cpu"):
        self.single, self.flat = parameters_of(shapes, device), parameters_of(shapes, device)
        self.optimizer = make_optimizer(self.single.values(), config)
        allocate_states(self.optimizer)
        self.ours = FlatAdamW(self.flat, config)
        self.ours._merge = merge
        self.config = config

    def step(self, gradients, lr):
        """One step on both sides from a backward pass that gives these gradients."""
        self.backward(self.single, gradients)
        self.backward(self.flat, gradients)
        for optimizer in (self.optimizer, self.ours):
            for group in optimizer.param_groups:
                group["lr"] = lr
        norm = clip_grad_norm_(self.single.values(), self.config.max_grad_norm)
        assert torch.equal(self.ours.clip(self.config.max_grad_norm), norm)
        self.optimizer.step()
        assert self.ours.step()
        self.optimizer.zero_grad()
        self.ours.zero_grad()

    def backward(self, parameters, gradients):
        sum((parameters[name] * g).sum() for name, g in gradients.items()).backward()

    def states(self):
        names = {parameter: name for name, parameter in self.single.items()}
        return optimizer_state(self.optimizer, names), self.ours.state_by_name()

    def assert_equal(self):
        for name, parameter in self.single.items():
            assert torch.equal(parameter, self.flat[name]), name
        (tensors, scalars), (our_tensors, our_scalars) = self.states()
        assert scalars == our_scalars
        assert same(tensors, our_tensors)
        for key, tensor in tensors.items():
            assert our_tensors[key].dtype == tensor.dtype
            assert our_tensors[key].shape == tensor.shape


CASES = pytest.mark.parametrize(
    ("shapes", "merge"),
    [(LORA, True), (TORN, True), (LORA, False), (TORN, False), (ODD, False)],
    ids=["lora merged", "torn merged", "lora", "torn", "odd"],
)
"""Merged, many parameters are updated at once, as on a GPU."""


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@CASES
def test_flat_memory_changes_no_number(optim, decay, shapes, merge):
    """Norm, clipping, weights and moments are those of the single parameters, to the bit."""
    config = config_of("unused", optim=optim, weight_decay=decay)
    both = Both(shapes, config, merge)
    for number in range(6):
        both.step(gradients_of(shapes, number), lr=1e-2 / (number + 1))
        both.assert_equal()


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("merge", [True, False])
def test_what_no_gradient_reaches_is_left_alone(optim, merge):
    """Weights, moments and steps stay as with ``grad=None``, also with weight decay; gradients of
    zero are gradients, and let the moments decay."""
    both = Both(LORA, config_of("unused", optim=optim, weight_decay=0.1), merge)
    reached = [("a", "b", "c"), ("a", "d", "e"), tuple(LORA), ("b",), tuple(LORA), ("e", "c")]
    for number, names in enumerate(reached):
        gradients = gradients_of(LORA, number)
        some = {name: gradients[name] for name in names}
        if number == 4:
            some["d"] = torch.zeros(LORA["d"])
        both.step(some, lr=1e-2)
        both.assert_equal()
    (_, scalars), _ = both.states()
    if scalars:
        assert [scalars[name]["step"] for name in LORA] == [4, 4, 4, 3, 4]


def test_adjoining_parameters_are_updated_together():
    """A GPU gets one kernel per kind of moments, and a few more where steps differ."""
    flat = FlatAdamW(parameters_of(LORA), config_of("unused"))
    flat._merge = True
    calls = []
    for buffer in flat._buffers:
        buffer.update = lambda part, step, group: calls.append((part.start, part.stop, step))
    flat._touched[:] = bytes([1, 1, 1, 1, 1])
    flat.step()
    assert calls == [(0, 2 * 16 * 512 + 16 * 256, 1), (0, 2 * 16 * 128, 1)]
    flat.zero_grad()
    flat._touched[:] = bytes([1, 0, 0, 0, 0])
    flat.step()
    calls.clear()
    flat._touched[:] = bytes([1, 1, 1, 1, 1])
    flat.step()
    assert calls == [(0, 8192, 3), (8192, 8192 + 8192 + 4096, 2), (0, 4096, 2)]


@pytest.mark.parametrize("optim", OPTIMS)
@CASES
def test_states_pass_between_both(optim, shapes, merge):
    """A state of single parameters goes on in flat memory and back, to the bit, also when some
    parameters have had no step yet."""
    config = config_of("unused", optim=optim)
    both = Both(shapes, config, merge)
    for number in range(3):
        gradients = gradients_of(shapes, number)
        both.step({name: gradients[name] for name in "abd"}, lr=1e-2)
    theirs, ours = both.states()
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    resumed = Both(shapes, config, merge)
    resumed.step(gradients_of(shapes, 9), lr=1.0)  # what was there before is forgotten
    for parameters in (resumed.single, resumed.flat):
        for name, parameter in parameters.items():
            parameter.data.copy_(both.single[name].data)
    resumed.ours.load_state_by_name(*theirs)
    resumed.optimizer = make_optimizer(resumed.single.values(), config)
    load_optimizer_state(resumed.optimizer, {p: n for n, p in resumed.single.items()}, *ours)
    resumed.assert_equal()
    for number in range(3, 6):
        for each in (both, resumed):
            each.step(gradients_of(shapes, number), lr=1e-2)
        both.assert_equal()
        resumed.assert_equal()
        assert same(both.flat, resumed.flat)


@pytest.mark.parametrize("optim", OPTIMS)
def test_an_overflow_changes_nothing(optim):
    """A skipped window leaves weights, moments and steps as they are to the bit, the scale falls,
    and the wait for the GPU tells of it."""
    config = config_of("unused", optim=optim, precision="fp16")
    parameters = parameters_of(LORA)
    flat = FlatAdamW(parameters, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(spoil=None, loss=1.0):
        for name, gradient in gradients_of(LORA, 0).items():
            if name == spoil:
                gradient.view(-1)[5] = torch.inf
            scaler.scale((parameters[name] * gradient).sum()).backward()
        flat.spoil_unless_finite(torch.tensor(loss))
        scaler.unscale_(flat)
        flat.clip(1.0)
        updated = scaler.step(flat)
        scaler.update()
        flat.zero_grad()
        return updated

    def everything():
        tensors, scalars = copy.deepcopy(flat.state_by_name())
        weights = {name: p.detach().clone() for name, p in parameters.items()}
        return {**tensors, **weights}, scalars

    assert step() is True
    before, steps = everything()
    assert step(spoil="c") is False
    assert step(loss=float("nan")) is False
    after, same_steps = everything()
    assert same(before, after)
    assert steps == same_steps
    assert scaler.get_scale() == 256.0
    assert step() is True
    assert not same(before, everything()[0])


def test_gradients_are_added_up_in_flat_memory():
    """Backward passes add to the views, and one fill clears them all."""
    parameters = parameters_of(LORA)
    flat = FlatAdamW(parameters, config_of("unused"))
    for _ in range(2):
        sum((p * 3.0).sum() for name, p in parameters.items() if name != "c").backward()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 0.0 if name == "c" else 6.0))
    assert flat._touched == bytes([1, 1, 0, 1, 1])
    flat.zero_grad()
    assert flat._touched == bytes(5)
    assert not any(p.grad.any() for p in parameters.values())


def test_a_gradient_of_minus_zero_stays_one():
    """A GPU's 8-bit states tell it from zero, so adding it to the cleared memory must not."""
    parameters = parameters_of(LORA)
    flat = FlatAdamW(parameters, config_of("unused"))
    for _ in range(2):
        sum((p * -0.0).sum() for p in parameters.values()).backward()
        assert all(p.grad.signbit().all() for p in parameters.values())
        flat.zero_grad()


def test_a_gradient_that_somebody_deletes_comes_back():
    """``zero_grad`` of the model between two steps does not make training go on without effect."""
    parameters = parameters_of(LORA)
    flat = FlatAdamW(parameters, config_of("unused"))
    parameters["a"].grad = None
    for _ in range(2):
        sum((p * 3.0).sum() for p in parameters.values()).backward()
    assert torch.equal(parameters["a"].grad, torch.full(LORA["a"], 6.0))
    assert flat.clip(1e9) == pytest.approx(6.0 * sum(p.numel() for p in parameters.values()) ** 0.5)


def test_parameters_that_left_are_brought_back(lora):
    """After ``model.half()``, a deleted gradient or replaced memory, what is trained is again what
    the model computes with."""
    parameters = trainable_parameters(lora)
    flat = FlatAdamW(parameters, config_of("unused"))
    values = {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}
    lora.half()
    lora.zero_grad(set_to_none=True)
    first = next(iter(parameters.values()))
    assert first.dtype == torch.float16
    flat.link(parameters)
    assert first.dtype == torch.float32
    assert lora.get_parameter(next(iter(parameters))) is first
    for name, tensor in adapter_tensors(lora).items():
        assert torch.equal(tensor, values[name].half().float())
    first.data = torch.full_like(first, 0.5)
    flat.link(parameters)
    before = [p.detach().clone() for p in parameters.values()]
    assert torch.equal(before[0], torch.full_like(first, 0.5))
    sum((p * 3.0).sum() for p in parameters.values()).backward()
    flat.step()
    assert not any(torch.equal(p, b) for p, b in zip(parameters.values(), before, strict=True))


def test_a_replaced_parameter_is_taken_over():
    """A module's new ``Parameter`` object is trained instead of the old one."""
    parameters = parameters_of(LORA)
    flat = FlatAdamW(parameters, config_of("unused"))
    old = parameters["b"]
    parameters["b"] = Parameter(torch.ones(LORA["b"]))
    flat.link(parameters)
    old.sum().backward()
    assert flat._touched == bytes(5)
    parameters["b"].sum().backward()
    assert flat._touched == bytes([0, 1, 0, 0, 0])
    flat.step()
    assert (parameters["b"] < 1.0).all()


def test_the_next_optimizer_takes_over():
    """A run that ended in an exception leaves nothing that would take the next one's gradients."""
    parameters = parameters_of(LORA)
    before = FlatAdamW(parameters, config_of("unused"))
    flat = FlatAdamW(parameters, config_of("unused"))
    with before:
        pass
    sum(p.sum() for p in parameters.values()).backward()
    assert flat._touched == bytes([1] * 5)
    assert before._touched == bytes(5)
    flat.step()
    assert flat.clip(1e9) > 0
    assert not any(buffer.gradients.any() for buffer in before._buffers)


def test_another_adapter_is_refused():
    """Other names or shapes cannot be what the moments belong to; the message names one."""
    parameters = parameters_of(LORA)
    flat = FlatAdamW(parameters, config_of("unused"))
    with pytest.raises(ValueError, match=r"b had the shape \(512, 16\) and has \(3,\)"):
        flat.link({**parameters, "b": Parameter(torch.ones(3))})
    with pytest.raises(ValueError, match="x had the shape None"):
        flat.link({**parameters, "x": Parameter(torch.ones(3))})


def test_another_optimizers_state_is_refused():
    """Nothing is loaded from a state that does not fit, and the message says what does not."""
    both = Both(LORA, config_of("unused"), merge=False)
    both.step(gradients_of(LORA, 0), lr=1e-2)
    tensors, scalars = both.ours.state_by_name()
    before = copy.deepcopy(tensors)
    torch_flat = FlatAdamW(parameters_of(LORA), config_of("unused", optim="adamw_torch"))
    with pytest.raises(ValueError, match="optimizer state of a has .*state1.*expected a step and"):
        torch_flat.load_state_by_name(tensors, scalars)
    with pytest.raises(ValueError, match=r"belongs to other parameters: \['x'\]"):
        both.ours.load_state_by_name({**tensors, "x::state1": tensors["a::state1"]}, scalars)
    torn = {key: t[:-1] if key == "b::absmax1" else t for key, t in copy.deepcopy(tensors).items()}
    with pytest.raises(ValueError, match="optimizer state of b"):
        both.ours.load_state_by_name(torn, scalars)
    assert same(both.ours.state_by_name()[0], before)


def test_a_released_model_is_an_ordinary_one(lora):
    """Each parameter has memory of its own again, no gradient and no hook, and nothing else of the
    optimizer lives on."""
    parameters = trainable_parameters(lora)
    values = {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}
    with FlatAdamW(parameters, config_of("unused")) as flat:
        assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == 2
    assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == len(parameters)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in parameters.values())
    assert same(values, adapter_tensors(lora))
    weights = weakref.ref(flat._buffers[0].weights)
    del flat
    gc.collect()
    assert weights() is None


def test_an_adapter_in_flat_memory_is_saved_as_ever(lora, tmp_path):
    """peft writes the single matrices, though all of them share one memory."""
    values = {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}
    FlatAdamW(trainable_parameters(lora), config_of("unused"))
    lora.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "adapter_model.safetensors"), values)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 5 * sum(
        t.numel() for t in values.values()
    )
    copied = copy.deepcopy(lora)
    assert same(adapter_tensors(copied), values)
    assert next(iter(trainable_parameters(copied).values())).untyped_storage().nbytes() < 20_000


@pytest.mark.gpu
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("reached", ["abcdef", "adf"])
def test_flat_memory_changes_no_number_on_a_gpu(optim, reached):
    """There too weights and moments are those of the single parameters to the bit, paged or not."""
    shapes = {**LORA, "f": (16, 16384)}
    both = Both(shapes, config_of("unused", optim=optim, weight_decay=0.1), True, "cuda:0")
    if optim == "paged_adamw_8bit":
        assert both.ours._buffers[0].moments.state1.is_paged
    for number in range(6):
        gradients = gradients_of(shapes, number, "cuda:0")
        names = reached if number % 2 else shapes
        both.step({name: gradients[name] for name in names}, lr=1e-2 / (number + 1))
        both.assert_equal()
    saved = [{k: t.cpu().clone() for k, t in both.ours.state_by_name()[0].items()}]
    saved.append(both.ours.state_by_name()[1])
    resumed = Both(shapes, both.config, True, "cuda:0")
    for name, parameter in resumed.flat.items():
        parameter.data.copy_(both.flat[name].data)
    resumed.ours.load_state_by_name(*saved)
    gradients = gradients_of(shapes, 9, "cuda:0")
    both.step(gradients, lr=1e-2)
    for name, gradient in gradients.items():
        (resumed.flat[name] * gradient).sum().backward()
    for group in resumed.ours.param_groups:
        group["lr"] = 1e-2
    resumed.ours.clip(1.0)
    resumed.ours.step()
    assert same(both.flat, resumed.flat)


@pytest.mark.gpu
def test_a_step_waits_for_the_gpu_once():
    """Clearing, checking, clipping and updating wait once, for what the scaler has found."""
    shapes = {**LORA, "f": (16, 16384)}
    parameters = parameters_of(shapes, "cuda:0")
    flat = FlatAdamW(parameters, config_of("unused", precision="fp16"))
    scaler = torch.amp.GradScaler("cuda")
    loss = torch.ones((), device="cuda:0")

    def step():
        scaler.scale(sum(p.sum() for p in parameters.values())).backward()
        flat.spoil_unless_finite(loss)
        scaler.unscale_(flat)
        flat.clip(1.0)
        scaler.step(flat)
        scaler.update()
        flat.zero_grad()

    step()
    with torch.profiler.profile(acc_events=True) as profile:
        step()
    names = [event.name for event in profile.events()]
    assert names.count("aten::_local_scalar_dense") == 1


@pytest.mark.gpu
def test_paged_memory_is_used_again():
    """bitsandbytes never gives it back: the next run of the same size takes it, cleared."""
    places = []
    for _ in range(2):
        with FlatAdamW(parameters_of({"a": (16, 16384)}, "cuda:0"), config_of("unused")) as flat:
            moments = flat._buffers[0].moments
            assert not moments.state1.any()
            moments.state1.fill_(7)
            places.append({moments.state1.data_ptr(), moments.state2.data_ptr()})
    assert places[0] == places[1]
