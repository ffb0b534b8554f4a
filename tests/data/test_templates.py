"""A model knows what it was asked in training, and plain rows are asked the same."""

import copy
import json
import logging
import re
import shutil

import pytest
import torch
from helpers import config_of, same_examples, warnings_of

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.data.formats import as_example, prompt_of
from idefics_qlora.data.templates import (
    captions_of,
    question_findings,
    remember,
    templates_of,
    trained_captions,
    trained_question,
)

ASKED = "Question: Which creature is it? Answer:"
CAPTIONS = iq.Captions(question=ASKED, answer=" {name}.")
TEMPLATES = {"question": ASKED, "answer": " {name}."}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, loaded, cards):
    """A run by ``Captions``, and the model as ``train`` left it; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    model = iq.add_lora(copy.deepcopy(loaded[0]))
    config = config_of(folder, max_steps=1, save_steps=1, learning_rate=0.01)
    iq.train(model, loaded[1], cards[:8], config=config, to_example=CAPTIONS)
    return folder, model


def test_rows_that_say_nothing_are_asked_as_in_training(picture):
    """A picture alone, with its answer, or under the usual name; what asks something is left."""
    asked = [picture, ASKED]
    for row in ({"image": picture}, {"image": picture, "text": "x"}, {"image": picture, "z": 1}):
        assert prompt_of(row, trained=CAPTIONS) == asked
    row = {"image": picture, "name": "Fox", "caption": "A fox.", "question": None}
    assert same_examples(as_example(row, trained=CAPTIONS), iq.Example(asked, " Fox."))
    named = iq.Captions(question=ASKED, answer=" {name}", image="photo")
    assert prompt_of({"photo": picture}, trained=named) == asked
    assert prompt_of({"image": picture}, trained=named) == asked
    own = {"image": picture, "question": "Where?", "answer": "Here."}
    assert same_examples(as_example(own, trained=CAPTIONS), as_example(own))
    example = iq.Example([picture, "Mine"], " x")
    assert as_example(example, trained=CAPTIONS) is example
    assert prompt_of([picture, "Mine"], trained=CAPTIONS) == [picture, "Mine"]
    of_column = iq.Captions(question="Question: {question} Answer:", answer=" {answer}")
    assert as_example(own, trained=of_column).prompt[1] == "Question: Where? Answer:"


def test_another_to_example_wins(picture):
    """What the user passes is what is asked, whatever the model was trained with."""
    other = iq.Captions(question="What?", answer=" {text}")
    row = {"image": picture, "text": "x"}
    assert as_example(row, other, trained=CAPTIONS).prompt[1] == "What?"
    assert prompt_of(row, other, trained=CAPTIONS)[1] == "What?"


def test_a_row_that_lacks_what_training_had_is_told(picture):
    """The column, the template, and the way out."""
    with pytest.raises(ValueError, match=r"'name', which answer=.*so the model was trained"):
        as_example({"image": picture, "text": "x"}, trained=CAPTIONS)
    by_kind = iq.Captions(question="Which {kind}?", answer=" {name}")
    with pytest.raises(ValueError, match=r"'kind', which question=.*pass to_example="):
        prompt_of({"image": picture}, trained=by_kind)


def test_templates_of_a_file_are_not_trusted(processor):
    """What is none is as if it were not there; a field is a column's name alone."""
    owner = copy.copy(processor)
    for kept in (None, 3, [], {}, {"question": 3}, {"access": "x"}, {"answer": "{a.b}"}):
        remember(kept, owner)
        assert trained_captions(owner) is None
        assert trained_question(owner) == QUESTION
    assert templates_of(lambda row: row) is templates_of(None) is None
    assert templates_of(CAPTIONS) == TEMPLATES
    assert captions_of(TEMPLATES) == CAPTIONS
    remember(TEMPLATES, owner)
    assert trained_question(owner) == ASKED
    remember({"question": "Which {kind}?", "answer": " x"}, owner)
    assert trained_question(owner) == QUESTION
    remember({"question": "What is {{x}}?", "answer": " x"}, owner)
    assert trained_question(owner) == "What is {x}?"


def test_the_default_in_the_place_of_the_own_question_is_told(picture):
    """Both are named; where the default was trained, or something else is asked, nothing is."""
    (finding,) = question_findings([picture, f"{QUESTION} "], CAPTIONS)
    assert QUESTION in finding.line
    assert ASKED in finding.line
    default = iq.Captions(answer=" {name}")
    for prompt, known in (
        ([picture, QUESTION], None),
        ([picture, QUESTION], default),
        ([picture, "What?"], CAPTIONS),
        ([iq.Turn("user", QUESTION)], CAPTIONS),
    ):
        assert not list(question_findings(prompt, known))


