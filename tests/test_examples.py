"""The examples on drawn data: what they draw is right, they learn it from the pictures, and their
page shows all of these."""

import json
import random
from collections import Counter
from xml.etree import ElementTree

import answer_documents
import classify_cards
import count_in_pictures
import pytest
from helpers import every_family
from pages import Page

import idefics_qlora as iq


def pictures_shown(run):
    """Of each row of the run's gallery, how many pictures it has; the page must show them all."""
    kept = json.loads((run / "gallery" / "rows.json").read_text())
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    alts = [image["alt"] for image in page.all("img")]
    shown = {}
    for row in kept["rows"]:
        assert row["more_images"] == 0
        for number in range(1, len(row["images"]) + 1):
            assert any(alt.startswith(f"Picture {number} of {row['row']};") for alt in alts)
        shown[row["row"]] = len(row["images"])
    return [*shown.values()]


# --- classification -------------------------------------------------------------------------------


@pytest.mark.slow
def test_cards_are_classified_by_their_pictures(tmp_path, capsys):
    """Most are right, far above what the same answers score for other pictures; the matrix on the
    screen and in its file counts every picture once."""
    run = tmp_path / "run"
    result, scores = classify_cards.main(["--output-dir", str(run)])
    assert scores["right"] > 0.7
    assert scores["exchanged"] < 0.25
    number = classify_cards.NUM_HELD_OUT - classify_cards.NUM_HELD_OUT // 3
    assert {f"eval_recall_{kind}" for kind in iq.tiny.FIELDS["type"]} <= result.metrics.keys()
    printed = capsys.readouterr().out
    assert f"right: {scores['right']:.0%}; with the pictures exchanged" in printed
    drawing = ElementTree.fromstring((run / "confusion.svg").read_text(encoding="utf-8"))
    texts = [element.text for element in drawing.iter() if element.text]
    assert sum(int(text) for text in texts if text.isdigit()) == number
    assert pictures_shown(run) == [1] * 6


def test_the_matrix_says_what_was_taken_for_what():
    """Lines are right classes and columns answers, also those that are no class; with the pictures
    exchanged the accuracy is the mean over all ways to give the answers to other pictures."""
    rng = random.Random(0)
    rights = rng.choices("abc", k=60)
    saids = [rng.choice([right, "a", "<d>", ""]) for right in rights]
    pairs = Counter(zip(rights, saids, strict=True))
    moved = [rights[n:] + rights[:n] for n in range(60)]
    shares = [sum(map(str.__eq__, rotated, saids)) / 60 for rotated in moved]
    assert classify_cards.accuracy(pairs) == shares[0]
    assert classify_cards.accuracy_by_chance(pairs) == pytest.approx(sum(shares) / 60)
    head, *lines = classify_cards.matrix_text(pairs, "abc").splitlines()
    assert head.split() == ["a", "b", "c", "nothing", "<d>"]
    for line, right in zip(lines, "abc", strict=True):
        name, *counts = line.split()
        assert name == right
        assert [0 if n == "." else int(n) for n in counts] == [
            pairs[right, said] for said in ("a", "b", "c", "", "<d>")
        ]
    drawing = ElementTree.fromstring(classify_cards.matrix_svg(pairs, "abc"))
    assert "<d>" in [element.text for element in drawing.iter()]


def test_class_folders_of_ones_own_are_taken(tmp_path, capsys):
    """`--train` and `--test` replace the drawn cards; nothing is drawn then."""
    for name, split in (("train", "train"), ("val", "held_out")):
        classify_cards.write_cards(tmp_path / name, 12, seed=0, split=split)
    result, scores = classify_cards.main(
        [
            *("--train", str(tmp_path / "train"), "--test", str(tmp_path / "val")),
            *("--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--eval-steps", "1"),
        ]
    )
    assert result.global_step == 1
    assert set(scores) == {"right", "exchanged"}
    assert "12 pictures of" in capsys.readouterr().out
    assert not (tmp_path / "run" / "pictures").exists()


# --- counting in several pictures -----------------------------------------------------------------


@pytest.mark.slow
def test_hearts_are_counted_on_every_card(tmp_path, capsys):
    """The cards' numbers and the one with the most are right; with other cards they are guesses."""
    run = tmp_path / "run"
    # Two thirds of the steps: enough for all but the sums.
    arguments = ["--output-dir", str(run), "--max-steps", "200"]
    _, scores = count_in_pictures.main(arguments)
    own, other = scores["own cards"], scores["other cards"]
    assert own["hearts"] > 0.8
    assert own["most"] > 0.75
    assert own["sum"] > 0.2
    assert other["hearts"] < 0.2  # of 5 x 5 or 5 x 5 x 5
    assert other["most"] < 0.65  # of two or three cards
    assert other["sum"] < 0.3
    assert "with the own cards" in capsys.readouterr().out
    assert set(pictures_shown(run)) == {2, 3}


