"""Metrics over what the model says of held-out rows."""

import copy
import functools
import json
import logging

import numpy as np
import pytest
import torch
from helpers import config_of, encoded, every_family, same
from steps import snapshot

import idefics_qlora as iq


def answers_of(base, processor, examples, **options):
    prompts = [example.prompt for example in examples]
    return [text.strip() for text in iq.generate(base, processor, prompts, **options)]


@every_family
def test_a_metric_gets_what_generate_says(base, processor, examples, tmp_path):
    """Every row once, in order, its references or its completion, without white space around."""
    several = iq.Example(examples[1].prompt, examples[1].completion, references=(" a", "b "))
    rows = [examples[0], several, *examples[2:7]]
    got = []

    def right(predictions, references):
        got.append((predictions, references))
        predictions.clear()  # it may do with its lists what it likes
        references[1].clear()
        return 0.25

    file = tmp_path / "answers.jsonl"
    metrics = {"right": right, "second": lambda p, r: {"rows": len(p), "both": len(r[1])}}
    record = iq.evaluate(
        base, processor, rows, metrics=metrics, max_new_tokens=6, predictions_file=file
    )
    expected = answers_of(base, processor, rows, max_new_tokens=6)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == expected
    assert [line["row"] for line in lines] == list(range(7))
    references = [[e.completion.strip()] for e in examples[:7]]
    assert [line["references"] for line in lines] == [references[0], ["a", "b"], *references[2:]]
    assert len(got) == 1
    assert record["eval_right"] == 0.25
    assert (record["eval_second_rows"], record["eval_second_both"]) == (7, 2)
    assert record["eval_generate_s"] > 0
    plain = iq.evaluate(base, processor, rows)
    assert plain["eval_loss"] == record["eval_loss"]
    assert not {"eval_generate_s", "eval_right"} & plain.keys()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_is_opened_once(base, processor, cards, tmp_path, workers):
    """The loss and the answers are of one reading, in processes of their own too."""
    opened = tmp_path / "opened"

    def to_example(card):
        with opened.open("a") as file:
            file.write(card["name"] + "\n")
        return iq.Example([encoded(card["image"]), "What is it?"], f" {card['name']}")

    record = iq.evaluate(
        *(base, processor, cards[:5]),
        to_example=to_example,
        metrics={"exact": iq.metrics.exact_match},
        max_new_tokens=3,
        num_workers=workers,
    )
    assert sorted(opened.read_text().splitlines()) == sorted(card["name"] for card in cards[:5])
    assert 0 <= record["eval_exact"] <= 1


def test_our_metrics_can_be_given_as_they_are(base, processor, examples):
    """Each takes the two lists; that of fields with its fields."""
    names = ("exact_match", "cider_d", "anls", "bleu", "chrf")
    metrics = {name: getattr(iq.metrics, name) for name in names}
    fields = functools.partial(iq.metrics.field_match, fields=lambda text: {"words": text.split()})
    metrics["fields"] = fields
    four = [iq.Example(e.prompt, e.completion, references=["yes"] * 4) for e in examples[:3]]
    metrics["vqa"] = iq.metrics.vqa_accuracy
    record = iq.evaluate(base, processor, four, metrics=metrics, max_new_tokens=3)
    keys = {*(f"eval_{name}" for name in names), "eval_fields_words", "eval_vqa"}
    assert keys <= record.keys()
    assert all(isinstance(record[key], float) for key in keys)


def test_bad_rows_have_no_answers(base, processor, examples, tmp_path):
    """Numbers of rows stay those of the rows."""
    rows = [{"prompt": "nothing"}, *examples[:3]]
    file = tmp_path / "answers.jsonl"
    sizes = []
    iq.evaluate(
        *(base, processor, rows),
        metrics={"n": lambda p, r: sizes.append((len(p), len(r))) or 1},
        max_new_tokens=2,
        predictions_file=file,
    )
    assert sizes == [(3, 3)]
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    "number", [1, True, np.float32(1), np.bool_(True), np.array(1.0), torch.tensor([1.0])]
)
def test_numbers_of_all_kinds(base, processor, examples, number):
    """What a metric's library returns becomes a float."""
    metrics = {"one": lambda p, r: number, "key": lambda p, r: {"a": number}}
    record = iq.evaluate(base, processor, examples[:1], metrics=metrics, max_new_tokens=1)
    assert [type(record[key]) for key in ("eval_one", "eval_key_a")] == [float, float]
    assert record["eval_one"] == record["eval_key_a"] == 1.0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (float("nan"), ValueError, r"metrics\['right'\] gave nan: expected a finite number"),
        ({"a": float("inf")}, ValueError, r"metrics\['right'\] gave inf for 'a'"),
        ("0.5", TypeError, r"metrics\['right'\] gave '0.5' \(str\): expected a number"),
        (None, TypeError, r"metrics\['right'\] gave None \(NoneType\): expected a number"),
        (torch.ones(2), TypeError, r"metrics\['right'\] gave tensor.*expected a number"),
        ({}, TypeError, r"metrics\['right'\] gave {}: expected numbers by name"),
        ({1: 0.5}, TypeError, r"expected numbers by name"),
        ({"a": [1]}, TypeError, r"gave \[1\] for 'a' \(list\)"),
        ([0.5], TypeError, r"gave \[0.5\] \(list\)"),
    ],
)
def test_what_is_no_score(base, processor, examples, given, error, message):
    """The metric is named, with what it gave and what was expected."""
    with pytest.raises(error, match=message):
        iq.evaluate(
            *(base, processor, examples[:1]),
            metrics={"fine": lambda p, r: 1.0, "right": lambda p, r: given},
            max_new_tokens=1,
        )


