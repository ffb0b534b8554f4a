"""What only POSIX has is not needed: imports, a run, and figures of memory on other systems.

The systems are imitated on the one that the tests run on; nothing of ours is.
"""

import resource
import subprocess
import sys

import pytest

from idefics_qlora.machine import available_bytes, peak_resident_bytes

WITHOUT_POSIX = """
import multiprocessing, os, pkgutil, signal, sys
from importlib import import_module
import bitsandbytes, datasets, filelock, peft, psutil, torch, torchvision, transformers

hidden = ["fcntl", "resource", "termios", "pwd", "grp", "triton"]
sys.modules.update(dict.fromkeys(hidden))  # their import fails
for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGBUS", "SIGPIPE", "SIGHUP"):
    delattr(signal, name)
nonblock = os.O_NONBLOCK
for name in ("register_at_fork", "statvfs", "sysconf", "sched_getaffinity", "O_NONBLOCK", "pwrite"):
    delattr(os, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]

import idefics_qlora as iq

for module in pkgutil.walk_packages(iq.__path__, "idefics_qlora."):
    if module.name.rpartition(".")[2] not in ("__main__", "environment"):
        import_module(module.name)
"""

A_RUN = """
os.O_NONBLOCK = nonblock  # filelock, for which this is still Linux, opens its file with it
folder = sys.argv[1]
model, processor = iq.tiny.load_model()
rows = iq.tiny.creature_cards(4, seed=0)
config = iq.TrainConfig(
    output_dir=folder, max_steps=2, global_batch_size=2, cache_images="memory", num_workers=2,
    progress="none",
)
result = iq.train(
    iq.add_lora(model), processor, rows, rows[:2], config=config,
    to_example=iq.pokemon_card_example,
)
assert result.global_step == 2
assert result.metrics["peak_memory_bytes"] > 2**27
assert iq.latest_checkpoint(folder).name == "checkpoint-2"
from idefics_qlora.process import RunLock
from pathlib import Path
with RunLock(Path(folder)):
    try:
        RunLock(Path(folder)).__enter__()
    except RuntimeError as error:
        assert "in use by another run" in str(error)
    else:
        raise AssertionError("two runs in one folder")
"""


@pytest.mark.slow
def test_nothing_of_posix_is_needed(tmp_path):
    """Every module can be imported, and a run trains, saves and keeps its folder, as on Windows."""
    command = [sys.executable, "-c", WITHOUT_POSIX + A_RUN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_peak_of_memory_is_in_bytes(monkeypatch):
    """Linux counts KiB, macOS bytes: what the kernel says is read as each of them means it."""
    said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 1024 * said <= peak_resident_bytes() <= 1024 * said + 2**24
    monkeypatch.setattr(sys, "platform", "darwin")
    assert said <= peak_resident_bytes() <= said + 2**14


def test_what_is_available_where_the_kernel_has_no_files(tmp_path):
    """Without /proc (macOS, Windows) it is about what /proc says here."""
    assert 0.5 < available_bytes(tmp_path) / available_bytes() < 2