def test_answers_state_what_is_drawn():
    """Numbers, sums and the card with the most are those of the cards; none is in both splits."""
    rows = count_in_pictures.questions(40, seed=3)
    cards = {c["image"].tobytes(): c["hp"] // 10 for c in iq.tiny.creature_cards(80, seed=3)}
    for row in rows:
        hearts = [cards[picture.tobytes()] for picture in row["pictures"]]
        fields = count_in_pictures.stated(f" {row['answer']}")
        assert fields["hearts"] == " and ".join(map(str, hearts))
        if row["question"] == count_in_pictures.QUESTIONS["sum"]:
            assert fields["sum"] == str(sum(hearts))
        else:
            best = count_in_pictures.CARDS.index(fields["most"])
            assert hearts[best] == max(hearts)
            assert hearts.count(max(hearts)) == 1
        assert len(fields) == 2
        prompt = count_in_pictures.to_example(row).prompt
        assert [item for item in prompt if not isinstance(item, str)] == row["pictures"]
    held_out = count_in_pictures.questions(4, seed=3, split="held_out")
    assert not cards.keys() & {p.tobytes() for row in held_out for p in row["pictures"]}
    assert count_in_pictures.stated("3 hearts, I think") == {}


# --- documents ------------------------------------------------------------------------------------


@every_family
def test_questions_about_documents_run_offline(bases, family, tmp_path, capsys):
    """Rows of two and three drawn pages: previewed, trained on, scored and answered."""
    result, scores = answer_documents.main(
        [
            *("--model", bases(family)[0].name_or_path),
            *("--output-dir", str(tmp_path / "run")),
            *("--documents", "6", "--held-out", "2", "--global-batch-size", "4"),
            *("--max-steps", "2", "--eval-steps", "1"),
        ]
    )
    assert 0 <= result.metrics["eval_anls"] <= 1
    assert result.best_checkpoint.is_dir()
    assert set(scores) == {"own pages", "other pages"}
    printed = capsys.readouterr().out
    assert "2 images" in printed or "3 images" in printed  # the preview
    assert printed.index("before:") < printed.index("after:") < printed.index("of one page")


@pytest.mark.slow
def test_documents_are_answered_from_their_pages(tmp_path):
    """Of each page and of the one; with the pages of other documents the answers are guesses."""
    run = tmp_path / "run"
    _, scores = answer_documents.main(["--output-dir", str(run)])
    own, other = scores["own pages"], scores["other pages"]
    assert own["each page"] > 0.6
    assert own["one page"] > 0.6
    assert other["each page"] < 0.25
    assert other["one page"] < 0.45
    held_out = answer_documents.documents(6, seed=1, can_read=False)
    assert pictures_shown(run) == [len(row["pages"]) for row in held_out]


def test_documents_are_asked_about_their_pages():
    """The same seed gives the same rows; an answer is that of the page, or of each in its order."""
    rows, again = (answer_documents.documents(20, seed=3) for _ in range(2))
    assert {len(row["pages"]) for row in rows} == {2, 3}
    questions = " ".join(row["question"] for row in rows)
    unread = answer_documents.documents(20, seed=3, can_read=False)
    assert "delivery" in questions
    assert "delivery" not in " ".join(row["question"] for row in unread)  # of the embedded base
    for row, same in zip(rows, again, strict=True):
        assert row["answer"] == same["answer"]
        assert [p.tobytes() for p in row["pages"]] == [p.tobytes() for p in same["pages"]]
        example = answer_documents.to_example(row)
        assert example.completion == f" {row['answer']}"
        assert sum(not isinstance(item, str) for item in example.prompt) == len(row["pages"])
        about_each = "each page" in row["question"]
        assert len(row["answer"].split(", ")) == (len(row["pages"]) if about_each else 1)


# --- the controls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [answer_documents, count_in_pictures])
def test_the_control_gives_each_row_the_pictures_of_another(module):
    """As many, of another row, every row's used once; question and answer stay."""
    name, draw = {
        answer_documents: ("pages", answer_documents.documents),
        count_in_pictures: ("pictures", count_in_pictures.questions),
    }[module]
    rows = draw(24, seed=1)
    others = module.exchanged(rows)
    for row, other in zip(rows, others, strict=True):
        assert len(other[name]) == len(row[name])
        assert other[name] != row[name]
        assert {**other, name: row[name]} == row
    used = {tuple(picture.tobytes() for picture in other[name]) for other in others}
    assert len(used) == len(rows)
