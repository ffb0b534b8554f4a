"""Loading, adapters, dtypes, and the traps of the libraries underneath."""

import copy
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from full_size import configuration
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import IdeficsForVisionText2Text

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.families import FAMILIES
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.model.base import base_fingerprint
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.precision import (
    autocast,
    compute_dtype,
    set_activation_checkpointing,
    set_compute_dtype,
)


def backward(model, batch, dtype=torch.float32):
    """The loss of a batch, its gradients in the model's parameters."""
    with autocast(torch.device("cpu"), dtype):
        logits = model(**batch.inputs(), use_cache=False).logits
    loss = summed_cross_entropy(logits, batch.labels) / batch.num_targets
    loss.backward()
    return loss.detach()


def parts_with_gradient(model):
    """For each part of the model: how many of its LoRA matrices have a non-zero gradient."""
    counts = {"vision": [0, 0], "perceiver": [0, 0], "cross_attn": [0, 0], "self_attn": [0, 0]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(part for part in counts if part in name)
            counts[part][0] += parameter.grad is not None and bool(parameter.grad.any())
            counts[part][1] += 1
    return {part: tuple(count) for part, count in counts.items()}


def open_adapters(model):
    """Give the second LoRA matrices values, so that the first ones get a gradient too."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def test_the_dtype_policy(base):
    """Exactly these parameters have these dtypes; a library upgrade that changes it is noticed."""
    kinds = {torch.uint8: set(), torch.float16: set()}
    for name, parameter in base.named_parameters():
        kinds[parameter.dtype].add(name)
    quantised = {
        f"{name}.weight" for name, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    }
    assert kinds[torch.uint8] == quantised
    expected = {
        f"{name}.weight"
        for name, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    }
    assert quantised == expected
    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert module.compute_dtype == torch.float16, name
            assert module.weight.quant_state.quant_type == "nf4", name
            assert module.weight.quant_state.nested, name  # double quantisation
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not base.training


def test_adapters_are_fp32_on_qkv_everywhere(lora):
    """The recipe's adapters: fp32, on q, k and v of all four parts, with its r, alpha, dropout."""
    trainable = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    config = lora.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)


def test_idefics_9b_has_the_tutorials_parameters():
    """19,750,912 trainable of 8,949,430,544, in 234 modules: the tutorial's numbers."""
    with torch.device("meta"):
        model = iq.add_lora(IdeficsForVisionText2Text(configuration("9b")))
    assert model.get_nb_trainable_parameters() == (19_750_912, 8_949_430_544)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 234


