"""Whether loading keeps up with training: how many processes it takes, and what helps else."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from idefics_qlora.machine import usable_cpus

RATE = 256
"""Examples per second that shall be loaded for a GPU: twice what the fastest ones train, since
processes disturb each other, and windows differ."""

FEWEST, MOST = 2, 32
"""Processes: while one loads a window that takes long, another has the next; each needs memory."""

WAITING_SHARE = 0.1
"""Share of the time that training may wait for data before it is told."""


@dataclass(frozen=True)
class Reading:
    """What a row takes to be read, as the first rows of a run show."""

    seconds: float
    """Mean per row, in one process."""
    pixel_bytes: float
    """Mean of what a row's pixels take in a window."""


def chosen_workers(
    reading: Reading | None,
    window_rows: int,
    *,
    on_gpu: bool,
    is_stream: bool = False,
    cpus: int | None = None,
    shared_bytes: float | None = None,
) -> tuple[int, str]:
    """How many processes shall load windows, and why.

    Args:
        reading: What a row takes; ``None`` where no row could be read.
        window_rows: Rows of a window.
        on_gpu: Whether a GPU trains; on a CPU, training is slow and needs the cores itself.
        is_stream: Whether the rows are a stream.
        cpus: CPUs there are; by default those that this process may use.
        shared_bytes: Free shared memory; by default that of /dev/shm.
    """
    if is_stream:
        return 1, "a stream has one reader"
    if not on_gpu or reading is None:
        return FEWEST, "training on a CPU needs no more" if not on_gpu else "no row could be read"
    cpus = usable_cpus() if cpus is None else cpus
    shared_bytes = _free_shared_bytes() if shared_bytes is None else shared_bytes
    # Each process has up to two windows in shared memory; half of what is free may be taken.
    two_windows = 2 * window_rows * max(1.0, reading.pixel_bytes)
    fitting = MOST if math.isinf(shared_bytes) else int(shared_bytes / 2 / two_windows)
    number, why = min(
        (math.ceil(RATE * reading.seconds), f"these load {RATE} examples/s"),
        (cpus - 1, f"one of {cpus} CPUs is left to the training"),
        (fitting, f"/dev/shm has {shared_bytes / 2**20:.0f} MiB free"),
        (MOST, "never more"),
    )
    why = why if number >= FEWEST else f"never fewer; {why}"
    return max(number, FEWEST), f"a row takes {1e3 * reading.seconds:.1f} ms; {why}"


def _free_shared_bytes() -> float:
    try:
        return float(shutil.disk_usage("/dev/shm").free)
    except OSError:  # another system, with other limits
        return math.inf


def what_helps(
    num_workers: int,
    *,
    is_stream: bool = False,
    is_cached: bool = False,
    is_draft: bool = False,
    cpus: int | None = None,
) -> str:
    """What to set where training waits for data, what helps most first.

    Args:
        num_workers: Processes that load now.
        is_stream: Whether the rows are a stream, which one process reads.
        is_cached: Whether decoded pictures are kept already.
        is_draft: Whether large JPEGs are decoded at reduced size already.
        cpus: CPUs there are; by default those that this process may use.
    """
    cpus = usable_cpus() if cpus is None else cpus
    ways = []
    if is_stream:
        ways.append("pass rows with numbers instead of a stream, which one process reads")
    elif num_workers < cpus - 1:
        ways.append(f"raise num_workers (now {num_workers}; {cpus} CPUs may be used)")
    if not is_cached:
        ways.append("set cache_images='disk', if rows are used more than once")
    if not is_draft:
        ways.append("pass access=ImageAccess(draft=True), for large JPEGs")
    ways.append("make the picture files smaller")
    return "; or ".join(ways)
