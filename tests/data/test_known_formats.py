"""The formats in which people have their rows, each from the form in which it is found."""

import base64
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import encoded, same_examples
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.data.example import Turn, naming_row
from idefics_qlora.data.fingerprints import hash_given
from idefics_qlora.data.formats import as_example, prompt_of, table
from idefics_qlora.data.rows import RowReader
from idefics_qlora.images.access import DEFAULT_ACCESS


def asked(*content, answer="Red.", **more):
    """The example of one question and its answer."""
    return iq.Example([Turn("user", content)], answer, **more)


def row_of(rows, processor, to_example=None):
    """The first row's example, as training reads it."""
    reader = RowReader(rows, "rows", to_example, Collator(processor))
    row = reader.decoded(next(iter(reader.stream()))) if reader.is_stream else reader.row(0)
    return reader.example(row)


# --- one by one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"answer": "Red."}, ("Red.", ())),
        ({"answer": 3}, ("3", ())),
        ({"answer": None, "answers": ["a", "b", "b"]}, ("b", ("a", "b", "b"))),
        ({"answers": ["a", "b"]}, ("a", ("a", "b"))),
        (
            {"answers": [{"answer": "a"}, {"answer": " b "}, {"answer": "b"}]},
            ("b", ("a", "b", "b")),
        ),
        ({"answer": "c", "answers": ["a", "a"]}, ("c", ("a", "a"))),
        ({"answers": ["", "a"]}, ("a", ())),
    ],
)
def test_questions(picture, columns, expected):
    """One answer, or several right ones as VQA has them: the most common is learnt."""
    row = {"image": picture, "question": "Which colour?", **columns}
    answer, references = expected
    assert same_examples(
        as_example(row), asked(picture, "Which colour?", answer=answer, references=references)
    )


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_question_about_several_pictures(picture, column):
    """`images`, or a list in `image`."""
    row = {column: [picture, picture], "question": "Which?", "answer": "Red."}
    assert same_examples(as_example(row), asked(picture, picture, "Which?"))


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"text": "A fox."}, " A fox."),
        ({"caption": " A fox. "}, " A fox."),
        ({"text": None, "caption": "A fox."}, " A fox."),
        ({"caption": ["A fox.", "A red fox."]}, " A fox."),
        ({"label": "fox"}, " fox"),
    ],
)
def test_captions_and_classes(picture, row, completion):
    """A picture with its text, several texts, or the name of its class."""
    example = as_example({"image": picture, **row})
    assert list(example.prompt) == [picture, QUESTION]
    assert example.completion == completion
    assert len(example.references) == (2 if isinstance(row.get("caption"), list) else 0)


def test_llava_conversations(picture):
    """Pictures where `<image>` stands, or first; all answers of `gpt` are learnt."""
    other = Image.new("RGB", (5, 4), "red")
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "<image>\nWhich colour? And\n<image>"},
        {"from": "gpt", "value": "Red, an <image>."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    expected = iq.Example(
        [
            Turn("system", "Be short."),
            Turn("user", [picture, "Which colour? And", other]),
            Turn("assistant", "Red, an <image>.", is_target=True),
            Turn("user", "Sure?"),
        ],
        "Yes.",
    )
    assert same_examples(as_example({"conversations": turns, "image": [picture, other]}), expected)
    assert same_examples(as_example({"conversations": turns, "images": [picture, other]}), expected)
    plain = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]
    assert same_examples(
        as_example({"conversations": plain, "image": picture}), asked(picture, "Which?")
    )
    assert same_examples(as_example({"conversations": plain, "image": None}), asked("Which?"))
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Red."}]
    assert same_examples(
        as_example({"conversations": chat, "image": picture}), asked(picture, "Which?")
    )