def test_the_same_seed_gives_the_same_adapter(base):
    """Adapters start reproducibly, and the global generator is not touched."""
    other = copy.deepcopy(base)
    before = torch.get_rng_state()
    first = adapter_tensors(iq.add_lora(base))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = adapter_tensors(iq.add_lora(other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unquantised_on_request(processor, examples):
    """quantize=False keeps the linear layers as they are stored, in the compute dtype."""
    model, _ = iq.tiny.load_model(device="cpu", quantize=False, compute_dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    quantised, _ = iq.tiny.load_model(device="cpu", compute_dtype=torch.float32)
    losses = [iq.evaluate(m, processor, examples[:4])["eval_loss"] for m in (model, quantised)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # NF4 rounds, it does not destroy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compute_dtype_can_change(lora, dtype):
    """A run in bf16 or fp32 casts the frozen parts; the adapter stays fp32."""
    set_compute_dtype(lora, dtype)
    assert compute_dtype(lora) == dtype
    dtypes = {p.dtype for p in lora.parameters() if not p.requires_grad}
    assert dtypes == {dtype, torch.uint8}
    assert all(p.dtype == torch.float32 for p in lora.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_adapter_gets_a_gradient(lora, processor, examples, checkpointing, dtype):
    """Vision, perceiver, cross-attention and text all learn, also when layers are recomputed."""
    open_adapters(lora)
    set_compute_dtype(lora, dtype)
    set_activation_checkpointing(lora, checkpointing)
    lora.train()
    backward(lora, Collator(processor)(examples[:2]), dtype)
    for part, (with_gradient, all_of_them) in parts_with_gradient(lora).items():
        assert with_gradient == all_of_them > 0, part


def test_recomputing_activations_changes_no_gradient(lora, processor, examples):
    """Activation checkpointing trades time for memory and nothing else, dropout included."""
    open_adapters(lora)
    set_compute_dtype(lora, torch.float32)
    lora.train()
    batch = Collator(processor)(examples[:2])

    def gradients(recompute, seed):
        set_activation_checkpointing(lora, recompute)
        lora.zero_grad()
        torch.manual_seed(seed)
        backward(lora, batch)
        return [p.grad.clone() for p in lora.parameters() if p.requires_grad]

    kept, recomputed, control = gradients(False, 1), gradients(True, 1), gradients(True, 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, control, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_pefts_preparation_would_leave_vision_without_gradient(base, processor, examples):
    """The reason why add_lora does not call it; when this fails, peft was mended."""
    model = iq.add_lora(prepare_model_for_kbit_training(base))
    open_adapters(model)
    model.train()
    backward(model, Collator(processor)(examples[:2]))
    counts = parts_with_gradient(model)
    assert counts["vision"][0] == 0
    assert counts["self_attn"][0] == counts["self_attn"][1]


def test_evaluation_does_not_break_training(lora, processor, examples):
    """On a CPU with AVX512-BF16, bitsandbytes repacks weights in an evaluation: not with us."""
    quantised = [m for m in lora.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    open_adapters(lora)
    batch = Collator(processor)(examples[:2])
    lora.eval()
    backward(lora, batch)
    before = [p.grad.clone() for p in lora.parameters() if p.requires_grad]
    lora.zero_grad()
    iq.evaluate(lora, processor, examples[:2])
    backward(lora, batch)
    after = [p.grad for p in lora.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_models_own_loss_raises(base, processor, examples):
    """transformers' loss forgets the additional tokens; when this fails, it was mended."""
    batch = Collator(processor)(examples[:2])
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        base(**batch.inputs(), labels=batch.labels)


def test_loss_equals_pytorchs_over_the_targets():
    """Shifted, in fp32, over the whole decoupled vocabulary, padding left out."""
    logits = torch.randn(2, 5, 12).half()
    labels = torch.tensor([[-100, 3, 11, 10, -100], [-100, -100, 0, -100, -100]])
    expected = torch.stack(
        [
            -logits[b, t - 1].float().log_softmax(0)[labels[b, t]]
            for b in range(2)
            for t in range(1, 5)
            if labels[b, t] != -100
        ]
    ).sum()
    loss = summed_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_plain_peft_loads_what_was_trained(lora, processor, examples, tmp_path):
    """A checkpoint is an ordinary peft adapter, and load_finetuned gives the trained model back."""
    config = iq.TrainConfig(
        output_dir=tmp_path, max_steps=2, load_best_model_at_end=False, num_workers=0
    )
    iq.train(lora, processor, examples, config=config)
    checkpoint = iq.latest_checkpoint(tmp_path)
    theirs = PeftModel.from_pretrained(iq.tiny.load_model(device="cpu")[0], checkpoint)
    ours, _ = iq.load_finetuned(checkpoint, device="cpu")
    expected = adapter_tensors(lora)
    for model in (theirs, ours):
        tensors = adapter_tensors(model)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert not model.training
    file = load_file(checkpoint / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in file)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(iq.tiny.BASE)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_an_adapter_that_does_not_fit_is_refused(lora, tmp_path, damage):
    """peft only warns and leaves random matrices; here nothing is half-loaded."""
    tensors = {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}
    name = next(iter(tensors))
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors["other"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3, 3)
    lora.save_pretrained(tmp_path, save_embedding_layers=False)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit this model"):
        iq.load_finetuned(tmp_path, device="cpu")


def test_errors_of_loading(tmp_path):
    """Each wrong place says what is wrong with it."""
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        iq.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder './nowhere'"):
        iq.load_model("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        iq.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' checkpoint: expected the 'idefics'"):
        iq.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        iq.load_finetuned(tmp_path)


def test_too_little_gpu_memory_says_how_much_was_free(monkeypatch):
    """An out-of-memory error while loading names the card's memory and the way out."""

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(IdeficsForVisionText2Text, "from_pretrained", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 2**30, 16 * 2**30))
    with pytest.raises(RuntimeError, match=r"2\.0 of 16\.0 GiB were free.*device='cpu'"):
        iq.tiny.load_model(device="cuda:0")


def test_a_copied_base_folder_loads(tmp_path, processor, examples):
    """Weights, processor and configuration need nothing outside their folder."""
    shutil.copytree(iq.tiny.BASE, tmp_path / "base")
    model, own = iq.load_model(tmp_path / "base", device="cpu")
    assert type(own).__name__ == "IdeficsProcessor"
    assert iq.evaluate(model, own, examples[:2])["eval_loss"] > 0


def test_flops_of_9b_match_the_count_by_hand():
    """0.76 + 0.0322 T TFLOP per example, of which adapters and attention scores are 2 to 3 %."""
    config = configuration("9b")
    for tokens in (50, 100):
        expected = (0.76 + 0.0322 * tokens) * 1e12
        assert FAMILIES["idefics"].training_flops(config, tokens, 1) == pytest.approx(
            expected, rel=0.03
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["input_layernorm"]},
        {"bias": "lora_only"},
        {"bias": "all"},
    ],
    ids=str,
)
def test_other_adapters_train_and_come_back(base, processor, examples, tmp_path, changes):
    """Trained copies and biases are fp32, and their checkpoint is of the base it was trained on."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **changes)
    before = base_fingerprint(base)
    model = iq.add_lora(base, config)
    assert base_fingerprint(model) == before
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    settings = iq.TrainConfig(
        output_dir=tmp_path, max_steps=1, global_batch_size=2, num_workers=0, precision="fp32",
        load_best_model_at_end=False,
    )  # fmt: skip
    iq.train(model, processor, examples, config=settings)
    assert base_fingerprint(model)["architecture"] == before["architecture"]
    again, _ = iq.load_finetuned(tmp_path / "checkpoint-1", device="cpu")
    assert iq.evaluate(again, processor, examples[:2])["eval_loss"] > 0


def test_adapters_on_adapters_are_refused(lora):
    """A notebook cell that is run twice does not stack adapters."""
    with pytest.raises(ValueError, match="has adapters already"):
        iq.add_lora(lora)


def test_an_adapter_is_not_a_base(tmp_path):
    """load_model of a checkpoint folder points to load_finetuned."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="load both with load_finetuned"):
        iq.load_model(tmp_path)
