"""The page on which an adapter is tried: asked as the library asks, and driven as people do."""

import contextlib
import copy
import json
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import browser
import pytest
import torch
from helpers import config_of, every_family
from pages import entry, write_run
from peft import LoraConfig
from PIL import Image

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.model.adapters import without_adapter
from idefics_qlora.sharing import demo as demos
from idefics_qlora.sharing.side_by_side import Asked, SideBySide, asked_by

ROOT = Path(__file__).parents[2]
in_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")


@pytest.fixture
def pictures(cards, tmp_path):
    """Two pictures as files, one of them a JPEG."""
    files = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for card, file in zip(cards[30:], files, strict=False):
        card["image"].save(file)
    return files


def learnt(model):
    """The model as if its adapter had learnt something."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


# --- what is asked --------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("is_dialogue", [False, True])
def test_both_answer_as_generate_does(lora, processor, pictures, is_dialogue):
    """Two pictures and a question, as a text and as a dialogue: what `iq.generate` says with and
    without the adapter, which works as before afterwards."""
    model = learnt(lora)
    items = [*pictures, "What is it?"]
    prompt = [iq.Turn("user", items)] if is_dialogue else items
    pair = SideBySide(model, processor)
    question = pair.read(pictures, " What is it? ", is_dialogue, 12)
    said = [pair.base(question, 12), pair.adapter(question, 12)]
    with without_adapter(model):
        expected = iq.generate(model, processor, [prompt], max_new_tokens=12)
    expected += iq.generate(model, processor, [prompt], max_new_tokens=12)
    assert said == [text.strip() for text in expected]
    assert said[0] != said[1]
    assert any(p.requires_grad for p in model.parameters())


def test_what_cannot_be_asked_is_told(lora, processor, pictures, tmp_path):
    """In words for who looks at a page: nothing given, files that are no pictures (all of them, by
    their names alone), and more than the model can read."""
    pair = SideBySide(lora, processor, max_length=20)
    wrong = [tmp_path / "torn.png", tmp_path / "text.png"]
    wrong[0].write_bytes(pictures[0].read_bytes()[:200])
    wrong[1].write_text("no picture")
    for images, text, told in (
        ([], "What?", "There is no picture: drop one"),
        (pictures, " \n", "There is no question"),
        ([wrong[0], pictures[0], wrong[1]], "What?", "torn.png cannot be opened: "),
        ([wrong[0], pictures[0], wrong[1]], "What?", " text.png cannot be opened: "),
        (pictures * 130, "What?", "The 260 pictures and the question are "),
        (pictures, "What? " * 600, "more than the 512 that the model can read: take fewer"),
        (pictures[:1], "https://somewhere/cat.png", "cat.png"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            pair.read(images, text, False, 20)
        assert str(tmp_path) not in str(error.value)
    assert pair.read(pictures, "What?", False, 20).notes == []
    (note,) = pair.read(pictures, "<image> Two?", False, 20).notes
    assert note.startswith("'<image>' is read as letters")
    (note,) = pair.read(pictures, "What is on the picture? " * 4, False, 20).notes
    assert "more than the adapter has learnt from (max_length=20)" in note


def test_a_base_that_is_not_quite_the_base_is_told(base, processor, pictures):
    """peft cannot switch off biases that were trained."""
    pair = SideBySide(iq.add_lora(base, LoraConfig(r=8, bias="lora_only")), processor)
    (note,) = pair.read(pictures, QUESTION, False, 12).notes
    assert "biases" in note


def test_one_at_a_time(lora, processor, pictures):
    """The adapter is switched off for the base's answer alone, not for one beside it."""
    pair = SideBySide(learnt(lora), processor)
    question = pair.read(pictures, QUESTION, False, 12)
    expected = [pair.base(question, 12), pair.adapter(question, 12)] * 3
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(4) as pool:
        said = pool.map(lambda ask: ask(question, 12), [pair.base, pair.adapter] * 3)
        assert [*said] == expected


