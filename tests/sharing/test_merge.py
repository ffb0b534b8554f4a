"""Merging: peft's own numbers, in bounded memory, whole or not there, and proved."""

import copy
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import config_of, every_family
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.data.batches import Collator
from idefics_qlora.model.adapters import adapter_config, adapter_tensors
from idefics_qlora.sharing import merge as merging

VARIANTS = {
    "the recipe": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks": {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "biases of the matrices": {"lora_bias": True, "target_modules": r".*vision.*\.(fc1|q_proj)"},
    "all linear layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["patch_embedding", "q_proj"]},
    "parameters": {"target_parameters": ["q_proj.weight"], "lora_dropout": 0.0},
    "whole modules": {"modules_to_save": ["lm_head", "vision_model.post_layernorm"]},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
}
FP32 = {"quantize": False, "compute_dtype": torch.float32, "device": "cpu"}


def written(model, folder):
    """An adapter's two files, its weights as if it had learnt something."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    tensors = {name: t.contiguous() for name, t in adapter_tensors(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    return folder


def adapter_in(folder, family="idefics", **settings):
    base, _ = iq.tiny.load_model(family=family, **FP32)
    return written(iq.add_lora(base, LoraConfig(r=8, lora_alpha=16, **settings)), folder)


@pytest.fixture
def adapter(tmp_path):
    return adapter_in(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # peft: of any bias
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_what_peft_merges(name, tmp_path):
    """Each variant, layer by layer, gives peft's own merged model to the bit."""
    folder = adapter_in(tmp_path / "adapter", **VARIANTS[name])
    result = iq.merge(folder, tmp_path / "out", dtype=torch.float32, verify=False)
    assert 0 < result.num_changed <= result.num_adapted
    expected = iq.load_finetuned(folder, **FP32)[0].merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []


def test_parts_that_learnt_whole_are_merged(tmp_path):
    """`train_parts` of a family: every weight is the trained one."""
    base, _ = iq.tiny.load_model(family="smolvlm", **FP32)
    folder = written(iq.add_lora(base, train_parts=["connector"]), tmp_path / "adapter")
    iq.merge(folder, tmp_path / "out", dtype=torch.float32, verify=False)
    model, _ = iq.load_model(tmp_path / "out", **FP32)
    expected = iq.load_finetuned(folder, **FP32)[0].merge_and_unload().state_dict()
    found = model.state_dict()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


