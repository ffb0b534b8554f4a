"""Checkpoints of idefics-9b's adapter and optimizer against torch.save of the same tensors.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --folder /mnt/disk     # on the disk that a run will use

Both sides write the same tensors and flush them to the disk (the file, and the folder that names
it); rounds alternate between them. Ours also verifies: it hashes what it writes, and hashes all of
it again to find the newest whole checkpoint and to load it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import idefics_qlora as iq
from idefics_qlora.checkpoint import (
    Snapshot,
    load_checkpoint,
    rotate,
    save_checkpoint,
)
from idefics_qlora.machine import library_versions
from idefics_qlora.training.parts import rng_tensors

RANK = 16
RUN = "benchmark"
BLOCK = 256
"""Elements that share one scale in the 8-bit optimizer's states."""


def projections(
    vision_layers: int, perceiver_layers: int, text_layers: int
) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of every layer of idefics-9b that gets an adapter."""
    for layer in range(vision_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"vision_model.encoder.layers.{layer}.self_attn.{name}", 1280, 1280
    for layer in range(perceiver_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"perceiver_resampler.blocks.{layer}.0.{name}", 1280, 1536
    for layer in range(text_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"layers.{layer}.self_attn.{name}", 4096, 4096
    for layer in range(text_layers // 4):
        yield f"gated_cross_attn_layers.{layer}.cross_attn.q_proj", 4096, 4096
        for name in ("k_proj", "v_proj"):
            yield f"gated_cross_attn_layers.{layer}.cross_attn.{name}", 1280, 4096


COUNTERS = (
    *("global_step", "total_steps", "window", "skipped_windows", "skips_in_a_row"),
    *("micro_batch_size", "num_examples", "num_images", "num_tokens", "num_bad_rows"),
    *("unlogged_steps", "seconds", "loss_sum", "unlogged_loss"),
)
"""Numbers of a run's state."""


def snapshot(full_size: bool, history: int = 100) -> Snapshot:
    """What a run of idefics-9b (or one of a few layers) saves, with random numbers in it."""
    generator = torch.Generator().manual_seed(0)
    quantile_map = torch.linspace(-1, 1, 256)
    adapter: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for layer, inputs, outputs in projections(*((32, 6, 32) if full_size else (1, 1, 4))):
        for matrix, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            name = f"base_model.model.model.{layer}.lora_{matrix}.weight"
            adapter[name] = torch.randn(shape, generator=generator)
            for state in ("1", "2"):
                levels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
                scales = torch.rand(-(-levels.numel() // BLOCK), generator=generator)
                optimizer[f"{name}::state{state}"] = levels
                # All parameters share one map of levels, as in bitsandbytes.
                optimizer[f"{name}::qmap{state}"] = quantile_map
                optimizer[f"{name}::absmax{state}"] = scales
    record = {"loss": 1.234567, "learning_rate": 2e-4, "grad_norm": 0.5, "epoch": 0.1, "step": 1}
    return Snapshot(
        adapter=adapter,
        adapter_config={"peft_type": "LORA", "r": RANK},
        optimizer=optimizer,
        rng=rng_tensors(torch.device("cpu")),
        state={
            **dict.fromkeys(COUNTERS, 1),
            **dict.fromkeys(("position", "eval_rows", "best_checkpoint", "best_metric"), None),
            "first_nonfinite_module": None,
            "growing": False,
            "run": RUN,
            "log_history": [record] * history,
            "scaler": {},
            "optimizer": {name: {"step": 1} for name in adapter},
            "config": iq.TrainConfig(output_dir="run").to_json(),
            "environment": iq.environment(),
            "base": {"architecture": "", "weights": "", "rounding": "none"},
            "train_rows": {"number": 1, "first": []},
        },
    )


def torch_save(path: Path, content: Snapshot) -> None:
    """The same content with torch.save, flushed to the disk."""
    with path.open("wb") as file:
        torch.save(vars(content), file)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def torch_load(path: Path) -> dict[str, Any]:
    """What :func:`torch_save` wrote."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def measure(content: Snapshot, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of every operation, round by round; and the checkpoint's bytes."""
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        work()
        times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)

    ours, theirs = folder / "ours", folder / "theirs"
    theirs.mkdir()
    with ThreadPoolExecutor(1) as background:
        for step in range(1, rounds + 2):
            checkpoint = ours / f"checkpoint-{step}"
            content.state["global_step"] = step
            file = theirs / f"{step}.pt"

            def save_ours(checkpoint: Path = checkpoint) -> None:
                save_checkpoint(checkpoint, content)

            def save_theirs(file: Path = file) -> None:
                torch_save(file, content)

            # Whoever comes first may leave the disk busy: they take turns.
            both = [("save", save_ours), ("torch.save", save_theirs)]
            for name, save in both if step % 2 else reversed(both):
                timed(name, save)
            timed("verify", lambda: iq.latest_checkpoint(ours))
            timed("load", lambda checkpoint=checkpoint: load_checkpoint(checkpoint))
            timed("torch.load", lambda file=file: torch_load(file))
            timed("rotate in the loop", lambda: rotate(ours, 1, set(), RUN, background))
            timed("rotate behind it", lambda: background.submit(int).result())
            for old in theirs.iterdir():
                if old != file:
                    old.unlink()
        num_bytes = size_of(checkpoint)
    return {name: values[1:] for name, values in times.items()}, num_bytes  # the first warms up


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a Markdown table and JSON, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder in it)")
    parser.add_argument("--small", action="store_true", help="a few layers instead of all")
    options = parser.parse_args(arguments)
    content = snapshot(full_size=not options.small)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        times, num_bytes = measure(content, Path(name), options.rounds)
        torch_save(Path(name) / "size.pt", content)
        torch_bytes = size_of(Path(name) / "size.pt")
    medians = {name: statistics.median(values) for name, values in times.items()}
    summary = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "parameters": sum(tensor.numel() for tensor in content.adapter.values()),
        "bytes": num_bytes,
        "torch_bytes": torch_bytes,
        "milliseconds": medians,
        "rounds": times,
        "ratio": medians["save"] / medians["torch.save"],
        "versions": library_versions(),
    }
    print("| operation | median ms | slowest ms |\n| --- | --- | --- |")
    for name, values in times.items():
        print(f"| {name} | {medians[name]:.1f} | {max(values):.1f} |")
    print(json.dumps(summary, indent=2))
    return summary


if __name__ == "__main__":
    main()
