"""Training at full size, ours and Hugging Face's Trainer's, each arm in a process of its own.

    python benchmarks/train.py --json benchmarks/results/h200.json       # a CUDA GPU of 80 GB
    python benchmarks/train.py --json ... --arms a d --rounds 2          # goes on in the same file
    python benchmarks/train.py --json ... --share --minutes 9            # what fits into 9 minutes
    python benchmarks/train.py --size tiny --device cpu --json tiny.json # the same code in seconds
    python benchmarks/train.py --tables benchmarks/results/*.json        # into docs/

The architecture of idefics-9b with random weights in 4 bits and the recipe's LoRA
(``train_arms.py``). Arms take turns, so that a machine that slows down slows all of them. What an
arm needs and the machine lacks is reported as not available. Figures are of the counted steps
(``train_meter.py``); the profiler looks at a few steps of a second, short run.

With ``--share``, arms that follow each other and have the same base (weights, precision, loop)
share a process, and the loading of the base: each trains fresh adapters. What that disturbs is the
time to the first step, which finds kernels loaded; a record names the arms before it. The steps of
a whole recipe are then the arm's without it too (``a`` after ``a-recipe``): evaluations and
checkpoints between them are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from train_arms import ARMS, SIZES, WARM_AGAIN, Bench, missing
from train_meter import pairs_agree
from train_tables import write_tables

from idefics_qlora.machine import environment, library_versions

DOCS = Path(__file__).parent.parent / "docs"
LOADING_S, BESIDE_STEPS_S = 35, 20
"""What an arm of full size takes, beside its steps, on one H200: for ``--minutes``."""

Job = tuple[int, str]
"""Round and arm."""


# --- some arms, in one process -------------------------------------------------------------------


def run_jobs(jobs: list[Job], options: argparse.Namespace) -> None:
    """Measure arms that share a process, and write each record when it is there.

    After an arm that failed, the process ends: what it left behind would disturb the next.
    """
    if options.start_method is not None:  # Trainer's loader gets Linux's, as ours has it
        multiprocessing.set_start_method("fork", force=True)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda:0")
        torch.cuda.set_device(device)
    bench = Bench(options.size, device, options.workers)
    of_round = 0
    for round_, key in jobs:
        if round_ != of_round:  # a recipe's steps are those of its own round
            bench.done.clear()
            of_round = round_
        is_measured = f"{key}-recipe" in bench.done
        if too_late(key, options, is_loaded=bench.base is not None, is_measured=is_measured):
            print(f"{key}: left out, it does not fit into --minutes", flush=True)
            continue
        try:
            record = bench.measure(key)
        except Exception as error:
            traceback.print_exc()
            record = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        add_record(options, round_, key, record)
        if "error" in record:
            break


def too_late(
    key: str, options: argparse.Namespace, *, is_loaded: bool = False, is_measured: bool = False
) -> bool:
    """Whether an arm of full size would run beyond the time that there is."""
    if options.deadline is None:
        return False
    num_steps = WARM_AGAIN if is_measured else SIZES[options.size].steps
    takes = ARMS[key].step_s * num_steps + BESIDE_STEPS_S
    return time.time() + takes + (0 if is_loaded else LOADING_S) > options.deadline


def add_record(options: argparse.Namespace, round_: int, key: str, record: dict[str, Any]) -> None:
    """Put a record into the file, which is whole at any moment."""
    content = read(options)
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    at = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
    named = {"arm": key, "what": ARMS[key].what, "round": round_, "device": gpu, "at": at}
    content["records"].append({**named, **record})
    content["versions"], content["environment"] = library_versions(), environment()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    part = options.json.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, options.json)
    print(line_of(content["records"][-1]), flush=True)


def read(options: argparse.Namespace) -> dict[str, Any]:
    """What the file has; it may not be there yet.

    Raises:
        SystemExit: If it is of another size.
    """
    if not options.json.exists():
        return {"size": options.size, "records": []}
    content: dict[str, Any] = json.loads(options.json.read_text())
    if content["size"] != options.size:
        raise SystemExit(f"{options.json} has figures of size {content['size']}")
    return content


# --- all arms, in turn ---------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run the arms in turn; each record is in the file as soon as it is there."""
    device = torch.device(options.device)
    # Forking spares a CPU the imports; CUDA does not survive it.
    options.start_method = "spawn" if device.type == "cuda" else None
    processes = multiprocessing.get_context(options.start_method or "fork")
    num_before = len(read(options)["records"])
    jobs = [(round_, key) for round_ in range(options.rounds) for key in options.arms]
    for together in groups(jobs, share=options.share):
        why = missing(ARMS[together[0][1]], device)
        if why is not None:
            for job in together:
                add_record(options, *job, {"not_available": why})
            continue
        while any(not too_late(key, options) for _, key in together):
            num_records = len(read(options)["records"])
            process = processes.Process(target=run_jobs, args=(together, options))
            process.start()
            process.join()
            new = read(options)["records"][num_records:]
            done = [(record["round"], record["arm"]) for record in new]
            if process.exitcode != 0:
                job = next((job for job in together if job not in done), together[-1])
                add_record(options, *job, {"error": f"the process ended with {process.exitcode}"})
                done.append(job)
            elif not new or "error" not in new[-1]:
                break
            together = together[together.index(done[-1]) + 1 :]
    content = read(options)
    for problem in disagreements(content["records"][num_before:]):
        print(f"LOSSES DIFFER: {problem}")
    return content


def groups(jobs: Iterable[Job], *, share: bool) -> list[list[Job]]:
    """The jobs of each process: one, or consecutive ones with the same base."""
    if not share:
        return [[job] for job in jobs]
    return [list(same) for _, same in itertools.groupby(jobs, lambda job: ARMS[job[1]].base)]


def line_of(record: dict[str, Any]) -> str:
    """One record, for somebody who watches."""
    start = f"{record['arm']:9s} {record['what']:32s}"
    for name in ("not_available", "error"):
        if name in record:
            return f"{start} {name.replace('_', ' ')}: {record[name]}"
    if "seconds" in record:
        return f"{start} {record['seconds']:8.1f} s for {record['num_steps']} steps"
    return f"{start} {record['examples_per_second']:8.2f} examples/s, losses {record['losses']}"


def disagreements(records: Iterable[dict[str, Any]], tolerance: float = 0.03) -> list[str]:
    """Arms that saw the same rows, but whose mean losses over halves of the run differ."""
    work: dict[Any, dict[str, list[float]]] = {}
    for record in records:
        if record.get("losses"):
            arm = ARMS[record["arm"]]
            same = arm.model, arm.rows, arm.many, arm.loader
            work.setdefault(same, {})[record["arm"]] = record["losses"]
    return [f"{losses}" for losses in work.values() if not pairs_agree(losses.values(), tolerance)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the arms or write the tables; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="receives the records; what it has stays")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--share", action="store_true", help="processes, where arms can")
    parser.add_argument("--minutes", type=float, help="begin no arm that would take longer")
    parser.add_argument("--size", choices=SIZES, default="9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, help="loader processes; 6, or 0 on a CPU")
    parser.add_argument("--tables", type=Path, nargs="*", help="write these files' tables instead")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the pages")
    options = parser.parse_args(arguments)
    if options.tables is not None:
        write_tables(options.tables, options.docs)
        return {}
    if options.json is None:
        parser.error("--json FILE is needed")
    if options.workers is None:
        options.workers = 6 if options.device.startswith("cuda") else 0
    options.deadline = None if options.minutes is None else time.time() + 60 * options.minutes
    return run_all(options)


if __name__ == "__main__":
    main()