def test_an_answer_can_be_broken_off(lora, processor, pictures):
    """Whoever ends the page does not wait for the rest of a text."""
    pair = SideBySide(lora, processor)
    question = pair.read(pictures[:1], QUESTION, False, 40)
    whole = pair.adapter(question, 40)
    pair.ending.set()
    part = pair.adapter(question, 40)
    assert whole.startswith(part)
    assert len(part) < len(whole)


# --- how the run asked ----------------------------------------------------------------------------


def run_with(folder, *rows, samples=(), **train):
    """A run's folder with rows of its gallery, and their pictures."""
    run = write_run(folder, [{"step": 1, "loss": 1.0}], gallery={"rows": rows}, train=train)
    lines = "".join(json.dumps({"step": 1, **sample}) + "\n" for sample in samples)
    (run / "samples.jsonl").write_text(lines)
    (run / "eval_samples").mkdir()
    for row in (*rows, *samples):
        for name in row["images"]:
            if not name.startswith("."):
                Image.new("RGB", (8, 8)).save(run / name)
    return run


def asking(index, question, **changes):
    images = [f"gallery/row-{index}-image-0.webp"]
    told = {"images": images, "question": question, "prompt": question, "dialogue": False}
    return entry(index, **told | changes)


def test_the_runs_question_is_known(tmp_path):
    """That of the adapter's templates, or the one that all rows ask; none if each has its own; the
    tutorial's if nothing is known. A checkpoint asks as its run does."""
    same = run_with(tmp_path / "same", asking(0, "What?"), asking(1, "What?"), max_length=70)
    (same / "checkpoint-1").mkdir()
    for folder in (same, same / "checkpoint-1"):
        asked = asked_by(folder)
        assert (asked.question, asked.is_dialogue, asked.max_length) == ("What?", False, 70)
        assert [row.right for row in asked.rows] == ["A red box."] * 2
        assert [image.name for image in asked.rows[1].images] == ["row-1-image-0.webp"]
    other = run_with(tmp_path / "other", asking(0, "Who?", dialogue=True), asking(1, "Where?"))
    assert asked_by(other).question == ""
    captions = {kind: iq.Captions(answer=" {a}", question=kind) for kind in ("Why?", "{q}?")}
    assert asked_by(same, captions["Why?"]).question == "Why?"
    assert asked_by(same, captions["{q}?"]).question == "What?"
    assert asked_by(tmp_path, captions["Why?"]) == Asked("Why?")
    assert asked_by(tmp_path) == Asked() == Asked(QUESTION, False, None, ())


def test_a_dialogue_is_asked_as_one(tmp_path):
    """Rows of questions and answers were turns, and so is what is asked on the page."""
    rows = [asking(n, f"Is it {n}?", dialogue=True) for n in range(2)]
    asked = asked_by(run_with(tmp_path / "run", *rows))
    assert asked.is_dialogue
    assert [row.question for row in asked.rows] == ["Is it 0?", "Is it 1?"]


def test_only_rows_that_can_be_asked_again_are_shown(tmp_path):
    """Whole samples rather than small copies; no row whose texts are several, whose pictures are
    not all there, or lie outside the run's folder; torn files are no error."""
    sample = {"row": "eval_rows[0]", "images": ["eval_samples/row-0-image-0.png"]}
    run = run_with(
        tmp_path / "run",
        asking(0, "What?"),
        asking(1, None),
        asking(2, "What?", more_images=2),
        asking(3, "What?", images=["../run/config.yaml", "./../secret.png"]),
        asking(4, "What?", images=["./gallery/gone.webp"]),
        {key: value for key, value in asking(5, "What?").items() if key != "question"},
        samples=[sample],
    )
    (tmp_path / "secret.png").write_bytes(b"")
    rows = asked_by(run).rows
    assert [row.images[0].name for row in rows] == ["row-0-image-0.png", "row-5-image-0.webp"]
    (run / "gallery" / "rows.json").write_text('{"rows": [1, {"question": 2, "images": 3}]}')
    assert asked_by(run).rows == ()


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
