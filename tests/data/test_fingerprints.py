"""What tells the rows of a run from others, and what does not."""

import copy
import json

import datasets
import pytest
from helpers import config_of, encoded
from PIL import Image, ImageFile

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.checkpoint import save_checkpoint as save
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.example import Turn
from idefics_qlora.data.rows import RowReader
from idefics_qlora.images.opening import open_image

QUESTION = "Question: What's on the picture? Answer:"


def another_decoder(monkeypatch):
    """From here on Pillow decodes every file with its least significant bits turned over."""
    real = ImageFile.ImageFile.load

    def load(image):
        first = bool(image.tile)
        result = real(image)
        if first and image.mode == "RGB":
            image.paste(image.point(lambda level: level ^ 1))
        return result

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.fixture
def fingerprint(processor):
    """The fingerprint of rows, as a checkpoint would keep it."""

    def of(rows, to_example=None):
        reader = RowReader(rows, "train_rows", to_example, Collator(processor))
        order = [] if reader.is_stream else range(len(rows))
        found, bad = reader.first_rows(order, 64)
        assert not bad
        return found

    return of


@pytest.fixture
def kinds(picture, tmp_path):
    """The same picture and text in every way that they can be given: rows and to_example."""
    file = tmp_path / "rows" / "a.png"
    file.parent.mkdir()
    picture.save(file)
    data = encoded(picture)
    texts = {"prompt": QUESTION, "completion": " A gradient."}

    def features(**columns):
        text = {name: datasets.Value("string") for name in texts}
        return datasets.Features({**text, **columns})

    stored = {**texts, "image": {"bytes": data, "path": None}}
    on_disk = {**texts, "image": {"bytes": None, "path": str(file)}}
    several = {**texts, "images": [stored["image"]]}
    image = datasets.Image()
    example = iq.Example([file, QUESTION], " A gradient.")
    return {
        "path": ([example], None),
        "path in a column": ([{**texts, "image": str(file)}], None),
        "bytes": ([iq.Example([data, QUESTION], " A gradient.")], None),
        "bytes in a column": ([{**texts, "image": data}], None),
        "mapping": ([iq.Example([{"bytes": data}, QUESTION], " A gradient.")], None),
        "turns": ([iq.Example([Turn("user", [file, "What?"])], "That.")], None),
        "opened by us": ([data], lambda row: iq.Example([open_image(row), "What?"], " That.")),
        "opened by Pillow": ([file], lambda row: iq.Example([Image.open(row), "What?"], " That.")),
        "dataset": (datasets.Dataset.from_list([stored], features(image=image)), None),
        "dataset of files": (datasets.Dataset.from_list([on_disk], features(image=image)), None),
        "dataset of lists": (
            datasets.Dataset.from_list([several], features(images=datasets.List(image))),
            None,
        ),
        "stream": (
            datasets.Dataset.from_list([stored], features(image=image)).to_iterable_dataset(),
            None,
        ),
    }


KINDS = ("path", "path in a column", "bytes", "bytes in a column", "mapping", "turns")
KINDS += ("opened by us", "opened by Pillow", "dataset", "dataset of files", "dataset of lists")
KINDS += ("stream",)


@pytest.mark.parametrize("kind", KINDS)
def test_another_decoder_does_not_make_other_rows(kinds, kind, fingerprint, monkeypatch):
    """What the user gave is the same to the last bit, whatever Pillow makes of it."""
    before = fingerprint(*kinds[kind])
    another_decoder(monkeypatch)
    after = fingerprint(*kinds[kind])
    assert before.tensors != after.tensors  # the decoder is another indeed
    assert after.fits(before.to_json())


def test_a_run_goes_on_with_another_decoder(base, processor, examples, tmp_path, monkeypatch):
    """The whole way: started with one Pillow, resumed with the next."""
    rows = [iq.Example([encoded(e.prompt[0]), QUESTION], e.completion) for e in examples[:10]]
    for steps in (1, 2):
        config = config_of(tmp_path, max_steps=steps, lr_scheduler_type="constant")
        result = iq.train(iq.add_lora(copy.deepcopy(base)), processor, rows, config=config)
        assert result.global_step == steps
        another_decoder(monkeypatch)


