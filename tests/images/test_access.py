"""One ``ImageAccess`` of a call decides what is opened, and which files may be read at all."""

import os
import pickle
from pathlib import Path

import pytest
from helpers import config_of, encoded

import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.data.order import epoch_order
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.opening import open_image
from idefics_qlora.images.prefetch import prefetch_images

SMALL = ImageAccess(max_pixels=100)
TOO_LARGE = r"120 x 160 pixels are over 100 \(ImageAccess.max_pixels\)"


@pytest.fixture
def file(picture, tmp_path):
    path = tmp_path / "pictures" / "a.png"
    path.parent.mkdir()
    picture.save(path)
    return path


def user_function(row):
    return iq.Example([open_image(row["path"]), "What is it?"], " A card.")


def user_messages(row):
    part = {"type": "image", "path": row["path"]}
    return iq.Example([{"role": "user", "content": [part]}], "A card.")


def in_message(part, images=()):
    question = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "A card."}
    return {"messages": [question, answer], "images": list(images)}


ROWS = {
    "example": lambda path: (iq.Example([Path(path), "What?"], " A card."), None),
    "prompt": lambda path: ({"prompt": "What?", "completion": " A card.", "image": path}, None),
    "messages": lambda path: (in_message({"type": "image"}, [path]), None),
    "chat part": lambda path: (in_message({"type": "image", "path": path}), None),
    "card": lambda path: ({"name": "A", "caption": "B.", "image_path": path}, None),
    "card function": lambda path: (
        {"name": "A", "caption": "B.", "image_path": path},
        pokemon_card_example,
    ),
    "captions": lambda path: ({"image": path, "text": "B"}, iq.Captions(answer=" {text}")),
    "own function": lambda path: ({"path": path}, user_function),
    "own messages": lambda path: ({"path": path}, user_messages),
}


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row_keeps_to_the_calls_access(kind, base, processor, file):
    """No known format, template or function of the user's opens more than the call allows."""
    row, to_example = ROWS[kind](str(file))
    options = {"to_example": to_example, "on_bad_row": "raise"}
    iq.evaluate(base, processor, [row], **options)
    with pytest.raises(iq.BadImage, match=TOO_LARGE):
        iq.evaluate(base, processor, [row], **options, access=SMALL)
    iq.evaluate(base, processor, [row], **options)  # the access was the call's alone


def test_every_function_takes_an_access(lora, processor, file, tmp_path):
    """Training (with its evaluation, also in a loader worker), generation, previews, image use."""
    row = ROWS["prompt"](str(file))[0]
    config = config_of(tmp_path / "run", on_bad_row="raise", num_workers=1)
    with pytest.raises(iq.BadImage, match=rf"train_rows\[0\]: {TOO_LARGE}"):
        iq.train(lora, processor, [row], config=config, access=SMALL)
    unread = {"prompt": "What?", "completion": " A card."}
    with pytest.raises(iq.BadImage, match=rf"eval_rows\[0\]: {TOO_LARGE}"):
        iq.train(lora, processor, [unread], [row], config=config, access=SMALL)
    with pytest.raises(iq.BadImage, match=rf"rows\[0\]: {TOO_LARGE}"):
        iq.preview_batch(processor, [row], access=SMALL)
    with pytest.raises(ValueError, match="0 of 2 rows have a picture"):
        iq.image_use(lora, processor, [row, row], access=SMALL)
    chat = in_message({"type": "image", "path": str(file)})["messages"][:1]
    for prompt in ([file, "What?"], chat):
        with pytest.raises(iq.BadImage, match=rf"prompts\[0\]: {TOO_LARGE}"):
            iq.generate(lora, processor, [prompt], access=SMALL)


def test_loader_workers_keep_to_the_access(lora, processor, picture, tmp_path):
    """Rows that are read only by a worker, after those that are checked at the start."""
    for row in range(72):
        picture.save(tmp_path / f"{row}.png")
    late = int(epoch_order(42, 0, 72)[70])
    picture.resize((400, 400)).save(tmp_path / f"{late}.png")
    rows = [
        {"prompt": "What?", "completion": " A.", "image": str(tmp_path / f"{row}.png")}
        for row in range(72)
    ]
    config = config_of(
        tmp_path / "run",
        max_steps=2,
        global_batch_size=36,
        micro_batch_size=12,
        num_workers=1,
        on_bad_row="raise",
    )
    with pytest.raises(iq.BadImage, match=rf"train_rows\[{late}\]: 400 x 400 pixels are over"):
        iq.train(lora, processor, rows, config=config, access=ImageAccess(max_pixels=50_000))


