"""Checkpoints on disk: whole or not at all, verified, rotated."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import idefics_qlora as iq
from idefics_qlora.checkpoint import Snapshot, clear_leftovers, load_checkpoint, rotate, set_aside
from idefics_qlora.checkpoint import save_checkpoint as save
from idefics_qlora.durable import CheckpointError

HERE = Path(__file__).parent


def state_of(step: int) -> dict:
    """A state with all that a checkpoint must have."""
    texts = json.loads((HERE / "runs_0_1" / "fp32" / "checkpoint-2" / "state.json").read_text())
    return {**texts, "global_step": step}


def snapshot(step: int, value: float = 1.0, run: str | None = None) -> Snapshot:
    return Snapshot(
        adapter={"a": torch.full((3, 2), value), "b": torch.arange(4.0)},
        adapter_config={"peft_type": "LORA"},
        optimizer={"a::state1": torch.arange(6, dtype=torch.uint8)},
        rng={"cpu": torch.get_rng_state()},
        state=state_of(step) | ({} if run is None else {"run": run}),
    )


def save_checkpoint(output_dir, step, value=1.0, run=None):
    folder = output_dir / f"checkpoint-{step}"
    save(folder, snapshot(step, value, run))
    return folder


def test_what_is_saved_comes_back(tmp_path):
    """Tensors to the bit, values as they were."""
    saved = snapshot(3)
    folder = save_checkpoint(tmp_path, 3)
    assert folder == tmp_path / "checkpoint-3"
    loaded = load_checkpoint(folder)
    assert loaded.state == saved.state
    assert loaded.adapter_config == saved.adapter_config
    for name in ("adapter", "optimizer", "rng"):
        ours, theirs = getattr(saved, name), getattr(loaded, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_file_is_what_the_library_would_write(tmp_path):
    """Byte for byte, whatever the tensors' dtypes, shapes and memory are."""
    dtypes = ["int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8"]
    dtypes += ["uint8", "bool"]
    tensors = {f'{n}ä"{d}': torch.arange(5).to(getattr(torch, d)) for n, d in enumerate(dtypes)}
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    tensors["same"] = tensors["also"] = torch.ones(3, requires_grad=True)
    alone = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save(tmp_path / "checkpoint-1", replace(snapshot(1), adapter=tensors), extra=tensors)
    for name, metadata in (("adapter_model", {"format": "pt"}), ("extra", None)):
        written = (tmp_path / "checkpoint-1" / f"{name}.safetensors").read_bytes()
        assert written == safetensors.torch.save(alone, metadata)