def test_rows_may_move_to_another_folder(fingerprint, picture, tmp_path):
    """A file is known by its name and size; another name, size, text or number is another row."""

    def rows(folder, name="a.png", text=" This.", bigger=False):
        (tmp_path / folder).mkdir(exist_ok=True)
        image = picture.resize((300, 300)) if bigger else picture
        image.save(tmp_path / folder / name)
        return [iq.Example([tmp_path / folder / name, QUESTION], text)]

    kept = fingerprint(rows("one")).to_json()
    assert fingerprint(rows("two")).fits(kept)
    assert not fingerprint(rows("two", name="b.png")).fits(kept)
    assert not fingerprint(rows("two", bigger=True)).fits(kept)
    assert not fingerprint(rows("one", text=" That.")).fits(kept)
    assert not fingerprint(rows("one") * 2).fits(kept)


@pytest.mark.parametrize("kind", ["bytes", "turns", "opened by us", "dataset", "stream"])
def test_another_picture_is_another_row(kinds, kind, fingerprint, picture):
    """One other byte in what the user gave is noticed."""
    kept = fingerprint(*kinds[kind]).to_json()
    rows, to_example = kinds[kind]
    other = picture.copy()
    other.putpixel((0, 0), (255, 255, 255))
    if kind == "turns":
        other = other.resize((50, 50))
        other.save(rows[0].prompt[0].content[0])
    elif kind == "bytes":
        rows = [iq.Example([encoded(other), QUESTION], " A gradient.")]
    elif kind == "opened by us":
        rows = [encoded(other)]
    else:
        row = {**next(iter(rows)), "image": {"bytes": encoded(other), "path": None}}
        rows = datasets.Dataset.from_list([row], rows.features)
        rows = rows.to_iterable_dataset() if kind == "stream" else rows
    assert not fingerprint(rows, to_example).fits(kept)


def test_pixels_count_where_nothing_else_is_given(fingerprint, picture):
    """A drawn picture, or one changed by to_example, is known by its pixels."""

    def rows(image):
        return [iq.Example([image, QUESTION], " A gradient.")]

    other = picture.copy()
    other.putpixel((0, 0), (255, 255, 255))
    kept = fingerprint(rows(picture)).to_json()
    assert fingerprint(rows(picture.copy())).fits(kept)
    assert not fingerprint(rows(other)).fits(kept)
    palette = picture.quantize(8)
    swapped = palette.copy()
    swapped.putpalette(list(reversed(palette.getpalette())))
    assert not fingerprint(rows(swapped)).fits(fingerprint(rows(palette)).to_json())
    opened = open_image(encoded(picture))
    turned = fingerprint(rows(opened.rotate(90))).to_json()
    assert not fingerprint(rows(opened)).fits(turned)
    assert not fingerprint(rows(opened.rotate(180))).fits(turned)


def test_a_transform_of_datasets_is_not_passed_over(fingerprint, kinds):
    """What a set_transform makes of the stored picture is what the user gave."""
    stored, _ = kinds["dataset"]

    def turned(degrees):
        def turn(rows):
            return {**rows, "image": [image.rotate(degrees) for image in rows["image"]]}

        return stored.with_transform(turn)

    assert not fingerprint(turned(90)).fits(fingerprint(turned(180)).to_json())


def test_the_versions_of_the_decoders_are_told(base, processor, examples, tmp_path, caplog):
    """Pillow and torchvision decide the pixels: a change of theirs is said on resume."""
    config = config_of(tmp_path / "a", max_steps=1)
    iq.train(iq.add_lora(copy.deepcopy(base)), processor, examples, config=config)
    snapshot = load_checkpoint(tmp_path / "a" / "checkpoint-1")
    snapshot.state["environment"]["versions"].update(pillow="1.0", torchvision="0.1")
    save(tmp_path / "b" / "checkpoint-1", snapshot)
    config = config_of(tmp_path / "b", max_steps=1)
    iq.train(iq.add_lora(copy.deepcopy(base)), processor, examples, config=config)
    assert "pillow was 1.0 when" in caplog.text
    assert "torchvision was 0.1 when" in caplog.text


def test_a_fingerprint_says_its_version(fingerprint, kinds):
    """So that a later version knows by which rule it is to be compared."""
    kept = json.loads(json.dumps(fingerprint(*kinds["path"]).to_json()))
    assert kept.keys() == {"version", "number", "first"}
    assert kept["version"] == 2


def test_a_later_versions_fingerprint_is_named(processor, picture):
    """What a later version has written is not called other content."""
    reader = RowReader([iq.Example([picture, QUESTION], " A.")], "rows", None, Collator(processor))
    fingerprint, _ = reader.first_rows(range(1), 1)
    kept = fingerprint.to_json()
    assert fingerprint.fits(kept)
    with pytest.raises(ValueError, match="version 7, expected 1 or 2: a later"):
        fingerprint.fits({**kept, "version": 7})
