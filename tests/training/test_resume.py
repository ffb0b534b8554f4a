"""A run that was interrupted ends bit for bit like one that was not.

More than 400 lines: all compare runs with the same whole ones, which are made once.
"""

import copy
import dataclasses
import shutil

import pytest
import torch
from helpers import differences, every_family, without_clocks
from peft import LoraConfig

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.checkpoint import save_checkpoint as save
from idefics_qlora.families import FAMILIES
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.training.parts import Counters
from idefics_qlora.training.state import PARTS, TrainState

STEPS = 6
MARKER = "xyzzy"
"""A row with this word makes its window overflow."""


def config_of(folder, **changes):
    """Everything on that has a state: fp16 scaling, dropout, crops, 8-bit AdamW, the best."""
    settings = {
        "output_dir": folder,
        "max_steps": STEPS,
        "global_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 2,
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": None,
        "num_workers": 0,
    }
    return iq.TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def rows(examples):
    """Ten rows: windows of four cross the borders of epochs, and step 5 ends one."""
    return examples[:10]


@pytest.fixture(scope="session")
def overflowing(rows):
    """The same with one row that makes its windows overflow."""
    bad = dataclasses.replace(rows[4], completion=f" {MARKER}.")
    return [*rows[:4], bad, *rows[5:]]


def model_of(base, processor, rows, seed=42):
    """A fresh adapter on a copy of the base; windows with the marker overflow, in any process.

    Without a marker there is no hook, with which nothing would be computed the fast way.
    """
    model = iq.add_lora(copy.deepcopy(base), seed=seed)
    if not any(MARKER in row.completion for row in rows):
        return model
    marker = processor.tokenizer(f"a {MARKER}", add_special_tokens=False)["input_ids"][-4:]

    def overflow(_, __, inputs, output):
        if any(marker == row[i : i + 4] for row in inputs["input_ids"].tolist()
               for i in range(len(row))):  # fmt: skip
            output.logits = output.logits * torch.inf

    model.get_base_model().register_forward_hook(overflow, with_kwargs=True)
    return model


def run(base, processor, rows, config, seed=42):
    """Train in what could be a fresh process: another adapter, other random states."""
    torch.manual_seed(seed)
    model = model_of(base, processor, rows, seed)
    result = iq.train(model, processor, rows, rows[:2], config=config)
    return model, result


def resumed_from(checkpoint, folder):
    """A folder as a killed run left it: this checkpoint is the newest."""
    shutil.copytree(checkpoint.parent, folder)
    for newer in iq.checkpoint.checkpoints(folder):
        if int(newer.name.split("-")[1]) > int(checkpoint.name.split("-")[1]):
            shutil.rmtree(newer)
    return folder


@pytest.fixture(scope="session")
def made_once(loaded, rows, tmp_path_factory):
    """The run below."""
    folder = tmp_path_factory.mktemp("two-steps")
    run(*loaded, rows, config_of(folder, max_steps=2))
    return folder


@pytest.fixture
def two_steps(made_once, tmp_path):
    """A run of two steps; a copy, so that a test may do with it what it likes."""
    return shutil.copytree(made_once, tmp_path / "two-steps")


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "rows") for family in FAMILIES), ("idefics", "overflowing")],
    indirect=["family"],
)
@pytest.mark.slow
def test_interrupted_at_every_step(base, processor, kind, request, tmp_path):
    """At each step, in mid-epoch and at its end, after skipped windows, with dropout, crops, fp16
    scaling, evaluation and the best: whole checkpoints and histories are equal."""
    rows = request.getfixturevalue(kind)
    _, whole = run(base, processor, rows, config_of(tmp_path / "whole"))
    assert whole.global_step == STEPS
    assert bool(whole.metrics["skipped_windows"]) == (kind == "overflowing")
    last = f"checkpoint-{STEPS}"
    for step in range(1, STEPS):
        folder = resumed_from(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / str(step))
        config = config_of(folder, num_workers=step % 2)
        _, result = run(base, processor, rows, config, seed=step)
        assert differences(tmp_path / "whole" / last, folder / last) == []
        assert result.best_checkpoint.name == whole.best_checkpoint.name


