"""What a run runs on: versions, processor, GPU, and the settings that change arithmetic."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

COMPUTING = (
    *("idefics_qlora", "torch", "transformers", "peft", "bitsandbytes"),
    *("torchvision", "pillow"),  # the pictures' pixels
)
"""Packages whose versions decide the bits of a result."""
OTHERS = ("accelerate", "datasets", "safetensors", "tokenizers", "numpy")
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS", "BNB_CUDA_VERSION"),
)
"""Environment variables that change how, or how fast, things are computed."""


def library_versions() -> dict[str, str | None]:
    """Versions of this library and of those it computes with; ``None``: not known by that name."""
    return {name: _version(name) for name in COMPUTING}


def environment() -> dict[str, Any]:
    """A report of the machine and the software, as JSON values, for bug reports and checkpoints.

    It has no names of users, hosts or folders. Print it with ``python -m
    idefics_qlora.environment``.

    Returns:
        ``versions`` (of packages, ``None`` where one is not installed, of Python, CUDA and cuDNN),
        ``platform``, ``cpu`` (cores, threads in use, vector instructions), ``gpus`` (name, memory
        in bytes, compute capability), ``precision`` (whether TF32 and bf16 are in use or possible)
        and the ``variables`` that are set.
    """
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            **{name: _version(name) for name in (*COMPUTING, *OTHERS)},
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
        },
        "platform": platform.platform(terse=True),
        "cpu": {
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "precision": {
            "matmul": torch.get_float32_matmul_precision(),
            "bf16": torch.cuda.is_bf16_supported() if cuda else None,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: what its affinity and the quotas of its cgroups leave.

    Args:
        root: Where the files of the kernel are.
    """
    if hasattr(os, "sched_getaffinity"):  # on Linux
        cpus = float(len(os.sched_getaffinity(0)))
    else:
        cpus = float(os.cpu_count() or 1)
    mounted = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):  # no version 1, or no quota (-1)
        files = (mounted / f"cpu/cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota, period = (int(file.read_text()) for file in files)
        cpus = min(cpus, quota / period) if quota > 0 and period > 0 else cpus
    for group in _groups(root):
        with suppress(OSError, ValueError):  # "max 100000", or no version 2
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cpus = min(cpus, quota / period)
    return max(1, int(cpus))


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: what is available and its cgroups allow.

    Args:
        root: Where the files of the kernel are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # another system
        available = psutil.virtual_memory().available
    for group in _groups(root):
        with suppress(OSError, ValueError):  # "max", or no version 2
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used -= int(stat.get("inactive_file", 0))  # files' pages, which give way
            available = min(available, max(0, limit - used))
    return available


def peak_resident_bytes() -> int:
    """Most main memory that this process has held at once."""
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def _groups(root: Path) -> list[Path]:
    """Folders of this process's cgroup (version 2) and those above it, as far as they are seen."""
    mounted = root / "sys/fs/cgroup"
    own = "."
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next((line[4:] for line in lines if line.startswith("0::/")), ".")
    folder = Path(os.path.normpath(mounted / own))
    return [path for path in (folder, *folder.parents) if path.is_relative_to(mounted)] or [mounted]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }
