"""Row formats that people have, and what is said of rows in none of them."""

import pickle

import datasets
import pytest
from helpers import encoded
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.captions import QUESTION, first_sentence, pokemon_card_example
from idefics_qlora.data.example import Turn, naming_row
from idefics_qlora.data.formats import as_example


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("Mr. Mime is a card. It has 40 HP.", "Mr. Mime is a card."),
        ("Lt. Surge's Raichu of stage 1. It is rare.", "Lt. Surge's Raichu of stage 1."),
        ("Card No. 151 of the set. It is Mew.", "Card No. 151 of the set."),
        ("It hits for 30+. Then it rests.", "It hits for 30+."),
        ("It waits... Then it acts. It wins.", "It waits... Then it acts."),
        ("It is 3.5 m tall. It flies.", "It is 3.5 m tall."),
        ("No full stop at all", "No full stop at all"),
        ("Does it fly? Yes.", "Does it fly?"),
        ("Does it fly? No. It walks.", "Does it fly?"),
        ("No. It walks.", "No."),
        (
            "It met, e.g. Mr. Mime Jr. of Mt. Moon. It ran.",
            "It met, e.g. Mr. Mime Jr. of Mt. Moon.",
        ),
        ("  Two\n lines. More.", "Two lines."),
    ],
)
def test_first_sentence_is_not_cut_inside_a_name(caption, sentence):
    """Splitting at the first full stop would cut real captions inside names and numbers."""
    assert first_sentence(caption) == sentence


def test_pokemon_card_row(picture):
    """The tutorial's row becomes the tutorial's text."""
    row = {
        "id": "x-1",
        "image": picture,
        "image_url": None,
        "caption": "A Stage 1 card with 90 HP. It attacks.",
        "name": "Mr. Mime",
        "hp": 90,
        "set_name": "Base",
    }
    example = pokemon_card_example(row)
    assert example.prompt[1] == "Question: What's on the picture? Answer:"
    assert example.completion == " This is Mr. Mime. A Stage 1 card with 90 HP."
    assert as_example(row) == example


