"""A checkpoint is known by its run and its step, wherever and under whatever path it lies."""

import copy
from pathlib import Path

import pytest
from helpers import config_of, same

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.checkpoint import save_checkpoint as save
from idefics_qlora.model import adapter_tensors


@pytest.fixture
def train(base, processor, examples):
    """Train on twelve rows, in a few steps that are all evaluated and saved."""

    def train(folder, steps, **changes):
        settings = {
            "global_batch_size": 4,
            "eval_steps": 1,
            "save_steps": 1,
            "save_total_limit": None,
            "lr_scheduler_type": "constant",
            "load_best_model_at_end": True,
        }
        config = config_of(folder, max_steps=steps, **{**settings, **changes})
        model = iq.add_lora(copy.deepcopy(base))
        result = iq.train(model, processor, examples[:12], examples[12:14], config=config)
        return model, result

    return train


def make_best(checkpoint, step):
    """Let a checkpoint say that the best so far is that of an earlier step."""
    snapshot = load_checkpoint(checkpoint)
    snapshot.state.update(best_checkpoint=f"checkpoint-{step}", best_metric=0.0)
    save(checkpoint, snapshot)


@pytest.mark.parametrize(
    ("output_dir", "resume"),
    [("relative", "absolute"), ("absolute", "link"), ("link", "home"), ("home", "relative")],
)
def test_the_best_stays_by_whatever_path(train, tmp_path, monkeypatch, output_dir, resume):
    """Rotation knows the best when the run's folder has two names, and the result has its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    run = {
        "relative": Path("runs", "a"),
        "absolute": tmp_path / "runs" / "a",
        "link": tmp_path / "link" / "a",
        "home": "~/runs/a",
    }
    train("runs/a", 2)
    assert iq.latest_checkpoint("~/runs/a") == tmp_path / "runs" / "a" / "checkpoint-2"
    make_best(tmp_path / "runs" / "a" / "checkpoint-2", 1)
    best = load_checkpoint(tmp_path / "runs" / "a" / "checkpoint-1").adapter
    model, result = train(
        run[output_dir], 4, resume=f"{run[resume]}/checkpoint-2", save_total_limit=1
    )
    assert result.best_checkpoint == tmp_path / "runs" / "a" / "checkpoint-1"
    assert same(load_checkpoint(result.best_checkpoint).adapter, best)
    assert same(adapter_tensors(model), best)
    left = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert left == {"checkpoint-1", "checkpoint-4"}
    assert {path.name for path in tmp_path.iterdir()} == {"link", "runs"}


def test_a_checkpoint_may_be_a_link(train, tmp_path):
    """One that was moved to another disk, with a link in its place, is the run's as before."""
    train(tmp_path / "run", 2)
    make_best(tmp_path / "run" / "checkpoint-2", 1)
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "moved")
    (tmp_path / "run" / "checkpoint-2").symlink_to(tmp_path / "moved")
    for resume in ("auto", tmp_path / "run" / "checkpoint-2"):
        _, result = train(tmp_path / "run", 3, resume=resume)
        assert result.best_checkpoint == tmp_path / "run" / "checkpoint-1"


def test_home_is_expanded(train, tmp_path, monkeypatch):
    """``~`` works wherever a folder is asked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    train("~/run", 1)
    model, _ = iq.load_finetuned("~/run/checkpoint-1", device="cpu")
    assert same(adapter_tensors(model), load_checkpoint(tmp_path / "run" / "checkpoint-1").adapter)
    iq.tiny.creature_cards(1, directory="~/cards")
    (tmp_path / "cards" / "metadata.jsonl").write_text('{"text": "no picture"}\n')
    assert iq.load_rows("~/cards") == [{"text": "no picture"}]


def test_a_best_that_is_gone_is_no_result(train, tmp_path, caplog):
    """``best_checkpoint`` is a folder that is there, or None with a line in the log."""
    train(tmp_path, 2)
    make_best(tmp_path / "checkpoint-2", 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / "elsewhere")
    _, result = train(tmp_path, 2)
    assert result.best_checkpoint is None
    assert "checkpoint-1, is gone" in caplog.text