def test_a_metric_that_raises_is_named(base, processor, examples, tmp_path):
    """With its own type; the answers have been written by then."""
    file = tmp_path / "answers.jsonl"
    with pytest.raises(ZeroDivisionError, match=r"division by zero; raised by metrics\['right'\]"):
        iq.evaluate(
            *(base, processor, examples[:2]),
            metrics={"right": lambda p, r: 1 / 0},
            max_new_tokens=1,
            predictions_file=file,
        )
    assert len(file.read_text().splitlines()) == 2


def test_answers_that_a_metric_cannot_score_are_told_before_training(lora, processor, tmp_path):
    """The row is named, nothing is trained or generated; a function of the user's own is not
    called with what no model has said."""
    rows = iq.tiny.creature_cards(4, seed=0)
    asked = [{"image": r["image"], "question": "Who?", "answers": [r["name"]] * 4} for r in rows]
    calls = []

    def mine(predictions, references):
        calls.append(predictions)
        return 1.0

    metrics = {"vqa": functools.partial(iq.metrics.vqa_accuracy), "mine": mine}
    config = config_of(
        tmp_path / "run", max_steps=1, eval_steps=1, save_steps=1, eval_max_new_tokens=1
    )
    few = [asked[0], {**asked[1], "answers": ["a", "b"]}, asked[2]]
    told = r"metrics\['vqa'\] cannot score eval_rows: eval_rows\[1\] has 2 answers: expected"
    with pytest.raises(ValueError, match=told):
        iq.train(lora, processor, asked, few, config=config, metrics=metrics)
    assert not calls
    assert not (tmp_path / "run").exists()
    cider = {"cider": iq.metrics.cider_d}
    with pytest.raises(ValueError, match=r"'cider'\] cannot score .*: cider_d got 1 example"):
        iq.train(lora, processor, asked, asked[:1], config=config, metrics=cider)
    result = iq.train(lora, processor, asked, asked[:2], config=config, metrics=metrics)
    assert {"eval_vqa", "eval_mine"} <= result.metrics.keys()


def test_two_metrics_of_one_name(base, processor, examples):
    """What one records does not hide what another has."""
    metrics = {"a_b": lambda p, r: 1.0, "a": lambda p, r: {"b": 2.0}}
    with pytest.raises(ValueError, match=r"metrics\['a'\] gave 'b', but eval_a_b is recorded"):
        iq.evaluate(base, processor, examples[:1], metrics=metrics, max_new_tokens=1)


def test_metrics_that_cannot_be_are_told_at_once(base, processor):
    """Before a row is read, all of them."""
    metrics = {"loss": len, "": len, 3: len, "cider": 0.5}
    with pytest.raises(ValueError, match="recorded already") as caught:
        iq.evaluate(base, processor, [{}], metrics=metrics)
    message = str(caught.value)
    assert "metrics['loss']: eval_loss is recorded already" in message
    assert "metrics has the name ''" in message
    assert "metrics has the name 3" in message
    assert "metrics['cider']=0.5: expected a function (predictions, references)" in message
    with pytest.raises(ValueError, match="expected names and functions, such as"):
        iq.evaluate(base, processor, [{}], metrics=[iq.metrics.cider_d])


def test_memory_that_does_not_suffice(base, processor, examples, caplog):
    """Answers come from smaller batches; if not even one fits, the error says what to lower."""
    expected = answers_of(base, processor, examples[:7], max_new_tokens=4)
    sizes, most = [], 2

    def too_large(module, arguments, inputs):
        if inputs.get("use_cache", True):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("injected")

    said = []
    hook = base.register_forward_pre_hook(too_large, with_kwargs=True)
    options = {"metrics": {"a": lambda p, r: said.extend(p) or 1}, "max_new_tokens": 4}
    with caplog.at_level(logging.INFO):
        iq.evaluate(base, processor, examples[:7], **options)
    assert said == expected
    assert sizes[0] == 7
    assert set(sizes) == {7, 3, 1}
    assert "out of memory: answers are generated 1 at a time" in caplog.text
    most = 0
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"lower batch_size \(now 2\) or max_new_tokens \(now 4\)",
    ):
        iq.evaluate(base, processor, examples[:7], **options)
    hook.remove()


@every_family
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answering_does_not_change_training(base, processor, examples, tmp_path, precision):
    """The weights are those of a run without metrics to the bit, dropout goes on where it was."""
    ends = []
    for metrics in (None, {"exact": iq.metrics.exact_match, "n": lambda p, r: {"rows": len(p)}}):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(
            tmp_path / str(bool(metrics)),
            eval_steps=1,
            precision=precision,
            eval_generate_rows=3,
            eval_max_new_tokens=5,
        )
        result = iq.train(model, processor, examples, examples[:5], config=config, metrics=metrics)
        ends.append(snapshot(model))
    assert same(*ends)
    records = [r for r in result.log_history if "eval_loss" in r]
    assert [r["eval_n_rows"] for r in records] == [3.0] * 4
    assert all(0 <= r["eval_exact"] <= 1 and r["eval_generate_s"] > 0 for r in records)
    assert result.metrics["eval_n_rows"] == 3.0
    assert result.metrics["eval_loss"] == records[-1]["eval_loss"]
