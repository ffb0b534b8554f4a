"""What the page of an adapter asks and answers, and what it knows of the run."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import every_family
from pages import entry, write_run
from peft import LoraConfig
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.model.adapters import without_adapter
from idefics_qlora.sharing.side_by_side import Asked, SideBySide, asked_by


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


def test_a_picture_is_shown_as_the_row_has_it(tmp_path):
    """Of samples that were squeezed into squares the undistorted picture is taken; of others the
    sample, which is larger."""
    samples = [
        {"row": f"eval_rows[{n}]", "images": [f"eval_samples/row-{n}-image-0.png"]} for n in (0, 1)
    ]
    run = run_with(tmp_path / "run", asking(0, "What?"), asking(1, "What?"), samples=samples)
    Image.new("RGB", (16, 8)).save(run / "gallery" / "row-0-image-0.webp")
    names = [row.images[0].name for row in asked_by(run).rows]
    assert names == ["row-0-image-0.webp", "row-1-image-0.png"]


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
