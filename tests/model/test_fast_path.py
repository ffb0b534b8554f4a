"""The fast execution of a micro-batch: the same loss and gradient as the model's own way.

Past 400 lines: all is one comparison, of many models and batches.
"""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SUCCESSORS, every_family
from micro_batches import (
    QKV,
    a_batch,
    adapted,
    check_equal,
    gradient,
    images_of,
    lengths_of,
    shape_for,
    text_model_of,
)
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.families import family_of
from idefics_qlora.families.patches import patches_of
from idefics_qlora.model import fused, fused_idefics, fused_successors
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.precision import (
    DTYPES,
    autocast,
    set_activation_checkpointing,
    set_compute_dtype,
)
from idefics_qlora.model.shapes import Shape, shape_of

CPU = torch.device("cpu")
FAMILIES = ["idefics", *SUCCESSORS]


def slow(model, batch, precision="fp32", num_targets=None):
    """Loss and gradient as the loop of 0.1 computes them."""
    model.zero_grad()
    with autocast(CPU, DTYPES[precision]):
        logits = model(**batch.inputs(), use_cache=False).logits
    loss = summed_cross_entropy(logits, batch.labels) / (num_targets or batch.num_targets)
    loss.backward()
    return loss.detach(), gradient(model)


def fast(path, batch, num_targets=None):
    path.model.zero_grad()
    path.begin_window()
    number = num_targets or batch.num_targets
    loss = path.micro_batch_backward(
        batch, number, lengths=lengths_of(batch), images=images_of(batch)
    )
    return loss, gradient(path.model)


@pytest.fixture
def batch(processor, cards):
    return a_batch(processor, cards[:4])


@every_family
def test_loss_and_gradient_are_the_models_own(base, batch):
    """Without dropout, micro-batches of different lengths give 0.1's loss and gradient."""
    model = adapted(base)
    expected = slow(model, batch)
    path = FastPath(model, torch.float32)
    assert not path.blocks.others
    assert not path.linears.others
    check_equal(fast(path, batch), expected, 3e-5)
    path.close()


@every_family
def test_layers_are_recomputed_when_asked(base, batch, monkeypatch):
    """Activation checkpointing runs every layer twice, with the same dropout: nothing changes."""
    model, calls = adapted(base, dropout=0.1), []
    text = text_model_of(base)
    kind = fused_idefics.Decoder if text is base.model else fused_successors.Decoder
    decoder = kind.__call__

    def counted(self, *args, **kwargs):
        calls.append(self)
        return decoder(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counted)
    results = []
    for recompute in (False, True):
        set_activation_checkpointing(model, recompute)
        path = FastPath(model, torch.float32)
        torch.manual_seed(0)
        results.append(fast(path, batch))
        path.close()
    layers = len(text.layers)
    assert len(calls) == layers + 2 * layers
    check_equal(results[1], results[0], 1e-6)


@every_family
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.05), ("bf16", 0.2)])
def test_in_16_bits_it_is_as_exact_as_they_are(base, batch, precision, tolerance):
    """Loss and gradient are those in fp32 of the same weights, to rounding."""
    model = adapted(base, precision=precision)
    path = FastPath(model, DTYPES[precision])
    loss, grad = fast(path, batch)
    path.close()
    set_compute_dtype(model, torch.float32)  # of the same, rounded, weights
    exact_loss, exact = slow(model, batch)
    torch.testing.assert_close(loss, exact_loss, rtol=tolerance / 20, atol=0)
    assert (grad - exact).norm() < tolerance * exact.norm()


@every_family
@pytest.mark.parametrize("case", ["two images", "one example", "no image", "some without"])
def test_other_batches(base, processor, cards, case):
    """Several images per example, a single one, and none at all."""
    number = 1 if case == "one example" else 3
    batch = a_batch(processor, cards[:number], images=2 if case == "two images" else 1)
    if case in ("no image", "some without"):
        examples = [iq.Example(["Question: What?"], " That. " * n) for n in (3, 2)]
        if case == "some without":
            examples.insert(1, iq.Example([cards[0]["image"], "What?"], " This."))
        batch = Collator(processor)(examples)
    model = adapted(base)
    expected = slow(model, batch)
    path = FastPath(model, torch.float32)
    check_equal(fast(path, batch), expected, 3e-5)
    path.close()


class Masks(TorchFunctionMode):
    """Keeps the masks that attention is given."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return function(*args, **(kwargs or {}))


def test_who_sees_no_image_has_finite_scores(base, processor, cards):
    """Features may be fp32, as autocast's norms are on a GPU: no score becomes infinite in 16."""
    model = adapted(base, precision="bf16")
    path = FastPath(model, torch.bfloat16)
    perceiver = model.get_base_model().model.perceiver_resampler
    perceiver.register_forward_hook(lambda _, __, features: features.float())
    with Masks() as watched:
        fast(path, a_batch(processor, cards[:3], images=2))
    masks = [mask for mask in watched.masks if mask is not None]
    assert masks
    assert all(mask.isfinite().all() for mask in masks)
    path.close()


