"""The examples on drawn data: what they draw is right, they learn it from the pictures, and their
page shows all of these."""

import json
import random
from collections import Counter
from xml.etree import ElementTree

import classify_cards
import pytest
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
