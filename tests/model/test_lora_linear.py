"""Adapter layers computed as one operation: equal to peft's, and peft's wherever it must be."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import idefics_qlora as iq
from idefics_qlora.model.cpu import prepare_for_cpu
from idefics_qlora.model.lora_linear import Group, install, linear, why_not
from idefics_qlora.model.precision import set_compute_dtype

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]


class Block(nn.Module):
    """Layers under the names that adapters look for."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 48, bias, dtype=dtype)
        self.k_proj = nn.Linear(64, 32, bias, dtype=dtype)
        self.v_proj = nn.Linear(64, 48, bias, dtype=dtype)


def adapted(block: nn.Module, **changes) -> nn.Module:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    model = get_peft_model(block.requires_grad_(False), LoraConfig(**{**settings, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # fresh ones are zero, and so would be the gradient of A
            nn.init.normal_(parameter)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def run(layers: list[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    outputs = torch.cat([layer(x) for layer in layers], dim=-1)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    (outputs * weights).sum().backward()
    return outputs.detach(), x.grad


def check_equal(model: nn.Module, layers: list[nn.Module], x: torch.Tensor, tolerance: float):
    """Outputs and every gradient are those of peft's own forward."""
    model.zero_grad()
    expected = run(layers, x)
    reference = gradients(model)
    model.zero_grad()
    linears = install(model)
    assert not linears.others
    with linears.active():
        actual = run(layers, x)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b) < tolerance
    found = gradients(model)
    assert found.keys() == reference.keys()
    for name, gradient in found.items():
        assert relative(gradient, reference[name]) < tolerance, name
    linears.uninstall()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_pattern": {"q_proj": 4, "v_proj": 16}, "alpha_pattern": {"k_proj": 3}},
        {"use_rslora": True},
        {"bias": "all"},
    ],
    ids=["plain", "rank-pattern", "rslora", "bias"],
)
def test_gradients_are_pefts(dtype, changes):
    """Every LoRA setting that is only numbers: outputs and gradients are peft's."""
    model = adapted(Block(bias="bias" in changes, dtype=dtype), **changes)
    model = model.to(dtype)
    block = model.get_base_model()
    layers = [block.q_proj, block.k_proj, block.v_proj]
    x = torch.randn(3, 5, 64, dtype=dtype)
    check_equal(model, layers, x, 1e-6 if dtype == torch.float32 else 1e-13)


def test_input_need_not_be_contiguous():
    """A transposed and a strided input give what a copy of them gives."""
    model = adapted(Block())
    layers = [model.get_base_model().q_proj]
    check_equal(model, layers, torch.randn(64, 7).T, 1e-6)
    check_equal(model, layers, torch.randn(2, 6, 128)[:, ::2, ::2], 1e-6)


@pytest.mark.parametrize("target", LINEAR)
def test_every_target_of_the_quantised_base(base, target):
    """On the real NF4 base, an adapter on any of its linear layers has peft's gradients."""
    model = iq.add_lora(base, LoraConfig(r=4, lora_alpha=8, target_modules=[target]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    set_compute_dtype(model, torch.float32)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert layers
    first, last = layers[0], layers[-1]
    for layer in (first, last):
        check_equal(model, [layer], torch.randn(2, 9, layer.in_features), 1e-6)


def test_gradcheck():
    """The backward pass is the derivative of the forward pass, in double precision."""
    model = adapted(Block(bias=True, dtype=torch.float64), bias="lora_only").to(torch.float64)
    block = model.get_base_model()
    group = Group([block.q_proj, block.k_proj])
    parameters = group.parameters
    assert len(parameters) == 6  # A and B of both, and their biases

    def function(x, *_):
        return linear(x, group)

    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_layers_side_by_side_are_those_layers():
    """Query, key and value as one product: each one's outputs and gradients."""
    model = adapted(Block(bias=True))
    block = model.get_base_model()
    layers = [block.q_proj, block.k_proj, block.v_proj]
    x = torch.randn(4, 64)
    expected, expected_grad = run(layers, x)
    reference = gradients(model)
    model.zero_grad()
    group = Group(layers)
    whole = type("Whole", (), {"__call__": lambda self, x: linear(x, group)})()
    actual, grad = run([whole], x)
    assert relative(actual, expected) < 1e-6
    assert relative(grad, expected_grad) < 1e-6
    for name, gradient in gradients(model).items():
        assert relative(gradient, reference[name]) < 1e-6, name
    # Unquantised weights lie in one tensor now, the model is none the worse for it.
    assert group.weight(torch.float32).data_ptr() == block.q_proj.base_layer.weight.data_ptr()


def test_gradients_can_be_added_where_they_belong():
    """``accumulate`` adds to ``.grad`` what autograd would have added."""
    model = adapted(Block())
    layers = [model.get_base_model().q_proj]
    x = torch.randn(4, 64)
    linears = install(model)
    with linears.active():
        run(layers, x)
    once = gradients(model)
    assert once
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(1)
    with linears.active(accumulate=True):
        run(layers, x)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, once[name] + 1)
    linears.uninstall()


def test_dropout_is_dropout():
    """The right share of inputs is dropped and the rest scaled, differently each time; the backward
    pass drops the same."""
    model = adapted(Block(), lora_dropout=0.25)
    layer = model.get_base_model().q_proj
    group = Group([layer])
    layer.base_layer.weight.zero_()
    lora = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.zeros_(lora[0])
    nn.init.zeros_(lora[1])
    lora[0].data[0, :] = torch.linspace(1, 2, 64)  # of one input, its number can be told
    lora[1].data[0, 0] = 1
    x = torch.eye(64).repeat(100, 1).requires_grad_()
    y = linear(x, group, torch.tensor([5]))[:, 0]
    expected = lora[0][0].repeat(100) * group.loras[0].scaling / 0.75
    kept = y != 0
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(y[kept], expected[kept])
    y.sum().backward()
    assert torch.equal((x.grad != 0).any(dim=1) & kept, kept)
    diagonal = x.grad[torch.arange(6400), torch.arange(64).repeat(100)]
    assert torch.equal(diagonal != 0, kept)
    again = linear(x, group, torch.tensor([6]))[:, 0]
    assert not torch.equal(again != 0, kept)
    layer.eval()
    assert (linear(x, group)[:, 0] != 0).all()


def test_copies_of_the_adapter_are_as_old_as_told():
    """In 16 bits A and B are cast when told, once for all micro-batches of a window."""
    model = adapted(Block())
    layer = model.get_base_model().q_proj
    linears = install(model)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), linears.active():
        linears.refresh(torch.bfloat16)
        first = layer(x)
        layer.lora_B["default"].weight.data.mul_(3)
        assert torch.equal(layer(x), first)
        linears.refresh(torch.bfloat16)
        assert not torch.equal(layer(x), first)
        second = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(second, layer(x), rtol=0.05, atol=0.1)
    linears.uninstall()


def test_fp16_on_a_cpu_is_rounded_once():
    """Under fp16 autocast the result is that of rounded operands, rounded, as in cpu.py."""
    block = Block()
    for name in ("q_proj", "k_proj", "v_proj"):
        old = getattr(block, name)
        new = bnb.nn.Linear4bit(64, old.out_features, bias=False, compute_dtype=torch.float16)
        setattr(block, name, new)
    block.to("cpu")  # quantises
    block.is_loaded_in_4bit = True
    model = adapted(block)
    prepare_for_cpu(model)
    layer = model.get_base_model().q_proj
    x = torch.randn(8, 64)
    linears = install(model)
    assert not linears.others
    with torch.autocast("cpu", dtype=torch.float16):
        with linears.active():
            linears.refresh(torch.float16)
            fast = layer(x)
        slow = layer(x)
    assert fast.dtype == torch.float16
    group = Group([layer])
    exact = x.half().double() @ group.weight(torch.float32).double().T
    exact += x.half().double() @ (layer.get_delta_weight("default").double().T)
    assert relative(fast.double(), exact) < 1e-3
    assert relative(fast.double(), slow.double()) < 2e-3
    linears.uninstall()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "a bias in the adapter"),
    ],
)
def test_what_is_not_known_goes_pefts_way(changes, reason):
    """DoRA and its like are computed by peft, and the report says which and why."""
    model = adapted(Block(bias=True), **changes)
    x = torch.randn(4, 64)
    layers = [model.get_base_model().q_proj]
    expected = run(layers, x)
    linears = install(model)
    assert not linears.groups
    assert reason in linears.report()
    assert "base_model.model.q_proj and 2 more" in linears.report()
    with linears.active():
        actual = run(layers, x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    linears.uninstall()


def test_states_of_a_layer_that_go_pefts_way():
    """Two adapters, a merged one, one switched off, hooks: each is seen."""
    model = adapted(Block())
    layer = model.get_base_model().q_proj
    assert why_not(layer) is None
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert why_not(layer) is None  # one of two is active
    model.base_model.set_adapter(["default", "second"])
    assert why_not(layer) == "2 adapters are active"
    model.set_adapter("default")
    layer.merge()
    assert why_not(layer) == "its adapter is merged"
    layer.unmerge()
    with model.disable_adapter():
        assert why_not(layer) == "its adapter is switched off"
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: None)
    assert why_not(layer) == "it has hooks"
    handle.remove()
    assert why_not(layer) is None
    assert why_not(nn.Linear(2, 2)) == "a modules Linear"


