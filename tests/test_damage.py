"""Damaged checkpoints and folders with something in the way: none ends a run with a raw error.

What is damaged is passed over with a line in the log, and the whole checkpoint before it is used.
More than 400 lines: many small kinds of damage to one and the same run.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
import socket

import pytest
import safetensors.torch
import torch
from helpers import config_of
from peft import LoraConfig

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.bad_rows import BadRow, BadRows
from idefics_qlora.durable import CheckpointError

FILES = ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
FILES += ("optimizer.safetensors", "rng.safetensors", "state.json")
TENSORS = tuple(name for name in FILES if name.endswith(".safetensors"))


class Trainer:
    """Trains one model again and again in folders that have checkpoints of the same run.

    All that a run goes on with comes from its checkpoint, so the model may be the same.
    """

    def __init__(self, model, processor, rows):
        self.model, self.processor, self.rows = model, processor, rows

    def __call__(self, folder, steps, **changes):
        settings = {
            "global_batch_size": 2, "eval_steps": 1, "save_steps": 1, "save_total_limit": None,
            "lr_scheduler_type": "constant", "load_best_model_at_end": True, "precision": "fp16",
        }  # fmt: skip
        config = config_of(folder, max_steps=steps, **{**settings, **changes})
        return iq.train(self.model, self.processor, self.rows[:4], self.rows[4:6], config=config)


@pytest.fixture(scope="session")
def train(loaded):
    """A trainer with a small adapter, so that its files are small."""
    base, processor = loaded
    model = iq.add_lora(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"]))
    cards = iq.tiny.creature_cards(6, seed=0)
    rows = [iq.Example([card["image"], "What?"], f" {card['name']}.") for card in cards]
    return Trainer(model, processor, rows)


@pytest.fixture(scope="session")
def two_steps(train, tmp_path_factory):
    """A run of two steps, both saved."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, 2)
    return folder


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(two_steps, tmp_path / "run")


def rehash(checkpoint):
    """Let the manifest say what the files are, as if they had been written so."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"size": len(content), "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def in_place_of(path, put):
    """Replace a file or folder by what ``put`` makes at its path."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    put(path)


def bind_socket(path):
    with socket.socket(socket.AF_UNIX) as endpoint:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
        endpoint.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


NO_FILES = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a looping link": lambda path: path.symlink_to(path.name),
    "a link to an over-long name": lambda path: path.symlink_to("x" * 255),
    "a pipe": os.mkfifo,
    "a socket": bind_socket,
    "another file": lambda path: path.symlink_to("/proc/self/stat"),
}
CONTENTS = {
    "empty": b"",
    "zeros": bytes(100),
    "not UTF-8": b'{"a": "\xff\xfe\xfa"}',
    "nested deep": b"[" * 100_000,
    "nested and closed": b'{"files": ' * 100_000 + b"1" + b"}" * 100_000,
    "a list": b"[1, 2]",
    "a string": b'"state"',
    "null": b"null",
    "an object": b"{}",
    "a huge number": b"9" * 10_000,
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "an unknown dtype": (57).to_bytes(8, "little")
    + b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}    ' + b"a",
}  # fmt: skip


