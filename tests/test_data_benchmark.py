"""The benchmark of loading runs every way, and tells how far a draft is from the whole picture."""

import json

import data
import torch


def test_every_way_is_measured(tmp_path, capsys):
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