def test_an_access_that_is_named_wins(base, processor, file):
    """What a template or a function says itself is more particular than the call's access."""
    row = {"image": str(file), "text": "B"}
    strict = iq.Captions(answer=" {text}", access=SMALL)
    with pytest.raises(iq.BadImage, match=TOO_LARGE):
        iq.evaluate(base, processor, [row], to_example=strict, on_bad_row="raise")
    lenient = iq.Captions(answer=" {text}", access=ImageAccess())
    iq.evaluate(
        base,
        processor,
        [row],
        to_example=lenient,
        on_bad_row="raise",
        access=ImageAccess(max_bytes=10),
    )


def test_rows_of_files_and_their_pictures_share_an_access(base, processor, file):
    """The folder of the access, for the metadata's paths and when they are opened."""
    root = file.parent.parent
    metadata = root / "lists" / "metadata.jsonl"
    metadata.parent.mkdir()
    metadata.write_text('{"image": "pictures/a.png", "prompt": "What?", "completion": " A."}\n')
    access = ImageAccess(folder=root)
    (row,) = iq.load_rows(metadata, access=access)
    assert row["image"] == root.resolve() / "pictures" / "a.png"
    iq.evaluate(base, processor, [row], on_bad_row="raise", access=access)
    with pytest.raises(iq.BadImage, match="leads out of .*lists"):
        iq.evaluate(
            base,
            processor,
            [row],
            on_bad_row="raise",
            access=ImageAccess(folder=metadata.parent),
        )
    metadata.write_text(f'{{"image": "{file}"}}\n')
    with pytest.raises(ValueError, match=r"line 1: image=.* leads out of .*allow_absolute_paths"):
        iq.load_rows(metadata)
    (row,) = iq.load_rows(metadata, access=ImageAccess(allow_absolute_paths=True))
    assert row["image"] == file


def test_the_pictures_of_chat_messages_are_prefetched(file):
    """Parts that carry a picture are looked up, whatever key it is under; others are no failure."""
    gone = str(file.with_name("gone.png"))
    rows = [
        in_message({"type": "image", "path": str(file), "url": None}),
        in_message({"type": "image", "image": str(file)}),
        in_message({"type": "image", "url": gone}),
        in_message({"type": "image"}, [str(file)]),
        {"messages": [{"role": "user", "content": gone}]},
    ]
    result = prefetch_images(rows, "messages")
    assert (result.num_already_there, [failed.row for failed in result.failed]) == (1, [2])


def test_bad_image_survives_a_worker_process():
    """The error keeps its parts when a loader worker sends it to the main process."""
    error = pickle.loads(pickle.dumps(iq.BadImage("'a.png'", "broken")))
    assert (error.source, error.reason) == ("'a.png'", "broken")
    assert str(error) == "cannot open the image 'a.png': broken"


def test_too_many_bytes_are_refused(picture, tmp_path):
    """In a file, they are not even read."""
    small = ImageAccess(max_bytes=100)
    data = encoded(picture)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (path, data, {"bytes": data}):
        with pytest.raises(iq.BadImage, match="more than 100 bytes"):
            open_image(source, small)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(iq.BadImage, match="more than"):
        open_image(tmp_path / "huge")


@pytest.mark.parametrize("field", ["max_bytes", "max_retries", "max_pixels", "read_timeout_s"])
def test_senseless_limits_are_refused(field):
    """The error names the field."""
    with pytest.raises(ValueError, match=f"{field}=-1"):
        ImageAccess(**{field: -1})


def test_only_regular_files_are_opened(tmp_path):
    """A pipe without a writer, a device, a folder: none hangs, none is read."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(iq.BadImage, match="expected a regular file|no such file|more than"):
            open_image(path)
    with pytest.raises(iq.BadImage, match="a folder"):
        open_image(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(iq.BadImage, match="(?i)symbolic link|symlink|loop"):
        open_image(tmp_path / "loop")


def test_paths_stay_in_the_datasets_folder(picture, tmp_path, monkeypatch):
    """A row cannot name files outside it, unless absolute paths are asked for."""
    folder = tmp_path / "data"
    (folder / "in").mkdir(parents=True)
    for path in (folder / "in" / "a.png", tmp_path / "secret.png"):
        path.write_bytes(encoded(picture))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "fine.png").symlink_to("in/a.png")
    monkeypatch.chdir(tmp_path)
    access = ImageAccess(folder="data")
    for path in ("in/a.png", "fine.png", Path("in/a.png"), {"path": "in/a.png"}):
        assert open_image(path, access).size == picture.size
    for path in ("../secret.png", "in/../../secret.png", "link.png", "in/../in/a.png"):
        with pytest.raises(iq.BadImage, match="leads out of"):
            open_image(path, access)
    absolute = str(tmp_path / "secret.png")
    with pytest.raises(iq.BadImage, match="allow_absolute_paths=True"):
        open_image(absolute, access)
    assert open_image(absolute).size == picture.size
    access = ImageAccess(folder=folder, allow_absolute_paths=True)
    assert open_image(absolute, access).size == picture.size
    with pytest.raises(iq.BadImage, match="leads out of"):
        open_image("../secret.png", access)
