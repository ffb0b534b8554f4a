"""The training benchmark: every arm runs small, its arithmetic is right, its tables are written."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import train
import train_arms
import train_meter
import train_tables
from random_model import configuration

from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.families import FAMILIES, family_of_config

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
    arm, size = train_arms.ARMS[arm], train_arms.SIZES["tiny"]
    return train_arms.Rows(arm, size, number, processor, folder)


@pytest.mark.slow
def test_every_arm_runs_small(results):
    """Each arm trains in its process, or says what the machine lacks; losses of the same work
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
        assert record["first_step_s"] > 0
        assert record["process"] == {"after": []}
        steps = record["step_ms"]
        assert record["steps"] == train.SIZES["tiny"].counted
        assert 0 < steps["p10"] <= steps["median"] <= steps["p90"]
        assert record["examples_per_second"] > 0
        assert record["warm_tokens_per_second"] > 0
        assert 0 < record["optimizer_ms"] < steps["p90"]
        assert 0 < record["share_of_matmul_rate"] < 1
        # A CPU packs rows without padding, Trainer pads what differs.
        assert record.get("padding_share", 0) == 0 or key == "a-mixed"
        if arm.recipe:
            assert record["seconds"] > record["first_step_s"]
            assert len(record["evaluations"]) == 2
        if not arm.trainer:
            assert (record["micro_batches"] is not None) == arm.fast
        if arm.model and not arm.trainer:
            assert record["tiles"] == 5
            assert record["text_tokens"] > 5 * 4
            assert record["estimate_of_peak"] > 0
    assert 0 < records["a-mixed"]["padding_share"] < 1
    absent = {key for key, record in records.items() if "not_available" in record}
    assert absent == {"b-bf16"}


@pytest.mark.slow
def test_arms_share_a_process(tmp_path):
    """With the same base and fresh adapters each; the steps of a whole recipe are the arm's. What
    they give is what an arm in a process of its own gives, to rounding."""
    start = ["--size", "tiny", "--device", "cpu", "--arms"]
    shared, _ = run(tmp_path / "shared.json", *start, "f", "d-recipe", "d", "h", "--share")
    alone, _ = run(tmp_path / "alone.json", *start, "f", "d")
    assert shared["d"]["process"] == {"after": ["f", "d-recipe"]}
    assert shared["h"]["process"] == {"after": []}
    assert shared["d"]["steps_of"] == "d-recipe"
    assert shared["d"]["step_ms"] == shared["d-recipe"]["step_ms"]
    assert "seconds" not in shared["d"]
    for key in ("f", "d"):
        assert shared[key]["losses"] == pytest.approx(alone[key]["losses"], rel=1e-6)


