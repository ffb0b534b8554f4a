"""Checkpoints on disk: whole or not at all, verified, rotated."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.checkpoint import (
    CheckpointError,
    Snapshot,
    load_checkpoint,
    rotate,
    save_checkpoint,
)


def snapshot(value: float = 1.0) -> Snapshot:
    return Snapshot(
        adapter={"a": torch.full((3, 2), value), "b": torch.arange(4.0)},
        adapter_config={"peft_type": "LORA"},
        optimizer={"a::state1": torch.arange(6, dtype=torch.uint8)},
        rng={"cpu": torch.get_rng_state()},
        state={"global_step": 3, "scaler": {"scale": 65536.0}},
    )


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


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    """The oldest go first; best, newest and folders of others stay."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, snapshot())
    (tmp_path / "checkpoint-0").mkdir()  # not ours: it has no manifest
    rotate(tmp_path, None, None)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-0",
        "checkpoint-1",
        "checkpoint-4",
    ]
    rotate(tmp_path, 1, tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1").exists()
    assert (tmp_path / "checkpoint-4").exists()


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    """A run that went back to an older checkpoint can save over the damaged one."""
    folder = save_checkpoint(tmp_path, 1, snapshot())
    (folder / "state.json").unlink()
    save_checkpoint(tmp_path, 1, snapshot(2.0))
    assert load_checkpoint(folder).adapter["a"][0, 0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


RUN = """
import sys
import idefics_qlora as iq
from idefics_qlora.examples import pokemon_card_example

model, processor = iq.tiny.load_model(device="cpu")
cards = iq.tiny.creature_cards(8, seed=0)
config = iq.TrainConfig(
    output_dir=sys.argv[1], max_steps=1000, global_batch_size=2, precision="fp32", save_steps=1,
    logging_steps=1, load_best_model_at_end=False, num_workers=1,
)
iq.train(iq.add_lora(model), processor, cards, config=config,
         on_log=lambda record: print("step", record["step"], flush=True))
"""


def test_ctrl_c_leaves_complete_checkpoints_only(tmp_path):
    """Interrupted in the middle of training, every checkpoint verifies and no other file stays."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    for line in process.stdout:
        if line.strip() == "step 3":
            break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    complete = [path for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]
    assert len(complete) >= 2
    for folder in complete:
        state = load_checkpoint(folder).state
        assert json.dumps(state)
    leftovers = {path.name for path in tmp_path.iterdir()} - {path.name for path in complete}
    assert all(name.startswith(".checkpoint-") for name in leftovers)
    shutil.rmtree(tmp_path)