def test_known_formats_need_no_function(picture):
    """Examples, and mappings with prompt and completion, are taken as they are."""
    example = iq.Example([picture, "What?"], " That.")
    assert as_example(example) is example
    assert as_example({"prompt": [picture, "What?"], "completion": " That."}) == example


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, r"columns \['text'\] is no known format.*to_example="),
        ("hello", "type str is no known format"),
        ({"name": "A", "caption": ""}, "caption=''"),
        (
            {"name": "A", "caption": "B."},
            "no picture: neither `image` nor `image_path` nor `image_url` has a value",
        ),
        ({"prompt": [None, "What?"], "completion": "x"}, "the row has no image"),
        ({"prompt": ["What?"], "completion": " "}, "completion=' ' is empty"),
        ({"prompt": ["What?"], "completion": None}, "completion=None: expected a string"),
        ({"prompt": 3, "completion": "x"}, "prompt=3: expected a list of images and texts"),
        (
            {"prompt": "What?", "completion": "x", "images": "a.png"},
            "images='a.png': expected a list",
        ),
        ({"prompt": ["What?"], "completion": "x", "images": [b""]}, "put them into the list"),
        ({"prompt": [], "completion": "x"}, r"prompt=\[\] is empty"),
        ({"prompt": ["https://host/a.png"], "completion": "x"}, "bare URL.*open_image"),
        (
            {"prompt": [3.5], "completion": "x"},
            "prompt item 3.5 .float.: expected text or an image",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(row, message):
    """The error names the row, the value and what was expected."""
    with (
        pytest.raises(ValueError, match=rf"train_rows\[3\]: .*{message}"),
        naming_row("train_rows[3]"),
    ):
        as_example(row)


def test_missing_column_and_wrong_return_are_named(picture):
    """Mistakes in the user's own function point to the row as well."""
    with (
        pytest.raises(ValueError, match="rows.0.: 'title' is missing"),
        naming_row("rows[0]"),
    ):
        as_example({}, lambda row: iq.Example([picture], row["title"]))
    with pytest.raises(ValueError, match="to_example returned"), naming_row("rows[0]"):
        as_example({}, lambda row: None)


def test_a_bad_image_names_its_row():
    """BadImage stays BadImage, with the row in it."""
    row = {"name": "A", "caption": "B.", "image_url": "no/such.png"}
    with (
        pytest.raises(iq.BadImage, match=r"'no/such.png' of image_url of train_rows\[7\]"),
        naming_row("train_rows[7]"),
    ):
        as_example(row)


def plain(item):
    """An example with the pixels of its pictures, however they were opened."""
    if isinstance(item, Image.Image):
        return item.size, item.tobytes()
    if isinstance(item, Turn):
        return item.role, plain(item.content), item.is_target
    if isinstance(item, (list, tuple)):
        return [plain(part) for part in item]
    return (plain(item.prompt), item.completion) if isinstance(item, iq.Example) else item


def test_captions_from_any_picture_column(picture, tmp_path):
    """PIL images, bytes, mappings, paths, `datasets.Image`, in the column of any of the names."""
    data = encoded(picture)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    to_example = iq.Captions(answer=" {title}: {hp} HP")
    expected = iq.Example([picture, QUESTION], " Mime: 40 HP")
    for column, value in (
        ("image", picture),
        ("image", data),
        ("image", {"bytes": data, "path": None}),
        ("image", path),
        ("image_path", str(path)),
        ("image_url", str(path)),
    ):
        row = {column: value, "title": "Mime", "hp": 40}
        assert plain(as_example(row, to_example)) == plain(expected), (column, value)
        named = iq.Captions(answer=" {title}: {hp} HP", image=column)
        assert plain(as_example(row, named)) == plain(expected)
    rows = datasets.Dataset.from_dict({"image": [str(path)], "title": ["Mime"], "hp": [40]})
    rows = rows.cast_column("image", datasets.Image())
    assert plain(as_example(rows[0], to_example)) == plain(expected)


def test_captions_cross_to_workers():
    """Loader processes that are spawned get it by pickling."""
    captions = iq.Captions(answer=" {text}", question="{kind}?", image="picture")
    assert pickle.loads(pickle.dumps(captions)) == captions


def test_templates_hold_columns_and_nothing_else(picture):
    """A value is put in as it is; a field cannot reach into it."""
    row = {"image": picture, "a": "{b} {{", "b": "never", "Card Name": "Mime"}
    to_example = iq.Captions(answer=" {{{a}}} {Card Name}", question="{a}?")
    assert to_example(row) == iq.Example([picture, "{b} {{?"], " {{b} {{} Mime")


@pytest.mark.parametrize(
    "template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{a", "a}"]
)
def test_other_templates_are_refused(template):
    """Attributes, indices, conversions and broken braces are found before any row is read."""
    with pytest.raises(ValueError, match="answer='"):
        iq.Captions(answer=template)
    with pytest.raises(ValueError, match="question='"):
        iq.Captions(answer="x", question=template)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": None}, "no picture: neither `image` nor"),
        ({"image": 3.5}, "3.5 of image of rows.0.: float is no image"),
        ({"image": "no.png"}, "'no.png' of image of rows.0.: there is no such file"),
        ({"image": b"x"}, "<1 bytes> of image of rows.0.: no format that Pillow reads"),
        ({"text": None}, "text=None: expected text or a number"),
        ({"text": float("nan")}, "text=nan: expected text or a number"),
        ({"text": ["a"]}, r"text=\['a'\]: expected text or a number"),
        ({"text": " "}, "text=' ' is empty"),
    ],
)
def test_bad_captions_name_row_and_column(picture, values, message):
    """What is wrong, in which column of which row."""
    row = {"image": picture, "text": "fine", **values}
    with pytest.raises(ValueError, match=message), naming_row("rows[0]"):
        as_example(row, iq.Captions(answer=" {text}"))


def test_missing_columns_are_named_with_those_that_are_there(picture):
    """A wrong name in a template is corrected at a glance."""
    row = {"image": picture, "text": "x"}
    with pytest.raises(ValueError, match=r"column 'txt'.*answer=.*missing.*\['image', 'text'\]"):
        iq.Captions(answer="{txt}")(row)
    with pytest.raises(ValueError, match=r"\['image', 'text'\], not `photo`"):
        iq.Captions(answer="{text}", image="photo")(row)


PART = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def test_chat_messages(picture, tmp_path):
    """Strings and parts, pictures in `images`, in the parts or in `image`; all answers learnt."""
    other = Image.new("RGB", (5, 4), "red")
    other.save(tmp_path / "other.png")
    expected = iq.Example(
        [
            Turn("user", [picture, "Which? This,", other, "or that?"]),
            Turn("assistant", "This.", is_target=True),
            Turn("user", "Sure?"),
        ],
        "Yes.",
    )
    end = [
        {"role": "assistant", "content": [text("This.")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("Yes.")]},
    ]

    def row(first, second, **columns):
        content = [first, text("Which? "), text("This, "), second, text("or that?")]
        return {"messages": [{"role": "user", "content": content}, *end], **columns}

    expected = plain(expected)
    assert plain(as_example(row(PART, PART, images=[picture, other]))) == expected
    inline = {"type": "image", "path": str(tmp_path / "other.png")}
    assert plain(as_example(row({**PART, "image": picture}, inline))) == expected
    assert plain(as_example(row(PART, inline, images=[picture]))) == expected
    assert plain(as_example(row(PART, inline, image=picture))) == expected
    # `datasets` gives each part all keys, and each picture in its own way.
    rows = datasets.Dataset.from_list([row(PART, PART, images=[encoded(picture), encoded(other)])])
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    assert "text" in rows[0]["messages"][0]["content"][0]
    assert plain(as_example(rows[0])) == expected


