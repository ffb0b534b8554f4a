"""Runs that are killed, or run out of disk, at any moment.

``make test-faults`` kills fifty times; ``make test`` a few.
"""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import EVALUATED, same, tensors_of, without_clocks

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.families import FAMILIES

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

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("victim.py")), family],
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

    def records(self, run: str) -> list[dict]:
        """The records in a run's log."""
        file = self.folder / run / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def end(self, run: str) -> dict:
        """The tensors of a run's last checkpoint."""
        return tensors_of(self.folder / run / f"checkpoint-{SETTINGS['max_steps']}")


@pytest.fixture(scope="session")
def victim(request, tmp_path_factory):
    """A victim with one untouched run, ``whole``, to compare with."""
    folder = tmp_path_factory.mktemp("victim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDEFICS_QLORA_CACHE", str(folder / "cache"))
        victim = Victim(folder, getattr(request, "param", "idefics"))
    assert victim.train("whole") == 0, victim.log("whole")
    yield victim
    victim.process.stdin.close()
    victim.process.wait()
    victim.process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", FAMILIES, indirect=True)
def test_killed_again_and_again(victim, request, pytestconfig):
    """kill -9 at random moments and at random file operations: each restart goes on, none finds a
    corrupt checkpoint, and the end is the untouched run's to the bit."""
    rng = random.Random(0)
    kills = runs = 0
    wanted = pytestconfig.getoption("kills")
    if request.node.callspec.id != "idefics":
        wanted = -(-wanted // 3)  # the same code wrote what they leave behind
    events = len(victim.report("whole")["operations"])
    while kills < wanted:
        run, code = f"killed-{runs}", -signal.SIGKILL
        while code == -signal.SIGKILL and kills < wanted:
            if rng.random() < 0.7:  # in a save or in the rotation after it
                order = {"kill_at_event": rng.randrange(1, events // 2)}
            else:
                order = {"kill_after_s": rng.uniform(0.2, 2.0)}
            code = victim.train(run, **order, config={"num_workers": int(rng.random() < 0.2)})
            victim.records(run)  # each line is whole
            kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), victim.log(run)
        assert victim.train(run) == 0, victim.log(run)
        assert same(victim.end(run), victim.end("whole"))
        assert "passed over" not in victim.log(run)
        assert "was altered" not in victim.log(run)
        assert without_clocks(victim.records(run)) == without_clocks(victim.records("whole"))
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
        for pointer in ("best", "last"):  # a save before it names the one, after it the other
            named = (victim.folder / run / pointer).read_text().strip()
            load_checkpoint(victim.folder / run / named)
        assert victim.train(run) == 0, victim.log(run)
        assert same(victim.end(run), victim.end("whole"))
        assert without_clocks(victim.records(run)) == without_clocks(victim.records("whole"))


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
    saved = {path.name for path in (victim.folder / "continue").iterdir()}
    assert saved == {*(f"checkpoint-{step}" for step in (1, 2, 5, 6)), *EVALUATED}
    assert same(victim.end("continue"), victim.end("whole"))


@pytest.mark.slow
def test_a_write_that_breaks_off(victim):
    """The kernel ends a write in the middle of a file: an error, and no torn checkpoint."""
    assert victim.train("short", file_size_limit=20_000) == 1
    assert "cannot be written" in victim.log("short")
    assert "allow larger files" in victim.log("short")
    assert "make room" not in victim.log("short")
    there = {path.name for path in (victim.folder / "short").iterdir()}
    assert there == {"config.yaml", "environment.json", "log.jsonl", "gallery"}
    assert victim.train("short") == 0
    assert same(victim.end("short"), victim.end("whole"))


def config_of(folder, **changes):
    return iq.TrainConfig(output_dir=folder, **{**SETTINGS, **changes})
