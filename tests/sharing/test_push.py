"""Sharing: what goes to the Hub, what its card says, and what a fault tells to do."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub.utils._http as client
import pytest
from helpers import config_of
from hub import SHA, TOKEN
from huggingface_hub import ModelCard, constants

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.sharing.push import Upload

ME = "me/cards"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's


def texts_of(upload):
    return {n: c.decode() for n, c in upload.files.items() if isinstance(c, bytes)}


def test_what_would_go_is_shown_and_nothing_goes(hub, run, capsys):
    """--dry_run lists every file with its size, says that it is private, and asks no more
    than whether the base is there."""
    told = ""
    for given in (["--dry_run", "true"], ["--dry_run"]):
        assert cli.main(["push", str(run), ME, "--base", "someone/base", *given]) == 0
        before, told = told, capsys.readouterr().out
    assert told == before
    assert told.endswith("\nnothing was sent\n")
    assert told.startswith(f"{ME} (private), 6 files:")
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        assert re.search(rf" \d+(\.\d [kM]B| bytes)  {name}$", told, re.MULTILINE)
    assert "samples/row-1-image-0.png" in told
    assert "the base someone/base and its licence: not checked (the Hub answers 404)" in told
    assert hub.sent(".*someone.*|.*cards.*") == ["GET /api/models/someone/base"] * 2


def test_a_dry_run_does_not_wait_for_a_network(hub, run, monkeypatch):
    """Of a Hub that is not there a base's licence is asked once; what would go is shown."""
    hub.faults["GET /api/models/someone/base"] = [503] * 9
    upload = iq.push(run, ME, base="someone/base", dry_run=True)
    assert str(upload).endswith("and its licence: not checked (the Hub answers 503)")
    assert len(hub.sent("GET /api/models/someone/base")) == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    upload = iq.push(run, ME, base="someone/base", dry_run=True)
    assert str(upload).endswith("not reached, not checked (ConnectError)")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    client.close_session()
    upload = iq.push(run, ME, base="someone/base", dry_run=True)
    assert str(upload).endswith("not reached, not checked (OfflineModeIsEnabled)")


