"""Checkpoints on disk: whole or not at all, verified, rotated."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import idefics_qlora as iq
from idefics_qlora.checkpoint import (
    CheckpointError,
    Snapshot,
    clear_leftovers,
    load_checkpoint,
    rotate,
    set_aside,
)
from idefics_qlora.checkpoint import save_checkpoint as save


def snapshot(value: float = 1.0) -> Snapshot:
    return Snapshot(
        adapter={"a": torch.full((3, 2), value), "b": torch.arange(4.0)},
        adapter_config={"peft_type": "LORA"},
        optimizer={"a::state1": torch.arange(6, dtype=torch.uint8)},
        rng={"cpu": torch.get_rng_state()},
        state={"global_step": 3, "scaler": {"scale": 65536.0}},
    )


def save_checkpoint(output_dir, step, content):
    folder = output_dir / f"checkpoint-{step}"
    save(folder, content)
    return folder


def test_what_is_saved_comes_back(tmp_path):
    """Tensors to the bit, values as they were."""
    saved = snapshot()
    folder = save_checkpoint(tmp_path, 3, saved)
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
    save(tmp_path / "checkpoint-1", replace(snapshot(), adapter=tensors), extra=tensors)
    for name, metadata in (("adapter_model", {"format": "pt"}), ("extra", None)):
        written = (tmp_path / "checkpoint-1" / f"{name}.safetensors").read_bytes()
        assert written == safetensors.torch.save(alone, metadata)


def test_nothing_is_pickled(tmp_path):
    """A checkpoint from somebody else runs no code when it is read."""
    folder = save_checkpoint(tmp_path, 1, snapshot())
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_and_passed_over(tmp_path, name, damage, caplog):
    """One flipped bit, a short or a missing file: reported, and the checkpoint before is used."""
    save_checkpoint(tmp_path, 1, snapshot())
    folder = save_checkpoint(tmp_path, 2, snapshot())
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


def test_no_checkpoint_is_none(tmp_path):
    """An empty or missing folder has no checkpoint."""
    assert iq.latest_checkpoint(tmp_path) is None
    assert iq.latest_checkpoint(tmp_path / "nowhere") is None


def test_steps_are_numbers_not_words(tmp_path):
    """checkpoint-10 is newer than checkpoint-9."""
    for step in (9, 10):
        save_checkpoint(tmp_path, step, snapshot())
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-10"


def test_an_incomplete_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    """A save that dies before its rename is invisible, and the next one clears it away."""

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 1, snapshot())
    assert iq.latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1, snapshot())
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
        save_checkpoint(tmp_path, step, snapshot())
    (tmp_path / "checkpoint-0").mkdir()  # not ours: it has no manifest
    rotate(tmp_path, None, set(), background)
    assert len(names(tmp_path)) == 5
    rotate(tmp_path, 2, {1, 4}, background)
    background.submit(int).result()  # the deletions before it are done
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, 1, {1, 4}, background)
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-4"]


def test_a_deletion_that_fails_is_survived(tmp_path, background, caplog, monkeypatch):
    """Whether the rename or the removal is refused, the run goes on and says which folder stays."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, snapshot())

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", refuse)
        rotate(tmp_path, 1, {3}, background)
    assert "checkpoint-1 cannot be deleted" in caplog.text
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        rotate(tmp_path, 2, set(), background)
        background.submit(int).result()
    assert ".checkpoint-1.deleted cannot be deleted" in caplog.text
    assert names(tmp_path) == [".checkpoint-1.deleted", "checkpoint-2", "checkpoint-3"]
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_going_back_sets_newer_checkpoints_aside(tmp_path):
    """A run that goes on from an older checkpoint is not mixed up with what it had become."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, snapshot())
    set_aside(tmp_path, 2)
    assert names(tmp_path) == ["abandoned-checkpoint-3", "checkpoint-1", "checkpoint-2"]


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    """A run that went back to an older checkpoint can save over the damaged one."""
    folder = save_checkpoint(tmp_path, 1, snapshot())
    (folder / "state.json").unlink()
    save_checkpoint(tmp_path, 1, snapshot(2.0))
    assert load_checkpoint(folder).adapter["a"][0, 0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_no_flipped_bit_of_a_manifest_is_anything_but_damage(tmp_path):
    """Whatever a manifest has become, it is passed over or says the same; nothing is raised."""
    save_checkpoint(tmp_path, 1, snapshot())
    folder = save_checkpoint(tmp_path, 2, snapshot())
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
    folder = save_checkpoint(tmp_path, 1, snapshot())
    hidden = str(tmp_path / ".checkpoint-1.incomplete")
    place = events.index("rename")
    assert {f"{hidden}/{path.name}" for path in folder.iterdir()} == set(events[: place - 1])
    assert events[place - 1] == hidden
    assert events[place + 1] == str(tmp_path)


def test_a_kill_while_replacing_loses_neither(tmp_path):
    """The old checkpoint that had lost its name gets it back; a finished replacement stays."""
    folder = save_checkpoint(tmp_path, 1, snapshot())
    folder.rename(tmp_path / ".checkpoint-1.replaced")
    clear_leftovers(tmp_path)
    assert load_checkpoint(folder).state["global_step"] == 3
    (tmp_path / ".failed-window-3.incomplete").mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_others_wrote_is_not_deleted(tmp_path):
    """A folder of another program in the way of a save is renamed."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "precious").write_text("x")
    save_checkpoint(tmp_path, 1, snapshot())
    assert (tmp_path / "abandoned-checkpoint-1" / "precious").read_text() == "x"