def test_ia3_and_saved_modules_go_pefts_way():
    """Adapters of another method, and whole modules that are trained, are left to peft."""
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = get_peft_model(Block().requires_grad_(False), ia3)
    linears = install(model)
    assert linears.others == {"base_model.model.q_proj": "a ia3 Linear"}
    linears.uninstall()
    model = adapted(Block(), target_modules=["q_proj"], modules_to_save=["k_proj"])
    linears = install(model)
    assert list(linears.groups) == ["base_model.model.q_proj"]
    assert linears.others == {"base_model.model.k_proj": "modules_to_save or trained tokens"}
    linears.uninstall()


def test_changes_of_the_layers_are_noticed():
    """After merging, switching off or rescaling, what was prepared is out of date, and says so."""
    model = adapted(Block())
    layer = model.get_base_model().q_proj
    linears = install(model)
    assert linears.is_current
    layer.set_scale("default", 3)
    assert not linears.is_current
    linears.uninstall()
    linears = install(model)
    layer.merge()
    assert not linears.is_current
    layer.unmerge()
    assert linears.is_current
    model.base_model.disable_adapter_layers()
    assert not linears.is_current
    linears.uninstall()


def test_uninstalling_leaves_the_model_as_it_was():
    """Afterwards every layer has peft's forward, its own attributes and tensors; a copy made in
    between is a model of its own."""
    model = adapted(Block())
    layer = model.get_base_model().q_proj
    before = set(layer.__dict__)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = install(model)
    x = torch.randn(4, 64)
    twin = copy.deepcopy(model)
    twin.get_base_model().q_proj.lora_B["default"].weight.data.zero_()
    with linears.active():
        expected = layer(x)
    twins = twin.get_base_model().q_proj.fast_linears
    with twins.active():
        assert not torch.equal(twin.get_base_model().q_proj(x), expected)
    linears.uninstall()
    assert set(layer.__dict__) == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