def test_images_without_a_place_come_first(picture):
    """As in TRL: a message of plain text is asked about the images."""
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "This."},
    ]
    example = as_example({"messages": messages, "images": [picture, picture]})
    assert example.prompt[1] == Turn("user", [picture, picture, "Which?"])
    assert as_example({"messages": messages}).prompt[1] == Turn("user", "Which?")


def test_prompt_and_completion_with_images(picture):
    """TRL's columns, plain or conversational; only the completion's turns are learnt."""
    row = {"prompt": "What?", "completion": " That.", "images": [picture, picture]}
    assert as_example(row) == iq.Example([picture, picture, "What?"], " That.")
    assert as_example({**row, "images": []}) == iq.Example(["What?"], " That.")
    prompt = [
        {"role": "user", "content": [PART, text("What?")]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": [text("And?"), PART]},
    ]
    row = {"prompt": prompt, "completion": "This.", "images": [picture, picture]}
    example = as_example(row)
    assert example.prompt[1] == Turn("assistant", "That.")
    assert example.prompt[2] == Turn("user", ["And?", picture])
    assert example.completion == "This."
    assert as_example({**row, "completion": [{"role": "assistant", "content": "This."}]}) == example


USER = {"role": "user", "content": "What?"}


ANSWER = {"role": "assistant", "content": "That."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"messages=\[\]: expected a list of messages"),
        ({"messages": "hi"}, "messages='hi': expected a list of messages"),
        ({"messages": [USER, "hi"]}, r"messages\[1\]: 'hi': expected a message with `role`"),
        ({"messages": [USER]}, r"messages\[0\] is the last message and has role='user'"),
        ({"messages": [ANSWER]}, "prompt=.. is empty"),
        ({"messages": [USER, ANSWER, ANSWER]}, "prompt ends with an assistant turn"),
        ({"messages": [{**USER, "role": "human"}, ANSWER]}, r"messages\[0\]: role='human'"),
        ({"messages": [{**USER, "content": None}, ANSWER]}, r"messages\[0\]: content=None"),
        ({"messages": [{**USER, "content": " "}, ANSWER]}, r"messages\[0\]: content=.* is empty"),
        (
            {"messages": [{**USER, "content": [{"type": "video"}]}, ANSWER]},
            r"messages\[0\]: content\[0\]=.*video.*expected .*text",
        ),
        (
            {"messages": [{**USER, "content": [text(3)]}, ANSWER]},
            r"messages\[0\]: content\[0\]=.*a string",
        ),
        (
            {"messages": [{**USER, "content": [PART]}, ANSWER]},
            "the messages have 1 parts .* the row has 0 images",
        ),
        (
            {"messages": [{**USER, "content": [PART]}, ANSWER], "images": [b"", b""]},
            r"<0 bytes> of images\[0\]",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": [{**PART, "path": "no.png"}]}]},
            r"'no.png' of content\[0\] of messages\[1\]",
        ),
        ({"prompt": [USER], "completion": 3}, "completion=3: expected a list of messages"),
        ({"prompt": [USER], "completion": [USER]}, r"completion\[0\] is the last message"),
    ],
)
def test_bad_chats_name_row_and_message(row, message):
    """The error names the row, the message and the part."""
    with (
        pytest.raises(ValueError, match=rf"rows\[3\].*{message}|{message}.*rows\[3\]"),
        naming_row("rows[3]"),
    ):
        as_example(row)


def test_pictures_and_places_must_be_as_many(picture):
    """One image too many or too few would put every later one at the wrong question."""
    messages = [{**USER, "content": [PART, PART]}, ANSWER]
    with pytest.raises(ValueError, match="have 2 parts .* the row has 1 images"):
        as_example({"messages": messages, "images": [picture]})
    with pytest.raises(ValueError, match="have 2 parts .* the row has 3 images"):
        as_example({"messages": messages, "images": [picture] * 3})
    with pytest.raises(ValueError, match=r"messages\[1\]: an assistant turn has an image"):
        as_example({"messages": [USER, {**ANSWER, "content": [PART]}], "images": [picture]})