def quick(cases, *names):
    """All cases, those marked slow that are not named."""
    return [c if c in names else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def assert_passed_over(train, run, caplog):
    """The second checkpoint is reported, and the run is again where the first one left it."""
    caplog.clear()
    assert iq.latest_checkpoint(run) == run / "checkpoint-1"
    assert "passed over: " in caplog.text
    assert train(run, 1).global_step == 1
    assert load_checkpoint(run / "checkpoint-1").state["global_step"] == 1
    assert not (run / "checkpoint-2").is_dir()
    assert os.path.lexists(run / "abandoned-checkpoint-2")


@pytest.mark.parametrize("name", quick(FILES, "manifest.json", "state.json", "rng.safetensors"))
@pytest.mark.parametrize(
    "kind",
    quick([*NO_FILES, *CONTENTS], "a folder", "a looping link", "a pipe", "empty", "nested deep"),
)
def test_each_file_damaged_in_each_way(train, run, caplog, name, kind):
    """A file that is none, or has other content: passed over, and refused where it is named."""
    file = run / "checkpoint-2" / name
    put = NO_FILES.get(kind, lambda path: path.write_bytes(CONTENTS[kind]))
    in_place_of(file, put)
    with pytest.raises(CheckpointError):
        train(run, 3, resume=run / "checkpoint-2")
    with pytest.raises((CheckpointError, FileNotFoundError)):
        iq.load_finetuned(run / "checkpoint-2", device="cpu")
    assert_passed_over(train, run, caplog)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
@pytest.mark.parametrize("kind", quick(CONTENTS, "not UTF-8", "nested deep", "null"))
def test_content_that_is_nonsense_though_unaltered(train, run, caplog, name, kind):
    """The hashes fit, but nothing can be made of it."""
    (run / "checkpoint-2" / name).write_bytes(CONTENTS[kind])
    rehash(run / "checkpoint-2")
    if (name, kind) == ("adapter_config.json", "an object"):
        return  # every setting has a default
    with pytest.raises(CheckpointError):
        train(run, 3, resume=run / "checkpoint-2")
    caplog.clear()
    assert train(run, 1).global_step == 1
    assert "passed over: " in caplog.text


def listed(change):
    def put(checkpoint):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        change(manifest["files"])
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return put


ENTRY = {"size": 1, "sha256": "0" * 64}
MANIFESTS = {
    **{
        f"lists {name!r:.20}": listed(lambda files, name=name: files.update({name: ENTRY}))
        for name in ("", ".", "..", "/", "x" * 300, "a\0b", "\ud800", "../checkpoint-1/state.json")
    },
    **{
        f"size {size!r:.20}": listed(lambda files, size=size: files["state.json"].update(size=size))
        for size in (-1, 10**30, "7", None, [], 1.5, True)
    },
    **{
        f"hash {hash_!r}": listed(lambda files, h=hash_: files["state.json"].update(sha256=h))
        for hash_ in (None, 7, [], "x")
    },
    "lists all but one": listed(lambda files: files.pop("rng.safetensors")),
    "an entry is a list": listed(lambda files: files.update({"state.json": [1]})),
    "no hash": listed(lambda files: files["state.json"].pop("sha256")),
    "a later format": lambda checkpoint: (checkpoint / "manifest.json").write_text(
        (checkpoint / "manifest.json").read_text().replace("qlora-1", "qlora-9")
    ),
    "no files": lambda checkpoint: (checkpoint / "manifest.json").write_text(
        '{"format": "idefics_qlora-1"}'
    ),
    "files is a list": lambda checkpoint: (checkpoint / "manifest.json").write_text(
        '{"format": "idefics_qlora-1", "files": []}'
    ),
    "format is nested": lambda checkpoint: (checkpoint / "manifest.json").write_text(
        '{"files": {}, "format": ' + "[" * 900 + "]" * 900 + "}"
    ),
}


@pytest.mark.parametrize(
    "kind",
    quick(MANIFESTS, "lists 'xxxxxxxxxxxxxxxxxxx", "no files", "format is nested", "no hash"),
)
def test_a_manifest_that_is_an_object_but_wrong(train, run, caplog, kind):
    """Whatever it lists."""
    MANIFESTS[kind](run / "checkpoint-2")
    assert_passed_over(train, run, caplog)


STATE_KEYS = (
    "global_step", "window", "skipped_windows", "skips_in_a_row", "micro_batch_size", "growing",
    "num_examples", "num_images", "num_tokens", "num_bad_rows", "position", "seconds", "loss_sum",
    "unlogged_steps", "best_metric", "log_history", "first_nonfinite_module", "best_checkpoint",
    "unlogged_loss", "total_steps", "scaler", "optimizer", "config", "base", "train_rows",
    "eval_rows", "environment", "run", "finished_step", "num_told", "draft", "too_large",
    "judged_from", "diverged", "image_side", "image_splitting", "quantize",
    "templates",
)  # fmt: skip
INSIDE = (
    "config precision", "config micro_batch_size", "config seed", "base weights", "base rounding",
    "base architecture", "train_rows first", "train_rows number", "eval_rows first",
    "environment versions", "scaler scale", "scaler growth_factor", "scaler backoff_factor",
    "scaler growth_interval", "scaler _growth_tracker",
)  # fmt: skip


def alter_state(checkpoint, alter):
    state = json.loads((checkpoint / "state.json").read_text())
    alter(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    rehash(checkpoint)


def test_every_key_of_a_state_is_known(two_steps):
    """The tests below leave none out."""
    state = load_checkpoint(two_steps / "checkpoint-2").state
    assert sorted(state) == sorted(STATE_KEYS)


@pytest.mark.parametrize("key", [*STATE_KEYS, *INSIDE])
def test_a_state_that_lacks_a_key(train, run, caplog, key):
    """Its hashes fit, and something is missing."""
    *outer, name = key.split()

    def alter(state):
        del (state[outer[0]] if outer else state)[name]

    alter_state(run / "checkpoint-2", alter)
    of_0_1 = key in (
        *("run", "finished_step", "num_told", "draft", "too_large", "diverged", "judged_from"),
        *("image_side", "image_splitting", "quantize", "templates"),
    )
    if of_0_1:  # which had none of these
        assert train(run, 1).global_step == 2
    else:
        caplog.clear()
        assert train(run, 1).global_step == 1
        assert "passed over: " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("key", [*STATE_KEYS, *INSIDE])
def test_a_state_with_a_value_of_another_kind(train, run, key):
    """It is passed over, or told from this run, or harmless; nothing else is raised."""
    *outer, name = key.split()
    for value in (None, "x", 7, [], [1], [None], {}, {"a": {}}):

        def alter(state, value=value):
            (state[outer[0]] if outer else state)[name] = value

        here = shutil.copytree(run, run.parent / "here")
        alter_state(here / "checkpoint-2", alter)
        try:
            assert train(here, 1).global_step in (1, 2)
        except ValueError as error:
            assert "with other settings or rows" in str(error)  # noqa: PT017
        shutil.rmtree(here)


def change_tensors(checkpoint, name, change):
    tensors = safetensors.torch.load_file(checkpoint / name)
    change(tensors, next(iter(tensors)))
    metadata = {"format": "pt"} if name.startswith("adapter") else None
    safetensors.torch.save_file(tensors, checkpoint / name, metadata)
    rehash(checkpoint)


TENSOR_CHANGES = {
    "one is missing": lambda tensors, name: tensors.pop(name),
    "all are missing": lambda tensors, name: tensors.clear(),
    "one is renamed": lambda tensors, name: tensors.update({"other": tensors.pop(name)}),
    "another shape": lambda tensors, name: tensors.update({name: torch.zeros(3, 1)}),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", TENSOR_CHANGES)
def test_tensors_that_are_not_those_of_the_run(train, run, caplog, name, kind):
    """Missing states, or of another shape, are not made up for with fresh ones."""
    change_tensors(run / "checkpoint-2", name, TENSOR_CHANGES[kind])
    caplog.clear()
    assert train(run, 1).global_step == 1
    assert "passed over: " in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_may_pass_is_no_damage(train, run, monkeypatch, number):
    """A disk that does not answer now: the run does not start over the newest checkpoint."""
    real = os.open

    def refuse(path, *args, **options):
        if str(path).endswith("checkpoint-2/optimizer.safetensors"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(OSError, match=r"checkpoint-2 cannot be read .* may be whole") as caught:
            train(run, 3)
        assert caught.value.errno == number
        with pytest.raises(OSError, match="optimizer.safetensors"):
            iq.latest_checkpoint(run)
    assert train(run, 1).global_step == 2


def test_all_damaged_is_no_fresh_start(train, run):
    """Not even if the manifests themselves are no files."""
    for step in (1, 2):
        in_place_of(run / f"checkpoint-{step}" / "manifest.json", lambda path: path.mkdir())
    with pytest.raises(CheckpointError, match="none of checkpoint-1, checkpoint-2 in"):
        train(run, 3)


def precious(folder):
    folder.mkdir()
    (folder / "file").write_text("precious")


THINGS = {**NO_FILES, "a file": lambda path: path.write_text("x"), "someone's folder": precious}
THINGS["a link to a folder"] = lambda path: path.symlink_to(path.parent.parent / "precious")
del THINGS["missing"]


@pytest.mark.parametrize("thing", quick(THINGS, "a looping link", "a file", "someone's folder"))
@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-2", "abandoned-checkpoint-2", ".checkpoint-2.incomplete",
        ".checkpoint-2.replaced", ".checkpoint-1.deleted",
    ],
)  # fmt: skip
def test_something_is_in_the_way(train, run, tmp_path, name, thing, caplog):
    """Whatever stands where a run writes, renames or deletes: it goes on, and nobody else's files
    are lost."""
    precious(tmp_path / "precious")
    (run / "checkpoint-2").rename(tmp_path / "second")
    if name == "abandoned-checkpoint-2":  # going back renames the second
        (tmp_path / "second").rename(run / "checkpoint-2")
    THINGS[thing](run / name)
    changes = {"resume": run / "checkpoint-1"} if name == "abandoned-checkpoint-2" else {}
    changes |= {"save_total_limit": 1} if name == ".checkpoint-1.deleted" else {}
    result = train(run, 2, **changes)
    assert result.global_step == 2
    assert load_checkpoint(run / "checkpoint-2").state["global_step"] == 2
    assert "make room" not in caplog.text
    assert (tmp_path / "precious" / "file").read_text() == "precious"
    if thing == "someone's folder" and not name.startswith("."):
        kept = [folder for folder in run.glob("abandoned-*") if (folder / "file").exists()]
        assert len(kept) == 1
    if name == "abandoned-checkpoint-2":
        assert load_checkpoint(run / "abandoned-checkpoint-2-2").state["global_step"] == 2
    assert not [path.name for path in run.iterdir() if path.name.startswith(".checkpoint")]


def test_hidden_names_of_others_are_left_alone(train, run):
    """Only what this library leaves behind is cleared away, and odd names do no harm."""
    names = ("..replaced", ".x.deleted", ".nfs0001", ".checkpoint-x.incomplete", ".replaced")
    for name in names:
        (run / name).write_text("x")
    train(run, 2)
    assert all((run / name).read_text() == "x" for name in names)


LEDGERS = {
    "not UTF-8": b'{"row": "a", "reason": "\xff\xfe"}\n',
    "no objects": b'1\nnull\n"x"\n[1]\n[]\n{}\n{"row": [], "reason": 1}\n{"row": {}}\n',
    "nested deep": b"[" * 100_000 + b"\n",
    "half a line": b'{"row": "train_ro',
    "NULs": bytes(100),
}


@pytest.mark.parametrize("kind", [*LEDGERS, "a folder", "a looping link", "a pipe", "a socket"])
def test_a_ledger_that_is_none(train, run, kind):
    """Nothing in ``bad_rows.jsonl`` ends or hangs a run, and a bad row is still noted if it can."""
    ledger = run / "bad_rows.jsonl"
    if kind in LEDGERS:
        ledger.write_bytes(LEDGERS[kind])
    else:
        THINGS[kind](ledger)
    assert train(run, 3).global_step == 3
    rows = BadRows("skip", ledger)
    rows.note([BadRow("train_rows[3]", "train_rows[3]", "is bad")])
    if kind in LEDGERS:
        last = ledger.read_bytes().splitlines()[-1]
        assert json.loads(last)["row"] == "train_rows[3]"
        assert BadRows("skip", ledger).reasons["train_rows[3]"] == "train_rows[3]: is bad"


@pytest.mark.parametrize("kind", ["a folder", "a looping link", "a pipe"])
def test_a_lock_that_is_no_file(train, run, kind):
    """The error says what to delete."""
    THINGS[kind](run / ".lock")
    with pytest.raises(OSError, match=r"cannot be written to .*: delete .*\.lock, which is no"):
        train(run, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batch_size", 0), ("window", -1), ("unlogged_steps", -1), ("num_told", 9),
        ("num_told", -5), ("finished_step", 9),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_are_damage(run, name, value):
    """A state whose numbers contradict each other is told from a sound one when it is read."""
    file = run / "checkpoint-2" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    rehash(run / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"state.json cannot be used: it has {name}={value}"):
        load_checkpoint(run / "checkpoint-2")
