"""Rows from files, and what is refused in them."""

import csv
import json

import datasets
import pytest

import idefics_qlora as iq
from idefics_qlora.data.formats import as_example


@pytest.fixture
def folder(picture, tmp_path):
    """A folder with a.png, deep/b.png and no metadata yet."""
    folder = tmp_path / "cards"
    (folder / "deep").mkdir(parents=True)
    picture.save(folder / "a.png")
    picture.save(folder / "deep" / "b.png")
    return folder


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_folder_with_either_metadata(folder, picture):
    """JSONL and CSV give the same rows, with quotes and line breaks, ready for a template."""
    rows = [
        {"file_name": "a.png", "text": 'A "card", red'},
        {"file_name": "deep/b.png", "text": "Two\nlines: é"},
    ]
    (folder / "metadata.jsonl").write_text(jsonl(rows) + "\n", encoding="utf-8")
    read = iq.load_rows(folder)
    assert [row["image"] for row in read] == [folder / "a.png", folder / "deep" / "b.png"]
    example = as_example(read[0], iq.Captions(answer=" {text}"))
    assert example.prompt[0].size == picture.size
    assert example.completion == ' A "card", red'

    (folder / "metadata.jsonl").unlink()
    table = 'file_name,text\na.png,"A ""card"", red"\ndeep/b.png,"Two\nlines: é"\n'
    (folder / "metadata.csv").write_text(table, encoding="utf-8-sig")  # as spreadsheets write it
    assert iq.load_rows(folder) == read
    assert iq.load_rows(folder / "metadata.csv") == read


@pytest.mark.parametrize(
    ("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.tsv", ",")]
)
def test_tables_as_spreadsheets_write_them(folder, name, mark):
    """Semicolons, where a comma is that of numbers, and tabs; commas in texts are theirs."""
    texts = ["A fox, red", "Two\nlines: \u00e9"]
    lines = [["file_name", "text"], *(["a.png", text] for text in texts)]
    with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=mark).writerows(lines)
    expected = [{"text": text, "image": folder / "a.png"} for text in texts]
    assert iq.load_rows(folder / name) == expected


def test_every_place_of_a_picture(folder):
    """Columns, lists and chat messages point to pictures beside the file; URLs stay."""
    url = "https://host/c.png"
    parts = [{"type": "image", "path": "a.png"}, {"type": "image"}, {"type": "text", "text": "?"}]
    row = {
        "image_path": "a.png",
        "image_url": url,
        "images": ["deep/b.png", url],
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x.png"}],
        "note": "../not a picture",
    }
    file = folder / "rows.jsonl"
    file.write_text(jsonl([row]))
    (read,) = iq.load_rows(str(file))
    a, b = folder / "a.png", folder / "deep" / "b.png"
    assert read == {
        **row,
        "image_path": a,
        "images": [b, url],
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": a}, *parts[1:]]},
            row["messages"][1],
        ],
    }
    del read["images"][1]
    assert as_example(read).completion == "x.png"


