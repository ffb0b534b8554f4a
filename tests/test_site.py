"""The documentation site: it builds, its links lead somewhere, and it says what is so."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import families
import pytest
import site_pages
import yaml
from published import PUBLISHED

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.config import GROUPS
from idefics_qlora.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MESSAGES = re.findall(
    r"^```text message\n(.*?)\n```$",
    (DOCS / "troubleshooting.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)


def literals(tree):
    """Every text of a module but its docstrings, with ``...`` where a value is put in."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if id(node) not in alone:
            yield re.sub(r"%[-.\d]*[sdgf]", "...", text)


@pytest.fixture(scope="module")
def source():
    """The texts of the package that it can say."""
    files = Path(iq.__file__).parent.rglob("*.py")
    return {text for path in files for text in literals(ast.parse(path.read_text("utf-8")))}


def said(message, source):
    """Whether one text of the source is this message, or goes on where this ends."""
    words = map(re.escape, message.strip(" .").split("..."))
    # A value stands for a value; the source may have several where the page has one. What stands
    # first or last may be put there by another text.
    begin = ".*?" if message.startswith("...") else ""
    pattern = re.compile(begin + r"\.\.\..*?".join(words), re.DOTALL)
    return any(pattern.match(text) for text in source)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_source(message, source):
    """Who looks for a message finds it: each is quoted from its beginning as one is raised."""
    assert len(message) > 20
    assert said(message, source)


def test_a_message_that_nothing_raises_is_found(source):
    """The control of the test above: another word, a docstring's sentence; and there are many."""
    (lock,) = [message for message in MESSAGES if message.startswith("output_dir=")]
    assert said(lock, source)
    assert not said(lock.replace("another run", "somebody"), source)
    assert not said(" ".join(iq.train.__doc__.splitlines()[:1]), source)
    assert len(MESSAGES) > 50


def test_every_setting_is_on_the_page():
    """By group, each below a heading that can be linked, with its default and its explanation."""
    page = site_pages.settings_page()
    told = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=\n##|\Z)", page, re.DOTALL | re.MULTILINE))
    assert [*told] == [name for names in GROUPS.values() for name in names]
    for field in dataclasses.fields(iq.TrainConfig):
        line, text = told[field.name].split("\n\n", 1)
        assert line.endswith((f"default `{field.default!r}`", "must be given")), line
        assert len(text) > 20, field.name
    assert re.findall(r"^## (\w+)", page, re.MULTILINE) == [g.capitalize() for g in GROUPS]
    assert site_pages.ABOUT.keys() == GROUPS.keys()


def test_every_public_name_is_in_the_reference():
    """And no other."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: idefics_qlora\.(\w+)$", page, re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(iq.__all__)


def public(path, module):
    """The names of a module's functions and classes, as the reference may have them."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()  # without __all__: what is defined in it
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    ]
    for name in names:
        value = getattr(module, name)
        places = [path, getattr(value, "__module__", path)]
        places += ["idefics_qlora"] * (name in iq.__all__ and getattr(iq, name) is value)
        yield {f"{place}.{name}" for place in places}


class Links(HTMLParser):
    """The targets of a page's links and pictures, and the names within it."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.names = set(), {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key in ("href", "src") and value:
                self.targets.add(value)
            elif key in ("id", "name") and value:
                self.names.add(value)


def test_the_site_is_built_and_every_link_leads_somewhere(tmp_path):
    """Strictly, without a network, with every page, and nothing that is fetched from elsewhere."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {p.resolve(): Links(p) for p in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 20
    reference = pages[(tmp_path / "site" / "api.html").resolve()].names
    assert {f"idefics_qlora.{name}" for name in iq.__all__ if name != "__version__"} <= reference
    for name in ("metrics", "tiny", "images"):
        names = [*public(f"idefics_qlora.{name}", getattr(iq, name))]
        assert len(names) > 4
        assert all(known & reference for known in names), names
    for page, links in pages.items():
        if page.name == "404.html":  # its links are absolute, for it is shown anywhere
            continue
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.hostname == "squidfunk.github.io", f"{page.name}: {target}"
                continue
            there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert there.exists(), f"{page.name}: {target}"
            if there in pages:
                assert unquote(parts.fragment) in pages[there].names, f"{page.name}: {target}"


def test_the_job_runs_as_it_is_shown(cards, tmp_path, monkeypatch, capfd):
    """The configuration file and the commands of the page, one after the other."""
    import test_docs

    monkeypatch.chdir(tmp_path)
    test_docs.lay_out_files(cards)
    page = (DOCS / "how_to" / "job.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```text\n(model: .*?)```", page, re.DOTALL)
    Path("run.yaml").write_text(text)
    assert yaml.safe_load(text)["train"]["max_steps"] == 4
    commands = re.findall(rf"^    {cli.PROG} (.*)$", page, re.MULTILINE)
    assert [words.split()[0] for words in commands] == ["train", "evaluate", "generate"]
    for words in commands:
        assert cli.main(words.split()) == cli.DONE, capfd.readouterr().err
    assert Path("texts.jsonl").read_text().count("\n") == 1


@pytest.mark.slow
def test_the_pictures_are_drawn_from_a_run(tmp_path):
    """Anyone can draw them again: a terminal's last look, the losses, the samples, a preview."""
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tools" / "site_pictures.py"),
            *("--max-steps", "20", "--output", str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, shown in [
        ("terminal", "Held-out loss"),
        ("loss", "<polyline"),
        ("samples", "data:image/png;base64,"),
        ("preview", "sees image 0"),
    ]:
        drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        kept = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
        assert shown in drawn
        assert shown in kept
    for name in ("report", "report_phone", "demo") if browser.find() else ():
        for folder in (tmp_path, DOCS / "pictures"):
            assert 10_000 < (folder / f"{name}.webp").stat().st_size < 200_000


def test_the_page_of_families_has_every_published_base():
    """With the parameters that a test counts, and what a picture is for each."""
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert families.PICTURES.keys() == PUBLISHED.keys()
    for name, base in PUBLISHED.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        assert cells[1] == f"{base.parameters:,}"
        assert cells[2] == "{}, {:,}".format(*families.PICTURES[name])
        assert all(re.fullmatch(r"\d+\.\d / \d+\.\d", cell) for cell in cells[3:5])
    for kind in FAMILIES:
        assert any(base.config_class.model_type == kind for base in PUBLISHED.values())
