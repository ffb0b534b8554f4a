"""Loading bases and what was trained on them; what does not fit is refused."""

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import IdeficsForVisionText2Text

import idefics_qlora as iq
from idefics_qlora.model.adapters import adapter_tensors


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


def test_unquantised_on_request(processor, examples):
    """quantize=False keeps the linear layers as they are stored, in the compute dtype."""
    model, _ = iq.tiny.load_model(device="cpu", quantize=False, compute_dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    quantised, _ = iq.tiny.load_model(device="cpu", compute_dtype=torch.float32)
    losses = [iq.evaluate(m, processor, examples[:4])["eval_loss"] for m in (model, quantised)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # NF4 rounds, it does not destroy


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
    with pytest.raises(ValueError, match="'llama' model: expected the 'idefics'"):
        iq.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        iq.load_finetuned(tmp_path)
    for name in ("b", "a"):
        (tmp_path / "runs" / name / "checkpoint-2").mkdir(parents=True)
    runs = tmp_path / "runs"
    with pytest.raises(
        FileNotFoundError, match=f"is no run, but holds 2: .* such as {runs}/a, {runs}/b$"
    ):
        iq.load_finetuned(runs)


def test_too_little_gpu_memory_says_how_much_was_free(monkeypatch):
    """An out-of-memory error while loading names the card's memory and the way out."""

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(IdeficsForVisionText2Text, "from_pretrained", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 2**30, 16 * 2**30))
    with pytest.raises(RuntimeError, match=r"2\.0 of 16\.0 GiB were free.*device='cpu'"):
        iq.tiny.load_model(device="cuda:0", compute_dtype=torch.float16)


def test_a_copied_base_folder_loads(tmp_path, processor, examples):
    """Weights, processor and configuration need nothing outside their folder."""
    shutil.copytree(iq.tiny.BASE, tmp_path / "base")
    model, own = iq.load_model(tmp_path / "base", device="cpu")
    assert type(own).__name__ == "IdeficsProcessor"
    assert iq.evaluate(model, own, examples[:2])["eval_loss"] > 0


def test_other_names_of_what_there_is(tmp_path, monkeypatch):
    """The embedded base has no Hub id to be asked for, and a run is no base."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"idefics_qlora\.tiny\.load_model\(\)"):
        iq.load_model("tiny")
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is a run, .*: load both with load_finetuned"):
        iq.load_model("run")


def test_an_adapter_is_not_a_base(tmp_path):
    """load_model of a checkpoint folder points to load_finetuned."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="load both with load_finetuned"):
        iq.load_model(tmp_path)