class Failing:
    """What a user's ``on_log``, or the device in an evaluation, does: it breaks down at one step.

    Args:
        where: ``evaluation``, ``samples``, ``on_log of training`` or ``on_log of evaluation``.
        step: At which step; 0: at that from which the run goes on.
    """

    def __init__(self, where, step):
        self.where, self.step = where, step
        self.told = []

    def on_log(self, record):
        self.told += without_clocks([record])
        kind = "evaluation" if "eval_loss" in record else "training"
        if self.where == f"on_log of {kind}" and record["step"] == self.step:
            raise ConnectionError("injected")

    def attach(self, model):
        """Let the model fail in the evaluation of that step, as for want of memory."""

        def fail(module, _, inputs):
            step = self.told[-1]["step"] if self.told else 0
            wanted = self.where == ("samples" if inputs.get("use_cache") else "evaluation")
            if not module.training and wanted and step == self.step:
                raise torch.OutOfMemoryError("injected")

        model.get_base_model().register_forward_pre_hook(fail, with_kwargs=True)
        return model


MIDDLE, UNSAVED, LAST = 2, 3, 4
"""Of four steps with ``eval_steps=1`` and ``save_steps=2``."""


@pytest.mark.parametrize(
    ("where", "step", "times"),
    [
        ("evaluation", MIDDLE, 1),
        ("evaluation", UNSAVED, 2),
        ("evaluation", LAST, 1),
        ("samples", LAST, 1),
        ("on_log of training", MIDDLE, 2),
        ("on_log of training", LAST, 1),
        ("on_log of evaluation", MIDDLE, 1),
        ("on_log of evaluation", UNSAVED, 1),
        ("on_log of evaluation", LAST, 2),
    ],
)
@pytest.mark.slow
def test_what_failed_is_made_up_for(base, processor, rows, tmp_path, where, step, times):
    """An evaluation or an on_log that fails, even again and again: after a restart what was due is
    done, so that checkpoints, histories, the best and the adapter are the undisturbed run's."""
    changes = {
        "max_steps": LAST, "learning_rate": 0.02, "warmup_steps": 0,
        "save_steps": 2, "logging_steps": 1,
        "eval_samples": int(where == "samples"), "eval_image_use": where == "samples",
    }  # fmt: skip

    def run(folder, failing, seed):
        torch.manual_seed(seed)
        model = failing.attach(iq.add_lora(copy.deepcopy(base), seed=seed))
        config = config_of(tmp_path / folder, **changes)
        return model, lambda: iq.train(
            model, processor, rows, rows[4:6], config=config, on_log=failing.on_log
        )

    undisturbed = Failing("nowhere", 0)
    whole_model, train = run("whole", undisturbed, 42)
    whole = train()
    told = []
    for time in range(times):
        # A process that goes on from this very step has no other record of it.
        failing = Failing(where, step if time == 0 or where.startswith("on_log") else 0)
        _, train = run("failed", failing, seed=42 + time)
        with pytest.raises((ConnectionError, torch.OutOfMemoryError)):
            train()
        told += failing.told
        assert iq.latest_checkpoint(tmp_path / "failed").name == f"checkpoint-{step}"
    failing = Failing("nowhere", 0)
    model, train = run("failed", failing, 7)
    result = train()
    told += failing.told

    for saved in (MIDDLE, LAST):
        name = f"checkpoint-{saved}"
        assert differences(tmp_path / "whole" / name, tmp_path / "failed" / name) == []
    assert without_clocks(result.log_history)[:-1] == without_clocks(whole.log_history)[:-1]
    assert result.best_checkpoint.name == whole.best_checkpoint.name
    theirs, ours = (adapter_tensors(m) for m in (whole_model, model))
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    # on_log had every record once, and the one that it failed on once more each time.
    once = [r for i, r in enumerate(told) if i == 0 or r != told[i - 1]]
    assert once == undisturbed.told
    assert len(told) - len(once) == (times if where.startswith("on_log") else 0)


