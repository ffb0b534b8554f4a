"""What runs keep for their report, and that keeping it changes nothing."""

import copy
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import config_of, same, tensors_of, warnings_of
from pages import Page

import idefics_qlora as iq
from idefics_qlora.evaluation.samples import MAX_NEW_TOKENS
from idefics_qlora.model.adapters import adapter_tensors, without_adapter


def settings(folder, **changes) -> iq.TrainConfig:
    given = {"eval_steps": 2, "save_steps": 2, "max_steps": 4, "learning_rate": 8e-3, **changes}
    return config_of(folder, load_best_model_at_end=True, **given)


def train(model, processor, rows, held_out, folder, to_example=iq.pokemon_card_example, **changes):
    config = settings(folder, **changes)
    return iq.train(model, processor, rows, held_out, config=config, to_example=to_example)


def kept(folder) -> dict:
    return json.loads((folder / "gallery" / "rows.json").read_text())


@pytest.fixture(scope="module")
def finished(loaded, cards, tmp_path_factory):
    """A run that has ended, with nine held-out rows and no samples; its model and folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    model = iq.add_lora(copy.deepcopy(loaded[0]))
    train(model, loaded[1], cards[:20], cards[20:29], folder)
    return model, folder


def test_four_rows_are_captioned_at_the_end(finished, processor, cards):
    """Without ``eval_samples``, too: by the base and by the adapter that the run came to."""
    model, folder = finished
    found = kept(folder)
    assert (found["step"], found["captioned"]) == (4, int((folder / "best").read_text()[-2]))
    assert [row["row"] for row in found["rows"]] == [f"eval_rows[{n}]" for n in range(4)]
    prompts = [iq.pokemon_card_example(card).prompt for card in cards[20:24]]
    options = {"batch_size": 4, "max_new_tokens": MAX_NEW_TOKENS}
    told = iq.generate(model, processor, prompts, **options)
    with without_adapter(model):
        base = iq.generate(model, processor, prompts, **options)
    assert [row["base"] for row in found["rows"]] == base
    assert base != told
    for row, text, card in zip(found["rows"], told, cards[20:24], strict=True):
        assert row["right"] == [iq.pokemon_card_example(card).completion]
        assert row["prompt"] == prompts[0][1]
        assert row["text"].split()[:3] == text.split()[:3]  # more rows stood in its batch
        (picture,) = row["images"]
        assert iq.images.open_image(folder / picture).size == card["image"].size  # undistorted
        assert row["seen"] == [[64, 64]]


def test_how_rows_ask_is_kept(lora, processor, cards, tmp_path):
    """The question, if a prompt is pictures and one text behind them, and whether it is a turn of a
    dialogue: a page asks the same way of other pictures."""
    picture = cards[0]["image"]
    file = tmp_path / "a cat.png"
    picture.save(file)
    prompts = [
        [file, picture, "Which?"],
        [iq.Turn("user", [picture, "Which?"])],
        [iq.Turn("system", "Be brief."), iq.Turn("user", [picture, "Which?"])],
        ["Here:", picture, "Which?"],
    ]
    held_out = [iq.Example(prompt, " This.") for prompt in prompts]
    train(lora, processor, held_out, held_out, tmp_path / "run", None, max_steps=2)
    rows = kept(tmp_path / "run")["rows"]
    assert rows[0]["files"] == ["a cat.png", ""]
    assert [row["question"] for row in rows] == ["Which?", "Which?", None, None]
    assert [row["dialogue"] for row in rows] == [False, True, True, False]


def test_the_rows_of_the_highest_loss(finished, processor, cards):
    """They are those of which an evaluation of each row alone says so, the highest first."""
    model, folder = finished
    losses = {}
    saved = copy.deepcopy(adapter_tensors(model))
    last = iq.load_finetuned(folder / "checkpoint-4", device="cpu")[0]
    for n, card in enumerate(cards[20:29]):
        losses[n] = iq.evaluate(
            last, processor, [card], to_example=iq.pokemon_card_example, batch_size=1
        )["eval_loss"]
    highest = sorted(losses, key=losses.get, reverse=True)[:6]
    found = kept(folder)["highest"]
    assert [row["index"] for row in found] == highest
    assert [row["loss"] for row in found] == pytest.approx([losses[n] for n in highest], rel=1e-3)
    assert all(isinstance(row["text"], str) for row in found)
    assert same(saved, adapter_tensors(model))


def test_a_finished_run_has_its_page(finished, loaded, cards):
    """With curves, rows, numbers; another start of the run leaves it as it is."""
    folder = finished[1]
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert "finished after 4 steps" in page.text
    assert len(page.all("img")) >= 4
    assert page.text.count("base, before training") == 4
    assert "GiB" in page.text
    before = (folder / "gallery" / "rows.json").stat().st_mtime_ns
    train(iq.add_lora(copy.deepcopy(loaded[0])), loaded[1], cards[:20], cards[20:29], folder)
    assert (folder / "gallery" / "rows.json").stat().st_mtime_ns == before
    assert (folder / "report.html").read_text() == html


def test_samples_are_shown_along_the_way(lora, processor, cards, tmp_path):
    """While the run goes on, its page has what the base and each evaluation said."""
    pages, rows = [], []

    def on_log(record):
        if record["step"] == 4 and "loss" in record:
            rows.append(kept(tmp_path))
            pages.append(Page(iq.report(tmp_path, output=tmp_path / "look.html").read_text()))

    config = settings(tmp_path, eval_samples=5)
    iq.train(
        *(lora, processor, cards[:20], cards[20:27]),
        config=config,
        to_example=iq.pokemon_card_example,
        on_log=on_log,
    )
    (page,), (found,) = pages, rows
    assert "under way" in page.text
    assert len(found["rows"]) == 5
    assert found["captioned"] is None
    assert all(isinstance(row["base"], str) for row in found["rows"])
    assert page.text.count("step 2 ") >= 5
    assert "after training" not in page.text
    (*_, record) = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())["log_history"]
    end = kept(tmp_path)
    if end["captioned"] == 4:  # what the last evaluation said is what is shown
        said = {sample["row"]: sample["text"] for sample in record["eval_samples"]}
        assert {row["row"]: row["text"] for row in end["rows"]} == said


@pytest.mark.parametrize("how", ["gone on", "in the way"])
def test_the_report_changes_no_number(base, processor, cards, tmp_path, how):
    """Rows are read for it once more after a resume, or it cannot be written: the same weights,
    with a to_example, too, that draws at random."""

    def to_example(card):
        torch.rand(1)
        return iq.pokemon_card_example(card)

    def run(folder, on_log=None):
        given = copy.deepcopy(base), processor, cards[:20], cards[20:22]
        config = settings(folder, max_steps=6)
        iq.train(
            *(iq.add_lora(given[0]), *given[1:]),
            config=config,
            to_example=to_example,
            on_log=on_log,
        )

    run(tmp_path / "a")
    if how == "gone on":
        run(tmp_path / "b", lambda record: iq.STOP if record["step"] == 2 else None)
        assert not (tmp_path / "b" / "checkpoint-6").exists()
    else:
        (tmp_path / "b" / "report.html").mkdir(parents=True)
        (tmp_path / "b" / "gallery").write_text("in the way")
    run(tmp_path / "b")
    assert same(*(tensors_of(tmp_path / name / "checkpoint-6") for name in "ab"))


def test_what_cannot_be_written_is_a_warning(lora, processor, cards, tmp_path, caplog):
    """A run whose report fails trains to its end and says what is missing."""
    (tmp_path / "gallery").write_text("in the way")
    (tmp_path / "report.html").mkdir()
    result = train(lora, processor, cards[:20], cards[20:22], tmp_path)
    assert result.global_step == 4
    said = "\n".join(warnings_of(caplog))
    assert "the report's gallery is not complete" in said
    assert f"{tmp_path / 'report.html'} cannot be written" in said
    assert "training goes on" in said


def test_what_others_keep_there_stays(lora, processor, cards, tmp_path):
    """A new run deletes the gallery of another one that was there, and nothing else."""
    (tmp_path / "gallery" / "mine").mkdir(parents=True)
    (tmp_path / "gallery" / "mine.png").write_text("mine")
    for name in ("row-7-image-0.webp", ".row-8-image-0.webp.incomplete", "rows.json"):
        (tmp_path / "gallery" / name).write_text('{"run": "another", "step": 0}')
    train(lora, processor, cards[:20], cards[20:22], tmp_path)
    left = {path.name for path in (tmp_path / "gallery").iterdir()}
    assert left == {
        *("mine", "mine.png", "rows.json"),
        *("row-0-image-0.webp", "row-1-image-0.webp"),
    }


def test_without_held_out_rows(lora, processor, cards, tmp_path):
    """There is a page all the same, at the end, without a gallery."""
    config = config_of(tmp_path, max_steps=2)
    iq.train(lora, processor, cards, config=config, to_example=iq.pokemon_card_example)
    page = Page((tmp_path / "report.html").read_text())
    assert "finished after 2 steps" in page.text
    assert page.all("img") == []
    assert not (tmp_path / "gallery").exists()
    assert "held out" not in page.text


def test_fewer_rows_than_four(lora, processor, cards, tmp_path):
    """All there are that can be read; a row without picture, one with two, one that is broken."""
    two = iq.Example([cards[1]["image"], cards[2]["image"], "Which?"], " Both.")
    none = iq.Example(["Is there a picture?"], " No.")
    broken = iq.Example([Path("nowhere.png"), "What?"], " Nothing.")
    rows = [*map(iq.pokemon_card_example, cards[:20])]
    train(lora, processor, rows, [two, broken, none], tmp_path, None, on_bad_row="skip")
    found = kept(tmp_path)["rows"]
    assert [(row["row"], len(row["images"])) for row in found] == [
        *(("eval_rows[0]", 2), ("eval_rows[2]", 0)),
    ]
    page = Page((tmp_path / "report.html").read_text())
    assert "eval_rows[1] : " in page.text  # left out


RUN = """
import json, os, signal, sys
import idefics_qlora as iq
model, processor = iq.tiny.load_model(device="cpu")
cards = iq.tiny.creature_cards(29, seed=0)
def on_log(record):
    if len(sys.argv) > 2 and [record["step"], *record.keys() & {"eval_loss"}] == [4, "eval_loss"]:
        os.kill(os.getpid(), signal.SIGKILL)