@pytest.mark.parametrize("value", ["../a.png", "deep/../a.png", "/etc/passwd", "out/a.png"])
@pytest.mark.parametrize(
    "row",
    [
        lambda path: {"file_name": path},
        lambda path: {"images": ["a.png", path]},
        lambda path: {
            "messages": [{"role": "user", "content": [{"type": "image", "image": path}]}]
        },
    ],
)
def test_paths_that_leave_the_folder_are_refused(folder, tmp_path, row, value):
    """Metadata from elsewhere cannot make a file of this machine a picture; links included."""
    (folder / "out").symlink_to(tmp_path)
    (folder / "metadata.jsonl").write_text(jsonl([{"file_name": "a.png"}, row(value)]))
    with pytest.raises(ValueError, match=rf"metadata.jsonl, line 2: .*='{value}' leads out of"):
        iq.load_rows(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "rows.jsonl, line 2: no JSON in UTF-8"),
        ("rows.jsonl", b'{"a": "\xff"}', "rows.jsonl, line 1: no JSON in UTF-8"),
        ("rows.jsonl", b"\n[1]\n", r"rows.jsonl, line 2: \[1\] is no JSON object"),
        ("rows.jsonl", b'{"file_name": "a", "image": "b"}', "line 1: .*both `file_name` and"),
        ("rows.jsonl", b'{"image": "a\\u0000.png"}', "line 1: .*null"),
        ("rows.jsonl", b"", "rows.jsonl has no rows"),
        ("rows.csv", b"a,b\n1,2\n1\n", "rows.csv, line 3: 1 value, expected 2 .columns a, b,"),
        (
            "rows.csv",
            b"file_name,text\n0.png,A red circle, on white\n",
            "rows.csv, line 2: 3 values, expected 2 .columns file_name, text, .*; a text with a "
            'comma goes in quotes: 0.png,"A red circle, on white"',
        ),
        ("rows.csv", b'a,b\n"1,2\n', "rows.csv, line 2: unexpected end of data"),
        ("rows.csv", b'a,b\n"1\n1",2\n3\n', "rows.csv, line 4: 1 value, expected 2"),
        ("rows.csv", b"a;b,c\n1;2\n", r"line 2: .*columns a;b, c, separated by ','"),
        (
            "rows.csv",
            b"a|b\n1|2\n",
            r"line 1: .*one column, 'a\|b': expected commas, semicolons or",
        ),
        ("rows.csv", b"a,b\n1,2\n\xff,2\n", "rows.csv, line 3: .*utf-8.*: save it in UTF-8"),
        ("rows.txt", b"", "ends in .jsonl or .csv"),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, content, message):
    """An error in a long file is found at once."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        iq.load_rows(tmp_path / name)


def test_the_pictures_in_another_column(folder, picture):
    """A misspelt `file_name` is named with the right one; or the column is told, and is beside the
    file as others are."""
    (folder / "metadata.csv").write_text("Filename,text\na.png,One\n")
    (row,) = iq.load_rows(folder)
    for to_example in (None, iq.Captions(answer=" {text}")):
        with pytest.raises((TypeError, ValueError), match="mean `file_name` for `Filename`"):
            as_example(row, to_example)
    (row,) = iq.load_rows(folder, image="Filename")
    example = as_example(row, iq.Captions(answer=" {text}", image="Filename"))
    assert example.prompt[0].size == picture.size
    with pytest.raises(TypeError, match="did you mean `image` for `file_name`"):
        as_example({"file_name": "a.png", "text": "One"})


def test_metadata_must_be_there_once(folder):
    """No guess which of two files is meant, and a way out where there is none."""
    with pytest.raises(
        FileNotFoundError, match="neither metadata.jsonl nor metadata.csv.*datasets"
    ):
        iq.load_rows(folder)
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).touch()
    with pytest.raises(ValueError, match="both metadata.jsonl and metadata.csv"):
        iq.load_rows(folder)
    with pytest.raises(FileNotFoundError, match="gone: there is no such file or folder"):
        iq.load_rows(folder / "gone")
    with pytest.raises(FileNotFoundError, match="no such file"):
        iq.load_rows(folder / "other.jsonl")


def test_a_missing_picture_is_the_rows_fault(folder):
    """It is found when the row is read, as any bad picture, so that loading stays quick."""
    (folder / "metadata.jsonl").write_text(jsonl([{"file_name": "c.png", "text": "x"}]))
    (row,) = iq.load_rows(folder)
    with pytest.raises(iq.BadImage, match="c.png' of image: there is no such file"):
        as_example(row, iq.Captions(answer=" {text}"))


def test_the_imagefolder_of_datasets_works_as_well(folder, picture, tmp_path):
    """Folders that `datasets` reads need no function of ours."""
    texts = {"a.png": "One", "deep/b.png": "Two"}
    metadata = jsonl([{"file_name": name, "text": text} for name, text in texts.items()])
    (folder / "metadata.jsonl").write_text(metadata)
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    to_example = iq.Captions(answer=" {text}")
    ours = [as_example(row, to_example) for row in iq.load_rows(folder)]
    assert [as_example(row, to_example) for row in rows] == ours