EXECUTIONS = {
    "bf16": {"precision": "bf16"},
    "adamw_torch": {"optim": "adamw_torch"},
    "recomputed": {"gradient_checkpointing": True},
    "slow": {"fast": False},
    "slow and recomputed": {"fast": False, "gradient_checkpointing": True},
    "fast": {"fast": True},
    "fast in fp32": {"fast": True, "precision": "fp32", "optim": "adamw_torch"},
    "fast and recomputed": {"fast": True, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTIONS)
def test_interrupted_in_each_execution(base, processor, rows, name, tmp_path, caplog):
    """Without a scaler, with PyTorch's AdamW, with dropout in recomputed or fused layers: equal."""
    caplog.set_level("INFO")
    run(base, processor, rows, config_of(tmp_path / "whole", **EXECUTIONS[name]))
    folder = resumed_from(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed")
    run(base, processor, rows, config_of(folder, **EXECUTIONS[name]), seed=1)
    last = f"checkpoint-{STEPS}"
    assert differences(tmp_path / "whole" / last, folder / last) == []
    assert ("blocks are fused" in caplog.text) == EXECUTIONS[name].get("fast", True)
    assert "go through its own layers" not in caplog.text


def test_every_count_goes_on(base, processor, rows, two_steps, tmp_path):
    """What a run has counted so far is in the result of whoever goes on with it."""
    snapshot = load_checkpoint(two_steps / "checkpoint-2")
    snapshot.state.update(seconds=1234.5, num_bad_rows=3, skips_in_a_row=4)
    snapshot.state.update(first_nonfinite_module="model.norm")
    save(tmp_path / "b" / "checkpoint-2", snapshot)
    _, result = run(base, processor, rows, config_of(tmp_path / "b", max_steps=2))
    assert result.metrics["train_runtime"] >= 1234.5
    assert result.metrics["bad_rows"] == 3
    assert result.fp16_ledger["skips_in_a_row"] == 4
    assert result.fp16_ledger["first_nonfinite_module"] == "model.norm"


def test_a_finished_run_returns_its_result_at_once(base, processor, rows, tmp_path):
    """Started again, the script gets the same result and nothing is computed or written."""
    _, first = run(base, processor, rows, config_of(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    model, again = run(base, processor, rows, config_of(tmp_path / "run"), seed=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert again.log_history[:-1] == first.log_history[:-1]
    assert (again.training_loss, again.best_checkpoint) == (
        first.training_loss,
        first.best_checkpoint,
    )
    best = load_checkpoint(first.best_checkpoint).adapter
    ours = adapter_tensors(model)
    assert all(torch.equal(best[key], ours[key]) for key in best)


def test_a_path_goes_back(base, processor, rows, tmp_path, caplog):
    """Continuing from an older checkpoint sets the newer ones aside and ends as before."""
    run(base, processor, rows, config_of(tmp_path / "run", max_steps=STEPS))
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "first-end" / "checkpoint-6")
    config = config_of(tmp_path / "run", resume=tmp_path / "run" / "checkpoint-4")
    run(base, processor, rows, config, seed=1)
    assert "checkpoint-6 is now abandoned-checkpoint-6" in caplog.text
    old, new = (tmp_path / name / "checkpoint-6" for name in ("first-end", "run"))
    assert differences(old, new) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 2}, "global_batch_size: was 4, now 2"),
        ({"seed": 1}, "seed: was 42, now 1"),
        ({"learning_rate": 1e-3}, "learning_rate: was 0.0002, now 0.001"),
        (
            {"adam_beta2": 0.95, "warmup_steps": 0, "warmup_ratio": 0.2},
            "(?s)warmup_steps: was 2, .*warmup_ratio: was 0.0, .*adam_beta2: was 0.999, now 0.95",
        ),
        ({"augment": False, "loss_on": "all"}, "(?s)loss_on: .*augment: was True, now False"),
    ],
)
def test_what_changes_the_mathematics_is_refused(
    base, processor, rows, two_steps, changes, message
):
    """Each differing field is listed with its old and new value."""
    with pytest.raises(ValueError, match=message):
        run(base, processor, rows, config_of(two_steps, **changes))


def test_other_rows_lora_or_base_are_refused(base, processor, rows, two_steps):
    """A run is not continued with other data, another adapter or another base."""
    with pytest.raises(ValueError, match="train_rows: were 10 rows, now 9"):
        run(base, processor, rows[:9], config_of(two_steps))
    lora = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = iq.add_lora(copy.deepcopy(base), lora)
    with pytest.raises(ValueError, match=r"(?s)LoRA r: was 16, now 4.*LoRA target_modules"):
        iq.train(model, processor, rows, rows[:2], config=config_of(two_steps))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"base model: was .*, now "):
        run(other, processor, rows, config_of(two_steps))


