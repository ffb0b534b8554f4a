"""How many processes load windows, and what is told where they do not keep up."""

import copy
import logging
import os
import time

import pytest
import torch
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.data import pace
from idefics_qlora.data.pace import FEWEST, MOST, Reading, chosen_workers, what_helps
from idefics_qlora.machine import available_bytes, usable_cpus
from idefics_qlora.training import result

SLOW = Reading(seconds=0.02, pixel_bytes=150_000)


@pytest.mark.parametrize(
    ("reading", "options", "number", "why"),
    [
        (SLOW, {}, 6, "a row takes 20.0 ms; these load 256 examples/s"),
        (SLOW, {"cpus": 4}, 3, "one of 4 CPUs is left"),
        (SLOW, {"cpus": 2}, FEWEST, "never fewer; one of 2 CPUs"),
        (SLOW, {"shared_bytes": 2**25}, 3, "/dev/shm has 32 MiB free"),
        (SLOW, {"on_gpu": False}, FEWEST, "training on a CPU"),
        (SLOW, {"is_stream": True}, 1, "one reader"),
        (Reading(0.25, 150_000), {}, MOST, "never more"),
        (Reading(0.001, 0), {}, FEWEST, "never fewer; these load"),
        (None, {}, FEWEST, "no row"),
    ],
)
def test_processes_follow_from_the_time_per_row(reading, options, number, why):
    """As many as a fast GPU needs, within what the machine has; the reason is the tightest."""
    options = {"on_gpu": True, "cpus": 64, "shared_bytes": 2**34, **options}
    assert chosen_workers(reading, 16, **options)[0] == number
    assert why in chosen_workers(reading, 16, **options)[1]


def test_cpus_are_those_that_the_process_may_use(tmp_path):
    """A container's quota counts, of whichever level of its group, and so does the affinity."""
    usable = len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path) == usable  # no such files
    group = tmp_path / "sys/fs/cgroup/jobs/one"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=x:/else\n0::/jobs/one\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(tmp_path) == usable
    (group.parent / "cpu.max").write_text("120000 100000\n")
    assert usable_cpus(tmp_path) == 1
    (tmp_path / "proc/self/cgroup").write_text("0::/../elsewhere\n")  # outside of what is seen
    assert usable_cpus(tmp_path) == usable
    old = tmp_path / "sys/fs/cgroup/cpu"
    old.mkdir()
    (old / "cpu.cfs_quota_us").write_text("-1")
    (old / "cpu.cfs_period_us").write_text("100000")
    assert usable_cpus(tmp_path) == usable
    (old / "cpu.cfs_quota_us").write_text("50000")
    assert usable_cpus(tmp_path) == 1


def test_memory_is_what_the_process_may_take(tmp_path):
    """A container's limit counts, less what is in use there and would not give way."""
    group = tmp_path / "sys/fs/cgroup/jobs"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 2**21
    (group / "memory.max").write_text("1000000\n")
    assert available_bytes(tmp_path) == 400_000
    (group / "memory.max").write_text("300000\n")
    assert available_bytes(tmp_path) == 0
    (tmp_path / "proc/meminfo").unlink()
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 2**21


def test_auto_is_told_once_and_trains_alike(base, processor, examples, tmp_path, caplog):
    """The number of processes is chosen by itself and changes speed only; the log says it."""
    losses = []
    for workers in ("auto", 0):
        config = config_of(tmp_path / str(workers), max_steps=2, num_workers=workers)
        torch.manual_seed(0)  # the adapter's first values
        model = iq.add_lora(copy.deepcopy(base))
        with caplog.at_level(logging.INFO, "idefics_qlora"):
            done = iq.train(model, processor, examples, config=config)
        losses.append(done.training_loss)
    told = [r.getMessage() for r in caplog.records if "num_workers='auto'" in r.getMessage()]
    assert told == ["num_workers='auto': 2 (training on a CPU needs no more)"]
    assert losses[0] == losses[1]


class Slow:
    """Rows that take a while when they are read again, as pictures of a slow disk do."""

    def __init__(self, rows, seconds):
        self.rows, self.seconds, self.read = rows, seconds, set()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        until = time.perf_counter() + self.seconds * (index in self.read)
        self.read.add(index)
        while time.perf_counter() < until:
            pass
        return self.rows[index]


def test_waiting_for_data_is_told_once(lora, processor, examples, tmp_path, caplog, monkeypatch):
    """A run whose device waits for data says how much, and what to do."""
    monkeypatch.setattr(result, "JUDGED_S", 0.05)
    config = config_of(tmp_path / "a", max_steps=4, global_batch_size=2)
    done = iq.train(lora, processor, Slow(examples[:12], 0.3), config=config)
    assert done.global_step == 4
    told = [r.getMessage() for r in caplog.records if "waited for data" in r.getMessage()]
    assert len(told) == 1
    assert "% of the time before step" in told[0]
    assert told[0].endswith(what_helps(0))
    assert "training waits for data" in caplog.records[-1].getMessage()


def test_what_helps_is_what_can_be_done():
    """More processes only where there are CPUs for them, and none for a stream."""
    assert what_helps(2, cpus=8).startswith("raise num_workers (now 2; 8 CPUs may be used); or")
    assert what_helps(7, cpus=8).startswith("set cache_images='disk'")
    told = what_helps(7, is_cached=True, is_draft=True, cpus=8)
    assert told == "make the picture files smaller"
    assert what_helps(1, is_stream=True, cpus=8).startswith("pass rows with numbers")
    assert pace.WAITING_SHARE == 0.1
