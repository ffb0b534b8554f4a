"""A checkpoint is known by its run and its step, wherever and under whatever path it lies."""

import copy
import shutil
from pathlib import Path

import pytest
from helpers import EVALUATED, config_of, same

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.checkpoint import save_checkpoint as save
from idefics_qlora.durable import CheckpointError
from idefics_qlora.model.adapters import adapter_tensors


@pytest.fixture
def train(base, processor, examples):
    """Train on twelve rows, in a few steps that are all evaluated and saved."""

    def train(folder, steps, on_log=None, **changes):
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
        rows = examples[:12], examples[12:14]
        result = iq.train(model, processor, *rows, config=config, on_log=on_log)
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
    assert left == {"checkpoint-1", "checkpoint-4", *EVALUATED}
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


def run_of(checkpoint):
    """The id in a checkpoint."""
    return load_checkpoint(checkpoint).state["run"]


def test_a_run_keeps_its_id(train, tmp_path):
    """Over restarts in its folder, back to an older checkpoint too; every other run has another,
    however the generators are seeded."""
    train(tmp_path / "a", 1)
    train(tmp_path / "a", 3)
    train(tmp_path / "a", 3, resume=tmp_path / "a" / "checkpoint-2")
    train(tmp_path / "b", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    train(tmp_path / "moved", 4)
    ours = {run_of(tmp_path / "a" / f"checkpoint-{step}") for step in (1, 2, 3)}
    assert ours == {run_of(tmp_path / "moved" / "checkpoint-4")}
    assert ours != {run_of(tmp_path / "b" / "checkpoint-1")}


def test_elsewhere_it_is_another_run(train, tmp_path, caplog):
    """Continued in another folder a run has another id, and its copy of the best has it too. What
    another run has there under that name is not taken for it, and not lost."""
    train(tmp_path / "a", 2)
    make_best(tmp_path / "a" / "checkpoint-2", 1)
    train(tmp_path / "b", 1, learning_rate=1e-3)
    other = load_checkpoint(tmp_path / "b" / "checkpoint-1")
    best = load_checkpoint(tmp_path / "a" / "checkpoint-1")
    assert not same(other.adapter, best.adapter)
    model, result = train(
        tmp_path / "b", 3, resume=tmp_path / "a" / "checkpoint-2", save_total_limit=1
    )
    assert result.best_checkpoint == tmp_path / "b" / "checkpoint-1"
    assert same(adapter_tensors(model), best.adapter)
    assert same(load_checkpoint(tmp_path / "b" / "abandoned-checkpoint-1").adapter, other.adapter)
    ours = {run_of(tmp_path / "b" / f"checkpoint-{step}") for step in (1, 3)}
    assert len(ours) == 1
    assert not ours & {other.state["run"], best.state["run"]}
    _, again = train(tmp_path / "b", 3)
    assert again.best_checkpoint == result.best_checkpoint


@pytest.mark.parametrize("how", ["copy of another step", "link to another step", "another run"])
def test_another_checkpoint_is_not_the_best(train, tmp_path, caplog, how):
    """A best checkpoint that was replaced is told and not loaded, though it is whole."""
    train(tmp_path / "run", 3)
    train(tmp_path / "other", 1, learning_rate=1e-3)
    last, best = tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-1"
    make_best(last, 1)
    shutil.rmtree(best)
    if how == "another run":
        shutil.copytree(tmp_path / "other" / "checkpoint-1", best)
    elif how == "copy of another step":
        shutil.copytree(tmp_path / "run" / "checkpoint-2", best)
    else:
        best.symlink_to(tmp_path / "run" / "checkpoint-2")
    model, result = train(tmp_path / "run", 3)
    assert same(adapter_tensors(model), load_checkpoint(last).adapter)
    assert result.best_checkpoint is None
    reason = "of another run" if how == "another run" else "holds step 2"
    assert f"the best checkpoint so far is forgotten: {best} " in caplog.text
    assert reason in caplog.text


def test_a_best_that_is_exchanged_while_the_run_lasts(train, tmp_path, caplog):
    """It is looked at again when it is loaded at the end."""

    def exchange(record):
        if "eval_loss" in record:
            shutil.rmtree(tmp_path / "checkpoint-1")
            shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")

    train(tmp_path, 2)
    make_best(tmp_path / "checkpoint-2", 1)
    model, result = train(tmp_path, 3, exchange)
    assert f"not the best: {tmp_path / 'checkpoint-1'} holds step 2" in caplog.text
    assert result.best_checkpoint is None
    assert same(adapter_tensors(model), load_checkpoint(tmp_path / "checkpoint-3").adapter)


def test_another_runs_checkpoints_are_left_alone(train, tmp_path, caplog):
    """A foreign one among ours is told, and stays whatever the limit."""
    train(tmp_path / "other", 1)
    train(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    shutil.copytree(tmp_path / "other" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    foreign = run_of(tmp_path / "run" / "checkpoint-1")
    train(tmp_path / "run", 5, save_total_limit=1)
    assert "left alone in" in caplog.text
    assert run_of(tmp_path / "run" / "checkpoint-1") == foreign


def test_a_copy_under_another_step_is_not_resumed_from(train, tmp_path):
    """Neither by itself nor when it is named; under a name that promises nothing it is."""
    train(tmp_path / "run", 2)
    copied = tmp_path / "run" / "checkpoint-9"
    shutil.copytree(tmp_path / "run" / "checkpoint-1", copied)
    with pytest.raises(CheckpointError, match="checkpoint-9 holds step 1"):
        train(tmp_path / "run", 3, resume=copied)
    _, result = train(tmp_path / "run", 3)
    assert result.global_step == 3
    assert load_checkpoint(tmp_path / "run" / "checkpoint-3").state["window"] == 3
    renamed = (tmp_path / "run" / "abandoned-checkpoint-9").rename(tmp_path / "kept")
    iq.load_finetuned(renamed, device="cpu")
    assert train(tmp_path / "b", 2, resume=renamed)[1].global_step == 2


def test_a_best_that_is_gone_is_no_result(train, tmp_path, caplog):
    """``best_checkpoint`` is a folder that is there, or None with a line in the log."""
    train(tmp_path, 2)
    make_best(tmp_path / "checkpoint-2", 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / "elsewhere")
    _, result = train(tmp_path, 2)
    assert result.best_checkpoint is None
    assert "the best checkpoint so far is forgotten" in caplog.text