def test_nothing_is_pickled(tmp_path):
    """A checkpoint from somebody else runs no code when it is read: JSON and plain tensors."""
    folder = save_checkpoint(tmp_path, 1)
    readers = {".json": json.loads, ".safetensors": safetensors.torch.load}
    for path in folder.iterdir():
        assert readers[path.suffix](path.read_bytes())


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_and_passed_over(tmp_path, name, damage, caplog):
    """One flipped bit, a short or a missing file: reported, and the checkpoint before is used."""
    save_checkpoint(tmp_path, 1)
    folder = save_checkpoint(tmp_path, 2)
    content = bytearray((folder / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x80
        (folder / name).write_bytes(content)
    elif damage == "cut":
        (folder / name).write_bytes(content[:-1])
    else:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint-2/{name}"):
        load_checkpoint(folder)
    assert iq.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2" in caplog.text


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
def test_an_altered_file_that_can_be_read_is_found(tmp_path, name):
    """Another number in a tensor or in the state is damage, though size and form are as before."""
    save_checkpoint(tmp_path, 1)
    folder = save_checkpoint(tmp_path, 2)
    content = bytearray((folder / name).read_bytes())
    if name == "state.json":
        content = content.replace(b'"window": 2', b'"window": 3')
    else:
        content[-1] ^= 1  # of the last tensor
    assert content != (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint-2/{name} was altered"):
        load_checkpoint(folder)
    assert iq.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_no_checkpoint_is_none(tmp_path):
    """An empty or missing folder has no checkpoint."""
    assert iq.latest_checkpoint(tmp_path) is None
    assert iq.latest_checkpoint(tmp_path / "nowhere") is None


def test_steps_are_numbers_not_words(tmp_path):
    """checkpoint-10 is newer than checkpoint-9."""
    for step in (9, 10):
        save_checkpoint(tmp_path, step)
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-10"


def test_an_incomplete_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    """A save that dies before its rename is invisible, and the next one clears it away."""

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 1)
    assert iq.latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rotation_keeps_the_newest_and_the_best(tmp_path, background):
    """The oldest go first; best, newest and folders of others stay."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-0").mkdir()  # not ours: it has no manifest
    rotate(tmp_path, None, set(), None, background)
    assert len(names(tmp_path)) == 5
    rotate(tmp_path, 2, {1, 4}, None, background)
    background.submit(int).result()  # the deletions before it are done
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, 1, {1, 4}, None, background)
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-4"]


def test_rotation_leaves_other_runs_alone(tmp_path, background):
    """Another run's checkpoint, and a copy under another step's name, are neither counted nor
    deleted; one of 0.1 has no run and is."""
    save_checkpoint(tmp_path, 1, run="other")
    for step, run in ((2, None), (3, "ours"), (4, "ours")):
        save_checkpoint(tmp_path, step, run=run)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-5")
    rotate(tmp_path, 2, {4}, "ours", background)
    assert {"checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-5"} <= set(names(tmp_path))
    assert "checkpoint-2" not in names(tmp_path)


def test_a_save_replaces_its_own_run_only(tmp_path, caplog):
    """What another run wrote under the same name is renamed, each time to a free name."""
    for run in ("first", "second", "third", "third"):
        save_checkpoint(tmp_path, 1, run=run)
    runs = {
        folder.name: load_checkpoint(folder).state["run"] for folder in sorted(tmp_path.iterdir())
    }
    assert runs == {
        "abandoned-checkpoint-1": "first",
        "abandoned-checkpoint-1-2": "second",
        "checkpoint-1": "third",
    }
    assert "checkpoint-1 was in the way and is abandoned-checkpoint-1-2 now" in caplog.text


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_checkpoint_of_another_step_is_passed_over(tmp_path, how, caplog):
    """The name promises a step: a copy of an older checkpoint is not the newest."""
    older = save_checkpoint(tmp_path, 2)
    if how == "copy":
        shutil.copytree(older, tmp_path / "checkpoint-7")
    else:
        (tmp_path / "checkpoint-7").symlink_to(older)
    assert iq.latest_checkpoint(tmp_path) == older
    assert "checkpoint-7 holds step 2" in caplog.text


def test_a_deletion_that_fails_is_survived(tmp_path, background, caplog, monkeypatch):
    """Whether the rename or the removal is refused, the run goes on and says which folder stays."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", refuse)
        rotate(tmp_path, 1, {3}, None, background)
    assert "checkpoint-1 cannot be deleted" in caplog.text
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        rotate(tmp_path, 2, set(), None, background)
        background.submit(int).result()
    assert ".checkpoint-1.deleted cannot be deleted" in caplog.text
    assert names(tmp_path) == [".checkpoint-1.deleted", "checkpoint-2", "checkpoint-3"]
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_going_back_sets_newer_checkpoints_aside(tmp_path):
    """A run that goes on from an older checkpoint is not mixed up with what it had become."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step)
    set_aside(tmp_path, 2)
    assert names(tmp_path) == ["abandoned-checkpoint-3", "checkpoint-1", "checkpoint-2"]


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    """A run that went back to an older checkpoint can save in the place of the damaged one, which
    stays: what is wrong with it may pass."""
    folder = save_checkpoint(tmp_path, 1)
    (folder / "state.json").unlink()
    save_checkpoint(tmp_path, 1, 2.0)
    assert load_checkpoint(folder).adapter["a"][0, 0] == 2.0
    assert names(tmp_path) == ["abandoned-checkpoint-1", "checkpoint-1"]


def test_no_flipped_bit_of_a_manifest_is_anything_but_damage(tmp_path):
    """Whatever a manifest has become, it is passed over or says the same; nothing is raised."""
    save_checkpoint(tmp_path, 1)
    folder = save_checkpoint(tmp_path, 2)
    whole = (folder / "manifest.json").read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(content)
        assert iq.latest_checkpoint(tmp_path) in (folder, tmp_path / "checkpoint-1")
    (folder / "manifest.json").write_bytes(whole.replace(b"qlora-1", b"qlora-9"))
    with pytest.raises(CheckpointError, match="format 'idefics_qlora-9', expected"):
        load_checkpoint(folder)


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """Each file is flushed, then the folder, then renamed, then the folder above is flushed."""
    events = []
    real_sync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(
        "os.fsync",
        lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or real_sync(file),
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, to: events.append("rename") or real_rename(path, to)
    )
    folder = save_checkpoint(tmp_path, 1)
    hidden = str(tmp_path / ".checkpoint-1.incomplete")
    place = events.index("rename")
    assert {f"{hidden}/{path.name}" for path in folder.iterdir()} == set(events[: place - 1])
    assert events[place - 1] == hidden
    assert events[place + 1] == str(tmp_path)


def test_a_kill_while_replacing_loses_neither(tmp_path):
    """The old checkpoint that had lost its name gets it back; a finished replacement stays."""
    folder = save_checkpoint(tmp_path, 1)
    folder.rename(tmp_path / ".checkpoint-1.replaced")
    clear_leftovers(tmp_path)
    assert load_checkpoint(folder).state["global_step"] == 1
    (tmp_path / ".failed-window-3.incomplete").mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_others_wrote_is_not_deleted(tmp_path):
    """A folder of another program in the way of a save is renamed."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "precious").write_text("x")
    save_checkpoint(tmp_path, 1)
    assert (tmp_path / "abandoned-checkpoint-1" / "precious").read_text() == "x"