@every_family
def test_micro_batches_add_up(base, processor, cards):
    """Parts of a window add up to the whole of it, as they do the slow way."""
    batch = a_batch(processor, cards[:4])
    lengths, num_images = lengths_of(batch), batch.vision.pixel_values.shape[1]
    model = adapted(base)
    path = FastPath(model, torch.float32)
    whole = fast(path, batch)
    model.zero_grad()
    path.begin_window()
    loss = torch.zeros(())
    for start in (0, 2):
        part = batch.part(slice(start, start + 2), lengths[start], num_images)
        number = batch.num_targets
        loss += path.micro_batch_backward(
            part, number, lengths=lengths[start : start + 2], images=images_of(part)
        )
    check_equal((loss, gradient(model)), whole, 3e-5)
    path.close()


@every_family
def test_the_scale_is_in_the_gradient_and_not_in_the_loss(base, batch):
    """A scaler's scale multiplies the gradient alone."""
    model = adapted(base)
    path = FastPath(model, torch.float32)
    loss, once = fast(path, batch)
    model.zero_grad()
    again = path.micro_batch_backward(
        batch,
        batch.num_targets,
        lengths=lengths_of(batch),
        images=images_of(batch),
        scale=torch.tensor(64.0),
    )
    assert torch.equal(loss, again)
    torch.testing.assert_close(gradient(model), 64 * once)
    path.close()


def with_dora(base):
    return adapted(base, use_dora=True, target_modules=["q_proj"])


def with_a_trained_norm(base):
    return adapted(base, modules_to_save=["layer_norm1"])


def with_a_hook(base):
    model = adapted(base)
    layers = text_model_of(model.get_base_model()).layers
    layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


def with_lora_everywhere(base):
    everywhere = [*QKV, "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"]
    return adapted(base, target_modules=everywhere)


@every_family
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_dora, "DoraLinearVariant"),
        (with_a_trained_norm, "ModulesToSaveWrapper"),
        (with_a_hook, "hooks on its mlp"),
        (with_lora_everywhere, None),
    ],
)
def test_blocks_that_are_not_known_run_their_own_way(base, batch, make, reason):
    """DoRA, trained norms, hooks: these blocks are the model's own, with the same result."""
    model = make(base)
    expected = slow(model, batch)
    path = FastPath(model, torch.float32)
    if reason is None:
        assert not path.blocks.others
    else:
        assert reason in path.blocks.report()
        assert path.blocks.blocks  # the others are fused
    check_equal(fast(path, batch), expected, 3e-5)
    path.close()


@every_family
def test_parts_that_are_trained_whole(bases, family, cards):
    """In 16 bits: what is fused beside them, and what is not, has the model's own gradient."""
    unquantised, processor = iq.load_model(
        bases(family)[0].name_or_path, device="cpu", quantize=False, compute_dtype=torch.float32
    )
    batch = a_batch(processor, cards[:3], images=2)
    fused_beside = []
    for part in family_of(unquantised).parts:
        lora = LoraConfig(r=4, target_modules=QKV)
        model = iq.add_lora(copy.deepcopy(unquantised), lora, train_parts=[part]).train()
        expected = slow(model, batch)
        if FastPath.why_not(model) is not None:  # parts that are called piece by piece
            assert FastPath.why_not(model) == "a whole part of the model is trained"
            continue
        path = FastPath(model, torch.float32)
        fused_beside.append(part)
        assert path.blocks.others
        check_equal(fast(path, batch), expected, 3e-5)
        path.close()
    assert "text layers" in fused_beside


@every_family
def test_dropout_follows_from_the_generator(base, batch):
    """The same random state gives the same masks; the next micro-batch has others."""
    model = adapted(base, dropout=0.2)
    path = FastPath(model, torch.float32)
    torch.manual_seed(1)
    first, second = fast(path, batch), fast(path, batch)
    torch.manual_seed(1)
    again = fast(path, batch)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], second[1])
    path.close()


@every_family
def test_outside_of_a_pass_the_model_is_its_own(base, batch):
    """Evaluation and generation between micro-batches take the model's own code, to the bit."""
    model = adapted(base)
    replaced = {m for m in model.modules() if "forward" in m.__dict__}
    model.eval()
    with torch.no_grad():
        before = model(**batch.inputs(), use_cache=False).logits
        model.train()
        path = FastPath(model, torch.float32)
        fast_loss = fast  # a pass in between
    fast_loss(path, batch)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs(), use_cache=False).logits, before)
    path.close()
    assert {m for m in model.modules() if "forward" in m.__dict__} == replaced
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs(), use_cache=False).logits, before)


