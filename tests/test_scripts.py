"""The example scripts and benchmarks, run as a user runs them, offline and small."""

import functools
import json
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import checkpoint
import data
import datasets
import describe_image
import diagnostics
import finetune_pokemon_cards
import import_time
import loop
import pytest
import quickstart
import torch
from helpers import every_family
from safetensors.torch import load_file

import idefics_qlora as iq


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served_cards(tmp_path):
    """Twelve cards whose pictures are behind http URLs on loopback, saved as a dataset."""
    rows = iq.tiny.creature_cards(12, seed=0, directory=tmp_path / "pictures")
    handler = functools.partial(Quiet, directory=str(tmp_path / "pictures"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for row in rows:
        row["image_url"] = f"http://127.0.0.1:{server.server_port}/{row['id']}.png"
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "dataset")
    yield tmp_path / "dataset"
    server.shutdown()
    thread.join()
    server.server_close()


@every_family
def test_the_tutorial_runs_offline(bases, family, served_cards, tmp_path, capsys):
    """The whole tutorial with a tiny base and pictures fetched over http, then its adapter."""
    result = finetune_pokemon_cards.main(
        [
            *("--model", bases(family)[0].name_or_path),
            *("--dataset", str(served_cards)),
            *("--output-dir", str(tmp_path / "run")),
            *("--test-size", "0.25"),
            *("--max-steps", "2", "--global-batch-size", "4"),
            *("--eval-steps", "1", "--save-steps", "1", "--logging-steps", "1"),
            *("--precision", "fp32", "--num-workers", "0", "--max-new-tokens", "5"),
            *("--allow-private-hosts", "--prefetch"),
        ]
    )
    printed = capsys.readouterr().out
    assert "9 pictures downloaded, 0 already there, 0 rows failed" in printed
    assert "9 cards to learn from, 3 held out" in printed
    assert "before:" in printed
    assert "after:" in printed
    assert result.global_step == 2
    assert load_file(result.best_checkpoint / "adapter_model.safetensors")

    pictures = [str(path) for path in sorted((tmp_path / "pictures").iterdir())[:2]]
    adapter = ["--adapter", str(tmp_path / "run")]  # of which it takes the best
    texts = describe_image.main([*pictures, *adapter, "--max-new-tokens", "5"])
    assert len(texts) == 2
    assert pictures[1] in capsys.readouterr().out
    texts = describe_image.main([pictures[0], "--base", "tiny", "--max-new-tokens", "5"])
    assert len(texts) == 1


def test_the_tutorial_opens_public_hosts_only(served_cards, tmp_path):
    """Unless told otherwise, no row can make the machine ask a host of its own network."""
    arguments = ["--checkpoint", str(iq.tiny.BASE), "--dataset", str(served_cards)]
    with pytest.raises(iq.BadImage, match="no public address"):
        finetune_pokemon_cards.main([*arguments, "--test-size", "0.25"])


def test_the_tutorials_numbers_are_the_defaults():
    """Started without flags, it is the tutorial."""
    options = vars(finetune_pokemon_cards.parse([]))
    recipe = {
        "model": "HuggingFaceM4/idefics-9b",
        "dataset": "TheFusion21/PokemonCards",
        "test_size": 0.002,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "learning_rate": 2e-4,
        "global_batch_size": 16,
        "micro_batch_size": "auto",
        "eval_steps": 20,
        "logging_steps": 20,
        "save_steps": 40,
        "max_steps": 40,
    }
    assert {name: options[name] for name in recipe} == recipe


@pytest.mark.slow
def test_the_quickstart_tells_what_was_not_learnt(tmp_path, monkeypatch, capsys):
    """After two steps nothing is learnt: it says so, exits with 1 and keeps all numbers."""
    monkeypatch.setattr(quickstart, "NUM_TEST", 8)
    monkeypatch.setattr(quickstart, "NUM_VALIDATION", 4)
    code = quickstart.main(["--output-dir", str(tmp_path / "run"), "--max-steps", "2"])
    assert code == 1
    told = re.search(r"Not learnt from the pictures: (.*) \(see", capsys.readouterr().out)
    fields = told[1].split(", ")
    assert 0 < len(fields) == len(set(fields))  # one that fails in two ways is one field
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for score in ("before", "after", "shuffled", "chance"):
        assert set(metrics[score]) == set(iq.tiny.FIELDS)
    assert metrics["log_history"][-1]["step"] == 2
    assert "torch" in metrics["versions"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.slow
def test_the_loop_benchmark_runs(capsys):
    """Both loops train and every number comes out; how fast is no test's business."""
    summary = loop.main(["--steps", "1", "--rounds", "1", "--micro-batch-size", "8"])
    assert summary["ratio"] > 0
    assert sum(summary["where_time_goes"].values()) == pytest.approx(1.0)
    assert summary["collator"]["ratio"] > 0


@pytest.mark.slow
def test_the_diagnostics_benchmark_reports_a_share(capsys):
    """It runs small and gives the share of a run that the always-on checks take."""
    summary = diagnostics.main(["--steps", "3"])
    assert json.loads(capsys.readouterr().out) == summary
    assert all(seconds > 0 for seconds in summary["checks_s"].values())
    assert 0 < summary["share_of_100_steps"] < 1


def test_the_import_benchmark_runs(capsys, monkeypatch):
    """Each statement is executed by an interpreter of its own, and its median compared."""
    chosen = {
        name: import_time.STATEMENTS[name] for name in ("import torch", "import idefics_qlora")
    }
    monkeypatch.setattr(import_time, "STATEMENTS", chosen)
    medians = import_time.main(["--runs", "1"])
    assert medians.keys() == chosen.keys()
    assert min(medians.values()) > 0
    printed = capsys.readouterr().out
    assert re.search(r"import idefics_qlora +\d+\.\d\d s +\d+\.\d\d x torch", printed)


@pytest.mark.slow
def test_the_data_benchmark_runs(capsys):
    """Every way loads every kind of rows, workers too, and the memory is watched."""
    summary = data.main(
        [
            *("--pictures", "4", "--size", "60", "80", "--examples", "16", "--rounds", "1"),
            *("--workers", "0", "1", "--memory-examples", "32", "--caches"),
        ]
    )
    assert set(summary["kinds"]) == {"png", "jpeg", "datasets"}
    for record in summary["kinds"].values():
        assert set(record["rounds"]) == {"decoding", "tutorial", "0 workers", "1 worker", "draft"}
        assert record["ratio"] > 0
        assert [len(taken) for taken in record["private_mib"].values()] == [11, 11]
    assert "| png |" in capsys.readouterr().out


def test_the_data_benchmark_keeps_and_drafts(tmp_path, capsys):
    """At a small number of pictures, but large ones: a draft is another picture, hardly."""
    threads = torch.get_num_threads()
    arguments = ["--kinds", "jpeg", "--pictures", "3", "--examples", "16", "--rounds", "1"]
    arguments += ["--size", "1200", "1000", "--workers", "0", "--caches", "disk", "memory"]
    summary = data.main([*arguments, "--json", str(tmp_path / "speeds.json")])
    assert json.loads((tmp_path / "speeds.json").read_text()) == summary
    (record,) = summary["kinds"].values()
    ways = {"tutorial", "0 workers", "kept: disk", "kept: memory", "draft", "draft, kept: disk"}
    assert record["examples_per_second"].keys() == ways | {"draft, kept: memory", "decoding"}
    assert all(speed > 0 for speed in record["examples_per_second"].values())
    assert record["cpu_ms"].keys() == record["examples_per_second"].keys()
    assert 0 < record["draft_difference"]["mean"] < 1
    assert "| jpeg |" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_the_data_benchmark_compares_the_same_work(processor, tmp_path):
    """The tutorial's way gives the texts that ours gives, and pictures of the same shape."""
    dataset = data.datasets.Dataset.from_list(iq.tiny.creature_cards(4, seed=0))
    theirs = next(data.tutorial_batches(dataset, processor))
    window = data.windows(data.Way().reader(dataset, processor, tmp_path))[0]

    def texts(ids, masks):
        pairs = zip(ids, masks, strict=True)
        return {tuple(row[mask.bool()].tolist()) for row, mask in pairs}

    ours = texts(window.batch.input_ids, window.batch.attention_mask)
    assert texts(theirs["input_ids"], theirs["attention_mask"]) <= ours
    assert theirs["pixel_values"].shape == (2, 1, 3, data.SIDE, data.SIDE)


def test_the_checkpoint_benchmark_runs(tmp_path, capsys):
    """Both sides save and load a few layers; how fast is no test's business."""
    summary = checkpoint.main(["--small", "--rounds", "2", "--folder", str(tmp_path)])
    assert summary["bytes"] > summary["parameters"] * 6  # 4 of the adapter, 2 of the optimizer
    assert summary["torch_bytes"] > summary["parameters"] * 6
    assert {len(times) for times in summary["rounds"].values()} == {2}
    assert summary["ratio"] > 0
    assert "| rotate in the loop |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_benchmark_has_the_size_of_idefics_9b():
    """19.75 million parameters in 468 matrices, as the real model's adapter has."""
    layers = list(checkpoint.projections(32, 6, 32))
    assert 2 * len(layers) == 468
    assert sum(16 * (inputs + outputs) for _, inputs, outputs in layers) == 19_750_912
