"""A 4-bit base on disk: the same to the bit, whole or not there, and known by its Hub id.

More than 400 lines: all start from the same saved folder, which is made once.
"""

import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.model.base import base_fingerprint
from idefics_qlora.model.base_weights import linear4bit_layers, unnest
from idefics_qlora.model.memory import estimate_memory
from idefics_qlora.model.saved_base import QUANTIZED_MANIFEST


def state_of(model):
    """Everything that a 4-bit model computes from, its scales included."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def same_model(a, b):
    first, second = state_of(a), state_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, loaded):
    """A folder that save_quantized wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    iq.save_quantized(*loaded, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub cache that holds the tiny base as ``someone/base``, as a download leaves it."""
    cache = tmp_path_factory.mktemp("hub")
    snapshot = cache / "models--someone--base" / "snapshots" / ("a" * 40)
    shutil.copytree(iq.tiny.BASE, snapshot)
    (cache / "models--someone--base" / "refs").mkdir()
    (cache / "models--someone--base" / "refs" / "main").write_text("a" * 40)
    return cache


@pytest.mark.parametrize("scales", ["nested", "in fp32"])
def test_it_comes_back_to_the_bit(base, processor, examples, tmp_path, monkeypatch, scales):
    """Weights, scales, buffers, logits and the processor; and nothing is quantised on the way."""
    if scales == "in fp32":
        unnest(base)
    iq.save_quantized(base, processor, tmp_path / "new" / "base")

    def quantised(*_args, **_options):
        raise AssertionError("a weight is quantised")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", quantised)
    model, own = iq.load_model(tmp_path / "new" / "base", device="cpu")
    assert same_model(model, base)
    pairs = zip(linear4bit_layers(base).values(), linear4bit_layers(model).values(), strict=True)
    for old, new in pairs:
        assert new.compute_dtype == old.compute_dtype
        assert not new.support_avx512bf16_for_cpu
        assert new.weight.quant_state.nested == (scales == "nested")
        assert new.weight.quant_state.dtype == old.weight.quant_state.dtype
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    batch = Collator(own)(examples[:3])
    logits = [m(**batch.inputs(), use_cache=False).logits for m in (base, model)]
    assert torch.equal(*logits)
    assert base_fingerprint(model) == base_fingerprint(base)
    with pytest.raises(RuntimeError, match="automatic conversion"):  # the original's way
        iq.tiny.load_model(device="cpu")


def test_the_folder_lists_all_that_is_in_it(whole):
    """Shards in safetensors, config, processor; sizes and sums in the manifest; nothing hidden."""
    manifest = json.loads((whole / QUANTIZED_MANIFEST).read_text())
    assert manifest["files"].keys() == {p.name for p in whole.iterdir()} - {QUANTIZED_MANIFEST}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["files"].keys()
    assert all(whole.joinpath(n).stat().st_size == f["size"] for n, f in manifest["files"].items())
    assert manifest["base"] == {"name": None, "revision": None}
    assert [path.name for path in whole.parent.iterdir()] == ["base"]


def test_several_shards(base, processor, tmp_path, monkeypatch):
    """A large base is split; the index is verified like the rest."""
    monkeypatch.setattr("idefics_qlora.model.saved_base.SHARD_SIZE", "300KB")
    iq.save_quantized(base, processor, tmp_path / "base")
    shards = sorted(tmp_path.glob("base/model-*.safetensors"))
    assert len(shards) > 3
    assert same_model(iq.load_model(tmp_path / "base", device="cpu")[0], base)
    shards[2].unlink()
    with pytest.raises(iq.CheckpointError, match=rf"{shards[2].name} cannot be read: No such file"):
        iq.load_model(tmp_path / "base", device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_compute_dtype(folder, examples, dtype):
    """Layers, scales and the rest compute in what is asked for, whatever was saved."""
    model, processor = iq.load_model(folder, device="cpu", compute_dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    for layer in linear4bit_layers(model).values():
        assert layer.compute_dtype == layer.weight.quant_state.dtype == dtype
        assert layer.weight.quant_state.state2.absmax.dtype == torch.float32
    original, _ = iq.tiny.load_model(device="cpu", compute_dtype=dtype)
    losses = [iq.evaluate(m, processor, examples[:4])["eval_loss"] for m in (model, original)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_base_in_fp32_is_saved_as_it_is(processor, tmp_path):
    """What computes in fp32 comes back to the bit in fp32, and in fp16 as if loaded so."""
    model, _ = iq.tiny.load_model(device="cpu", compute_dtype=torch.float32)
    iq.save_quantized(model, processor, tmp_path / "base")
    again, _ = iq.load_model(tmp_path / "base", device="cpu", compute_dtype=torch.float32)
    assert same_model(again, model)
    half, _ = iq.load_model(tmp_path / "base", device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.float16, torch.uint8}
    assert base_fingerprint(half) == base_fingerprint(iq.tiny.load_model(device="cpu")[0])


def test_dequantized_from_the_folder(folder, base):
    """base_weights="dequantized" of a saved base holds the saved values."""
    model, _ = iq.load_model(folder, device="cpu", base_weights="dequantized")
    assert not linear4bit_layers(model)
    for name, layer in linear4bit_layers(base).items():
        expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(model.get_parameter(f"{name}.weight"), expected)


def test_memory_is_estimated_from_the_folder(whole):
    """Its configuration is that of the base."""
    saved, original = estimate_memory(whole), estimate_memory(iq.tiny.BASE)
    assert saved.static == original.static
    assert saved.kept == original.kept


def test_adapters_serve_the_original_and_the_folder(base, processor, examples, folder, tmp_path):
    """What one was trained on does not matter to a resume or to load_finetuned."""
    runs = {"original": base, "saved": iq.load_model(folder, device="cpu")[0]}
    for name, model in runs.items():
        config = config_of(tmp_path / name, max_steps=2)
        iq.train(iq.add_lora(model), processor, examples, config=config)
    trained = {name: iq.load_finetuned(tmp_path / name / "checkpoint-2", device="cpu")[0]
               for name in runs}  # fmt: skip
    assert same_model(trained["original"], trained["saved"])
    recorded = json.loads((tmp_path / "saved" / "checkpoint-2" / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(folder)
    crossed, _ = iq.load_finetuned(
        tmp_path / "original" / "checkpoint-2", base=folder, device="cpu"
    )
    assert same_model(crossed, trained["original"])
    again = iq.add_lora(iq.load_model(folder, device="cpu")[0])
    config = config_of(tmp_path / "original", max_steps=3)
    assert iq.train(again, processor, examples, config=config).global_step == 3


FROM_THE_HUB = """
import json, sys
import idefics_qlora as iq

order = json.loads(sys.argv[1])
rows = iq.tiny.creature_cards(4, seed=0)
question = "Question: Who? Answer:"
examples = [iq.Example([row["image"], question], f" {row['name']}.") for row in rows]


def run(model, processor, folder, steps):
    config = iq.TrainConfig(
        output_dir=folder, max_steps=steps, global_batch_size=4, precision="fp32", num_workers=0,
        load_best_model_at_end=False,
    )
    iq.train(model, processor, examples, config=config)
    recorded = json.load(open(f"{folder}/checkpoint-{steps}/adapter_config.json"))
    return recorded["base_model_name_or_path"], recorded["revision"]


told = {}
model, processor = iq.load_model("someone/base", device="cpu", revision=order["revision"])
iq.save_quantized(model, processor, "saved")
told["manifest"] = json.load(open("saved/quantized_manifest.json"))["base"]
told["original"] = run(iq.add_lora(model), processor, "a", 1)
model, processor = iq.load_model("saved", device="cpu")
told["saved"] = run(iq.add_lora(model), processor, "b", 1)
model, processor = iq.load_model("saved", device="cpu")
told["resumed"] = run(iq.add_lora(model), processor, "a", 2)
iq.save_quantized(iq.load_model("saved", device="cpu")[0], processor, "saved again")
told["again"] = json.load(open("saved again/quantized_manifest.json"))["base"]
for how, base in (("by itself", None), ("of the folder", "saved")):
    model, _ = iq.load_finetuned("b/checkpoint-1", base=base, device="cpu", trainable=True)
    config = model.active_peft_config
    told[how] = config.base_model_name_or_path, config.revision
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.parametrize("revision", [None, "main"])
def test_the_hub_id_stays_known(hub, tmp_path, revision):
    """Trained on a saved base, an adapter names the base on the Hub and the revision asked for; it
    loads from there or from the folder, and resumes a run on the other."""
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB, json.dumps({"revision": revision})],
        env={**os.environ, "HF_HUB_CACHE": str(hub)},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    where = ["someone/base", revision]
    for who in ("original", "saved", "resumed", "by itself", "of the folder"):
        assert told[who] == where, who
    assert list(told["manifest"].values()) == list(told["again"].values()) == where


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def of_another_version(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "idefics_qlora-base-9"}))