config = iq.TrainConfig(
    output_dir=sys.argv[1], max_steps=6, global_batch_size=4, micro_batch_size=2, fast=False,
    precision="fp32", logging_steps=1, eval_steps=2, save_steps=2, num_workers=0, eval_samples=1,
    learning_rate=8e-3, progress="none",
)
iq.train(iq.add_lora(model), processor, cards[:20], cards[20:], config=config,
         to_example=iq.pokemon_card_example, on_log=on_log)
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same(tmp_path):
    """Killed after an evaluation and before its checkpoint: a page at once, and the same end."""

    def run(*arguments):
        done = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], timeout=400)
        return done.returncode

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "killed", "kill") == -signal.SIGKILL
    page = Page(iq.report(tmp_path / "killed").read_text())
    assert "under way or broken off; the last record is of step 4" in page.text
    assert len(page.all("img")) >= 4
    assert page.text.count("step 2 ") >= 1
    assert run(tmp_path / "killed") == 0
    found = [kept(tmp_path / name) for name in ("whole", "killed")]
    assert found[0].pop("run") != found[1].pop("run")
    assert found[0] == found[1]
    assert math.isfinite(found[0]["highest"][0]["loss"])
    pictures = [
        {f.name: f.read_bytes() for f in (tmp_path / name / "gallery").glob("*.webp")}
        for name in ("whole", "killed")
    ]
    assert pictures[0] == pictures[1]
    both = iq.report(tmp_path / "whole", tmp_path / "killed")
    assert "Their settings are the same." in Page(both.read_text()).text
