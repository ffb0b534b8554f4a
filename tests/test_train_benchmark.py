"""The training benchmark: every arm runs small, its arithmetic is right, its tables are written."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train
from full_size import configuration

from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.families import FAMILIES

SCRIPT = Path(train.__file__)
RESULTS = sorted((SCRIPT.parent / "results").glob("*.json"))


def run(file, *arguments):
    """The records by arm and the output of the script, as a user starts it."""
    paths = [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(file), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    records = json.loads(file.read_text())["records"]
    return {record["arm"]: record for record in records}, process.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The file of a run of every arm at tiny size, its records and its output."""
    file = tmp_path_factory.mktemp("benchmark") / "results" / "tiny.json"
    return file, *run(file, "--size", "tiny", "--device", "cpu")


def rows_of(arm, processor, folder, number=8):
    return train.Rows(train.ARMS[arm], train.SIZES["tiny"], number, processor, folder)


@pytest.mark.slow
def test_every_arm_runs_small(results):
    """Each arm trains in its process, or says what the library lacks; losses of the same work
    agree. How fast is no test's business."""
    _, records, printed = results
    assert records.keys() == train.ARMS.keys()
    assert "LOSSES DIFFER" not in printed
    for key, record in records.items():
        assert "error" not in record, (key, record)
        arm = train.ARMS[key]
        why = train.missing(arm, torch.device("cpu"))
        assert record.get("not_available") == why
        if why is not None:
            continue
        assert len(record["losses"]) == 2
        assert record["peak_allocated_gib"] > 0.1
        assert record["matmul_tflops"] > 0
        assert record["warmup_s"] > 0
        if arm.recipe:
            assert record["seconds"] > record["warmup_s"]
            assert len(record["evaluations"]) == 2
            continue
        steps = record["step_ms"]
        assert 0 < steps["p10"] <= steps["median"] <= steps["p90"]
        assert record["examples_per_second"] > 0
        assert 0 < record["optimizer_ms"] < steps["p90"]
        assert 0 < record["share_of_matmul_rate"] < 1
        if arm.loader:
            assert (0 < record["padding_share"] < 1) == (arm.rows != "fixed")
    assert {"a", "b-fp16", "f", "a-mixed", "a-recipe"} <= {
        key for key, record in records.items() if "not_available" not in record
    }


@pytest.mark.slow
def test_a_random_model_is_built_and_trained(tmp_path):
    """The code that builds idefics-9b on a GPU builds and trains a small architecture here."""
    records, _ = run(tmp_path / "small.json", "--size", "small", "--device", "cpu", "--arms", "f")
    # Random weights guess: each of the 1,002 tokens is as likely as the others.
    assert records["f"]["losses"] == pytest.approx([math.log(1002)] * 3, abs=0.2)


@pytest.mark.gpu
def test_arms_run_on_a_gpu(tmp_path):
    """What only a GPU has is measured there: kernels, busy time, waits, reserved memory."""
    arms = ("a", "b-bf16", "d", "f", "d-jpeg")
    records, printed = run(tmp_path / "small.json", "--size", "small", "--arms", *arms)
    assert "LOSSES DIFFER" not in printed
    for key in arms:
        assert "error" not in records[key], (key, records[key])
        if "not_available" in records[key]:
            continue
        assert records[key]["kernels_per_step"] > 100
        assert 0 < records[key]["busy_share"] <= 1
        assert sum(records[key]["gpu_ms"].values()) >= records[key]["busy_ms"]
        assert records[key]["peak_reserved_gib"] >= records[key]["peak_allocated_gib"]


@pytest.mark.slow
def test_tables_are_written_between_the_marks(results, tmp_path):
    """A page keeps what is around the marks; each arm is a row or named as not measured, and
    writing again gives the same page."""
    file, *_ = results
    page = tmp_path / "page.md"
    page.write_text(f"before\n{train.BEGIN}old\n{train.END}after\n")
    train.main(["--tables", str(file), "--docs", str(page)])
    written = page.read_text()
    assert written.startswith(f"before\n{train.BEGIN}")
    assert written.endswith(f"{train.END}after\n")
    assert "old" not in written
    assert "| (a) Trainer 2 x 8 |" in written
    assert "| (a) Trainer 2 x 8, mixed |" in written
    for key, arm in train.ARMS.items():
        assert arm.what in written or f"({key})" in written
    train.main(["--tables", str(file), "--docs", str(page)])
    assert page.read_text() == written
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected the lines"):
        train.main(["--tables", str(file), "--docs", str(page)])


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_the_documented_tables_are_those_of_the_results(file):
    """Nobody has edited a figure by hand, or forgotten to write the tables anew."""
    assert train.tables(json.loads(file.read_text())) in train.DOCS.read_text()