WEIGHTS = "model.safetensors"
DAMAGE = {
    "a flipped bit": (WEIGHTS, alter, "model.safetensors was altered: its SHA-256 differs"),
    "a truncated file": (WEIGHTS, lambda p: os.truncate(p, 999), "has 999 bytes, its manifest"),
    "a lost file": (WEIGHTS, Path.unlink, "model.safetensors cannot be read: No such file"),
    "an altered setting": ("config.json", alter, "config.json was altered"),
    "a truncated setting": ("config.json", lambda p: os.truncate(p, 9), "has 9 bytes"),
    "an altered word list": ("tokenizer.json", alter, "tokenizer.json was altered"),
    "a lost manifest": (QUANTIZED_MANIFEST, Path.unlink, f"{QUANTIZED_MANIFEST} is missing, but"),
    "half a manifest": (QUANTIZED_MANIFEST, lambda p: os.truncate(p, 99), "cannot be read: JSON"),
    "an empty manifest": (QUANTIZED_MANIFEST, lambda p: p.write_text("{}"), "has the format None"),
    "no files": (
        QUANTIZED_MANIFEST,
        lambda p: p.write_text('{"format": "idefics_qlora-base-1"}'),
        "cannot be read: KeyError: 'base'",
    ),
    "another version": (QUANTIZED_MANIFEST, of_another_version, "format 'idefics_qlora-base-9'"),
    "a file too many": (
        WEIGHTS,
        lambda p: shutil.copy(p, p.with_name("model-00001-of-00001.safetensors")),
        "model-00001-of-00001.safetensors is not known to",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_names_the_file_and_the_way_out(folder, kind):
    """Nothing damaged is loaded, and the message tells what to do."""
    name, damage, message = DAMAGE[kind]
    damage(folder / name)
    with pytest.raises(iq.CheckpointError, match=message) as caught:
        iq.load_model(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "copy the whole folder again, or write it anew with save_quantized" in str(caught.value)


def test_only_half_of_the_values_are_there(folder):
    """quantize=False cannot be had of a 4-bit folder; the message names what can."""
    with pytest.raises(ValueError, match="4-bit weights only.*base_weights='dequantized'"):
        iq.load_model(folder, device="cpu", quantize=False)


def test_what_cannot_be_saved(base, lora, processor, tmp_path):
    """Adapters, other weights, bf16, swapped arguments: nothing is written."""
    target = tmp_path / "base"
    for model in (lora, lora.get_base_model()):
        with pytest.raises(ValueError, match=r"has adapters.*before add_lora.*model\.unload\(\)"):
            iq.save_quantized(model, processor, target)
    for how in ({"quantize": False}, {"base_weights": "dequantized"}):
        with pytest.raises(ValueError, match="is not in 4 bits as load_model leaves it"):
            iq.save_quantized(iq.tiny.load_model(device="cpu", **how)[0], processor, target)
    rounded, _ = iq.tiny.load_model(device="cpu", compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*load it with compute_dtype=torch\.float16"):
        iq.save_quantized(rounded, processor, target)
    with pytest.raises(TypeError, match="the model first and then the processor"):
        iq.save_quantized(processor, lora, target)
    assert not any(tmp_path.iterdir())


def test_after_the_adapter_is_taken_off_it_can_be_saved(base, processor, tmp_path):
    """The way out that the message names."""
    model = iq.add_lora(copy.deepcopy(base))
    iq.save_quantized(model.unload(), processor, tmp_path / "base")
    assert same_model(iq.load_model(tmp_path / "base", device="cpu")[0], base)


def test_a_loaded_folder_can_be_saved_again(folder, base, processor, tmp_path):
    """A copy of a copy is the same base."""
    iq.save_quantized(iq.load_model(folder, device="cpu")[0], processor, tmp_path / "again")
    assert same_model(iq.load_model(tmp_path / "again", device="cpu")[0], base)


@pytest.mark.parametrize("kind", ["a folder", "a file", "a dangling link"])
def test_what_is_there_is_not_replaced(base, processor, tmp_path, kind):
    """A name that is taken stays with what has it."""
    target = tmp_path / "taken"
    if kind == "a folder":
        target.mkdir()
    elif kind == "a file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="taken exists already: delete it, or choose another"):
        iq.save_quantized(base, processor, target)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("limit", [400, 5_000, 700_000])
def test_a_disk_that_fills_leaves_nothing(base, processor, tmp_path, limit):
    """Writing fails in the configuration, the tokenizer or the weights: an OSError, and no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"base cannot be written: .*too large.*free space"):
            iq.save_quantized(base, processor, tmp_path / "base")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not any(tmp_path.iterdir())
    iq.save_quantized(base, processor, tmp_path / "base")


KILLED = """
import os, signal, sys
import idefics_qlora as iq

model, processor = iq.tiny.load_model(device="cpu")
count, last = [0], int(sys.argv[1])


def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
    if (writes or event in ("os.rename", "os.mkdir")) and "base" in str(arguments[0]):
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
iq.save_quantized(model, processor, "base")
print(count[0])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_folder_or_none(tmp_path, base, processor):
    """Killed before it writes one of its files, or before the folder gets its name."""

    def killed_at(number):
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(number)],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    operations = int(killed_at(0).stdout)
    assert operations > 5
    shutil.rmtree(tmp_path / "base")
    for number in (operations // 2, operations):
        assert killed_at(number).returncode == -signal.SIGKILL
        assert not (tmp_path / "base").exists()
    iq.save_quantized(base, processor, tmp_path / "base")  # what was left is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert same_model(iq.load_model(tmp_path / "base", device="cpu")[0], base)


def test_a_failing_disk_is_no_damage(folder, monkeypatch):
    """What may pass, such as a network disk that is away, is told as it is."""
    real = os.open

    def failing(path, *args, **options):
        if str(path).endswith("config.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        iq.load_model(folder, device="cpu")


def test_saving_changes_nothing(base, processor, tmp_path):
    """The model that is saved trains on as before; its configuration is the same."""
    before, config = copy.deepcopy(state_of(base)), base.config.to_dict()
    iq.save_quantized(base, processor, tmp_path / "base")
    after = state_of(base)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert base.config.to_dict() == config
    assert adapter_tensors(iq.add_lora(base))
