"""The files by which a run's folder explains itself."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import RUN_FILES, config_of, same, warnings_of

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.model.adapters import adapter_tensors

RUNS_OF_0_1 = Path(__file__).parent.parent / "runs_0_1"


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluated(folder, **changes) -> iq.TrainConfig:
    settings = {"eval_steps": 1, "save_steps": 1, "eval_samples": 2, **changes}
    return config_of(folder, load_best_model_at_end=True, **settings)


def train(model, processor, examples, config, **options):
    return iq.train(model, processor, examples, examples[:3], config=config, **options)


def test_a_folder_has_all_of_its_run(lora, processor, examples, tmp_path):
    """Log, samples, settings, machine, result, and which checkpoint is which, without our code."""
    config = evaluated(tmp_path, max_steps=3, allow_dead_parts=("perceiver",), adam_epsilon=1e-7)
    result = train(lora, processor, examples, config)
    history = result.log_history[:-1]
    log = lines_of(tmp_path / "log.jsonl")
    assert log == [{k: v for k, v in r.items() if k != "eval_samples"} for r in history]
    samples = lines_of(tmp_path / "samples.jsonl")
    told = [(r["step"], s["row"], s["text"]) for r in history for s in r.get("eval_samples", ())]
    assert [(s["step"], s["row"], s["text"]) for s in samples] == told
    assert len(told) == 6
    assert all((tmp_path / file).is_file() for s in samples for file in s["images"])
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["metrics"] == result.metrics
    assert (told["global_step"], told["stopped_by"]) == (3, None)
    assert told["best_checkpoint"] == result.best_checkpoint.name
    assert (tmp_path / "best").read_text() == f"{result.best_checkpoint.name}\n"
    assert (tmp_path / "last").read_text() == "checkpoint-3\n"
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["train"].keys() == {f.name for f in dataclasses.fields(iq.TrainConfig)}
    assert iq.TrainConfig(**settings["train"]).to_json() == config.to_json()
    assert settings["lora"]["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert settings["lora"]["r"] == 16
    assert json.loads((tmp_path / "environment.json").read_text()) == iq.environment()


@pytest.mark.parametrize(
    "loaded",
    [{"quantize": False}, {"base_weights": "dequantized"}],
    ids=lambda told: next(iter(told)),
)
def test_how_the_base_was_loaded(examples, tmp_path, loaded):
    """A run from its configuration file trains on the same weights, not on others."""
    model, processor = iq.load_model(iq.tiny.BASE, device="cpu", **loaded)
    config = config_of(tmp_path, max_steps=1)
    iq.train(iq.add_lora(model), processor, examples, config=config)
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    again, _ = iq.load_model(settings.pop("base"), device="cpu", **settings)
    assert settings.items() >= loaded.items()
    trained = dict(model.named_parameters())
    frozen = {name: p.float() for name, p in again.named_parameters() if ".mlp." in name}
    assert frozen
    assert same(frozen, {name: trained[name].float() for name in frozen})


@pytest.mark.parametrize("how", ["back", "failed", "stopped", "lost", "torn"])
def test_the_log_has_each_record_once(base, processor, examples, tmp_path, how):
    """However a run went on: what is not in the checkpoint is cut, what was lost is added."""
    config = evaluated(tmp_path, save_total_limit=None)
    log, samples = tmp_path / "log.jsonl", tmp_path / "samples.jsonl"

    def listen(record):
        if record["step"] == 3 and how == "failed":
            raise RuntimeError("the listener failed")
        return iq.STOP if record["step"] == 3 and how != "back" else None

    model = iq.add_lora(base)
    if how == "failed":
        with pytest.raises(RuntimeError, match="the listener failed"):
            train(model, processor, examples, config, on_log=listen)
    else:
        train(model, processor, examples, config, on_log=listen)
    assert json.loads(log.read_text().splitlines()[-1])["step"] == (4 if how == "back" else 3)
    assert (tmp_path / "result.json").exists() == (how != "failed")
    if how == "back":
        config = dataclasses.replace(config, resume=str(tmp_path / "checkpoint-2"))
    elif how == "lost":
        log.write_text("")
        samples.unlink()
    elif how == "torn":
        log.write_text(log.read_text() + '{"step": 4, "loss": 1.0}\n{"st')
    result = train(model, processor, examples, config)
    told = [(r["step"], "loss" in r) for r in lines_of(log)]
    assert told == [(step, is_loss) for step in (1, 2, 3, 4) for is_loss in (True, False)]
    assert lines_of(log)[-1]["eval_loss"] == result.log_history[-2]["eval_loss"]
    assert [s["step"] for s in lines_of(samples)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert json.loads((tmp_path / "result.json").read_text())["global_step"] == 4


def test_a_result_is_there_only_while_it_holds(base, processor, examples, tmp_path):
    """A stopped run's result tells what stopped it, and goes when the run goes on."""
    config = evaluated(tmp_path, eval_samples=0)
    seen = []

    def listen(record):
        seen.append((tmp_path / "result.json").exists())
        return iq.STOP if record["step"] == 2 else None

    model = iq.add_lora(base)
    train(model, processor, examples, config, on_log=listen)
    assert json.loads((tmp_path / "result.json").read_text())["stopped_by"] == "on_log"
    train(model, processor, examples, config, on_log=listen)
    assert not any(seen)
    assert json.loads((tmp_path / "result.json").read_text())["stopped_by"] is None