@every_family
def test_each_family_is_merged_and_loads_elsewhere(family, tmp_path, examples):
    """transformers' own classes load the folder, and it does what the adapter does."""
    folder = adapter_in(tmp_path / "adapter", family)
    result = iq.merge(folder, tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    proof = result.proof
    assert proof.rounding < min(merging.ROUNDING[torch.bfloat16], proof.effect / 4, proof.drift)
    assert len(proof.merged_texts) == len(proof.texts_in_4_bits) == 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ends = model.generation_config.eos_token_id  # a server's texts end where training ended them
    assert {*Collator(processor).end_ids} <= {*([ends] if isinstance(ends, int) else ends)}
    made = pipeline("image-text-to-text", model=str(tmp_path / "out"), device="cpu")
    assert type(made.model) is type(model)
    batch = Collator(processor)(examples[:2])
    adapted, _ = iq.load_finetuned(folder, **FP32)
    with torch.no_grad():
        logits = [m(**batch.inputs()).logits for m in (model.float(), adapted)]
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < merging.ROUNDING[torch.bfloat16]
    leak = str(tmp_path)
    assert not any(leak in f.read_text(errors="ignore") for f in (tmp_path / "out").glob("*.json"))


def test_a_run_is_merged_by_the_command(lora, processor, cards, tmp_path, capsys):
    """The base is found by the checkpoint's record; drift and texts are printed."""
    config = config_of(
        tmp_path / "run",
        max_steps=2, eval_steps=2, save_steps=2, eval_samples=2, learning_rate=0.01,
    )  # fmt: skip
    iq.train(lora, processor, cards[:8], cards[8:12], config=config)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert cli.main(["merge", run, out, "--dtype", "fp16", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "the merge is sound: equal to the adapter on the 16-bit base to rounding; on the" in told
    assert "merged against adapter on the 16-bit base: 0.0" in told
    assert "merged against adapter on the 4-bit base: " in told
    assert told.count("\n  merged: ") == 2
    assert "row-0-image-0.png" in told
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.strip().startswith("# out\n\nA base that is not on the Hub, fine-tuned")
    model, own = iq.load_model(out, device="cpu", quantize=False)
    assert iq.generate(model, own, [[cards[0]["image"], "Who?"]], max_new_tokens=2)
    assert cli.main(["merge", run, out]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_base_on_the_hub_is_found_by_its_record(adapter, tmp_path, monkeypatch):
    """Hub id and revision of the adapter's configuration, as a download left the base."""
    home = tmp_path / "hub" / "models--someone--base"
    shutil.copytree(iq.tiny.BASE, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "v2").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = adapter / "adapter_config.json"
    named = {"base_model_name_or_path": "someone/base", "revision": "v2"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    iq.merge(adapter, tmp_path / "out", device="cpu")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/base"
    assert "(revision `v2`)" in card.text


def test_a_merge_that_equals_the_base_is_an_error(lora, tmp_path):
    """An adapter that has learnt nothing, or that is lost in bf16, does not pass for a result."""
    for parameter in lora.parameters():
        parameter.requires_grad_(False)
    folder = written(lora, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the base's own weights in torch.float32"):
        iq.merge(folder, tmp_path / "out", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["adapter"]


@pytest.mark.parametrize(
    ("learnt", "dtype", "told"),
    [
        (0.0, torch.bfloat16, "the base's own weights in torch.bfloat16"),
        (1e-9, torch.float16, "the base's own weights in torch.float16"),
        (1e-4, torch.float16, r"adds \d% of what it has learnt"),
        (1e-4, torch.bfloat16, r"adds \d\d\d+% of what it has learnt"),
    ],
)
def test_what_a_dtype_cannot_hold_is_an_error(learnt, dtype, told, adapter, tmp_path):
    """What an adapter has learnt little of is rounded away, but for weights near 0, or tips
    roundings that are larger than it: that does not pass for merged, and in fp32 it is."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    small = {n: t * learnt if "lora_B" in n else t for n, t in tensors.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=told):
        iq.merge(adapter, tmp_path / "out", dtype=dtype, device="cpu")
    assert not list(tmp_path.glob("*out*"))
    if learnt:
        merged = iq.merge(adapter, tmp_path / "out", dtype=torch.float32, device="cpu")
        assert merged.kept == pytest.approx(1)
        assert f"by {merged.kept:.1%} of what the adapter adds" in str(merged)


def test_never_into_4_bits(adapter, base, processor, tmp_path):
    """A base that was saved in 4 bits says which one to pass instead."""
    base.name_or_path, base.base_revision = "someone/base", None
    iq.save_quantized(base, processor, tmp_path / "packed")
    with pytest.raises(ValueError, match="holds 4-bit weights.*base='someone/base'"):
        iq.merge(adapter, tmp_path / "out", base=tmp_path / "packed")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(lora, processor, cards, tmp_path):
    """The checkpoint's fingerprint is compared with the files, before anything is written."""
    iq.train(lora, processor, cards[:8], config=config_of(tmp_path / "run", max_steps=1))
    other, _ = iq.tiny.load_model(**FP32)
    for name, parameter in other.named_parameters():
        if "norm" in name:
            parameter.data += 0.1
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another base model than .*other"):
        iq.merge(tmp_path / "run", tmp_path / "out", base=tmp_path / "other")
    assert iq.merge(tmp_path / "run", tmp_path / "out", base=iq.tiny.BASE, verify=False)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*have invalid shape")
def test_what_cannot_be_merged_is_named(tmp_path):
    """A bias of the matrices needs one of the layer; without verifying it is noticed, too."""
    settings = {"lora_bias": True, "target_modules": r".*layers.1.self_attn.k_proj"}
    folder = adapter_in(tmp_path / "adapter", **settings)
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.k_proj cannot be merged: .*no bias"
    ):
        iq.merge(folder, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:aLoRA is currently")
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "embed_tokens.* TrainableTokensLayer"),
        ({"alora_invocation_tokens": [3]}, "k_proj cannot be merged: aLoRA"),
    ],
)
def test_a_kind_that_cannot_be_merged_is_named(settings, told, tmp_path):
    """Nothing that an adapter has is left out without a word."""
    folder = adapter_in(tmp_path / "adapter", "smolvlm", **settings)
    with pytest.raises(ValueError, match=told):
        iq.merge(folder, tmp_path / "out", verify=False)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True", "ignore:.*tied.*modules")
def test_a_tied_weight_is_named(tmp_path):
    """Embeddings that are the head as well cannot learn alone."""
    base, _ = iq.tiny.load_model(family="smolvlm", **FP32)
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    tied = type(base)(config)
    tied.save_pretrained(tmp_path / "tied")
    bases_processor = iq.tiny.load_model(family="smolvlm", **FP32)[1]
    bases_processor.save_pretrained(tmp_path / "tied")
    model, _ = iq.load_model(tmp_path / "tied", **FP32)
    plain = written(iq.add_lora(model), tmp_path / "plain")
    iq.merge(plain, tmp_path / "fine", verify=False)
    model, _ = iq.load_model(tmp_path / "tied", **FP32)
    settings = LoraConfig(r=4, target_modules=["embed_tokens"])
    folder = written(iq.add_lora(model, settings), tmp_path / "adapter")
    with pytest.raises(ValueError, match="embed_tokens.weight cannot be merged: the base ties it"):
        iq.merge(folder, tmp_path / "out", verify=False)


def test_a_merge_that_is_not_the_adapter_leaves_nothing(adapter, tmp_path, monkeypatch):
    """The proof decides: with less tolerance than rounding needs there is no folder."""
    monkeypatch.setitem(merging.ROUNDING, torch.float16, 1e-9)
    with pytest.raises(ValueError, match="not what the adapter on .* nothing was written"):
        iq.merge(adapter, tmp_path / "out", device="cpu")
    assert not list(tmp_path.glob("*out*"))


def test_values_too_large_for_the_dtype(adapter, tmp_path):
    """An overflow is an error that names the tensor, not an infinite weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    tensors[name][0] = 1e7
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has values that are too large for torch.float16"):
        iq.merge(adapter, tmp_path / "out", verify=False)


MEASURED = """
import sys
import idefics_qlora as iq

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) * 1024

iq.merge("small", "small-out", verify=False)
before = peak()
iq.merge("adapter", "out", verify=False)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_memory_is_that_of_a_shard_not_of_the_base(tmp_path, processor):
    """Merging a base of many shards takes a few times the largest, however many there are."""
    config = copy.deepcopy(iq.tiny.load_model(**FP32)[0].config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 12
    config.dtype = torch.float16
    model = iq.tiny.load_model(**FP32)[0].__class__(config).half()
    model.save_pretrained(tmp_path / "large", max_shard_size="16MB")
    processor.save_pretrained(tmp_path / "large")
    shards = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert sum(shards) > 10 * max(shards)
    model.name_or_path = str(tmp_path / "large")
    written(iq.add_lora(model), tmp_path / "adapter")
    adapter_in(tmp_path / "small")
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * max(shards) < sum(shards) / 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in (tmp_path / "large").iterdir()} <= names


KILLED = """
import os, signal, sys
import idefics_qlora as iq

last, count = int(sys.argv[1]), [0]

def watch(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes or event in ("os.rename", "os.mkdir")) and "out" in str(arguments[0]):
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
iq.merge("adapter", "out", verify=False)
print(count[0])
"""


@pytest.mark.slow
def test_a_killed_merge_leaves_a_whole_folder_or_none(adapter, tmp_path):
    """Killed before it writes one of its files, or before the folder gets its name."""

    def killed_at(number):
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(number)],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    for number in (3, 1000):
        done = killed_at(number)
        if number == 3:
            assert done.returncode == -signal.SIGKILL
            assert not (tmp_path / "out").exists()
    operations = int(done.stdout)
    assert {p.name for p in tmp_path.glob("*out*")} == {"out"}
    (tmp_path / "out").rename(tmp_path / "first")
    assert killed_at(operations).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    iq.merge(adapter, tmp_path / "out", verify=False)  # what was left is in nobody's way
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "out"))
    assert all(torch.equal(first[name], again[name]) for name in first)