def test_what_does_not_change_the_mathematics_is_free(base, processor, rows, tmp_path):
    """Micro-batches, workers, logging, recomputation: a resumed run may have others."""
    run(base, processor, rows, config_of(tmp_path, max_steps=2, lr_scheduler_type="constant"))
    config = config_of(
        tmp_path, max_steps=3, micro_batch_size=4, num_workers=1, logging_steps=1, save_steps=3,
        gradient_checkpointing=True, lr_scheduler_type="constant", eval_steps=3,
    )  # fmt: skip
    _, result = run(base, processor, rows, config)
    assert result.global_step == 3
    assert result.metrics["micro_batch_size"] == 4


def test_more_steps_stretch_the_schedule_and_say_so(base, processor, rows, tmp_path, caplog):
    """With a decaying schedule the new learning rate is told; a constant one needs none."""
    config = config_of(tmp_path / "a", max_steps=2, lr_scheduler_type="linear", warmup_steps=0)
    run(base, processor, rows, config)
    run(base, processor, rows, dataclasses.replace(config, max_steps=4))
    assert "learning rate of step 2 is 0.0001 instead of 0" in caplog.text
    caplog.clear()
    config = config_of(tmp_path / "b", max_steps=2, lr_scheduler_type="constant")
    run(base, processor, rows, config)
    _, result = run(base, processor, rows, dataclasses.replace(config, max_steps=3))
    assert result.global_step == 3
    assert "learning rate of step" not in caplog.text


def test_other_evaluation_rows_forget_the_best(base, processor, rows, tmp_path, caplog):
    """Losses on other rows cannot be compared; training is the same."""
    run(base, processor, rows, config_of(tmp_path, max_steps=2, lr_scheduler_type="constant"))
    model = model_of(base, processor, rows)
    config = config_of(tmp_path, max_steps=3, lr_scheduler_type="constant")
    result = iq.train(model, processor, rows, rows[2:5], config=config)
    assert "eval_rows differ" in caplog.text
    assert result.best_checkpoint.name == "checkpoint-3"


def test_other_versions_are_told(base, processor, rows, two_steps, tmp_path, caplog):
    """Another library may compute other bits: the run goes on and says so."""
    snapshot = load_checkpoint(two_steps / "checkpoint-2")
    snapshot.state["environment"]["versions"]["torch"] = "1.0"
    save(tmp_path / "b" / "checkpoint-2", snapshot)
    run(base, processor, rows, config_of(tmp_path / "b", max_steps=2))
    assert "torch was 1.0 when" in caplog.text


def test_an_fp16_run_may_go_on_in_bf16(base, processor, rows, two_steps, caplog):
    """The advice that an endless overflow gives can be followed."""
    _, result = run(base, processor, rows, config_of(two_steps, max_steps=3, precision="bf16"))
    assert result.global_step == 3
    assert "precision was fp16 and is bf16 now" in caplog.text


@every_family
def test_a_finetuned_model_is_verified(base, processor, rows, tmp_path):
    """A damaged checkpoint, or another base, is refused by name, and nothing is half-loaded."""
    run(base, processor, rows, config_of(tmp_path, max_steps=1, warmup_steps=0))
    folder = tmp_path / "checkpoint-1"
    model, _ = iq.load_finetuned(folder, device="cpu")
    assert model.peft_config["default"].r == 16
    other = tmp_path / "other"
    shutil.copytree(base.name_or_path, other)
    from safetensors.torch import load_file, save_file

    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    (embeddings,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[embeddings] *= 1.5
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="trained on another base model than"):
        iq.load_finetuned(folder, base=other, device="cpu")
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors was altered"):
        iq.load_finetuned(folder, device="cpu")


def test_no_whole_checkpoint_is_no_fresh_start(base, processor, rows, two_steps):
    """If all checkpoints are damaged, the run does not start anew over them."""
    for folder in two_steps.glob("checkpoint-*"):
        (folder / "rng.safetensors").unlink()
    with pytest.raises(ValueError, match="none of checkpoint-1, checkpoint-2 in .* is whole"):
        run(base, processor, rows, config_of(two_steps))


