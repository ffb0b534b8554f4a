"""What the checks that are always on cost, as a share of a run of 100 steps.

    python benchmarks/diagnostics.py

The embedded 4-bit model, so a step is as short as a step can be: for a larger model the share is
smaller. The checks are the labels of the first window, the gradient coverage of the first step, and
the marks by which adapters that never moved are found at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.families import family_of
from idefics_qlora.machine import library_versions
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.training.diagnostics import (
    check_labels,
    gradient_coverage,
    unmoved_modules,
    weight_marks,
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps to take the median step from")
    options = parser.parse_args(arguments)
    model, processor = iq.tiny.load_model()
    model = iq.add_lora(model)
    rows = iq.tiny.creature_cards(64, seed=0)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = iq.TrainConfig(
            output_dir=folder,
            max_steps=options.steps,
            micro_batch_size=16,
            logging_steps=1,
            save_steps=1000,
            load_best_model_at_end=False,
            num_workers=0,
        )
        iq.train(
            model,
            processor,
            rows,
            config=config,
            to_example=pokemon_card_example,
            on_log=lambda _: ends.append(time.perf_counter()),
        )
    step = statistics.median(b - a for a, b in itertools.pairwise(ends))

    collator = Collator(processor)
    reader = RowReader(rows, "rows", pokemon_card_example, collator)
    window = Windows(reader, seed=0, global_batch_size=16, augment=True)[0]
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    marks = weight_marks(parameters)

    def seconds(check: Callable[[], Any]) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            check()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    checks = {
        "labels": seconds(lambda: check_labels(window, collator)),
        "coverage": seconds(lambda: gradient_coverage(parameters, family_of(model))),
        "marks": seconds(lambda: weight_marks(parameters)),
        "unmoved": seconds(lambda: unmoved_modules(parameters, marks)),
    }
    device = next(iter(parameters.values())).device
    summary = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "step_s": step,
        "checks_s": checks,
        "share_of_100_steps": sum(checks.values()) / (100 * step),
        "versions": library_versions(),
    }
    print(json.dumps(summary, indent=2))
    return summary


if __name__ == "__main__":
    main()
