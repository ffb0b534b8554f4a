"""Signals, the lock of a run's folder, and what loader workers get of both."""

import copy
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import finetune_pokemon_cards
import helpers
import pytest
from helpers import same
from torch.utils.data import Dataset, get_worker_info

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.workers import Loading
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.process import RunLock, StopSignals

config_of = partial(
    helpers.config_of,
    max_steps=6,
    global_batch_size=4,
    precision="fp16",
    eval_steps=1,
    save_steps=1,
    save_total_limit=2,
    load_best_model_at_end=True,
)


def stopping(number):
    """An on_log that sends this process a signal after its second step."""

    def at_step_2(record):
        if record["step"] == 2 and "loss" in record:
            signal.raise_signal(number)

    return at_step_2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_returns(lora, processor, examples, tmp_path, name):
    """The step is finished and saved, though no save is due, and the handlers are as before."""
    number = signal.Signals[name]
    before = signal.getsignal(number)
    config = config_of(tmp_path, save_steps=4, load_best_model_at_end=False)
    result = iq.train(lora, processor, examples, config=config, on_log=stopping(number))
    assert (result.stopped_by, result.global_step) == (name, 2)
    assert signal.getsignal(number) is before
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-2"


def test_what_a_signal_stopped_goes_on(base, processor, examples, tmp_path):
    """A restart after a signal ends as if nothing had happened."""
    ends = []
    for name, on_log in (("whole", None), ("stopped", stopping(signal.SIGTERM))):
        config = config_of(tmp_path / name, save_steps=4, eval_steps=4)
        model = iq.add_lora(copy.deepcopy(base))
        result = iq.train(model, processor, examples, examples[:2], config=config, on_log=on_log)
        if on_log is not None:
            assert result.stopped_by == "SIGTERM"
            model = iq.add_lora(copy.deepcopy(base), seed=1)
            result = iq.train(model, processor, examples, examples[:2], config=config)
        assert (result.stopped_by, result.global_step) == (None, 6)
        ends.append(adapter_tensors(model))
    assert same(*ends)


def test_a_second_signal_stops_at_once(lora, processor, examples, tmp_path):
    """Ctrl-C twice is KeyboardInterrupt, and only whole checkpoints are there."""

    def twice(record):
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        iq.train(lora, processor, examples, examples[:2], config=config_of(tmp_path), on_log=twice)
    assert signal.getsignal(signal.SIGINT) is before
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-1"


def test_outside_the_main_thread_it_says_so(lora, processor, examples, tmp_path, caplog):
    """Signals cannot be handled there; training works all the same."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            iq.train, lora, processor, examples, examples[:2], config=config_of(tmp_path)
        )
        assert job.result().global_step == 6
    assert "runs outside the main thread, where signals cannot be handled" in caplog.text


def test_ignored_signals_stay_ignored():
    """A run under nohup is not stopped by what nohup shields it from."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_the_scripts_exit_with_128_plus_the_signal(tmp_path):
    """A scheduler sees why the tutorial's script ended, though the whole process group was told."""
    iq.tiny.creature_cards(12, seed=0, directory=tmp_path / "pictures")
    import datasets

    rows = iq.tiny.creature_cards(12, seed=0, directory=tmp_path / "pictures")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "dataset")
    process = subprocess.Popen(
        [
            *(sys.executable, finetune_pokemon_cards.__file__),
            *("--checkpoint", str(iq.tiny.BASE), "--dataset", str(tmp_path / "dataset")),
            *("--output-dir", str(tmp_path / "run"), "--test-size", "0.25"),
            *("--max-steps", "1000", "--global-batch-size", "2", "--logging-steps", "1"),
            *("--eval-steps", "500", "--save-steps", "500", "--max-new-tokens", "2"),
            *("--precision", "fp32", "--num-workers", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "'step': 3" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "".join(lines) + rest
    newest = iq.latest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert load_checkpoint(newest).state["global_step"] >= 3


def test_two_runs_in_one_folder(lora, processor, examples, tmp_path):
    """The second is refused for as long as the first one lives, even if it was killed."""
    config = config_of(tmp_path)
    with RunLock(tmp_path), pytest.raises(RuntimeError, match="in use by another run"):
        iq.train(lora, processor, examples, examples[:2], config=config)
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, os, sys\n"
            "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
            "fcntl.flock(file, fcntl.LOCK_EX)\n"
            "os.write(file, b'process 1 on moon')\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match=r"another run \(process 1 on moon\)"):
        iq.train(lora, processor, examples, examples[:2], config=config)
    holder.kill()
    holder.communicate()
    assert iq.train(lora, processor, examples, examples[:2], config=config).global_step == 6


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_a_folder_that_cannot_be_written(lora, processor, examples, tmp_path, place):
    """Found before training, not at the first save."""
    (tmp_path / "file").write_text("")
    folder = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "read-only": Path("/proc/self/run"),
    }[place]
    before = {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}
    with pytest.raises(OSError, match="output_dir=.*cannot be written to.*choose another folder"):
        iq.train(lora, processor, examples, examples[:2], config=config_of(folder))
    assert same(adapter_tensors(lora), before)


class Signalled:
    """Rows whose reading sends the loader worker what its whole process group would get."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if get_worker_info() is not None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return self.rows[index]


def test_loader_workers_ignore_stop_signals(lora, processor, examples, tmp_path):
    """The main process decides when its workers end."""
    config = config_of(tmp_path, num_workers=1, load_best_model_at_end=False, max_steps=2)
    assert iq.train(lora, processor, Signalled(examples), config=config).global_step == 2


class OpenFiles(Dataset):
    """Its one item: the files that the process which loads it has open."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        assert get_worker_info() is not None
        return [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]


def test_workers_that_outlive_a_run_do_not_lock_its_folder(tmp_path):
    """A run killed with -9 can be started again at once, though its workers still live."""
    with RunLock(tmp_path), Loading(OpenFiles(), num_workers=1) as loading:
        ours = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
        assert str(tmp_path / ".lock") in ours
        assert str(tmp_path / ".lock") not in next(loading)