@pytest.mark.parametrize("form", ["{url}", {"url": "{url}"}, {"url": "{url}", "detail": "low"}])
def test_openai_messages(picture, tmp_path, form):
    """`image_url` parts with a data: URL in either of their forms, in a table, in a file."""
    data = f"data:image/png;base64,{base64.b64encode(encoded(picture)).decode()}"
    place = {**form, "url": data} if isinstance(form, dict) else data
    content = [
        {"type": "text", "text": "Which colour?"},
        {"type": "image_url", "image_url": place},
    ]
    row = {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ]
    }
    expected = asked("Which colour?", picture)
    assert same_examples(as_example(row), expected)
    assert same_examples(as_example(datasets.Dataset.from_list([row])[0]), expected)
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    assert same_examples(as_example(iq.load_rows(tmp_path / "chat.jsonl")[0]), expected)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,A", "data:image/png;base64,AAAA", "data:x,y"]
)
def test_a_broken_data_url_is_a_bad_picture(url):
    """It ends neither the run nor the reading of the file."""
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    with pytest.raises(iq.BadImage, match=r"of content\[0\] of messages\[0\]"):
        as_example({"messages": messages})
    with pytest.raises(ValueError, match="has no picture: expected its URL"):
        as_example({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_the_cauldron(picture):
    """All pairs of a row are one dialogue about its pictures."""
    texts = [
        {"user": "Which?\nAnswer briefly.", "assistant": "Red.", "source": "VQAv2"},
        {"user": "Sure?", "assistant": "Yes.", "source": "VQAv2"},
    ]
    rows = datasets.Dataset.from_list([{"images": [encoded(picture)], "texts": texts}])
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    expected = iq.Example(
        [
            Turn("user", [picture, "Which?\nAnswer briefly."]),
            Turn("assistant", "Red.", is_target=True),
            Turn("user", "Sure?"),
        ],
        "Yes.",
    )
    assert same_examples(as_example(rows[0]), expected)


def shard(path, samples):
    """A tar file as webdataset has it: files of a sample have its name."""
    with tarfile.open(path, "w") as tar:
        for name, files in samples.items():
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_webdataset(picture, processor, tmp_path, streaming):
    """A picture with `txt`, with `json`, or both, through `datasets`, as a table or a stream."""
    png = encoded(picture)
    fields = json.dumps({"question": "Which?", "answer": "Red.", "image": "other.png"}).encode()
    for name, files, expected in (
        ("txt", {"txt": b"A fox."}, iq.Example([picture, QUESTION], " A fox.")),
        ("json", {"json": fields}, asked(picture, "Which?")),
        (
            "both",
            {"json": b'{"width": 3}', "txt": b"A fox."},
            iq.Example([picture, QUESTION], " A fox."),
        ),
    ):
        path = shard(tmp_path / f"{name}.tar", {f"{i:05}": {"png": png, **files} for i in range(3)})
        rows = datasets.load_dataset(
            "webdataset",
            data_files={"train": str(path)},
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )
        assert same_examples(row_of(rows, processor), expected), name
    # As the webdataset library gives them, not decoded.
    raw = {"__key__": "0", "jpg": png, "json": fields}
    assert same_examples(as_example(raw), asked(picture, "Which?"))


@pytest.fixture
def classes(picture, tmp_path):
    """Folders that are named after classes, and what lies about in such folders."""
    folder = tmp_path / "animals"
    for name in ("red fox", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            picture.save(folder / name / f"{i}.png")
    (folder / ".git").mkdir()
    (folder / "cat" / "notes.txt").touch()
    (folder / "cat" / "._0.png").touch()
    return folder


def test_class_folders(classes, picture, processor, tmp_path):
    """Read by `load_rows` and by `datasets`, the names of the classes are what is learnt."""
    rows = iq.load_rows(classes)
    assert [(row["image"].name, row["label"]) for row in rows] == [
        ("0.png", "cat"),
        ("1.png", "cat"),
        ("0.png", "red fox"),
        ("1.png", "red fox"),
    ]
    expected = iq.Example([picture, QUESTION], " cat")
    assert same_examples(as_example(rows[0]), expected)
    (classes / "cat" / "._0.png").unlink()  # `datasets` takes it for a picture
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(classes), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert same_examples(row_of(theirs, processor), expected)
    with pytest.raises(TypeError, match="label=0: expected the name of a class"):
        as_example(theirs[0])  # a number alone


def test_folders_that_are_no_classes(classes, picture, tmp_path):
    """Splits are not taken for classes, pictures beside classes are not passed over."""
    with pytest.raises(ValueError, match=r"animals holds folders of pictures \(cat, red fox\): if"):
        iq.load_rows(tmp_path)
    picture.save(classes / "a.png")
    with pytest.raises(
        FileNotFoundError,
        match=r'neither metadata.jsonl .* folders of pictures.* \[\{"image": path\} for path in',
    ):
        iq.load_rows(classes)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(classes / "cat")
    with pytest.raises(ValueError, match="leads out of"):
        iq.load_rows(tmp_path / "linked")


def test_parquet(picture, tmp_path):
    """Pictures as `{"bytes", "path"}` or beside the file, classes by name, as written by others."""
    data = encoded(picture)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "fox"])}
    )
    rows = datasets.Dataset.from_dict({"image": [data, data], "label": [1, -1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    fox, unknown = iq.load_rows(tmp_path / "a.parquet")
    assert same_examples(as_example(fox), iq.Example([picture, QUESTION], " fox"))
    assert unknown["label"] is None
    (tmp_path / "b.png").write_bytes(data)
    column = [{"bytes": None, "path": "b.png"}]
    datasets.Dataset.from_dict({"image": column, "text": ["It."]}).to_parquet(
        tmp_path / "b.parquet"
    )
    (row,) = iq.load_rows(tmp_path / "b.parquet")
    assert row["image"]["path"] == tmp_path / "b.png"
    assert same_examples(as_example(row), iq.Example([picture, QUESTION], " It."))
    column = [{"bytes": None, "path": "../b.png"}]
    datasets.Dataset.from_dict({"image": column, "text": ["It."]}).to_parquet(
        tmp_path / "c.parquet"
    )
    with pytest.raises(ValueError, match=r"c.parquet, row 0: image='../b.png' leads out of"):
        iq.load_rows(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"d.parquet, after 0 rows: no parquet"):
        iq.load_rows(tmp_path / "d.parquet")


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    """What is missing is said with how to install it."""
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'a.parquet: .*pyarrow.*pip install "datasets>=4.0"'):
        iq.load_rows(tmp_path / "a.parquet")


def test_the_json_of_llava(picture, tmp_path):
    """One list of objects, as LLaVA's own files are."""
    picture.save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "Red."}]
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([{"id": "0", "image": "a.png", "conversations": turns}]))
    assert same_examples(as_example(iq.load_rows(file)[0]), asked("Which?", picture))
    file.write_text(json.dumps([{"image": "../a.png"}]))
    with pytest.raises(ValueError, match="llava.json, row 0: image='../a.png' leads out of"):
        iq.load_rows(file)
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="llava.json: expected a list of objects"):
        iq.load_rows(file)


