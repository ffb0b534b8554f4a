"""Runs that are killed, run out of disk or memory, get signals, or lose a loader worker.

``make test-faults`` kills fifty times; ``make test`` a few.
"""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import finetune_pokemon_cards
import pytest
import torch
from helpers import same
from torch.utils.data import Dataset, get_worker_info

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.order import epoch_order
from idefics_qlora.data.workers import LoaderError, Loading
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.process import RunLock, StopSignals

SETTINGS = {
    "max_steps": 6,
    "global_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 2,
    "num_workers": 0,
}


class Victim:
    """Orders for the process of victim.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("victim.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def train(self, run: str, **order) -> int:
        """Exit code of a child that trains; negative: the signal that killed it."""
        order = {
            "output_dir": str(self.folder / run),
            "log": str(self.folder / f"{run}.log"),
            "report": str(self.folder / f"{run}.json"),
            **order,
            "config": {**SETTINGS, **order.get("config", {})},
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["code"]

    def log(self, run: str) -> str:
        return (self.folder / f"{run}.log").read_text()

    def report(self, run: str) -> dict:
        return json.loads((self.folder / f"{run}.json").read_text())

    def end(self, run: str) -> dict:
        """The adapter, optimizer and random states of a run's last checkpoint."""
        snapshot = load_checkpoint(self.folder / run / f"checkpoint-{SETTINGS['max_steps']}")
        return {**snapshot.adapter, **snapshot.optimizer, **snapshot.rng}


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A victim with one untouched run, ``whole``, to compare with."""
    victim = Victim(tmp_path_factory.mktemp("victim"))
    assert victim.train("whole") == 0
    yield victim
    victim.process.stdin.close()
    victim.process.wait()
    victim.process.stdout.close()


@pytest.mark.slow
def test_killed_again_and_again(victim, pytestconfig):
    """kill -9 at random moments and at random file operations: each restart goes on, none finds a
    corrupt checkpoint, and the end is the untouched run's to the bit."""
    rng = random.Random(0)
    kills = runs = 0
    events = len(victim.report("whole")["operations"])
    while kills < pytestconfig.getoption("kills"):
        run, code = f"killed-{runs}", -signal.SIGKILL
        while code == -signal.SIGKILL and kills < pytestconfig.getoption("kills"):
            if rng.random() < 0.7:  # in a save or in the rotation after it
                order = {"kill_at_event": rng.randrange(1, events // 2)}
            else:
                order = {"kill_after_s": rng.uniform(0.2, 2.0)}
            code = victim.train(run, **order, config={"num_workers": int(rng.random() < 0.2)})
            kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), victim.log(run)
        assert victim.train(run) == 0, victim.log(run)
        assert same(victim.end(run), victim.end("whole"))
        assert "passed over" not in victim.log(run)
        assert "was altered" not in victim.log(run)
        left = sorted(path.name for path in (victim.folder / run).iterdir())
        assert left == sorted(path.name for path in (victim.folder / "whole").iterdir())
        runs += 1


@pytest.mark.slow
def test_each_file_operation_of_a_save(victim, pytestconfig):
    """Killed before every single file operation of a save and its rotation, one after the other."""
    operations = victim.report("whole")["operations"]
    first, after = (operations.index(f"os.mkdir .checkpoint-{n}.incomplete") for n in (3, 4))
    every = range(first + 1, after + 2)  # counted from 1; the next save's first one as well
    sample = every if pytestconfig.getoption("kills") >= 50 else every[:: len(every) // 3]
    for event in sample:
        run = f"operation-{event}"
        assert victim.train(run, kill_at_event=event) == -signal.SIGKILL
        newest = iq.latest_checkpoint(victim.folder / run)
        assert newest is not None
        assert load_checkpoint(newest).state["global_step"] in (2, 3)
        assert victim.train(run) == 0, victim.log(run)
        assert same(victim.end(run), victim.end("whole"))


@pytest.mark.slow
def test_a_full_disk_loses_nothing(victim, pytestconfig):
    """ENOSPC at each operation that writes a checkpoint: the run stops and says so, what was saved
    before is whole, and with room again it ends like the untouched run."""
    operations = victim.report("whole")["operations"]
    writes = [operation for operation in operations if ".checkpoint-3.incomplete" in operation]
    assert (writes[0][:8], writes[-1][:9]) == ("os.mkdir", "os.rename")
    for operation in writes if pytestconfig.getoption("kills") >= 50 else writes[::4]:
        run = f"full-{writes.index(operation)}"
        assert victim.train(run, disk_full=[operation]) == 1
        assert "No space left on device" in victim.log(run)
        assert "make room" in victim.log(run)
        assert iq.latest_checkpoint(victim.folder / run).name == "checkpoint-2"
        assert "passed over" not in victim.log(run)
        assert victim.train(run) == 0, victim.log(run)
        assert same(victim.end(run), victim.end("whole"))


@pytest.mark.slow
def test_a_deletion_that_fails_does_not_stop_the_run(victim):
    """An old checkpoint that cannot be deleted stays, is named, and the end is the same."""
    operations = victim.report("whole")["operations"]
    deletion = next(o for o in operations if o.startswith("os.rename checkpoint-"))
    assert victim.train("kept", disk_full=[deletion]) == 0, victim.log("kept")
    old = victim.folder / "kept" / deletion.removeprefix("os.rename ")
    assert f"the old checkpoint {old} cannot be deleted" in victim.log("kept")
    assert old.is_dir()
    assert same(victim.end("kept"), victim.end("whole"))


@pytest.mark.slow
def test_a_full_disk_need_not_stop_the_run(victim):
    """With on_save_error="continue" training goes on, and the next save that works is whole."""
    full = [f"os.mkdir .checkpoint-{step}.incomplete" for step in (3, 4)]
    config = {"on_save_error": "continue", "save_total_limit": None}
    code = victim.train("continue", disk_full=full, config=config)
    assert code == 0, victim.log("continue")
    assert victim.log("continue").count("training goes on and tries again later") == 2
    saved = sorted(path.name for path in (victim.folder / "continue").iterdir())
    assert saved == [f"checkpoint-{step}" for step in (1, 2, 5, 6)]
    assert same(victim.end("continue"), victim.end("whole"))


@pytest.mark.slow
def test_a_write_that_breaks_off(victim):
    """The kernel ends a write in the middle of a file: an error, and no torn checkpoint."""
    assert victim.train("short", file_size_limit=20_000) == 1
    assert "cannot be written" in victim.log("short")
    assert "allow larger files" in victim.log("short")
    assert "make room" not in victim.log("short")
    assert [path.name for path in (victim.folder / "short").iterdir()] == []
    assert victim.train("short") == 0
    assert same(victim.end("short"), victim.end("whole"))


def config_of(folder, **changes):
    return iq.TrainConfig(output_dir=folder, **{**SETTINGS, **changes})


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


def test_out_of_memory_halves_the_micro_batch(base, processor, examples, tmp_path, caplog):
    """The window is done again in smaller parts, what the failed try had added is discarded, and
    the end is that of a run which had the smaller size from the start."""
    pairs = []

    def second_pair(module, _, inputs):
        if len(inputs["input_ids"]) == 2 and module.training:
            pairs.append(inputs)
            if len(pairs) % 2 == 0:  # after a backward pass of the same window
                raise torch.OutOfMemoryError("injected")

    results = []
    for size in (2, 1):
        model = iq.add_lora(copy.deepcopy(base))
        model.get_base_model().register_forward_pre_hook(second_pair, with_kwargs=True)
        config = config_of(tmp_path / str(size), micro_batch_size=size)
        result = iq.train(model, processor, examples, examples[:2], config=config)
        assert result.metrics["micro_batch_size"] == 1
        results.append(adapter_tensors(model))
    assert len(pairs) == 2
    assert "out of memory with 2 examples per micro-batch in window 0" in caplog.text
    assert same(*results)


def test_out_of_memory_with_one_example_is_an_error(lora, processor, examples, tmp_path):
    """There is nothing left to halve: the error says what is needed and what can be done."""

    def too_large(*_):
        raise torch.OutOfMemoryError("injected")

    config = config_of(tmp_path, load_best_model_at_end=False)
    hook = lora.get_base_model().register_forward_pre_hook(too_large)
    expected = r"single example.*GiB.*gradient_checkpointing=True"
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        iq.train(lora, processor, examples, config=config)
    hook.remove()


def test_the_search_for_an_overflow_changes_nothing(lora, processor, examples, tmp_path):
    """It sees the dropout masks of the window that overflowed, and the next window's are those it
    would have had without."""
    passes = []

    def before(module, _):
        passes.append([module.training and torch.is_grad_enabled(), torch.get_rng_state()])

    def after(_, __, output):
        passes[-1].append(torch.get_rng_state())

    def overflow(_, __, output):
        return output * torch.inf if len(passes) in (1, 3) else output  # and when searched for

    lora.get_base_model().register_forward_pre_hook(before)
    lora.get_base_model().register_forward_hook(after)
    lora.get_submodule(
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default"
    ).register_forward_hook(overflow)
    config = config_of(tmp_path, max_steps=1, load_best_model_at_end=False)
    result = iq.train(lora, processor, examples, config=config)
    assert result.metrics["skipped_windows"] == 1
    assert [is_training for is_training, *_ in passes] == [True, True, False, True, True]
    first, second, searched, third, _ = passes
    assert torch.equal(searched[1], first[1])
    assert torch.equal(third[1], second[2])


def test_auto_grows_until_memory_ends(lora, processor, examples, tmp_path):
    """Doubled from window to window; after the first failure the last size that worked is kept."""
    sizes = []

    def limited(module, _, inputs):
        size = len(inputs["input_ids"])
        if module.training:
            sizes.append(size)
            if size > 4:
                raise torch.OutOfMemoryError("injected")

    lora.get_base_model().register_forward_pre_hook(limited, with_kwargs=True)
    config = config_of(
        tmp_path, global_batch_size=16, micro_batch_size="auto", load_best_model_at_end=False
    )
    result = iq.train(lora, processor, examples, config=config)
    assert sizes[:16] == [1] * 16
    assert sizes[16:24] == [2] * 8
    assert sizes[24:28] == [4] * 4
    assert sizes[28:33] == [8, 4, 4, 4, 4]
    assert set(sizes[33:]) == {4}
    assert result.metrics["micro_batch_size"] == 4


def test_the_first_bad_module_is_named(lora, processor, examples, tmp_path, caplog):
    """Among all modules the one that overflows first is found, once."""
    victim_name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default"
    module = lora.get_submodule(victim_name)
    module.register_forward_hook(lambda _, __, output: output * torch.inf)
    config = config_of(tmp_path, load_best_model_at_end=False)
    with pytest.raises(FloatingPointError, match=r"25 windows in a row.*precision='bf16'"):
        iq.train(lora, processor, examples, config=config)
    assert caplog.text.count("the first module with an output that is not finite is") == 1
    assert victim_name in caplog.text


def test_what_is_not_finite_can_be_replayed(base, processor, examples, tmp_path):
    """In fp32 the run stops before the update, and its dump leads to the same window again."""
    config = config_of(tmp_path, precision="fp32", load_best_model_at_end=False)

    def broken_at(window):
        model = iq.add_lora(copy.deepcopy(base))
        calls = [0]

        def hook(_, __, output):
            calls[0] += 1
            if calls[0] > 2 * window:  # two micro-batches a window
                output.logits = output.logits * torch.nan

        model.get_base_model().register_forward_hook(hook)
        return model

    with pytest.raises(FloatingPointError, match="(?s)window 2 .rows.*failed-window-2") as caught:
        iq.train(broken_at(2), processor, examples, config=config)
    dump = tmp_path / "failed-window-2"
    assert load_checkpoint(dump).state["global_step"] == 2
    assert str(dump) in str(caught.value)
    again = config_of(tmp_path, precision="fp32", load_best_model_at_end=False, resume=dump)
    rows = str(caught.value).split("(rows ")[1].split(")")[0]
    with pytest.raises(FloatingPointError) as replayed:
        iq.train(broken_at(0), processor, examples, config=again)
    assert f"window 2 (rows {rows})" in str(replayed.value)
    model = iq.add_lora(copy.deepcopy(base))
    assert iq.train(model, processor, examples, config=again).global_step == 6
    # With the same dropout: it ends like a run in which nothing was wrong.
    whole = iq.add_lora(copy.deepcopy(base))
    config = config_of(tmp_path / "whole", precision="fp32", load_best_model_at_end=False)
    iq.train(whole, processor, examples, config=config)
    assert same(adapter_tensors(model), adapter_tensors(whole))


class Deadly:
    """Rows of which one ends the loader worker that reads it, or keeps it for ever."""

    def __init__(self, rows, how):
        self.rows, self.how = rows, how
        self.deadly = int(epoch_order(42, 0, len(rows))[-1])  # in the third window

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == self.deadly and get_worker_info() is not None:
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()
        return self.rows[index]


@pytest.mark.parametrize(
    ("how", "message"),
    [("die", "loader worker .* ended with exit code -9"), ("hang", "gave nothing for 1 s")],
)
def test_a_lost_loader_worker_is_found(base, processor, examples, tmp_path, how, message):
    """The worker is named, what was learnt is saved, and a restart ends like an untouched run."""
    config = {"loader_timeout_s": 1.0, "load_best_model_at_end": False, "save_steps": 6}
    model = iq.add_lora(copy.deepcopy(base))
    dead = Deadly(examples[:12], how).deadly
    with pytest.raises(LoaderError, match=rf"{message}.* one of the rows \[.*\b{dead}\b"):
        iq.train(
            model, processor, Deadly(examples[:12], how),
            config=config_of(tmp_path / "a", **config, num_workers=1),
        )  # fmt: skip
    model = iq.add_lora(copy.deepcopy(base), seed=1)
    iq.train(model, processor, examples[:12], config=config_of(tmp_path / "a", **config))
    whole = iq.add_lora(copy.deepcopy(base))
    iq.train(whole, processor, examples[:12], config=config_of(tmp_path / "b", **config))
    assert same(adapter_tensors(model), adapter_tensors(whole))


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


def test_clocks_may_jump(base, processor, examples, tmp_path, monkeypatch):
    """Neither the wall clock nor files' times decide which checkpoint is new, kept or best."""
    config = config_of(tmp_path)

    def turn_back(*_):
        """Each checkpoint looks older than those before it."""
        for path in tmp_path.glob("checkpoint-*"):
            step = int(path.name.split("-")[1])
            for file in (path, *path.iterdir()):
                os.utime(file, (10**9 - 1000 * step,) * 2)

    monkeypatch.setattr("time.time", iter(range(10**9, 0, -1000)).__next__)
    model = iq.add_lora(base)
    result = iq.train(model, processor, examples, examples[:2], config=config, on_log=turn_back)
    monkeypatch.undo()
    turn_back()
    losses = {r["step"]: r["eval_loss"] for r in result.log_history if "eval_loss" in r}
    best = min(losses, key=losses.get)
    assert best > 1  # by its time, checkpoint-1 would be the newest
    assert result.best_checkpoint.name == f"checkpoint-{best}"
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best if best < 6 else 5}", "checkpoint-6"}
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-6"
    assert result.metrics["train_runtime"] > 0


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


def test_an_endless_overflow_saves_its_scale(lora, processor, examples, tmp_path):
    """The state that is saved knows the fallen scale, and a restart may try as often again."""
    module = lora.get_submodule("base_model.model.model.layers.1.self_attn.v_proj.lora_B.default")
    module.register_forward_hook(lambda _, __, output: output * torch.inf)
    config = config_of(tmp_path, load_best_model_at_end=False)
    with pytest.raises(FloatingPointError, match="25 windows in a row"):
        iq.train(lora, processor, examples, config=config)
    state = load_checkpoint(iq.latest_checkpoint(tmp_path)).state
    assert state["scaler"]["scale"] < 1
    assert (state["window"], state["skips_in_a_row"]) == (25, 0)


def test_an_infinite_loss_is_an_overflow(lora, processor, examples, tmp_path, monkeypatch):
    """In fp16 a loss that is not finite skips the window, though every gradient is finite."""
    real, losses = summed_cross_entropy, []

    def infinite_once(logits, labels):
        losses.append(real(logits, labels))
        return losses[-1] + (torch.inf if len(losses) == 1 else 0.0)

    monkeypatch.setattr("idefics_qlora.training.loop.summed_cross_entropy", infinite_once)
    config = config_of(tmp_path, load_best_model_at_end=False, max_steps=1)
    result = iq.train(lora, processor, examples, config=config)
    assert result.metrics["skipped_windows"] == 1
    assert result.training_loss < 20


def test_the_ledger_is_read_again(base, processor, examples, tmp_path):
    """A restart adds no second line for a row that is known, not even behind half a line."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    rows[5] = {"text": "no format"}
    config = {"load_best_model_at_end": False, "global_batch_size": 8, "max_steps": 5}
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, config=config_of(tmp_path, **config))
    ledger = tmp_path / "bad_rows.jsonl"
    (line,) = ledger.read_text().splitlines()
    config = {**config, "max_steps": 10, "lr_scheduler_type": "linear"}
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, config=config_of(tmp_path, **config))
    assert ledger.read_text().splitlines() == [line]
