"""Right and wrong words of a text."""

import pytest

from idefics_qlora.reporting.words import MAX_WORDS, Part, marked


def kinds(said, *right):
    return [(part.kind, part.text) for part in marked(said, right).parts]


@pytest.mark.parametrize(
    ("said", "right", "found"),
    [
        ("A red box.", "A red box.", [("right", "A red box.")]),
        ("a RED box", "A red box.", [("right", "a RED box")]),
        (
            "This is Bob, a blue cat",
            "This is Ann, a cat.",
            [
                *(("right", "This is"), ("wrong", "Bob,"), ("missing", "Ann,"), ("right", "a")),
                *(("wrong", "blue"), ("right", "cat")),
            ],
        ),
        ("", "A box", [("missing", "A box")]),
        ("a box", "", [("wrong", "a box")]),
        ("", "", []),
        ("7 - 2", "7 + 2", [("right", "7"), ("wrong", "-"), ("missing", "+"), ("right", "2")]),
        ("猫が寝る", "犬が寝る", [("wrong", "猫"), ("missing", "犬"), ("right", "が 寝 る")]),
    ],
)
def test_words_are_marked(said, right, found):
    """Case and punctuation around a word are no difference; each word has its mark."""
    assert kinds(said, right) == found


def test_the_closest_right_text_counts():
    """Of several references the one that shares most is compared with."""
    found = marked("two dogs", ["a cat on a mat", "two dogs run"])
    assert found.parts == [Part("right", "two dogs"), Part("missing", "run")]
    assert (found.num_right, found.num_words) == (2, 3)


@pytest.mark.parametrize(
    ("said", "number"),
    [("A red box.", 0), ("A box.", 0), ("A red box. " * 3, 6), ("x " * 500, 497)],
)
def test_words_that_are_too_many_are_counted(said, number):
    """An answer that has all that is right, and much more, is not a good one."""
    assert marked(said, ["A red box."]).num_too_many == number


def test_long_texts_are_cut():
    """A text of a document is compared at its beginning, and its missing words are counted."""
    found = marked("x " * 1000, ["y " * 1000])
    assert [part.kind for part in found.parts] == ["wrong", "missing", "rest"]
    assert found.parts[1].text == f"{MAX_WORDS} words"
    assert str(1000 - MAX_WORDS) in found.parts[2].text
