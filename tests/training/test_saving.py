"""When a run saves, which checkpoints stay, and which is the best."""

import copy
import dataclasses
import os

import pytest
from helpers import EVALUATED, config_of, every_family

import idefics_qlora as iq
from idefics_qlora.model.adapters import trainable_parameters


def test_the_last_step_is_evaluated_and_saved(lora, processor, examples, tmp_path):
    """Whatever its number: the end of a run is neither unknown nor lost."""
    config = config_of(tmp_path, max_steps=3, eval_steps=2, save_steps=2)
    result = iq.train(lora, processor, examples, examples[:2], config=config)
    assert [r["step"] for r in result.log_history if "eval_loss" in r] == [2, 3]
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-3"


@every_family
def test_the_best_is_loaded_and_never_deleted(lora, processor, examples, tmp_path):
    """A run that is ruined after its second step keeps its best checkpoint and gives it back."""

    def ruin(record):
        if record["step"] == 3 and "loss" in record:
            # Back, and far beyond: noise might suit a base that was never trained.
            for name, parameter in trainable_parameters(lora).items():
                if "lora_B" in name:
                    parameter.data.mul_(-20)

    config = iq.TrainConfig(
        output_dir=tmp_path,
        max_steps=5,
        global_batch_size=2,
        precision="fp32",
        logging_steps=1,
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        num_workers=0,
    )
    result = iq.train(lora, processor, examples, examples[:4], config=config, on_log=ruin)
    evaluations = [r["eval_loss"] for r in result.log_history if "eval_loss" in r]
    best = 1 + evaluations.index(min(evaluations))
    assert best < 5
    checkpoints = {f"checkpoint-{best}", "checkpoint-5"}
    assert {p.name for p in tmp_path.iterdir()} == {*checkpoints, *EVALUATED}
    loss = iq.evaluate(lora, processor, examples[:4])["eval_loss"]
    assert loss == pytest.approx(min(evaluations), rel=1e-6)


def test_clocks_may_jump(base, processor, examples, tmp_path, monkeypatch):
    """Neither the wall clock nor files' times decide which checkpoint is new, kept or best."""
    config = config_of(
        tmp_path, max_steps=6, global_batch_size=4, eval_steps=1, save_steps=1, save_total_limit=2,
        load_best_model_at_end=True, precision="fp16",
    )  # fmt: skip

    def turn_back(*_):
        """Each checkpoint looks older than those before it."""
        for path in tmp_path.glob("checkpoint-*"):
            step = int(path.name.split("-")[1])
            for file in (path, *path.iterdir()):
                os.utime(file, (10**9 - 1000 * step,) * 2)

    monkeypatch.setattr("time.time", iter(range(10**9, 0, -1000)).__next__)
    model = iq.add_lora(base)
    result = iq.train(model, processor, examples, examples[:2], config=config, on_log=turn_back)
    monkeypatch.undo()
    turn_back()
    losses = {r["step"]: r["eval_loss"] for r in result.log_history if "eval_loss" in r}
    best = min(losses, key=losses.get)
    assert best > 1  # by its time, checkpoint-1 would be the newest
    assert result.best_checkpoint.name == f"checkpoint-{best}"
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best if best < 6 else 5}", "checkpoint-6"}
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-6"
    assert result.metrics["train_runtime"] > 0


def test_what_was_left_to_delete_goes_at_the_next_start(base, processor, examples, tmp_path):
    """A process that is killed between its last save and the deletion of older ones."""
    config = config_of(tmp_path, max_steps=3, save_steps=1, save_total_limit=None)
    iq.train(iq.add_lora(copy.deepcopy(base)), processor, examples, config=config)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    config = dataclasses.replace(config, save_total_limit=2)
    iq.train(iq.add_lora(base), processor, examples, config=config)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