def test_a_table_of_several_kinds_of_rows(picture, processor):
    """`datasets` gives every row the columns of all: those that are `None` choose no format, and
    neither do NaN, as pandas has it, and nothing, as CSV has it; nor where the model is asked."""
    asking = {"image": picture, "question": "Which colour?", "answer": "Red."}
    telling = {"image": picture, "text": "A fox."}
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    kinds = [datasets.Dataset.from_list([row]) for row in (asking, telling, chat)]
    rows = datasets.concatenate_datasets(kinds)
    assert rows[1]["question"] is None
    read = [row_of(rows.select([i]), processor) for i in range(3)]
    assert [e.completion for e in read] == ["Red.", " A fox.", "!"]
    for nothing in (None, "", float("nan")):
        row = {**telling, "question": nothing, "answer": nothing, "messages": nothing}
        assert as_example(row).completion == " A fox."
        assert list(prompt_of(row)) == [picture, QUESTION]
        assert list(prompt_of({**row, "text": nothing, "label": "fox"})) == [picture, QUESTION]
        (turn,) = prompt_of({**row, **asking, "text": nothing, "answer": nothing})
        assert [*turn.content] == [picture, "Which colour?"]
    with pytest.raises(ValueError, match="answer=None and answers=None: expected text"):
        as_example({**asking, "answer": None, "text": None})