def test_a_file_that_cannot_be_written_stops_nothing(lora, processor, examples, tmp_path, caplog):
    """Where something is in the way the run goes on, and says so once."""
    for name in ("log.jsonl", "best", "environment.json"):
        (tmp_path / name).mkdir()
    result = train(lora, processor, examples, evaluated(tmp_path, max_steps=2))
    assert result.global_step == 2
    for name in ("log.jsonl", "environment.json"):
        (said,) = [m for m in warnings_of(caplog) if m.startswith(f"{tmp_path / name} cannot be")]
        assert "training goes on" in said
    assert len(lines_of(tmp_path / "samples.jsonl")) == 4


def test_a_run_of_0_1_gets_its_files(tmp_path):
    """Its folder had none of them: its whole history is in the log when it has gone on."""
    from runs_0_1 import write

    shutil.copytree(RUNS_OF_0_1 / "fp32" / "checkpoint-2", tmp_path / "checkpoint-2")
    write.train("fp32", tmp_path, write.rows_of(RUNS_OF_0_1 / "rows"), fast=False)
    history = load_checkpoint(tmp_path / "checkpoint-4").state["log_history"]
    logged = [{k: v for k, v in r.items() if k != "eval_samples"} for r in history]
    assert lines_of(tmp_path / "log.jsonl") == logged
    assert {path.name for path in tmp_path.iterdir()} >= {*RUN_FILES, "best"}


def test_a_run_is_loaded_by_its_folder(base, processor, examples, tmp_path, caplog):
    """``load_finetuned(output_dir)`` takes what ``best`` names; without one the newest, and says
    so; one that is damaged is passed over."""
    train(iq.add_lora(base), processor, examples, evaluated(tmp_path, max_steps=2, eval_samples=0))

    adapters = {f.name: load_checkpoint(f).adapter for f in tmp_path.glob("checkpoint-*")}

    def loaded() -> str:
        caplog.clear()
        tensors = adapter_tensors(iq.load_finetuned(tmp_path, device="cpu")[0])
        (name,) = [name for name, adapter in adapters.items() if same(adapter, tensors)]
        return name

    (tmp_path / "best").write_text("checkpoint-1\n")
    assert loaded() == "checkpoint-1"
    assert warnings_of(caplog) == []
    for name in ("checkpoint-7", "../elsewhere", "\udcff"):
        (tmp_path / "best").write_bytes(name.encode(errors="surrogateescape"))
        assert loaded() == "checkpoint-2"
        assert "known to be the best: this is the newest, checkpoint-2" in warnings_of(caplog)[-1]
    (tmp_path / "best").write_text("checkpoint-1\n")
    file = tmp_path / "checkpoint-1" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert loaded() == "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="expected a run's output_dir, a checkpoint-N"):
        iq.load_finetuned(tmp_path)


def test_without_evaluations_the_newest_is_loaded_and_it_is_said(
    lora, processor, examples, tmp_path, caplog
):
    """No checkpoint is known to be the best where nothing was compared."""
    iq.train(lora, processor, examples, config=config_of(tmp_path, max_steps=2, save_steps=1))
    assert not (tmp_path / "best").exists()
    model, _ = iq.load_finetuned(tmp_path, device="cpu")
    assert "this is the newest, checkpoint-2" in warnings_of(caplog)[-1]
    assert same(adapter_tensors(model), load_checkpoint(tmp_path / "checkpoint-2").adapter)


def test_a_folder_of_0_1_is_loaded_by_what_its_newest_checkpoint_says(tmp_path, caplog):
    """There the best checkpoint's name stands in the state alone."""
    shutil.copytree(RUNS_OF_0_1 / "fp32", tmp_path / "run")
    best = load_checkpoint(tmp_path / "run" / "checkpoint-4").state["best_checkpoint"]
    model, _ = iq.load_finetuned(tmp_path / "run", base=iq.tiny.BASE, device="cpu")
    assert same(adapter_tensors(model), load_checkpoint(tmp_path / "run" / best).adapter)
    assert warnings_of(caplog) == []
