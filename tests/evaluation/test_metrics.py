"""Metrics of texts against published values, reference implementations, and their formulas."""

import math
import sys

import pytest

import idefics_qlora as iq
from idefics_qlora.evaluation.metrics import (
    anls,
    bleu,
    chrf,
    cider_d,
    exact_match,
    field_match,
    normalize_answer,
    vqa_accuracy,
)

ONE_OR_MANY = [exact_match, bleu, chrf, anls]
ALL = [*ONE_OR_MANY, cider_d, vqa_accuracy]


def test_exact_match_forgives_nothing_but_outer_space():
    """Case and inner space count; several references are alternatives."""
    assert exact_match(["a cat", " a cat\n", "A cat", "a  cat"], ["a cat"] * 4) == 0.5
    assert exact_match(["a cat", "a dog"], [["one cat", "a cat"], ["a cow"]]) == 0.5


def test_field_match_scores_each_field_alone():
    """The share of right values among the references that state the field."""

    def fields(text):
        return dict(part.split("=") for part in text.split())

    references = ["type=fire hp=60", "type=water hp=50", "type=grass"]
    predictions = ["hp=60 type=fire", "type=water", "type=fire hp=10"]
    assert field_match(predictions, references, fields) == {"type": 2 / 3, "hp": 1 / 2}
    several = [["type=fire", "type=flame"]]
    assert field_match(["type=flame"], several, fields) == {"type": 1.0}
    with pytest.raises(ValueError, match="no field in any reference"):
        field_match(["type=fire"], [""], fields)


def test_field_match_reads_cards(cards):
    """The reader of the drawn cards is such a function."""
    texts = [card["caption"] for card in cards]
    scores = field_match(texts, texts, iq.tiny.card_fields)
    assert set(scores.values()) == {1.0}


def test_bleu_and_chrf_are_those_of_sacrebleu():
    """The example of sacrebleu's documentation: 48.53 and 59.73; without one reference, 29.44."""
    predictions = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert bleu(predictions, references) == pytest.approx(48.53, abs=0.005)
    assert chrf(predictions, references) == pytest.approx(59.73, abs=0.005)
    assert bleu(predictions, [references[0][1:], *references[1:]]) == pytest.approx(
        29.44, abs=0.005
    )


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_without_sacrebleu_the_extra_is_named(metric, monkeypatch):
    """The way out is one line to copy."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=rf"{metric.__name__} needs .*idefics_qlora\[metrics\]"):
        metric(["a"], ["a"])


CAPTIONS = [
    "a small red dragon sleeps",
    "a blue turtle swims in the lake",
    "the bird sings in a tree and sings and sings",
]
CAPTION_REFERENCES = [
    ["a red dragon sleeps on a rock", "a small dragon sleeps"],
    ["a turtle swims in the blue lake", "a turtle in a lake"],
    ["a bird sings in a tree", "the bird sings"],
]


def test_cider_d_is_that_of_the_reference_implementation():
    """Values computed with pycocoevalcap 1.2 on the same words."""
    assert cider_d(CAPTIONS, CAPTION_REFERENCES) == pytest.approx(3.1772873603899723, abs=1e-12)
    first = [several[0] for several in CAPTION_REFERENCES]
    assert cider_d(CAPTIONS, first) == pytest.approx(4.145021889180044, abs=1e-12)
    assert cider_d(first, first) == pytest.approx(10.0)


def test_cider_d_follows_its_formula():
    """Two words, worked out by hand: clipping, the Gaussian of the length, four n-gram lengths."""
    references = ["red dragon", "blue turtle"]
    # Every n-gram is in one of two references. For "red red dragon" the tf-idf vector of single
    # words is log 2 * (2, 1), clipped to (1, 1); that of the reference log 2 * (1, 1). Of the two
    # word pairs of the prediction one is right. There are no longer n-grams in the reference.
    single = 2 / (math.sqrt(5) * math.sqrt(2))
    pairs = 1 / math.sqrt(2)
    expected = 10 * math.exp(-1 / 72) * (single + pairs) / 4
    assert cider_d(["red red dragon", "none"], references) == pytest.approx(expected / 2)


def test_cider_d_reads_words_not_punctuation():
    """Case and punctuation are no difference; hyphens, apostrophes and decimals stay in words."""
    references = ["A red dragon's fire, 2.5 m.", "Two well-fed turtles!"]
    plain = ["a red dragon's fire 2.5 m", "two well-fed turtles"]
    assert cider_d(plain, references) == pytest.approx(cider_d(references, references))
    assert cider_d(["a red dragon s fire 2 5 m", plain[1]], references) < 9


def test_cider_d_needs_a_set():
    """With one example every n-gram is in all of them, and the score would be 0 whatever it is."""
    with pytest.raises(ValueError, match="cider_d got 1 example: expected at least 2"):
        cider_d(["a cat"], ["a cat"])


@pytest.mark.parametrize(
    ("humans", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_is_the_challenges(humans, accuracy):
    """With ten humans, one of them left out in turn: 0.3, 0.6, 0.9 and 1."""
    answers = ["yes"] * humans + ["no"] * (10 - humans)
    assert vqa_accuracy(["Yes."], [answers]) == pytest.approx(accuracy)


def test_vqa_accuracy_averages_over_questions():
    """Every question counts the same; humans' answers are normalised as well."""
    references = [["two"] * 5 + ["2"] * 5, ["a dog"] * 2 + ["cat"] * 8]
    assert vqa_accuracy(["2", "the dog"], references) == pytest.approx((1 + 0.6) / 2)