# --- what is said of others -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": 1, "question": "?"}, "nearest: a question with its answer misses `answer` or"),
        ({"image": 1, "Question": "?", "Answer": "!"}, r"`Question` for `question`\?"),
        ({"picture": 1, "caption": "!"}, "a caption misses `image` or `images` or"),
        ({"conversation": []}, r"LLaVA's conversations misses .*`conversation` for"),
        ({"a": 1}, "known are chat messages, .* a class, a sample of webdataset; otherwise"),
        ({"image": None, "text": "x"}, "no picture: neither `image` nor"),
        ({"images": [], "text": "x"}, "images=.*expected a picture|no picture: neither"),
        ({"image": b"", "question": "?", "answer": ""}, "answer='' and answers=None: expected"),
        ({"image": b"", "question": "?", "answer": {"a": 1}}, "answer={'a': 1}: expected text"),
        ({"image": b"", "question": 3, "answer": "x"}, "question=3: expected text"),
        ({"images": [], "texts": ["x"]}, r"texts\[0\]='x': expected {.user.: question"),
        ({"images": [], "texts": "x"}, "texts='x': expected a list"),
        ({"conversations": "x"}, "conversations='x': expected a list of"),
        ({"conversations": [{"from": "bot"}]}, r"conversations\[0\]=.*expected .*human, user, gpt"),
        (
            {"conversations": [{"from": "human", "value": "<image> <image>"}], "image": b""},
            "have 2 times `<image>` but the row has 1 images",
        ),
        ({"__key__": "0", "jpg": b"", "json": b"{"}, "json: Expecting property name"),
        ({"__key__": "0", "jpg": b"", "json": "[1]"}, r"json=\[1\]: expected an object"),
        ({"__key__": "0", "jpg": None, "txt": "a"}, "no picture: neither `jpg` nor `jpeg`"),
    ],
)  # fmt: skip
def test_unknown_and_broken_rows(row, message):
    """What came nearest and what it missed; or the column, the value and what was expected."""
    with pytest.raises(ValueError, match=rf"rows\[3\]: .*{message}"), naming_row("rows[3]"):
        as_example(row)


@pytest.mark.parametrize("columns", [{"text": "x"}, {"question": "?", "answer": "x"}])
def test_a_picture_as_an_array(columns):
    """It is no picture that a row may hold, and the error says what one is."""
    with pytest.raises(iq.BadImage, match="of image: ndarray is no image; expected a path"):
        as_example({"image": np.zeros(2), **columns})


def test_the_page_has_the_table():
    """docs/data.md shows the formats as the code knows them."""
    assert table() in Path(__file__).parents[2].joinpath("docs/data.md").read_text()


def test_earlier_rows_stay_what_they_were(picture):
    """A run that began with these rows goes on with the same: the order of the table counts."""
    row = {"image": picture, "name": "Fox", "caption": "A fox. Red.", "text": "x", "label": "y"}
    assert as_example(row).completion == " This is Fox. A fox."
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert as_example({"messages": messages, "question": "x", "answer": "y"}).completion == "!"
    assert as_example({"prompt": "a", "completion": " b", "text": "c"}).completion == " b"
    example = iq.Example(["What?"], " That.")
    assert hash_given(example, DEFAULT_ACCESS) == "745c75ea31eafe94"  # as ever
    several = iq.Example(example.prompt, " That.", ["That.", "This."])
    assert several.references == ("That.", "This.")
    assert hash_given(several, DEFAULT_ACCESS) == hash_given(example, DEFAULT_ACCESS)
    with pytest.raises(TypeError, match="references='x': expected a list of right answers"):
        iq.Example(["?"], "x", "x")