def test_a_file_goes_on(tmp_path, capsys):
    """Arms can be measured one after another into one file, and what a library lacks is told."""
    file = tmp_path / "results.json"
    absent = next(
        (k for k, arm in train.ARMS.items() if train.missing(arm, torch.device("cpu"))), None
    )
    assert absent is not None  # bf16 needs a GPU
    arguments = ["--size", "tiny", "--device", "cpu", "--json", str(file), "--arms", absent]
    train.main(arguments)
    content = train.main(arguments)
    assert [record["arm"] for record in content["records"]] == [absent, absent]
    assert "not available: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of size tiny"):
        train.main(["--device", "cpu", "--json", str(file), "--arms", absent])


def test_rows_have_the_length_that_is_asked_for(processor, tmp_path):
    """Fixed rows have exactly so many tokens and one picture; mixed ones differ, and every fourth
    has two."""
    size = train.SIZES["tiny"]
    fixed = rows_of("d", processor, tmp_path)
    assert set(fixed.num_tokens) == {size.num_tokens}
    assert set(fixed.num_images) == {1}
    mixed = rows_of("d-mixed", processor, tmp_path, number=16)
    assert len(set(mixed.num_tokens)) > 4
    assert sum(mixed.num_images) == 16 + 4
    assert min(mixed.num_tokens) >= size.mixed_tokens[0]
    assert max(mixed.num_tokens) < size.mixed_tokens[1]


def test_both_sides_see_the_same_rows_in_the_same_order(processor, tmp_path):
    """Trainer's list is what our windows draw, one after the other."""
    rows = rows_of("d-mixed", processor, tmp_path)
    windows = Windows(
        RowReader(rows.drawn, "rows", None, Collator(processor)),
        seed=train.SEED,
        global_batch_size=4,
        augment=False,
    )
    drawn = [rows.drawn[row] for w in range(2) for _, row in windows.positions(w)]
    assert [id(example) for example in drawn] == [id(example) for example in rows.in_order]


def test_operations_are_counted_by_the_formula():
    """3.88 TFLOP for one example of idefics-9b with one picture and 97 text tokens, and about what
    the library counts, which leaves out attention's scores and the adapters."""
    config = configuration("9b")
    assert train.operations("9b", config, 97, 1) == pytest.approx(3.88e12, rel=1e-3)
    for num_tokens, num_images in ((40, 1), (97, 1), (160, 2)):
        counted = train.operations("9b", config, num_tokens, num_images)
        assert counted == pytest.approx(
            FAMILIES["idefics"].training_flops(config, num_tokens, num_images), rel=0.03
        )


def test_a_trace_becomes_busy_time_kinds_and_syncs():
    """Overlapping kernels are busy time once; names tell what a kernel does; the profiler's own
    wait is not counted."""
    meter = train.Meter(train.SIZES["tiny"], torch.device("cpu"))

    def event(category, name, start, duration):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    meter._trace = [
        {"ph": "M", "name": "process_name"},
        event("kernel", "nvjet_hsh_128x256_64", 100, 50),
        event("kernel", "void kDequantizeBlockwise<__half>", 120, 60),
        event("kernel", "pytorch_flash::flash_fwd_kernel", 300, 10),
        event("kernel", "vectorized_elementwise_kernel", 305, 15),
        event("gpu_memcpy", "Memcpy HtoD", 400, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 0, 3),
        event("cuda_runtime", "cudaDeviceSynchronize", 500, 3),
        event("cuda_runtime", "cudaLaunchKernel", 0, 3),
    ]
    profiled = meter._profiled()
    assert profiled["busy_ms"] == pytest.approx((80 + 20 + 5) / 1e3)
    assert profiled["kernels_per_step"] == 4
    assert profiled["syncs_per_step"] == 1
    assert profiled["gpu_ms"] == pytest.approx(
        {
            "matrix products": 0.05,
            "dequantisation": 0.06,
            "attention": 0.01,
            "elementwise": 0.015,
            "copies": 0.005,
        }
    )


def test_losses_that_differ_are_told():
    """An arm that trains on something else does not pass for a fast one."""
    records = [{"arm": "a", "losses": [2.0]}, {"arm": "d", "losses": [2.05]}]
    assert train.disagreements(records) == []
    records.append({"arm": "f", "losses": [2.2]})
    assert train.disagreements(records) == ["{'a': 2.0, 'd': 2.05, 'f': 2.2}"]
    assert train.disagreements([*records[:2], {"arm": "d-mixed", "losses": [3.0]}]) == []