def test_an_adapter_arrives_with_its_card(hub, run, caplog, capsys):
    """Private, byte for byte, without what a resume needs, and with no name of this machine."""
    caplog.set_level(logging.DEBUG)
    hub.cards["someone/base"] = {"license": "apache-2.0"}
    assert cli.main(["push", str(run), ME, "--base", "someone/base"]) == 0
    assert f"uploaded: {hub.url}/{ME}" in capsys.readouterr().out
    repo = hub.repos[ME]
    assert repo["private"]
    best = run / (run / "best").read_text().strip()
    assert repo["files"].keys() == {
        *("README.md", "idefics_qlora.json", "adapter_config.json", "adapter_model.safetensors"),
        *("samples/row-0-image-0.png", "samples/row-1-image-0.png"),
    }
    name = "adapter_model.safetensors"
    assert repo["files"][name] == (best / name).read_bytes()
    assert json.loads(repo["files"]["adapter_config.json"])["base_model_name_or_path"] == (
        "someone/base"
    )
    for path, content in repo["files"].items():
        if not path.endswith((".png", ".safetensors")):
            assert not re.search(r"/tmp|/home|/root|idefics_qlora/tiny", content.decode()), path
            assert TOKEN not in content.decode()
    assert TOKEN not in caplog.text
    card = ModelCard(repo["files"]["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("someone/base", "apache-2.0")
    (record,) = (
        r
        for r in load_checkpoint(best).state["log_history"]
        if "eval_loss" in r and best.name == f"checkpoint-{r['step']}"
    )
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results["loss"] == record["eval_loss"]
    assert f"`eval_loss` | {record['eval_loss']:.4g}" in card.text
    assert card.text.count("](samples/row-") == 2
    for words in ("`lora_alpha` | `32`", "`learning_rate` | `0.01`", "8 rows", "torch 2", "Limits"):
        assert words in card.text


def test_the_code_in_the_card_runs(hub, run, tmp_path, picture):
    """Both ways to load an adapter, and both of a merged model, as somebody else copies them."""
    iq.push(run, ME, base="someone/base")
    iq.merge(run, tmp_path / "merged", verify=False)
    iq.push(tmp_path / "merged", "me/merged")
    picture.save(tmp_path / "photo.jpg")
    cache = tmp_path / "hub"
    base = {path.name: path.read_bytes() for path in iq.tiny.BASE.iterdir()}
    files = {name: repo["files"] for name, repo in hub.repos.items()} | {"someone/base": base}
    for name, contents in files.items():
        home = cache / f"models--{name.replace('/', '--')}"
        for path, content in contents.items():
            file = home / "snapshots" / SHA / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(SHA)
    for name in (ME, "me/merged"):
        card = hub.repos[name]["files"]["README.md"].decode()
        code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
        assert code.count("from_pretrained") + code.count("iq.load_") >= 3
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("family", ["smolvlm"], indirect=True)
def test_what_arrives_knows_the_size_of_its_pictures(family, cards, tmp_path):
    """An adapter from the Hub sees pictures as it was trained, and refuses another base."""
    base, processor = iq.tiny.load_model(family=family, device="cpu", longest_edge=64)
    config = config_of(tmp_path / "run", max_steps=1, global_batch_size=2)
    iq.train(iq.add_lora(base), processor, cards[:4], config=config)
    upload = iq.push(tmp_path / "run", ME, base="someone/base", dry_run=True)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in upload.files.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        (arrived / name).write_bytes(content)
    folder = base.config.name_or_path
    _, own = iq.load_finetuned(arrived, base=folder, device="cpu")
    assert own.image_processor.size == processor.image_processor.size
    _, usual = iq.tiny.load_model(family=family, device="cpu")
    assert own.image_processor.size != usual.image_processor.size
    again = iq.push(arrived, "you/too", base="someone/base", dry_run=True)
    assert again.files["idefics_qlora.json"] == upload.files["idefics_qlora.json"]
    shared = json.loads((arrived / "idefics_qlora.json").read_text())
    shared["fingerprint"]["weights"] = "0" * 16
    (arrived / "idefics_qlora.json").write_text(json.dumps(shared))
    with pytest.raises(ValueError, match="trained on another base model"):
        iq.load_finetuned(arrived, base=folder, device="cpu")


def test_a_merged_folder_arrives_whole(hub, run, tmp_path):
    """Shards, configuration and processor; what the card says comes from the run."""
    iq.merge(run, tmp_path / "merged", verify=False)
    upload = iq.push(tmp_path / "merged", ME, base="someone/base", private=False)
    repo = hub.repos[ME]
    assert not repo["private"]
    assert "(PUBLIC)" in str(upload)
    expected = {
        p.relative_to(tmp_path / "merged").as_posix() for p in (tmp_path / "merged").rglob("*")
    }
    assert repo["files"].keys() == expected - {"samples"}
    card = ModelCard(repo["files"]["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.eval_results
    assert card.text.count("](samples/row-") == 2
    for content in repo["files"].values():  # neither the run's folder nor the base's
        assert not re.search(rf"{tmp_path}|{iq.tiny.BASE}", content.decode(errors="ignore"))


def test_what_is_hidden_in_a_merged_folder_stays(hub, run, tmp_path):
    """What other programs keep beside the weights, such as git with the token of an address."""
    merged = tmp_path / "merged"
    iq.merge(run, merged, verify=False)
    for name in (".git/config", ".cache/huggingface/x.lock", "samples/.DS_Store", ".env"):
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
        (merged / name).write_text(f"url = https://me:{TOKEN}@huggingface.co/{ME}")
    iq.push(merged, ME, base="someone/base")
    files = hub.repos[ME]["files"]
    assert "model.safetensors" in files
    assert [name for name in files if "/." in f"/{name}"] == []
    (merged / "notes.txt").write_text("x" * 2000 + f" login with {TOKEN}")
    with pytest.raises(ValueError, match="notes.txt would hold what looks like an access token"):
        iq.push(merged, ME, base="someone/base")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", *({"samples": wrong} for wrong in (None, [1], [{"images": None}])),
     {"results": {"eval_x": "y"}}, {"settings": None}, {"lora": [1]}],
)  # fmt: skip
def test_facts_that_somebody_altered_are_told(content, run, tmp_path, capsys):
    """By the file's name, not by a traceback: the folder may come from anywhere."""
    folder = tmp_path / "merged"
    iq.merge(run, folder, verify=False)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "idefics_qlora.json").write_text(text)
    assert cli.main(["push", str(folder), ME, "--dry_run", "true"]) == 2
    assert "merged/idefics_qlora.json" in capsys.readouterr().err


def test_a_merged_models_base_is_named_as_the_hub_does(run, tmp_path):
    """A folder given for it would stand in the public card; of another base none is known."""
    folder = tmp_path / "merged"
    iq.merge(run, folder, verify=False)
    for path in (iq.tiny.BASE, "~/base", "./base", r"C:\base", "base"):
        with pytest.raises(ValueError, match="expected the Hub id that the card names"):
            iq.push(folder, ME, base=str(path), dry_run=True)
    shared = json.loads((folder / "idefics_qlora.json").read_text())
    shared |= {"base": "someone/base", "base_revision": "v2"}
    (folder / "idefics_qlora.json").write_text(json.dumps(shared))
    for base, revision in ((None, "v2"), ("someone/base", "v2"), ("someone/other", None)):
        upload = iq.push(folder, ME, base=base, dry_run=True)
        assert json.loads(upload.files["idefics_qlora.json"])["base_revision"] == revision
        assert ("(revision `v2`)" in texts_of(upload)["README.md"]) == (revision is not None)


def test_a_base_without_a_name_is_asked_for(hub, run):
    """The path of a local base is of no use to anybody, and does not get out."""
    with pytest.raises(ValueError, match="which nobody else has: pass base='its/hub-id'"):
        iq.push(run, ME)
    assert hub.requests == []


FAULTS = [
    ("POST /api/repos/create", [401], PermissionError, "does not know who you are.*hf auth login"),
    ("POST /api/repos/create", [403], PermissionError, "may not write to me/cards.*permission"),
    ("POST /api/models/.*/commit", [403], PermissionError, "may not write to me/cards"),
    (
        "POST /api/models/.*/commit",
        [409],
        ConnectionError,
        "changed by somebody else.*run the same",
    ),
    (
        "POST /api/models/.*/commit",
        [412],
        ConnectionError,
        "changed by somebody else.*run the same",
    ),
    ("POST /api/models/.*/commit", [503], ConnectionError, r"just now \(503\): wait a little"),
    ("POST /.*/batch", [500] * 9, ConnectionError, r"just now \(500\): wait a little"),
    ("POST /api/models/.*/commit", ["cut"], ConnectionError, "broke off.*not sent again"),
    ("PUT /lfs/", [None, *["cut"] * 40], ConnectionError, "broke off.*not sent again"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_says_what_to_do_and_the_same_again_goes_on(number, hub, run, caplog):
    """Each of them; afterwards the same call uploads only what has not arrived."""
    pattern, answers, kind, told = FAULTS[number]
    hub.faults[pattern] = list(answers)
    with pytest.raises(kind, match=told) as error:
        iq.push(run, ME, base="someone/base")
    assert TOKEN not in str(error.value) + caplog.text
    hub.faults.clear()
    arrived = set(hub.blobs)
    assert bool(arrived) == ("commit" in pattern or None in answers)
    before = len(hub.requests)
    iq.push(run, ME, base="someone/base")
    again = {r.rpartition("/")[2] for r in hub.requests[before:] if r.startswith("PUT /lfs/")}
    assert not again & arrived
    assert len(hub.repos[ME]["files"]) == 6


def test_what_passes_is_tried_again(hub, run):
    """A server that is down for two requests, and a file that does not get through, do no harm."""
    hub.faults = {"POST /.*/batch": [503, 503], "PUT /lfs/": [500]}
    iq.push(run, ME, base="someone/base")
    assert len(hub.repos[ME]["files"]) == 6


def test_a_public_repository_is_not_taken_for_a_private_one(hub, run):
    """What shall be private does not land where everybody sees it."""
    hub.repos[ME] = {"private": False, "files": {}}
    with pytest.raises(ValueError, match="exists and is public: pass private=False"):
        iq.push(run, ME, base="someone/base")
    assert hub.repos[ME]["files"] == {}
    iq.push(run, ME, base="someone/base", private=False)
    assert hub.repos[ME]["files"]


def test_a_token_that_may_only_write_is_enough(hub, run):
    """Of a repository that is there already, one need not be allowed to make others."""
    hub.faults["POST /api/repos/create"] = [403] * 3
    hub.repos[ME] = {"private": True, "files": {}}
    iq.push(run, ME, base="someone/base")
    assert len(hub.repos[ME]["files"]) == 6
    hub.repos[ME] = {"private": False, "files": {}}
    with pytest.raises(ValueError, match="exists and is public: pass private=False"):
        iq.push(run, ME, base="someone/base")
    del hub.repos[ME]
    with pytest.raises(PermissionError, match="may not write to me/cards"):
        iq.push(run, ME, base="someone/base")


def test_without_a_token_it_says_so(hub, run, monkeypatch, tmp_path):
    """Nobody who is not logged in sees a traceback of the client."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="hf auth login"):
        iq.push(run, ME, base="someone/base")


def test_a_token_does_not_get_out(hub, run):
    """What looks like one stops the upload."""
    plain = run / "plain"
    plain.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(run / "checkpoint-1" / name, plain / name)
    file = plain / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"exclude_modules": [TOKEN]}))
    with pytest.raises(ValueError, match="README.md would hold what looks like an access token"):
        iq.push(plain, ME, base="someone/base")


@pytest.mark.parametrize("name", ["cards", "a/b/c", "me/", "../me", "me/a b"])
def test_a_name_that_cannot_be_one(hub, run, name):
    """Told before anything is asked of the Hub."""
    with pytest.raises(ValueError, match="expected a name such as me/name"):
        iq.push(run, name, base="someone/base")


def test_the_command_line_as_a_user_starts_it(hub, run):
    """With HF_ENDPOINT and HF_TOKEN alone, in a process of its own; a fault is one line and 2."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "idefics_qlora",
        "push",
        str(run),
        ME,
        "--base",
        "someone/base",
    ]
    hub.faults["POST /api/repos/create"] = [403]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "  - your token may not write to me/cards (403)" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "README.md" in hub.repos[ME]["files"]
    assert TOKEN not in done.stdout + done.stderr


def test_sizes_are_those_of_the_files(tmp_path):
    """What is shown first is what is there."""
    (tmp_path / "a").write_bytes(b"x" * 2_500_000)
    told = str(Upload(ME, False, {"a": tmp_path / "a", "b": b"1" * 1000, "c": b"1" * 99}))
    assert re.findall(r"  (\S.*)  (\w)$", told, re.MULTILINE) == [
        *(("2.5 MB", "a"), ("1.0 kB", "b"), ("99 bytes", "c")),
    ]