@every_family
def test_a_copy_of_the_model_is_a_model_of_its_own(base, batch):
    """A deep copy made while the fast path is there neither uses nor changes the first one's."""
    model = adapted(base)
    path = FastPath(model, torch.float32)
    loss, _ = fast(path, batch)
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with torch.no_grad():
        logits = twin(**batch.inputs(), use_cache=False).logits
    assert not torch.isclose(summed_cross_entropy(logits, batch.labels) / batch.num_targets, loss)
    assert torch.equal(fast(path, batch)[0], loss)
    path.close()


@every_family
def test_a_changed_adapter_is_taken_as_it_is_now(base, batch):
    """What is merged or switched off between two windows is so in the next."""
    model = adapted(base)
    path = FastPath(model, torch.float32)
    fast(path, batch)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
    expected = slow(model, batch)
    check_equal(fast(path, batch), expected, 3e-5)
    path.close()


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_family
def test_nothing_waits_for_data(base, batch):
    """A pass asks for no value and makes no tensor whose size depends on values: it could be
    recorded, and a GPU would not be waited for."""
    model = adapted(base, dropout=0.1, precision="bf16")
    path = FastPath(model, torch.bfloat16)
    path.begin_window()
    shape = shape_for(path, batch)
    inputs = path._inputs(batch, shape, 10, images_of(batch), None)
    with Operations() as ours:
        path._pass(shape, inputs)
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero"}
    assert not waiting & set(ours.names)
    path.close()
    with Operations() as before:
        slow(model, batch, "bf16")
    assert len(ours.names) < len(before.names)  # by far fewer where Triton runs


@pytest.mark.parametrize("family", SUCCESSORS, indirect=True)
def test_patches_have_the_models_places(base):
    """Pictures of all sizes, alone and beside smaller ones; no step asks which patches are there
    (in some versions of transformers the model's own do)."""
    embeddings = base.model.vision_model.embeddings.float()  # 16 bits: test_patches.py
    own = type(embeddings).forward
    size, side = embeddings.patch_size, embeddings.num_patches_per_side
    for rows, columns in itertools.product(range(1, side + 1), repeat=2):
        is_patch = torch.zeros(3, rows, columns, dtype=torch.bool)
        for n in range(3):
            is_patch[n, : rows - n or 1, : columns - 2 * n if columns > 2 * n else 1] = True
        pixels = torch.rand(3, 3, rows * size, columns * size)
        expected = own(embeddings, pixel_values=pixels, patch_attention_mask=is_patch)
        with Operations() as ours:
            patches = patches_of(embeddings, pixels, is_patch)
        assert torch.equal(patches, expected)
        assert not {"nonzero", "index", "index_put_", "_local_scalar_dense"} & set(ours.names)


def test_shapes_come_again():
    """Rounding up makes shapes few and adds at most 16 rows or 3.2 %."""
    shapes = set()
    for tokens in range(64, 8000):
        shape = shape_of(16, tokens, 97, tokens // 2, 1, 16)
        assert 0 <= shape.rows - tokens < max(16, 0.033 * tokens)
        assert shape.length == 128
        assert tokens // 2 <= shape.targets <= shape.rows
        shapes.add(shape)
    assert len(shapes) < 400
    assert shape_of(16, 16 * 97, 97, 1100, 1, 16) == Shape(16, 128, 1568, 1176, 1, 16)


def test_pictures_are_few_shapes():
    """Vision sees at most an eighth of the places for images more than there are images."""
    places = {shape_of(16, 1600, 160, 800, 2, n).pictures for n in range(33)}
    assert places == {4, 8, 12, 16, 20, 24, 28, 32}
    assert shape_of(16, 1600, 160, 800, 2, 20).pictures == 20
    assert shape_of(3, 300, 160, 100, 1, 0).pictures == 1
    assert shape_of(3, 300, 160, 100, 5, 15).pictures == 15


@every_family
@pytest.mark.parametrize("padding", [0, 2, 7])
def test_images_that_pad_are_not_looked_at(base, processor, cards, padding):
    """Of examples with 3, 1, 0 and 1 images, vision sees five, or as many more as a shape has, and
    loss and gradient are the model's own, with adapters on vision and on what it is asked by."""
    pictures = [card["image"].resize((60 + 20 * n, 80)) for n, card in enumerate(cards[5:10])]
    prompts = [[*pictures[:3], "Three?"], [pictures[3], "One?"], ["None?"], [pictures[4], "One?"]]
    examples = [iq.Example(prompt, " It is. It is.") for prompt in prompts]
    batch = Collator(processor)(examples)
    images = images_of(batch)
    assert [number // images[1] for number in images] == [3, 1, 0, 1]
    model = adapted(base)
    expected = slow(model, batch)
    path = FastPath(model, torch.float32)
    seen = []
    hook = base.model.vision_model.embeddings.patch_embedding.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output))
    )
    path.model.zero_grad()
    path.begin_window()
    lengths = lengths_of(batch)
    seen_by_vision = sum(images) + padding
    shape = Shape(*(4, max(lengths), sum(lengths), batch.num_targets, max(images), seen_by_vision))
    loss = path._pass(shape, path._inputs(batch, shape, batch.num_targets, images, None))
    check_equal((loss, gradient(model)), expected, 3e-5)
    assert seen == [seen_by_vision]
    hook.remove()
    path.close()