@pytest.mark.slow
def test_a_random_model_is_built_and_trained(tmp_path):
    """The code that builds idefics-9b on a GPU builds and trains a small architecture here."""
    records, _ = run(tmp_path / "small.json", "--size", "small", "--device", "cpu", "--arms", "f")
    # Random weights guess: each of the 1,002 tokens is as likely as the others.
    assert records["f"]["losses"] == pytest.approx([math.log(1002)] * 2, abs=0.2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # Trainer's
def test_arms_run_on_a_gpu():
    """What only a GPU has is measured there: kernels, busy time, waits, recorded graphs."""
    trainers = train_arms.Bench("small", torch.device("cuda:0"), num_workers=1)
    ours = train_arms.Bench("small", torch.device("cuda:0"), num_workers=0)
    records = {"a": trainers.measure("a"), "f": ours.measure("f"), "d": ours.measure("d")}
    assert train_meter.pairs_agree([record["losses"] for record in records.values()], 0.03)
    for record in records.values():
        assert record["kernels_per_step"] > 100
        assert 0 < record["busy_share"] <= 1
        assert sum(record["gpu_ms"].values()) == pytest.approx(record["busy_ms"])
        assert record["peak_reserved_gib"] >= record["peak_allocated_gib"]
    assert records["d"]["graph_captures"] == 1
    assert records["d"]["micro_batches"]["replayed"] > 0
    assert records["d"]["kernels_per_step"] < records["f"]["kernels_per_step"]
    assert records["d"]["syncs_per_step"] < records["a"]["syncs_per_step"]


@pytest.mark.slow
def test_tables_are_written_between_the_marks(results, tmp_path):
    """A page keeps what is around the marks; each arm is a row or named as not measured, and
    writing again gives the same page."""
    file, *_ = results
    pages = [tmp_path / "measurements.md", tmp_path / "speed.md"]
    for page in pages:
        page.write_text(f"before\n{train_tables.BEGIN}old\n{train_tables.END}after\n")
    train.main(["--tables", str(file), "--docs", str(tmp_path)])
    written = [page.read_text() for page in pages]
    for text in written:
        assert text.startswith(f"before\n{train_tables.BEGIN}")
        assert text.endswith(f"{train_tables.END}after\n")
        assert "old" not in text
        assert "| (a) Trainer 2 x 8 |" in text
    assert "| (a) Trainer 2 x 8, mixed |" in written[0]
    for key, arm in train.ARMS.items():
        assert arm.what in written[0] or f"({key})" in written[0]
    train.main(["--tables", str(file), "--docs", str(tmp_path)])
    assert [page.read_text() for page in pages] == written
    train.main(["--tables", "--docs", str(tmp_path)])
    assert train_tables.NOT_YET in pages[0].read_text()
    pages[1].write_text("no marks")
    with pytest.raises(ValueError, match="expected the lines"):
        train.main(["--tables", str(file), "--docs", str(tmp_path)])


def test_the_documented_figures_are_those_of_the_results():
    """Nobody has edited a figure by hand, or forgotten to write the pages and the picture anew."""
    contents = [json.loads(file.read_text()) for file in RESULTS]
    begin, end = train_tables.BEGIN, train_tables.END
    for name, expected in (
        ("measurements.md", train_tables.tables(contents)),
        ("speed.md", train_tables.summary(contents)),
    ):
        page = (train.DOCS / name).read_text()
        assert f"{begin}\n{expected}\n{end}" in page
    drawn, picture = train_tables.picture(contents), train.DOCS / "speed.svg"
    assert (picture.read_text() if picture.exists() else None) == drawn


def traced(key, **kinds):
    """A record of an arm in which the GPU was watched."""
    busy = sum(kinds.values())
    return {
        **{"arm": key, "round": 0, "device": "some GPU", "process": {"after": []}},
        **{"matmul_tflops": 700.0, "step_ms": {"p10": 99.0, "median": 100.0, "p90": 120.0}},
        **{"losses": [1.0], "busy_ms": busy, "gpu_ms": kinds, "examples_per_second": 160.0},
    }


def test_the_picture_shows_how_a_step_is_divided():
    """A bar for each arm that was watched, as long as the others; none without such arms."""
    records = [traced("a", attention=10.0), traced("d", **{"matrix products": 75.0, "copies": 5.0})]
    content = {"versions": {"torch": "9"}, "records": records}
    drawn = train_tables.picture([content])
    bars = [node.attrib for node in ElementTree.fromstring(drawn).iter() if "height" in node.attrib]
    assert sum(float(bar["width"]) for bar in bars if bar["height"] == "30") == 2 * 620
    assert "<title>idle: 90.0 ms, 90%</title>" in drawn
    assert "<title>matrix products: 75.0 ms, 75%</title>" in drawn
    assert "<title>idle: 20.0 ms, 20%</title>" in drawn
    assert "![" in train_tables.summary([content])
    for record in records:
        record["busy_ms"] = record["gpu_ms"] = None
    assert train_tables.picture([content]) is None
    assert "![" not in train_tables.summary([content])


def test_each_base_stands_beside_its_trainer():
    """With the ratio of both, and how near the estimate came; a file may have nothing else."""
    rates = {"smolvlm-256m": 30.0, "smolvlm-256m-trainer": 12.0, "idefics3-8b": 4.0}
    records = [
        {**traced(key), "examples_per_second": rate, "estimate_of_peak": 0.98}
        for key, rate in rates.items()
    ]
    content = {"versions": {"torch": "9"}, "records": records}
    for text in (train_tables.tables([content]), train_tables.summary([content])):
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        assert rows[0].endswith("estimate of it | ÷ Trainer |")
        ours, trainer, alone = rows[2:]
        assert ours.startswith("| SmolVLM-256M: ours 2 x 8 | 30.0 |")
        assert ours.endswith("| 98% | 2.5 |")
        assert trainer.endswith("| 98% | - |")
        assert alone.startswith("| Idefics3-8B: ours 2 x 4 | 4.0 |")


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
    size = train_arms.SIZES["tiny"]
    fixed = rows_of("d", processor, tmp_path)
    assert set(fixed.num_tokens) == {size.num_tokens}
    assert set(fixed.num_images) == {1}
    mixed = rows_of("d-mixed", processor, tmp_path, number=16)
    assert len(set(mixed.num_tokens)) > 4
    assert sum(mixed.num_images) == 16 + 4
    assert min(mixed.num_tokens) >= size.mixed_tokens[0]
    assert max(mixed.num_tokens) < size.mixed_tokens[1]


def test_trainers_batches_can_be_made_in_any_process(processor, tmp_path):
    """Where loader processes are not forked, what makes the batches is pickled."""
    rows = rows_of("a-mixed", processor, tmp_path)
    collate = train_arms.Collate(rows.collator)
    here, there = (f(rows.in_order[:2]) for f in (collate, pickle.loads(pickle.dumps(collate))))
    assert here.keys() == there.keys() >= {"labels"}
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_no_arm_begins_that_would_not_end_in_time(tmp_path, capsys):
    """What is left out has no record, so that a later call can measure it."""
    file = tmp_path / "results.json"
    train.main(["--json", str(file), "--arms", "a", "d", "--minutes", "1", "--share"])
    assert not file.exists()


def test_only_arms_with_the_same_base_share_a_process():
    """And only those that follow each other: the order is the caller's."""
    jobs = [(0, key) for key in ("a-recipe", "a", "d", "f", "h", "b-bf16", "c")]
    shared = [[key for _, key in group] for group in train.groups(jobs, share=True)]
    assert shared == [["a-recipe", "a"], ["d", "f"], ["h"], ["b-bf16"], ["c"]]
    assert train.groups(jobs, share=False) == [[job] for job in jobs]


def test_both_sides_see_the_same_rows_in_the_same_order(processor, tmp_path):
    """Trainer's list is what our windows draw, one after the other."""
    rows = rows_of("d-mixed", processor, tmp_path)
    windows = Windows(
        RowReader(rows.drawn, "rows", None, Collator(processor)),
        seed=train_arms.SEED,
        global_batch_size=4,
        augment=False,
    )
    drawn = [rows.drawn[row] for w in range(2) for _, row in windows.positions(w)]
    assert [id(example) for example in drawn] == [id(example) for example in rows.in_order]


@pytest.mark.parametrize("name", train_arms.SUCCESSORS)
def test_successors_at_full_size_have_the_benchmarks_tiles(name, bases, tmp_path):
    """Their processors cut its pictures as the published ones do."""
    config, arm = train_arms.SUCCESSORS[name].configuration(), train_arms.ARMS[name.lower()]
    processor = copy.deepcopy(bases(config.model_type)[1])
    train_arms.at_full_size(name, config, processor)
    bench = train_arms.Bench("9b", torch.device("cpu"), num_workers=0)
    assert family_of_config(config).why_not(config, processor) == ""
    rows = train_arms.Rows(arm, bench.size_of(arm), 16, processor, tmp_path)
    tokens_of_a_tile = {"SmolVLM2-2.2B": 81, "Idefics3-8B": 169}.get(name, 64)
    tiles = 1 if name == "Idefics2-8B" else 13
    assert set(rows.num_images) == {tiles}
    assert 95 < min(rows.num_tokens) - tiles * tokens_of_a_tile < 400


def test_operations_are_counted_by_the_formula():
    """3.88 TFLOP for one example of idefics-9b with one picture and 97 text tokens, and about what
    the library counts, which leaves out attention's scores and the adapters."""
    config = configuration("9b")
    assert train_arms.operations("9b", config, 97, 1) == pytest.approx(3.88e12, rel=1e-3)
    for num_tokens, num_images in ((40, 1), (97, 1), (160, 2)):
        counted = train_arms.operations("9b", config, num_tokens, num_images)
        assert counted == pytest.approx(
            FAMILIES["idefics"].training_flops(config, num_tokens, num_images), rel=0.03
        )


def test_a_trace_becomes_busy_time_kinds_and_syncs():
    """Overlapping kernels are busy time once; names tell what a kernel does; the profiler's own
    waits are not counted."""

    def event(category, name, start, duration):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    trace = [
        {"ph": "M", "name": "process_name"},
        event("kernel", "nvjet_hsh_128x256_64", 100, 50),
        event("kernel", "void kDequantizeBlockwise<__half>", 120, 60),
        event("kernel", "pytorch_flash::flash_fwd_kernel", 300, 10),
        event("kernel", "vectorized_elementwise_kernel", 305, 15),
        event("gpu_memcpy", "Memcpy HtoD", 400, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 0, 3),
        event("cuda_runtime", "cudaEventSynchronize", 500, 3),
        event("cuda_runtime", "cudaDeviceSynchronize", 510, 3),
        event("cuda_runtime", "cudaLaunchKernel", 0, 3),
    ]
    profiled = train_meter.from_trace(trace, steps=1)
    assert profiled["busy_ms"] == pytest.approx((80 + 20 + 5) / 1e3)
    assert profiled["kernels_per_step"] == 4
    assert profiled["syncs_per_step"] == 1
    assert profiled["gpu_ms"] == pytest.approx(
        {
            "matrix products": 0.05,
            "dequantisation": 0.03,
            "attention": 0.01,
            "elementwise": 0.01,
            "copies": 0.005,
        }
    )
    assert train_meter.from_trace([], steps=1)["busy_ms"] is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_dequantize", "dequantisation"),
        ("kOptimizerStatic8bit1StateBlockwise<float>", "optimizer"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", "attention"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n", "matrix products"),
        ("unrolled_elementwise_kernel<direct_copy_kernel_cuda, LoadWithCast<1>>", "elementwise"),
        ("elementwise_kernel<128, 4, gpu_kernel_impl<direct_copy_kernel_cuda>>", "copies"),
        ("_norm_backward", "elementwise"),
    ],
)
def test_names_tell_what_a_kernel_does(name, kind):
    """As far as the stacked bars need it; a copy that changes the type is arithmetic."""
    assert train_meter.kind_of(name, "kernel") == kind


def test_a_pause_is_no_part_of_a_step():
    """An evaluation between two steps is left out of both."""
    meter = train_meter.Meter(torch.device("cpu"), 1, 2)
    meter._begins, meter._ends, meter._warm_s = [0.0, 9.0, 11.0], [0.0, 1.0, 11.0], 3.0
    figures = meter.figures([5, 10, 20])
    assert figures["step_ms"]["median"] == pytest.approx(1500)  # of 1 s and 2 s
    assert figures["warm_tokens_per_second"] == pytest.approx(30 / 3)
    meter.begin()
    meter.step_ends()
    meter.pause_ends()
    assert meter._begins[-1] > meter._ends[-1]


def test_losses_that_differ_are_told():
    """An arm that trains on something else does not pass for a fast one."""
    records = [{"arm": "a", "losses": [2.0, 1.0]}, {"arm": "d-recipe", "losses": [2.05, 1.0]}]
    assert train.disagreements(records) == []
    records.append({"arm": "f", "losses": [2.0, 1.1]})
    assert len(train.disagreements(records)) == 1
    assert train.disagreements([*records[:2], {"arm": "d-mixed", "losses": [3.0]}]) == []