def test_going_on_elsewhere_takes_the_best_along(base, processor, rows, tmp_path):
    """The best so far is copied, so that a later start in the new folder still knows it."""
    config = config_of(tmp_path / "a", max_steps=3, lr_scheduler_type="constant")
    run(base, processor, rows, config)
    start = tmp_path / "a" / "checkpoint-3"
    snapshot = load_checkpoint(start)
    snapshot.state.update(best_checkpoint="checkpoint-1", best_metric=0.0)
    save(start, snapshot)
    config = dataclasses.replace(config, output_dir=tmp_path / "b", max_steps=4, resume=start)
    _, result = run(base, processor, rows, config)
    assert result.best_checkpoint == tmp_path / "b" / "checkpoint-1"
    _, again = run(base, processor, rows, dataclasses.replace(config, resume="auto"))
    assert again.best_checkpoint == result.best_checkpoint
    assert load_checkpoint(again.best_checkpoint).adapter.keys() == snapshot.adapter.keys()


def test_fewer_steps_than_done_is_finished(base, processor, rows, tmp_path):
    """A run that has had more steps than are asked for is over, with its best loaded."""
    config = config_of(tmp_path, max_steps=4, lr_scheduler_type="constant")
    run(base, processor, rows, config)
    model, result = run(base, processor, rows, dataclasses.replace(config, max_steps=3))
    assert (result.global_step, result.stopped_by) == (4, None)
    best = load_checkpoint(result.best_checkpoint).adapter
    ours = adapter_tensors(model)
    assert all(torch.equal(best[key], ours[key]) for key in best)


def test_what_no_checkpoint_would_hold_is_refused(base, processor, rows, tmp_path):
    """A base parameter that is switched on would be trained and lost: said before training."""
    model = iq.add_lora(copy.deepcopy(base))
    norm = model.get_base_model().model.norm.weight
    norm.data = norm.data.float()
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight .* is no part of the adapter"):
        iq.train(model, processor, rows, rows[:2], config=config_of(tmp_path))


def run_of(checkpoint):
    """The id of its run."""
    return load_checkpoint(checkpoint).state["run"]


class Forgetful:
    """A part that is taken down, but not put back."""

    def __init__(self, part):
        self.state_dict = part.state_dict

    def load_state_dict(self, saved):
        pass


FIVE_STEPS = {"max_steps": 5, "eval_steps": 3, "load_best_model_at_end": False}


@pytest.fixture(scope="session")
def five_steps(loaded, overflowing, tmp_path_factory):
    """A whole run's checkpoints: a window overflowed before the third, which is the best so far."""
    folder = tmp_path_factory.mktemp("five-steps")
    run(*loaded, overflowing, config_of(folder, **FIVE_STEPS))
    return folder


@pytest.mark.parametrize("forgotten", [None, *PARTS])
def test_no_part_can_be_left_out(
    base, processor, overflowing, five_steps, forgotten, tmp_path, monkeypatch
):
    """Whichever part a restart forgets, the run becomes another one; only whole it is the same."""
    if forgotten is not None:
        make = PARTS[forgotten]
        monkeypatch.setitem(PARTS, forgotten, lambda state: Forgetful(make(state)))
    folder = resumed_from(five_steps / "checkpoint-3", tmp_path / "run")
    run(base, processor, overflowing, config_of(folder, **FIVE_STEPS), seed=1)
    found = []
    for name in ("checkpoint-4", "checkpoint-5"):
        whole, resumed = five_steps / name, folder / name
        found += differences(whole, resumed)
        found += ["run"] * (run_of(whole) != run_of(resumed))
    assert bool(found) == (forgotten is not None)
    learnt_by = {"counters", "scaler", "adapter", "optimizer", "random states"}
    assert any(name.startswith("adapter ") for name in found) == (forgotten in learnt_by)


def test_every_field_of_a_state_has_its_place():
    """A new field is a counter, or somebody has decided what becomes of it."""
    fields = {field.name for field in dataclasses.fields(TrainState)}
    counters = {field.name for field in dataclasses.fields(Counters)}
    in_other_parts = {"run", "best_step", "unlogged_loss", "scaler", "model", "optimizer", "device"}
    compared = {"config", "total_steps", "origin", "criterion"}
    of_one_process = {"coverage", "window_rng", "half_updated", "execution", "is_unchanged"}
    assert fields - counters == in_other_parts | compared | of_one_process
