"""The command that serves the page of an adapter, and the page as people use it."""

import contextlib
import copy
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import browser
import pytest
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.model.adapters import without_adapter
from idefics_qlora.sharing import demo as demos

ROOT = Path(__file__).parents[2]
in_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")


# --- the command ----------------------------------------------------------------------------------


def problem_of(capsys, *arguments):
    """The one problem for which the command ends before it serves anything."""
    assert cli.main(["demo", *map(str, arguments)]) == 2
    first, problem = capsys.readouterr().err.strip().splitlines()[-2:]
    assert first == "idefics-qlora demo: 1 problem"
    return problem


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    """No run, a port in use or impossible, a wrong number, and the extra that is missing."""
    assert "nowhere" in problem_of(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "adapter_model.safetensors" in problem_of(capsys, tmp_path / "empty")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = problem_of(capsys, tmp_path, "--port", port)
    assert f"--port {port} is in use by another program: pass another one" in told
    assert "65535" in problem_of(capsys, tmp_path, "--port", 70000)
    assert "--max_new_tokens 0" in problem_of(capsys, tmp_path, "--max_new_tokens", 0)
    monkeypatch.setattr(demos, "find_spec", lambda name: None)
    told = problem_of(capsys, tmp_path)
    assert told == '  - demo needs the package gradio: pip install "idefics_qlora[demo]"'


def test_what_is_told_is_text():
    """Whatever stands in a row, or in the name of a file that is dropped, is shown as letters."""
    evil = "<script>alert(1)</script><img src=x onerror='alert(1)'>"
    html = demos._told([evil, evil], evil)
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3


# --- in the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(loaded, cards, tmp_path_factory):
    """A run that has learnt for some steps, with held-out rows in its folder."""
    folder = tmp_path_factory.mktemp("demo") / "a_run"
    config = config_of(
        folder, max_steps=6, global_batch_size=4, learning_rate=8e-3, eval_steps=6, save_steps=6
    )
    model = iq.add_lora(copy.deepcopy(loaded[0]))
    iq.train(model, loaded[1], cards[:24], cards[24:28], config=config)
    return folder


@contextlib.contextmanager
def demo(run, folder, *more, **environment):
    """The command as a user starts it: its address and its process, which asks no proxy, and is
    told to end."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **environment}
        env |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), address)
        command = [sys.executable, "-m", "idefics_qlora", "demo", str(run), "--port", "0"]
        command += ["--max_new_tokens", "20", "--device", "cpu", *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, env=env, **pipes) as child:
            try:
                assert select.select([child.stdout], [], [], 240)[0], "no address"
                line = child.stdout.readline()
                assert line.startswith("http://127.0.0.1:"), child.stderr.read()
                yield SimpleNamespace(address=line.split()[0], child=child)
                was_running = child.poll() is None
                child.terminate()
                assert not was_running or child.wait(60) == 128 + signal.SIGTERM
            finally:
                child.kill()
        assert [*folder.iterdir()] == []  # what was dropped is gone
        assert select.select([proxy], [], [], 0)[0] == [], "the server asked somebody"


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    with demo(run, tmp_path_factory.mktemp("served")) as started:
        yield started.address


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def finetuned(run):
    return iq.load_finetuned(run, device="cpu")


def expected(finetuned, prompt):
    """What base and adapter say."""
    with without_adapter(finetuned[0]):
        base = iq.generate(*finetuned, [prompt], max_new_tokens=20)
    texts = [*base, *iq.generate(*finetuned, [prompt], max_new_tokens=20)]
    return [text.strip() for text in texts]


@pytest.mark.slow
def test_only_this_machines_names_are_answered(served):
    """A site elsewhere that makes its name lead here, through somebody's browser, gets nothing."""
    place = urlsplit(served).netloc
    port = place.rpartition(":")[2]
    answers = {}
    for host in (place, f"localhost:{port}", f"elsewhere.example:{port}", "127.0.0.1.example"):
        connection = http.client.HTTPConnection(place, timeout=60)
        connection.request("GET", "/config", headers={"Host": host})
        answers[host] = connection.getresponse().status
        connection.close()
    assert [*answers.values()] == [200, 200, 400, 400]


OUTSIDE = ("data:", "blob:")
BASE, ADAPTER = "#base textarea", "#adapter textarea"


class Person:
    """Somebody at the page."""

    def __init__(self, chromium, address, size=browser.DESKTOP):
        self.chromium = chromium
        chromium.complaints.clear()
        chromium.requests.clear()
        chromium.open(address, size)
        chromium.wait_for("document.querySelector('#question textarea')")
        chromium.wait_for("document.querySelector('#pictures input[type=file]')")
        chromium.wait_for("document.querySelector('#rows img')")

    def drop(self, *files):
        shown = self.chromium.evaluate("document.querySelectorAll('#pictures img').length")
        self.chromium.choose("#pictures input[type=file]", *files)
        self.wait_for_pictures(shown + len(files))

    def wait_for_pictures(self, number):
        self.chromium.wait_for(f"document.querySelectorAll('#pictures img').length == {number}")

    def ask(self):
        """Both answers, or what is told in their place."""
        self.chromium.evaluate(f"document.querySelector('{ADAPTER}').value = ''")
        self.chromium.evaluate("document.querySelector('[role=alert]')?.classList.add('seen')")
        self.chromium.click("#ask")
        told = "document.querySelector('[role=alert]:not(.seen)')"
        self.chromium.wait_for(f"document.querySelector('{ADAPTER}').value || {told}")
        if told := self.chromium.evaluate(f"{told}?.innerText"):
            return told
        return [self.chromium.evaluate(f"document.querySelector('{s}').value") for s in _ANSWERS]

    def leave(self):
        """Nothing was complained of, and nothing was asked of anybody else."""
        # gradio's own client says so when a stream of answers ends.
        known = "Method not implemented."
        assert [told for told in self.chromium.complaints if known not in told] == []
        asked = {r for r in self.chromium.requests if not r.startswith(OUTSIDE)}
        assert {urlsplit(address).hostname for address in asked} == {"127.0.0.1"}


_ANSWERS = (BASE, ADAPTER)


@in_browser
@pytest.mark.slow
def test_it_answers_as_the_library_does(chromium, served, finetuned, pictures):
    """Pictures are dropped and a question is typed: base and adapter, side by side, say what
    `iq.generate` makes them say, of one picture and of two."""
    person = Person(chromium, served)
    question = "document.querySelector('#question textarea').value"
    assert chromium.evaluate(question) == QUESTION
    person.drop(pictures[0])
    said = person.ask()
    assert said == expected(finetuned, [pictures[0], QUESTION])
    assert said[0] != said[1]
    boxes = "[...document.querySelectorAll('#base, #adapter')].map(e => e.getBoundingClientRect())"
    assert chromium.evaluate(f"(b => b[0].right <= b[1].left && b[0].top == b[1].top)({boxes})")
    person.drop(pictures[1])
    chromium.type("#question textarea", "A picture of")
    assert person.ask() == expected(finetuned, [*pictures, "A picture of"])
    person.leave()


@in_browser
@pytest.mark.slow
def test_a_held_out_row_is_asked(chromium, served, finetuned, run, cards):
    """A click takes its picture and its question, and what was to be said stands beside what is,
    until something else is asked."""
    person = Person(chromium, served, browser.PHONE)
    chromium.click("#rows tbody tr:nth-child(2) td")
    person.wait_for_pictures(1)
    right = "document.querySelector('#told .right')?.innerText"
    chromium.wait_for(right)
    file = run / "gallery" / "row-1-image-0.webp"
    assert person.ask() == expected(finetuned, [file, QUESTION])
    assert chromium.evaluate(right).endswith(iq.pokemon_card_example(cards[25]).completion)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= browser.PHONE[0]
    chromium.type("#question textarea", "Another question")
    person.ask()
    assert chromium.evaluate(right) is None
    person.leave()


@in_browser
@pytest.mark.slow
def test_a_mistake_is_told_on_the_page(chromium, served, tmp_path, pictures):
    """No picture, a file that is none, no question, too long a one; then it goes on."""
    person = Person(chromium, served)
    assert "There is no picture" in person.ask()
    torn = tmp_path / "torn <b>.png"
    torn.write_bytes(pictures[0].read_bytes()[:300])
    person.drop(pictures[0])
    chromium.type("#question textarea", "What? " * 600)
    assert "more than the 512 that the model can read" in person.ask()
    person = Person(chromium, served)
    person.drop(torn)
    told = person.ask()
    assert told.startswith("torn")
    assert "cannot be opened: " in told
    assert str(tmp_path) not in told
    person = Person(chromium, served)
    person.drop(pictures[0])
    assert len(person.ask()) == 2


@pytest.mark.slow
def test_no_file_of_the_machine_can_be_asked_about(served, pictures):
    """Who speaks to the server itself cannot have it open what was not dropped."""
    with urlopen(f"{served}/config") as answer:
        functions = json.load(answer)["dependencies"]
    (number,) = (n for n, function in enumerate(functions) if len(function["inputs"]) == 4)
    picture = {"image": {"path": str(pictures[0]), "meta": {"_type": "gradio.FileData"}}}
    body = {"data": [[picture], "What?", False, 5], "fn_index": number, "session_hash": "one"}
    asked = Request(f"{served}/gradio_api/queue/join", json.dumps(body).encode())
    asked.add_header("Content-Type", "application/json")
    urlopen(asked).close()
    with urlopen(f"{served}/gradio_api/queue/data?session_hash=one", timeout=60) as events:
        told = [json.loads(line[5:]) for line in events if line.startswith(b"data:")]
    (done,) = (event for event in told if event["msg"] == "process_completed")
    assert not done["success"], told


@in_browser
@pytest.mark.slow
def test_ctrl_c_ends_it(chromium, run, pictures, tmp_path):
    """With a page open, as it asked a browser to, and an answer being written: 130, no word, and
    nothing that was dropped is left behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    os.mkfifo(pipe := tmp_path / "opened")
    opened = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    opens = tmp_path / "opens.py"
    opens.write_text(f"import sys; open({str(pipe)!r}, 'w').write(sys.argv[1])")
    person_opens = {"BROWSER": f"{sys.executable} {opens} %s"}
    with demo(run, folder, "--open", "true", **person_opens) as started:
        assert select.select([opened], [], [], 60)[0]
        assert os.read(opened, 100).decode() == started.address
        os.close(opened)
        person = Person(chromium, started.address)
        person.drop(pictures[0])
        (dropped,) = folder.rglob("one.png")
        assert dropped.read_bytes() == pictures[0].read_bytes()
        chromium.click("#ask")
        started.child.send_signal(signal.SIGINT)
        out, told = started.child.communicate(timeout=60)
    assert started.child.returncode == 128 + signal.SIGINT
    assert (out, told) == ("", "")
    assert [*folder.rglob("one.png")] == []