def test_packing_leads_to_slots_and_back():
    """Each token has its row, in order; padding and rows without a token are zero."""
    is_token = torch.arange(6) < torch.tensor([[5], [1], [3]])
    packing = fused.Packing.of(is_token, rows=12)
    assert packing.slot_of.tolist() == [0, 1, 2, 3, 4, 6, 12, 13, 14, -1, -1, -1]
    values = torch.randn(12, 2, requires_grad=True)
    slots = packing.slots(values)
    assert torch.equal(slots.view(3, 6, 2)[2, :3], values[6:9])
    assert (slots.view(3, 6, 2)[1, 1:] == 0).all()
    back = packing.rows(slots)
    assert torch.equal(back[:9], values[:9])
    assert (back[9:] == 0).all()
    back.sum().backward()
    assert torch.equal(values.grad, torch.cat([torch.ones(9, 2), torch.zeros(3, 2)]))


@every_family
def test_rows_that_are_no_token_change_nothing(base, batch):
    """A micro-batch rounded up to a shape has the loss and gradient of the one that is not."""
    model = adapted(base)
    path = FastPath(model, torch.float32)
    exact = fast(path, batch)
    lengths = lengths_of(batch)
    shape = shape_for(path, batch)
    assert shape.rows > sum(lengths)
    assert shape.length > max(lengths)
    model.zero_grad()
    loss = path._pass(shape, path._inputs(batch, shape, batch.num_targets, images_of(batch), None))
    check_equal((loss, gradient(model)), exact, 3e-5)
    path.close()


@every_family
def test_which_models_can_be_trained_the_fast_way(base):
    """Trained embeddings or head, and other attention, are told."""
    model = adapted(base)
    assert FastPath.why_not(model) is None
    inner = model.get_base_model()
    inner.config._attn_implementation = "eager"
    assert FastPath.why_not(model) == "attention is 'eager'"
    inner.config._attn_implementation = "sdpa"
    inner.lm_head.weight.requires_grad_(True)
    tied = inner.lm_head.weight is inner.get_input_embeddings().weight
    assert FastPath.why_not(model) == f"the {'embedding' if tied else 'head'} is trained"
    text_model_of(inner).embed_tokens.weight.requires_grad_(True)
    assert FastPath.why_not(model) == "the embedding is trained"


def test_embedding_is_the_models_own(base):
    """Usual and additional token ids are looked up as the model does it."""
    embedding = base.model.embed_tokens
    total = embedding.num_embeddings + embedding.num_additional_embeddings
    ids = torch.tensor([[0, 5, total - 1, embedding.num_embeddings, 7]])
    assert torch.equal(fused.embed(embedding, ids), embedding(ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["kernels_by_interpreter.py", *(f"pass_by_interpreter.py {f}" for f in FAMILIES)],
)
def test_triton_kernels_by_the_interpreter(script):
    """Every Triton kernel does what PyTorch's operations do, alone and in a whole pass."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(iq.__file__).parents[1])
    file, *arguments = script.split()
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name(file), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout


@every_family
def test_a_graph_of_the_same_parameters_is_not_touched(base, batch):
    """Autograd's nodes for the parameters, which another pass may hold on its own stream, are no
    part of a pass that adds its gradients directly."""
    model = adapted(base)
    path = FastPath(model, torch.float32)
    fast(path, batch)  # now there is a .grad to add to
    called = []
    hooks = [p.register_hook(called.append) for p in model.parameters() if p.requires_grad]
    once = gradient(model)
    path.micro_batch_backward(
        batch, batch.num_targets, lengths=lengths_of(batch), images=images_of(batch)
    )
    torch.testing.assert_close(gradient(model), 2 * once)
    assert not called
    for hook in hooks:
        hook.remove()
    path.close()
