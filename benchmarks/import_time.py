"""How long ``import idefics_qlora`` takes, next to ``import torch``: a fresh process for each.

python benchmarks/import_time.py --runs 11
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "nothing": "pass",
    "import torch": "import torch",
    "import idefics_qlora": "import idefics_qlora",
    "iq.TrainConfig": "import idefics_qlora as iq; iq.TrainConfig",
    "iq.train": "import idefics_qlora as iq; iq.train",
}


def seconds(statement: str) -> float:
    """Wall-clock seconds of a new interpreter that executes the statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def measure(runs: int) -> dict[str, float]:
    """Median seconds of each statement, the statements taking turns."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for round_number in range(runs + 1):
        for name, statement in STATEMENTS.items():
            taken = seconds(statement)
            if round_number:  # the first round fills the page cache
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the table; returns the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each statement")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args(arguments)
    medians = measure(options.runs)
    if options.json:
        print(json.dumps(medians, indent=2))
        return medians
    for name, taken in medians.items():
        print(f"{name:22} {taken:6.2f} s   {taken / medians['import torch']:5.2f} x torch")
    return medians


if __name__ == "__main__":
    main()
