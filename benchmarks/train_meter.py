"""What ``train.py`` measures of a training run: steps, the GPU's work in them, and memory."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

KINDS = {
    "dequantisation": r"[dD]equantize",
    "optimizer": r"kOptimizer|multi_tensor_apply|amp_update|FusedAdam",
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitK|gemv",
    "copies": r"direct_copy(?!.*WithCast)|CatArray",
}
"""What a kernel does, by its name; others are elementwise: norms, activations, dropout, casts."""
ELEMENTWISE = "elementwise"
SYNC = r"cuda(Stream|Device|Event)Synchronize"


def kind_of(name: str, category: str) -> str:
    """What a kernel of this name does."""
    if category != "kernel":
        return "copies"
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name)), ELEMENTWISE)


class Meter:
    """Marks the ends of steps and what is between them, without a wait that was not there.

    Args:
        device: Where the model is.
        warmup: Steps before the first that counts.
        counted: Steps that count.
        profiled: Steps after those, in which the profiler looks at the GPU.
    """

    def __init__(self, device: torch.device, warmup: int, counted: int, profiled: int = 0) -> None:
        self.device = device
        self.warmup, self.counted, self.profiled = warmup, counted, profiled
        self.num_slots = 0
        """Text positions that were computed in the counted steps, the padding included."""
        self.counts: Any = None
        """Of CUDA graphs, as the fast path counts."""
        self._step = 0
        self._begins: list[Any] = []
        self._ends: list[Any] = []
        self._cold: set[int] = set()
        self._optimizer: list[tuple[Any, Any]] = []
        self._optimizer_began: Any = None
        self._first_step_s = self._warm_s = float("nan")
        self._profile: Any = None
        self._trace: list[dict[str, Any]] = []

    def begin(self) -> None:
        """What came before is no part of the measurement."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Since the beginning, with all that the device has been given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self._began

    def optimizer_begins(self) -> None:
        """Gradients are complete; unscaling and clipping come next."""
        self._optimizer_began = self._mark()

    def step_ends(self) -> None:
        """The weights are updated and the gradients cleared."""
        mark = self._mark()
        self._ends.append(mark)
        self._begins.append(mark)
        if self._optimizer_began is not None:
            self._optimizer.append((self._optimizer_began, mark))
        self._optimizer_began = None
        self._step += 1
        if self._step == 1:
            self._first_step_s = self.seconds()
        if self._step == self.warmup:
            self._warm_s = self.seconds()
        if self._step == self.warmup + self.counted and self.profiled:
            self._begin_profile()
        if self._step == self.warmup + self.counted + self.profiled and self._profile is not None:
            self._end_profile()

    def pause_ends(self) -> None:
        """What went on since the last step's end (an evaluation, a checkpoint) is no part of one.

        The next step begins now.
        """
        if self._begins:
            self._begins[-1] = self._mark()

    def note_cold(self) -> None:
        """Something in this step was done for the first time, or launched by Python."""
        self._cold.add(self._step)

    def note_slots(self, number: int) -> None:
        """Text positions of a micro-batch."""
        if self.warmup <= self._step < self.warmup + self.counted:
            self.num_slots += number

    def figures(self, tokens: list[int]) -> dict[str, Any]:
        """Times of the counted steps.

        Args:
            tokens: Of each step's window.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        counted = range(self.warmup, self.warmup + self.counted)
        steps = {i: self._ms(self._begins[i - 1], self._ends[i]) for i in counted}
        optimizer = [self._ms(*pair) for pair in self._optimizer[counted.start : counted.stop]]
        median = statistics.median(steps.values())
        warm = [i for i in counted if i not in self._cold]
        return {
            "steps": len(steps),
            "step_ms": {
                "p10": float(np.quantile(list(steps.values()), 0.1)),
                "median": median,
                "p90": float(np.quantile(list(steps.values()), 0.9)),
            },
            "optimizer_ms": statistics.median(optimizer) if optimizer else None,
            "first_step_s": self._first_step_s,
            "warmup_s": max(0.0, self._warm_s - self.warmup * median / 1e3),
            "warm_steps": len(warm),
            "warm_tokens_per_second": (
                sum(tokens[i] for i in warm) / sum(steps[i] for i in warm) * 1e3 if warm else None
            ),
        }

    def memory(self) -> dict[str, float]:
        """The most that was in use: of the GPU, or of the process."""
        if self.device.type == "cuda":
            return {
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            }
        import resource

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_allocated_gib": resident / 2**30, "peak_reserved_gib": resident / 2**30}

    def profile(self) -> dict[str, Any]:
        """What the GPU did in the profiled steps, per step."""
        return from_trace(self._trace, self.profiled)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, a: Any, b: Any) -> float:
        return float((b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b))

    def _begin_profile(self) -> None:
        torch.cuda.synchronize()
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
        )
        self._profile.__enter__()

    def _end_profile(self) -> None:
        end = torch.cuda.Event()
        end.record()
        end.synchronize()  # seen in the trace: waits from here on are the profiler's
        self._profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            self._trace = json.loads(file.read_text())["traceEvents"]
        self._profile = None


def from_trace(trace: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Figures of a trace in Chrome's format, per step.

    Args:
        trace: Events, of which the last wait for a CUDA event ends the last step.
        steps: How many there were.

    Returns:
        ``busy_ms``: time with at least one kernel or copy on the GPU; ``gpu_ms``: the same split by
        kind (of two at the same time, to that which began first); ``kernels_per_step``;
        ``syncs_per_step``: times that the CPU waited for the GPU. ``None`` without a GPU.
    """
    events = sorted((e for e in trace if e.get("ph") == "X"), key=lambda e: float(e["ts"]))
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_gpu:
        return dict.fromkeys(("busy_ms", "kernels_per_step", "syncs_per_step", "gpu_ms"))
    by_kind: dict[str, float] = {}
    until = -1.0
    for event in on_gpu:
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        kind = kind_of(event["name"], event["cat"])
        by_kind[kind] = by_kind.get(kind, 0.0) + max(0.0, end - max(start, until)) / 1e3 / steps
        until = max(until, end)
    waits = [e for e in events if re.fullmatch(SYNC, str(e.get("name")))]
    marks = [n for n, event in enumerate(waits) if event["name"] == "cudaEventSynchronize"]
    return {
        "busy_ms": sum(by_kind.values()),
        "gpu_ms": dict(sorted(by_kind.items())),
        "kernels_per_step": sum(e["cat"] == "kernel" for e in on_gpu) / steps,
        "syncs_per_step": (marks[-1] if marks else len(waits)) / steps,
    }


def matmul_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large product, in the minute of the measurement."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    times = []
    for _ in range(5):
        a @ b
    for _ in range(3):  # the median of three, since others may use the machine
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(20):
                a @ b
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            for _ in range(20):
                a @ b
            times.append(time.perf_counter() - began)
    return 20 * 2 * side**3 / statistics.median(times)


def pairs_agree(losses: Iterable[list[float]], tolerance: float) -> bool:
    """Whether runs have, as far as all of them go, the same mean losses."""
    return all(
        max(same) - min(same) <= tolerance * min(same)
        for same in itertools.zip_longest(*losses)
        if None not in same
    )
