"""The pages show code that runs, commands that exist and names that are there."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from pages import write_run

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.data.formats import as_example

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "idefics_qlora"
TESTS = ROOT / "tests"
PAGES = {path.name: path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}
DATA = PAGES["data.md"].read_text(encoding="utf-8")

INSTEAD_OF_THE_HUB = {
    "HuggingFaceM4/idefics-9b": str(iq.tiny.BASE),
    "HuggingFaceTB/SmolVLM-256M-Instruct": str(iq.tiny.BASE),
    "max_steps=200": "max_steps=2",
    "max_steps=100": "max_steps=2",
    "creature_cards(1000": "creature_cards(32",
    "creature_cards(32, seed=1": "creature_cards(4, seed=1",
    "checkpoint-200": "checkpoint-2",
}
"""In a block that needs the ``hub``, or minutes: a base as small as its run is short."""


def blocks(page):
    """The fenced blocks of a page: info string and content."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(r"^```([^\n]+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def given(cards, request):
    """What a block may say that its reader has: ``with`` these names."""
    return {
        "runs.md": {
            "iq": iq,
            "model": request.getfixturevalue("lora"),
            "processor": request.getfixturevalue("processor"),
            "eval_rows": cards[:4],
            "to_example": pokemon_card_example,
            "my_fields": iq.tiny.card_fields,
        },
        "data.md": {"rows": Dataset.from_list([{"image_url": "cards/a.png"}, {"image_url": ""}])},
    }


def lay_out_files(cards):
    """What a block that needs ``files`` finds: folders of pictures, and of runs, as its page
    describes them."""
    if not Path("runs").exists():
        for name in ("mine", "other"):
            write_run(Path("runs", name), [{"step": 1, "loss": 1.0}])
    places = [("train", 0), ("train", 1), ("train", 2), ("val", 0), ("val", 1)]
    for card, (of, number) in zip(cards, places, strict=False):
        kind, name = ("leaf", "spark")[number % 2], f"{number}.png"
        for folder in (f"photos/{of}", f"kinds/{of}/{kind}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            card["image"].save(f"{folder}/{name}")
        with open(f"photos/{of}/metadata.csv", "a") as file:
            file.write("" if file.tell() else "file_name,text\n")
            file.write(f"{name},A {kind} creature.\n")
    columns = [{"image": card["image"], "text": card["name"]} for card in cards[:8]]
    Dataset.from_list(columns).to_parquet("photos/0.parquet")


WITH_PYTHON = [page for page in PAGES if "```python" in PAGES[page].read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page != "README.md"])
def test_every_block_of_python_runs(page, cards, tmp_path, monkeypatch, request):
    """One after the other in one namespace, in a folder with the pictures that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Path("cards").mkdir()
    for file, card in zip(("cards/a.png", "cards/b.png", "new.jpg"), cards, strict=False):
        card["image"].save(file)
    names: dict = {}
    for info, block in blocks(page):
        language, *needs = info.split()
        if language != "python":
            continue
        if needs[:1] == ["hub"]:
            needs = needs[1:]
            for there, here in INSTEAD_OF_THE_HUB.items():
                block = block.replace(there, here)
        if needs[:1] == ["files"]:
            lay_out_files(cards)
            needs = needs[1:]
        if needs:
            assert needs[0] == "with", f"what does {info!r} mean?"
            has = given(cards, request)[page]
            names |= {name: has[name] for name in needs[1:]}
        exec(compile(block, f"{page}: {info}", "exec"), names)


@pytest.mark.slow
def test_the_first_snippet_runs_as_it_stands(tmp_path):
    """The README's only program, unchanged and offline: it learns to read cards."""
    ((info, program),) = blocks("README.md")
    assert info == "python"
    (tmp_path / "first.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "first.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    card, said = (iq.tiny.card_fields(line) for line in done.stdout.splitlines()[-2:])
    right = [field for field in card if said.get(field) == card[field]]
    assert len(card) >= 5
    assert len(right) >= 4, done.stdout
    assert "iq.load_finetuned" in done.stderr  # the last lines say what to do with it


@pytest.mark.parametrize("page", ["README.md", "index.md"])
def test_first_scripts_do_not_go_on_with_half_a_run(page):
    """After Ctrl-C `train` returns, and the next lines would use what has hardly been trained."""
    script = blocks(page)[0][1]
    trained, used = script.index("iq.train("), script.index("print(")
    assert "if result.stopped_by:" in script[trained:used]


def test_every_fence_says_what_it_is():
    """A block is Python, which is run, or text; a third kind would go unchecked."""
    kinds = {tuple(info.split()) for page in PAGES for info, _ in blocks(page)}
    assert {kind[0] for kind in kinds} == {"python", "text"}
    assert {kind[1:] for kind in kinds if kind[0] == "text"} <= {(), ("message",)}
    for path in PAGES.values():
        assert len(re.findall(r"^```", path.read_text(), re.MULTILINE)) % 2 == 0, path


def commands(page):
    """Every shell command that a page shows, in an indented line or in a span, as its words."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    for shown in [*lines, *re.findall(r"`([^`]+)`", text)]:
        if re.match(rf"(make|pip|python|{cli.PROG}|\S*\bpytest|[A-Z_]+=\S+) [^\s|]", shown):
            words = shlex.split(shown, comments=True)
            yield [word for word in words if not re.match(r"[A-Z_]+=", word)]


def wrong_with(words):
    """What a reader who types the command would stumble over; ``None``: nothing."""
    makefile = (ROOT / "Makefile").read_text()
    program, *rest = words
    if program == "make":
        return next((t for t in rest if not re.search(rf"^{t}:", makefile, re.MULTILINE)), None)
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
        known = [["."], *([f".[{extra}]"] for extra in extras)]
        known.append(["transformers[serving]"])
        return None if rest[1:] in known else f"install {rest[1:]}"
    if program == cli.PROG:
        return wrong_with_ours(rest)
    if program == "python" and rest[0] == "-m":
        return None if importlib.util.find_spec(rest[1]) else rest[1]
    if program == "python":
        script, *flags = rest
        if not (ROOT / script).is_file():
            return script
        known = (ROOT / script).read_text()
        return next((f for f in flags if f.startswith("--") and f'"{f}"' not in known), None)
    if program.endswith("pytest"):
        known = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        return next((w for w in rest if w not in ["-m", *known] and not Path(w).exists()), None)
    return f"the program {program!r}"


def wrong_with_ours(words):
    """The same of a command of this library, which knows its options itself."""
    if words[0].partition("=")[0] in ("--help", "--version", "--print_completion"):
        return None
    if words[0] not in cli.COMMANDS:
        return words[0]
    known = {flag for a in cli.COMMANDS[words[0]].parser()._actions for flag in a.option_strings}
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((flag for flag in flags if flag not in known), None)


def test_commands_exist(monkeypatch):
    """Each target of make, script, module, flag and marker that a page names is there."""
    monkeypatch.chdir(ROOT)
    shown = [(page, words) for page in PAGES for words in commands(page)]
    programs = {words[0] for _, words in shown}
    assert programs >= {"make", "pip", "python", ".venv/bin/pytest", cli.PROG}
    wrong = [(page, words, found) for page, words in shown if (found := wrong_with(words))]
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "python benchmarks/none.py",
        "python benchmarks/loop.py --none",
        "python -m idefics_qlora.none",
        "pip install idefics",
        "pip install .[pictures]",
        "idefics-qlora learn",
        "idefics-qlora memory idefics-9b --picture 2",
        "idefics-qlora train --config run.yaml --train.no_such 2",
        ".venv/bin/pytest -m none",
        "conda activate",
    ],
)
def test_a_command_that_does_not_exist_is_found(command, monkeypatch):
    """The control of the test above."""
    monkeypatch.chdir(ROOT)
    assert wrong_with(command.split())


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    """Every ``iq.name`` of a page can be typed; every file of ours and every test is there."""
    text = PAGES[page].read_text(encoding="utf-8")
    for name in set(re.findall(r"\biq((?:\.[A-Za-z_]+)+)", text)):
        found = iq
        for part in name[1:].split("."):
            assert hasattr(found, part), f"iq{name}"
            found = getattr(found, part)
    for name in re.findall(r"`((?:benchmarks|examples|docs|tests|tools)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([a-z_0-9]+/[\w/]+\.py)`", text):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list(ROOT.glob(f"*/{name}")) + list(PACKAGE.rglob(name)), name
    tests = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("kind", ["processor", "instruct_processor"])
def test_the_data_page_shows_the_dialogues_as_they_are(kind, request):
    """The two written dialogues are what each kind of checkpoint gets."""
    processor = request.getfixturevalue(kind)
    dialogues = re.findall(r"```text\n(<s>.*?)\n```", DATA, re.DOTALL)
    messages = re.search(r'"messages": \[.*?\n        \]', DATA, re.DOTALL)
    row = eval("{" + messages[0] + "}")
    picture = iq.tiny.creature_cards(1, seed=0)[0]["image"]
    example = as_example({**row, "images": [picture, picture]})
    (tokens,) = Collator(processor).tokens([example])
    text = processor.tokenizer.decode(tokens.ids).replace("<fake_token_around_image>", "")
    assert text == dialogues[kind == "processor"]


def test_the_data_page_shows_the_preview_as_it_is(processor, cards, tmp_path):
    """The preview that the page prints of its first row is the library's own."""
    (shown,) = re.findall(r"```text\n(── row 0.*?)\n```", DATA, re.DOTALL)
    prompt, completion = re.search(
        r'row = {"prompt": "(.*?)", "completion": "(.*?)"', DATA
    ).groups()
    row = {"prompt": prompt, "completion": completion, "image": cards[0]["image"]}
    preview = iq.preview_batch(processor, [row], image_dir=tmp_path)
    width = len(shown.splitlines()[0]) + 1  # the last column stays free
    printed = preview.text(width, False).replace(str(tmp_path), "/tmp/idefics_qlora-preview-x1")
    assert [line.rstrip() for line in printed.strip().splitlines()] == shown.splitlines()


@pytest.mark.parametrize("page", [path.name for path in (ROOT / "docs" / "how_to").iterdir()])
def test_every_recipe_is_a_whole_program(page):
    """It imports, trains, and needs nothing but the files that its page describes."""
    programs = [(info, block) for info, block in blocks(page) if info.startswith("python")]
    if page == "job.md":  # without Python
        assert programs == []
        assert any(words[:2] == [cli.PROG, "train"] for words in commands(page))
        return
    assert {info for info, _ in programs} <= {"python", "python files"}
    assert "import idefics_qlora as iq" in programs[0][1]
    assert "iq.train(" in programs[0][1]


def heading_names(path):
    """The names that headings of a page have in links."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [path.name for path in ROOT.glob("*.md")])
def test_links_of_the_repository_lead_somewhere(page):
    """Those of the pages beside the site, such as the README; a test of the site has its own."""
    for target, name in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page].read_text("utf-8")):
        if target.startswith("https://"):
            continue
        there = ROOT / target if target else PAGES[page]
        assert there.exists(), target
        assert not name or name in heading_names(there), f"{target}#{name}"