def test_vqa_accuracy_needs_humans():
    """With three answers or fewer it could not reach 1."""
    with pytest.raises(ValueError, match=r"references\[1\] has 3 answers: expected .* at least 4"):
        vqa_accuracy(["yes", "no"], [["yes"] * 10, ["no"] * 3])


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        # the rules on the challenge's page
        ("YES", "yes"),
        ("It is 2.5 m.", "it is 2.5 m"),
        ("two", "2"),
        ("The dog and a cat", "dog and cat"),
        ("dont", "don't"),
        ("a girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # the official script's less obvious ways
        ("none", "0"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("x-ray -", "xray"),
        ("1,000 a/b", "1000 ab"),
        ("couldnt've", "couldn't've"),
        ("were we well", "were we well"),
        (" on\nthe\ttable ", "on table"),
        ("The 2 dogs, dont they?", "2 dogs don't they"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_the_challenge_does(answer, normalised):
    """The published rules, and what the official script makes of the rest."""
    assert normalize_answer(answer) == normalised


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("The Coca", 0.0), ("CocaCola", 0.89), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)],
)
def test_anls_is_that_of_the_challenge(prediction, score):
    """The example of the Robust Reading Competition's task page."""
    references = [["Coca Cola", "Coca Cola Company"]]
    assert anls([prediction], references) == pytest.approx(score, abs=0.005)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("kitten", "sitting", 1 - 3 / 7),  # the textbook's distance of 3
        ("saturday", "sunday", 1 - 3 / 8),
        ("ab", "ac", 0.0),  # at the threshold
        ("", "", 1.0),
        ("", "text", 0.0),
        ("  two\n words ", "Two Words", 1.0),
    ],
)
def test_anls_follows_its_formula(prediction, reference, score):
    """One minus edits over length, 0 from half of the length on."""
    assert anls([prediction], [reference]) == pytest.approx(score)
    assert anls([reference], [prediction]) == pytest.approx(score)


@pytest.mark.parametrize("metric", ALL)
def test_what_cannot_be_scored_is_refused(metric):
    """Numbers, emptiness and types are checked alike in every metric."""
    with pytest.raises(ValueError, match="there are 2 predictions, but 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="there are no predictions"):
        metric([], [])
    with pytest.raises(ValueError, match="predictions is a single text"):
        metric("ab", ["a", "b"])
    with pytest.raises(ValueError, match=r"predictions\[1\] is None: expected a text"):
        metric(["a", None], [["a"] * 4, ["b"] * 4])
    with pytest.raises(ValueError, match=r"references\[0\] is \[\]: expected a text, or a list"):
        metric(["a", "b"], [[], ["b"]])
    with pytest.raises(ValueError, match=r"references\[1\] is \[1\]: expected a text"):
        metric(["a", "b"], [["a"] * 4, [1]])


@pytest.mark.parametrize("metric", ONE_OR_MANY)
def test_one_reference_needs_no_list(metric):
    """A text and a list with this text are the same."""
    texts = ["a red dragon sleeps on a rock", "a blue turtle swims in the lake"]
    assert metric(CAPTIONS[:2], texts) == metric(CAPTIONS[:2], [[text] for text in texts])
