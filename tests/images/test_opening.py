"""Opening pictures: everything becomes RGB, everything broken becomes BadImage."""

from pathlib import Path

import pytest
from helpers import encoded
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.images.opening import file_name, mark_origin, open_image


def test_every_kind_of_source_gives_the_same_picture(picture, tmp_path):
    """Path, string, bytes, a datasets mapping and a PIL image are the same thing."""
    data = encoded(picture)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    sources = [path, str(path), data, {"bytes": data, "path": None}, {"path": str(path)}, picture]
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"no picture", "UnidentifiedImageError"),
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
        ("no/such/file.png", "there is no such file"),
        ({"bytes": None, "path": None}, "expected a mapping"),
        ({}, "expected a mapping"),
        (42, "int is no image"),
        (None, "NoneType is no image"),
        ("nul\0.png", "null"),
        ("\udcff.png", "there is no such file"),
        ("x" * 5000, "too long"),
        (Path("https://example.com/a.png"), "there is no such file"),
        ("", "a folder"),
        ("http://a\tb/", "Invalid"),
        ("http://", "with a host"),
        ("https://example.com:99999/", "with a host"),
        ("http://user:word@example.com/", "a URL with a user name"),
    ],
)
def test_what_cannot_be_opened_says_why(source, reason):
    """The error names the source and the reason."""
    with pytest.raises(iq.BadImage, match=f"(?i){reason}"):
        open_image(source)


@pytest.mark.parametrize(
    "source",
    ["file:///etc/hostname", "ftp://host/a.png", "data:image/png;base64,AA", "s3://b/a.png"],
)
def test_other_addresses_are_not_taken_for_paths(source, picture, tmp_path, monkeypatch):
    """A string is an http(s) URL or a path, never silently the other, even if there is a file."""
    monkeypatch.chdir(tmp_path)
    Path(source).parent.mkdir(parents=True)
    Path(source).write_bytes(encoded(picture))
    with pytest.raises(iq.BadImage, match=r"expected an http\(s\) URL, or a plain file path"):
        open_image(source)
    assert open_image(Path(source)).size == picture.size


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (Path("cats/a #1.png"), "a #1.png"),
        ({"bytes": b"x", "path": "cats/a.png"}, "a.png"),
        ({"bytes": b"x", "path": None}, ""),
        ("https://example.com/cats/a.png?token=secret#x", "a.png"),
        (Image.new("RGB", (4, 4)), ""),
        (mark_origin(Image.new("RGB", (4, 4)), Path("cats/a.png")), "a.png"),
        (mark_origin(Image.new("RGB", (4, 4)), ["file", "a.png", 7]), "a.png"),
    ],
)
def test_what_a_file_is_called(source, name):
    """For people, who look for a picture of a page: without its folders, or what is secret."""
    assert file_name(source) == name
