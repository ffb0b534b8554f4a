"""The notebook of the examples: it runs, and what is kept of it is what it then shows."""

import ast
import copy
import json
import re

import datasets
import finetune_pokemon_cards
import nbformat
import pytest
import run_notebook
from published import PUBLISHED

import idefics_qlora as iq

NOTEBOOK = run_notebook.NOTEBOOK
CHAPTERS = (
    *("Install", "Load", "Print", "Ask it", "Dataset", "LoRA", "Train", "Ask again"),
    "Share",
)
BASES = {"SmolVLM": "smolvlm", "idefics-9b": "idefics"}
"""The positions of the switch beside ``tiny``, and their families."""


@pytest.fixture
def notebook():
    """The notebook as it is kept."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def own_jupyter(tmp_path, monkeypatch):
    """What Jupyter writes for a kernel is written into the test's own folder."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def code_of(notebook):
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def words_of(notebook):
    """Its cells of text, as one."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def text_of(notebook, name):
    """What a cell shows, as text."""
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    return "".join(map(run_notebook.shown, cell.outputs))


def kinds(cell):
    """The kinds of a cell's outputs."""
    return [(output.output_type, *sorted(output.get("data", ()))) for output in cell.outputs]


@pytest.mark.slow
def test_it_runs_offline_and_the_last_answer_is_learnt(notebook, own_jupyter, tmp_path):
    """Every cell in a real kernel, unchanged: each shows the kinds of things that are kept of it,
    the loss falls, the files are there, and in the end it says what the adapter says."""
    kept = code_of(notebook)
    new = copy.deepcopy(notebook)
    for cell in code_of(new):
        cell.outputs, cell.execution_count = [], None
    run_notebook.execute(new, tmp_path)
    run_notebook.clean(new)
    assert run_notebook.problems(new) == []
    assert [kinds(cell) for cell in code_of(new)] == [kinds(cell) for cell in kept]

    run = tmp_path / "runs" / "cards-tiny"
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert losses[-1] < losses[0] / 2
    table = text_of(new, "train-run")
    assert [f"<td>{loss:.4f}</td>" in table for loss in losses] == [True] * 5

    card = iq.tiny.creature_cards(1, seed=2, split="held_out")[0]
    fields = iq.tiny.card_fields(card["caption"])
    before, after = (
        line.partition(":")[2].strip() for line in text_of(new, "after-training").splitlines()
    )
    assert before == text_of(new, "before").strip()
    assert after == text_of(new, "load-finetuned").strip()
    prompt = iq.pokemon_card_example(card).prompt
    model, processor = iq.load_finetuned(run)
    assert after == iq.generate(model, processor, [prompt])[0].strip()
    assert not any(iq.tiny.card_fields(before).get(name) == fields[name] for name in fields)
    right = [name for name in fields if iq.tiny.card_fields(after).get(name) == fields[name]]
    assert len(right) >= len(fields) - 1, after
    assert text_of(new, "image-use").startswith("This model looks")

    assert f"{(run / 'report.html').stat().st_size:,} bytes" in text_of(new, "report-page")
    best = run / (run / "best").read_text().strip()
    size = (best / "adapter_model.safetensors").stat().st_size / 1e3
    uploaded = dict(re.findall(r"^ *(\S+ \S+)  (\S+)$", text_of(new, "push"), re.MULTILINE))
    assert uploaded[f"{size:.1f} kB"] == "adapter_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("position", BASES)
