"""Loader workers that cannot hand over what they have read, or die: found at once, with the cause.

The limits and the full shared memory are the kernel's own.
"""

import copy
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import config_of, same
from torch.utils.data import get_worker_info

import idefics_qlora as iq
from idefics_qlora.data.order import epoch_order
from idefics_qlora.data.workers import LoaderError
from idefics_qlora.model.adapters import adapter_tensors

LIMITED = {"max_steps": 6, "global_batch_size": 4, "save_steps": 6, "loader_timeout_s": 60.0}


class InWorker:
    """Rows of which one does something to the worker reading it; by default in the third window."""

    def __init__(self, rows, act, place=-1):
        self.rows, self.act = rows, act
        self.number = int(epoch_order(42, 0, len(rows))[place])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == self.number and get_worker_info() is not None:
            self.act()
        return self.rows[index]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (resource.RLIMIT_FSIZE, "cannot hand over .*File too large.*ulimit -f"),
        (resource.RLIMIT_NOFILE, "limit on open files.*ulimit -n"),
    ],
)
def test_a_window_that_cannot_be_handed_over(base, processor, examples, tmp_path, limit, message):
    """The limit is named within seconds, with the rows; what was learnt is saved, and a restart
    ends like an untouched run."""
    rows = InWorker(examples[:12], lambda: resource.setrlimit(limit, (3, 3)))
    started = time.monotonic()
    message = rf"{message}.* one of the rows \[.*{rows.number}"
    with pytest.raises(LoaderError, match=message):
        iq.train(
            iq.add_lora(copy.deepcopy(base)), processor, rows,
            config=config_of(tmp_path / "a", **LIMITED, num_workers=1),
        )  # fmt: skip
    assert time.monotonic() - started < LIMITED["loader_timeout_s"]
    assert iq.latest_checkpoint(tmp_path / "a") is not None
    ends = []
    for run in ("a", "b"):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / run, **LIMITED)
        iq.train(model, processor, examples[:12], config=config)
        ends.append(adapter_tensors(model))
    assert same(*ends)


FULL = """
import sys
import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example

model, processor = iq.tiny.load_model(device="cpu")
cards = iq.tiny.creature_cards(8, seed=0)
config = iq.TrainConfig(
    output_dir=sys.argv[1], max_steps=1, load_best_model_at_end=False, loader_timeout_s=60.0
)
iq.train(iq.add_lora(model), processor, cards, config=config, to_example=pokemon_card_example)
"""


def test_full_shared_memory_is_named(tmp_path):
    """In a small /dev/shm of its own, as in a container, the run says so and how much is free."""
    shell = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh"]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system of its own")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*private, sys.executable, "-c", FULL, str(tmp_path / "run")],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "of 0.1 MiB of shared memory (/dev/shm) are free" in last
    assert "--shm-size" in last


def test_a_bus_error_is_full_shared_memory(lora, processor, examples, tmp_path):
    """What the kernel does where it promised more shared memory than there is, in words."""
    rows = InWorker(examples[:12], lambda: os.kill(os.getpid(), signal.SIGBUS))
    message = r"exit code -7 \(SIGBUS, mostly no room in shared memory; .* MiB .* are free"
    with pytest.raises(LoaderError, match=message):
        iq.train(
            lora, processor, rows, config=config_of(tmp_path, **LIMITED, num_workers=1)
        )  # fmt: skip


def test_a_dead_worker_is_found_outside_the_main_thread(lora, processor, examples, tmp_path):
    """Where no signal tells of it, somebody looks."""
    rows = InWorker(examples[:12], lambda: os.kill(os.getpid(), signal.SIGKILL), place=0)
    config = config_of(tmp_path, **LIMITED, num_workers=1)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(iq.train, lora, processor, rows, config=config)
        with pytest.raises(LoaderError, match="ended with exit code -9"):
            job.result()
    assert time.monotonic() - started < LIMITED["loader_timeout_s"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "loader worker .* ended with exit code -9"),
        (lambda: threading.Event().wait(), "gave nothing for 1 s"),
    ],
    ids=["dies", "hangs"],
)
def test_a_lost_loader_worker_is_found(base, processor, examples, tmp_path, act, message):
    """The worker is named, what was learnt is saved, and a restart ends like an untouched run."""
    config = {**LIMITED, "loader_timeout_s": 1.0}
    model = iq.add_lora(copy.deepcopy(base))
    rows = InWorker(examples[:12], act)
    with pytest.raises(LoaderError, match=rf"{message}.* one of the rows \[.*\b{rows.number}\b"):
        iq.train(
            model, processor, rows,
            config=config_of(tmp_path / "a", **config, num_workers=1),
        )  # fmt: skip
    model = iq.add_lora(copy.deepcopy(base), seed=1)
    iq.train(model, processor, examples[:12], config=config_of(tmp_path / "a", **config))
    whole = iq.add_lora(copy.deepcopy(base))
    iq.train(whole, processor, examples[:12], config=config_of(tmp_path / "b", **config))
    assert same(adapter_tensors(model), adapter_tensors(whole))
