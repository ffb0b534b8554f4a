"""Charts of a run in TensorBoard, Weights & Biases and Trackio, without a network."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from helpers import config_of, warnings_of

import idefics_qlora as iq
from idefics_qlora.training import trackers


def run(model, processor, examples, folder, report_to, **options):
    config = config_of(
        folder, report_to=(report_to,), eval_steps=2, save_steps=2, eval_samples=1,
        load_best_model_at_end=True, save_total_limit=None, **options.pop("config", {}),
    )  # fmt: skip
    return iq.train(model, processor, examples, examples[:2], config=config, **options)


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved."""


def kill_at_3(record):
    if record["step"] == 3:
        raise Killed


def test_tensorboard_has_each_point_once_however_a_run_went_on(base, processor, examples, tmp_path):
    """Real event files: scalars, samples and their picture; of a run that broke off beyond its
    checkpoint, what it drew there is purged."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    serving = import_module("tensorboard.backend.event_processing.plugin_event_accumulator")
    model = iq.add_lora(base)
    with pytest.raises(Killed):
        run(model, processor, examples, tmp_path, "tensorboard", on_log=kill_at_3)
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-2"
    result = run(model, processor, examples, tmp_path, "tensorboard")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    drawn = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    drawn.Reload()
    tags = drawn.Tags()
    assert {"train/loss", "train/learning_rate", "train/examples_per_second"} <= {*tags["scalars"]}
    for tag, kind, key in (("train/loss", "loss", "loss"), ("eval/loss", "eval_loss", "eval_loss")):
        points = [(point.step, point.value) for point in drawn.Scalars(tag)]
        recorded = [(r["step"], pytest.approx(r[key])) for r in result.log_history if kind in r]
        assert points == recorded
    assert [point.step for point in drawn.Tensors("samples/eval_rows[0]/text_summary")] == [2, 4]
    said = [r["eval_samples"][0]["text"] for r in result.log_history if "eval_samples" in r]
    shown = drawn.Tensors("samples/eval_rows[0]/text_summary")[-1].tensor_proto.string_val[0]
    assert shown.decode() == f"says: {said[-1]}\n\nis: {examples[0].completion}"
    # TensorBoard's own server reads them in another way, in which pictures are tensors too.
    served = serving.EventAccumulator(str(tmp_path / "tensorboard"))
    served.Reload()
    (picture,) = tags["images"]
    for tag in ("eval/loss", "samples/eval_rows[0]/text_summary", picture):
        assert [point.step for point in served.Tensors(tag)] == [2, 4]
    assert [point.step for point in served.Tensors("train/loss")] == [1, 2, 3, 4]
    assert (drawn.Images(picture)[0].width, drawn.Images(picture)[0].height) == (64, 64)


def test_a_finished_run_draws_nothing_more(base, processor, examples, tmp_path):
    """Started again it returns its result and leaves its charts alone."""
    pytest.importorskip("tensorboard")
    model = iq.add_lora(base)
    run(model, processor, examples, tmp_path, "tensorboard", config={"max_steps": 2})
    before = list((tmp_path / "tensorboard").iterdir())
    run(model, processor, examples, tmp_path, "tensorboard", config={"max_steps": 2})
    assert list((tmp_path / "tensorboard").iterdir()) == before


OFFLINE = """
import json, sys
import idefics_qlora as iq
name, folder, stop = sys.argv[1:]
model, processor = iq.tiny.load_model(device="cpu")
rows = iq.tiny.creature_cards(8, seed=0)
config = iq.TrainConfig(
    output_dir=folder, max_steps=4, global_batch_size=2, logging_steps=1, eval_steps=2,
    save_steps=2, eval_samples=1, num_workers=0, report_to=(name,), progress="none",
)
result = iq.train(
    iq.add_lora(model), processor, rows[:6], rows[6:], config=config,
    to_example=iq.pokemon_card_example,
    on_log=lambda record: iq.STOP if record["step"] == int(stop) else None,
)
print(json.dumps(result.log_history))
"""


def offline(name, tmp_path, **variables) -> list[dict]:
    """The history of a run that was stopped after step 3 and went on in another process."""
    home = str(tmp_path / "home")
    variables = {**os.environ, "HOME": home, "XDG_CACHE_HOME": home, **variables}
    for stop in ("3", "0"):
        command = [sys.executable, "-c", OFFLINE, name, str(tmp_path / "run"), stop]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{name} has failed" not in done.stderr
    (line,) = done.stdout.splitlines()  # stdout is the program's own
    return json.loads(line)


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a file of wandb, which is a log of LevelDB behind a head of 7 bytes."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # what is left of a block is filled up
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    """Offline it writes both parts of the run under one id, with losses, samples and a picture."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    history = offline("wandb", tmp_path, WANDB_MODE="offline")
    points, ids = [], set()
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if items:
                points.append({name: json.loads(value) for name, value in items.items()})
    assert len(ids) == 1
    losses = [(point["step"], point["train/loss"]) for point in points if "train/loss" in point]
    assert losses == [(r["step"], r["loss"]) for r in history if "loss" in r]
    assert [point["step"] for point in points if "eval/loss" in point] == [2, 4]
    assert len(list((tmp_path / "run" / "wandb").rglob("media/images/*.png"))) >= 1


@pytest.mark.slow
def test_trackio_offline(tmp_path):
    """In its own database: one run with both parts, losses and a picture."""
    pytest.importorskip("trackio")
    history = offline("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    code = (
        "import json, trackio; (run,) = trackio.Api().runs('idefics_qlora');"
        "from trackio.sqlite_storage import SQLiteStorage as S;"
        "print(json.dumps(S.get_logs('idefics_qlora', run.name), default=str))"
    )
    variables = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout.splitlines()[-1])
    losses = [(point["step"], point["train/loss"]) for point in points if "train/loss" in point]
    assert losses == [(r["step"], r["loss"]) for r in history if "loss" in r]
    assert [point["step"] for point in points if "eval/loss" in point] == [2, 4]
    assert any("samples/row-0-image-0" in point for point in points)


def test_what_is_not_installed_is_said_before_training(
    lora, processor, examples, tmp_path, monkeypatch
):
    """The error says what to install, and nothing is written."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "idefics_qlora\[trackio\]"'):
        run(lora, processor, examples, tmp_path / "run", "trackio")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_stop_a_run(lora, processor, examples, tmp_path, caplog):
    """It is told once, and the run goes on without it."""
    pytest.importorskip("tensorboard")

    def break_it(record):
        if record["step"] == 1:  # no picture can be opened any more
            (tmp_path / "eval_samples" / "row-0-image-0.png").write_bytes(b"")

    result = run(lora, processor, examples, tmp_path, "tensorboard", on_log=break_it)
    assert result.global_step == 4
    (said,) = [m for m in warnings_of(caplog) if m.startswith("tensorboard has failed")]
    assert "training goes on without it" in said


@pytest.mark.parametrize("value", ["tensorboard", ("mlflow",), None])
def test_the_setting_is_checked(tmp_path, value):
    """Names that there are not, and a bare name, are errors that list those there are."""
    with pytest.raises(ValueError, match="expected a tuple of tensorboard, wandb, trackio, or"):
        iq.TrainConfig(output_dir=tmp_path, report_to=value)