def test_a_trained_model_is_asked_what_it_was_trained_with(trained, cards, tmp_path):
    """At once after training and from its checkpoint: the same as with the run's ``Captions``."""
    folder, model = trained
    loaded, processor = iq.load_finetuned(folder / "checkpoint-1")
    assert model.trained_templates == loaded.trained_templates == TEMPLATES
    pictures = [{"image": card["image"]} for card in cards[:2]]
    right = [[card["image"], ASKED] for card in cards[:2]]
    for ours in (model, loaded):
        options = {"max_new_tokens": 4, "return_full_text": True}
        texts = iq.generate(ours, processor, pictures, **options)
        assert texts == iq.generate(ours, processor, right, **options)
        assert ASKED in texts[0]
        plain, own, other = (
            iq.evaluate(ours, processor, cards[:4], to_example=how)["eval_loss"]
            for how in (None, CAPTIONS, iq.Captions(question="What?", answer=" {name}."))
        )
        assert plain == own != other
    use = [iq.image_use(model, processor, cards[:4], to_example=how) for how in (None, CAPTIONS)]
    assert use[0].loss == use[1].loss
    shown = (
        str(iq.preview_batch(processor, cards[:1], how, image_dir=tmp_path))
        for how in (None, CAPTIONS, iq.Captions(answer=" {name}."))
    )
    plain, own, other = shown
    assert plain == own != other


def test_the_default_question_is_warned_of(trained, cards, caplog, tmp_path):
    """In generate, evaluate, a preview, and when the adapter is trained further."""
    folder, _ = trained
    model, processor = iq.load_finetuned(folder, trainable=True)
    default = iq.Captions(answer=" {name}.")
    config = config_of(tmp_path / "more", max_steps=1)
    for call in (
        lambda: iq.generate(model, processor, [[cards[0]["image"], QUESTION]], max_new_tokens=1),
        lambda: iq.evaluate(model, processor, cards[:2], to_example=default),
        lambda: iq.preview_batch(processor, cards[:1], default),
        lambda: iq.train(model, processor, cards[:8], config=config),
    ):
        caplog.clear()
        call()
        told = [line for line in warnings_of(caplog) if "the default, but" in line]
        assert len(told) == 1, told
        assert QUESTION in told[0]
        assert ASKED in told[0]
    assert model.trained_templates == {"question": QUESTION}  # as it is trained now


def test_nothing_is_claimed_of_a_function(loaded, cards, tmp_path):
    """Of a to_example of the user's own, no template is kept, and none of an earlier run."""
    model = iq.add_lora(copy.deepcopy(loaded[0]))
    remember(TEMPLATES, model)
    config = config_of(tmp_path, max_steps=1, save_steps=1)
    iq.train(model, loaded[1], cards[:8], config=config, to_example=lambda row: CAPTIONS(row))
    assert model.trained_templates is None
    assert load_checkpoint(tmp_path / "checkpoint-1").state["templates"] is None
    card = (tmp_path / "checkpoint-1" / "README.md").read_text()
    assert QUESTION not in card
    assert '"..."]  # the text as in training' in card


def test_what_is_given_away_has_the_question(trained, tmp_path, caplog):
    """The card and the file of an adapter, and of merged weights, which load with it."""
    caplog.set_level(logging.ERROR)
    folder = shutil.copytree(trained[0], tmp_path / "run")
    card = (folder / "checkpoint-1" / "README.md").read_text()
    said = f'a picture and the text "{ASKED}"; what was learnt to be said is "{{name}}."'
    assert said in card
    assert '[{"image": "photo.jpg"}]' in card
    assert QUESTION not in card
    iq.merge(folder, tmp_path / "merged", verify=False)
    for upload in (
        iq.push(folder, "me/mine", base="me/tiny", dry_run=True),
        iq.push(tmp_path / "merged", "me/mine", dry_run=True, base="me/tiny"),
    ):
        assert json.loads(upload.files["idefics_qlora.json"])["templates"] == TEMPLATES
        assert said in upload.files["README.md"].decode()
    model, processor = iq.load_model(tmp_path / "merged", device="cpu")
    assert trained_captions(model) == trained_captions(processor) == CAPTIONS
    shared = tmp_path / "shared"
    shared.mkdir()
    for name, content in iq.push(folder, "me/mine", base="me/tiny", dry_run=True).files.items():
        (shared / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    model, _ = iq.load_finetuned(shared, base=iq.tiny.BASE, device="cpu")
    assert trained_captions(model) == CAPTIONS


def test_another_question_is_no_resume(trained, loaded, cards, tmp_path):
    """The rows are others then; the message says which template."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    config = config_of(folder, max_steps=2, learning_rate=0.01)
    other = iq.Captions(question="What?", answer=" {name}.")
    with pytest.raises(
        ValueError, match=re.escape(f"the rows' question: was {ASKED!r}, now 'What?'")
    ):
        iq.train(
            iq.add_lora(copy.deepcopy(loaded[0])), loaded[1], cards[:8],
            config=config, to_example=other,
        )  # fmt: skip
    same = iq.add_lora(copy.deepcopy(loaded[0]))
    iq.train(same, loaded[1], cards[:8], config=config, to_example=CAPTIONS)
    assert torch.isfinite(torch.tensor(iq.evaluate(same, loaded[1], cards[:2])["eval_loss"]))