def test_the_other_positions_of_the_switch_run(position, notebook, bases, tmp_path, monkeypatch):
    """The same cells with rows of the tutorial's dataset and a base of the position's family: only
    what is too large or elsewhere is replaced by something small and here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    cards = iq.tiny.creature_cards(12, seed=0, directory=tmp_path / "pictures")
    (tmp_path / "cards").mkdir()
    datasets.Dataset.from_list(cards).to_parquet(tmp_path / "cards" / "train.parquet")
    instead = {
        'BASE = "tiny"': f'BASE = "{position}"',
        finetune_pokemon_cards.parse([]).dataset: str(tmp_path / "cards"),
        "(40, 2e-4)": "(2, 2e-4)",
        "0.002": "0.5",
        "https://images.pokemontcg.io/pop6/2_hires.png": cards[0]["image_url"],
        "else None,": 'else "me/base",',
    }
    code = "\n\n".join(cell.source for cell in code_of(notebook))
    hub_id = re.search(f'"{position}": "(.*?)"', code)[1]
    for there, here in {**instead, hub_id: bases(BASES[position])[0].name_or_path}.items():
        assert code.count(there) == 1, there
        code = code.replace(there, here)
    names: dict = {}
    exec(compile(code, NOTEBOOK, "exec"), names)
    assert names["result"].global_step == 2
    assert [len(names[rows]) for rows in ("train_rows", "eval_rows")] == [6, 6]
    assert names["upload"].repo_id == "me/cards"


def test_the_switch_names_what_there_is(notebook):
    """Published bases, whose families are known; the tutorial's dataset; and the table above it
    explains each position."""
    names: dict = {}
    exec(code_of(notebook)[0].source, names)
    assert names["BASE"] == "tiny"  # nothing to download
    assert set(names["HUB_IDS"]) == set(BASES)
    assert set(names["HUB_IDS"].values()) <= set(PUBLISHED)
    assert finetune_pokemon_cards.parse([]).dataset == names["CARDS"]
    rows = re.findall(r'^\| `"(.*?)"` \|', words_of(notebook), re.MULTILINE)
    assert rows == ["tiny", *names["HUB_IDS"]]


def test_what_is_kept_is_of_these_sources(notebook):
    """Whoever changes the code runs it anew: ``python tools/run_notebook.py``."""
    cells = code_of(notebook)
    assert notebook.metadata[run_notebook.RAN] == run_notebook.fingerprint(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert run_notebook.problems(notebook) == []
    again = copy.deepcopy(notebook)
    run_notebook.clean(again)
    assert nbformat.writes(again) == nbformat.writes(notebook)
    assert nbformat.writes(notebook) + "\n" == NOTEBOOK.read_text(encoding="utf-8")


def test_every_cell_that_shows_something_has_it(notebook):
    """A reader who does not run it misses nothing: texts, pictures, the table of training."""
    for cell in code_of(notebook):
        tree = ast.parse(cell.source)
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        shows = isinstance(tree.body[-1], ast.Expr) or {"print", "iq.train"} & set(calls)
        assert bool(cell.outputs) == bool(shows), cell.id
    table = text_of(notebook, "train-run")
    assert '<progress value="100" max="100"' in table
    assert "<th>Held-out loss</th>" in table
    before, after = text_of(notebook, "after-training").splitlines()
    assert before.partition(":")[2].strip() == text_of(notebook, "before").strip()
    assert after.partition(":")[2].strip() == text_of(notebook, "load-finetuned").strip()
    data = {cell.id: str(cell.get("outputs")) for cell in notebook.cells}
    pictures = [name for name in data if "image/png" in data[name]]
    assert {"picture", "to-example", "preview-batch", "all-held-out"} <= set(pictures)
    assert "trainable params" in text_of(notebook, "add-lora")
    assert "Linear4bit" in text_of(notebook, "print-model")
    assert "adapter_model.safetensors" in text_of(notebook, "push")


def test_its_texts_lead_somewhere(notebook):
    """The tutorial's chapters in their order; links, pictures and names that exist."""
    text = words_of(notebook)
    titles = re.findall(r"^## (\d+)\. (.*)$", text, re.MULTILINE)
    assert titles == [(str(n), title) for n, title in enumerate(CHAPTERS, start=1)]
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 5
    for target in links:
        assert (NOTEBOOK.parent / target).exists(), target
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (NOTEBOOK.parent / name).exists(), name
    for name in re.findall(r"\biq\.(\w+)", text):
        assert name in iq.__all__, name


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (nbformat.v4.new_output("error", ename="ValueError", evalue="no"), "an error, ValueError"),
        (nbformat.v4.new_output("stream", name="stderr", text="UserWarning: no"), "UserWarning"),
        (nbformat.v4.new_output("stream", text="it is in /home/me/runs"), "/home/me/runs"),
        (nbformat.v4.new_output("stream", text=r"it is in C:\runs"), r"C:\runs"),
        (
            nbformat.v4.new_output("display_data", {"text/html": '<a href="/tmp/x/y">y</a>'}),
            "/tmp/x/y",
        ),
        (nbformat.v4.new_output("stream", text="x" * run_notebook.MOST_BYTES), "bytes, more than"),
    ],
)
def test_what_should_not_be_kept_is_told(output, told, notebook):
    """The control of the tests above; other code is noticed, too."""
    cell = code_of(notebook)[1]
    cell.outputs.append(output)
    (problem,) = run_notebook.problems(notebook)
    assert told in problem
    cell.source += "\n# changed"
    assert notebook.metadata[run_notebook.RAN] != run_notebook.fingerprint(notebook)


def test_bars_and_clocks_are_left_out(notebook):
    """What a kernel adds that says nothing to a reader, or differs each time."""
    before = nbformat.writes(notebook)
    cell = code_of(notebook)[1]
    cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    bar = "Loading weights: 100%|██████████| 123/123 [00:00<00:00, 910.33it/s]"
    cell.outputs += [
        nbformat.v4.new_output("stream", name="stderr", text=bar),
        nbformat.v4.new_output("display_data", {"text/html": "", "text/plain": "<HTML object>"}),
    ]
    notebook.metadata["language_info"]["version"] = "3.0"
    run_notebook.clean(notebook)
    assert nbformat.writes(notebook) == before


def test_it_is_not_run_where_it_fails(own_jupyter, tmp_path):
    """A notebook whose run has a warning stays as it was."""
    path = tmp_path / "warns.ipynb"
    cells = [nbformat.v4.new_code_cell("import sys\nprint('careful', file=sys.stderr)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    assert run_notebook.main(["--notebook", str(path)]) == 1
    assert path.read_bytes() == before
