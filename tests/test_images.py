"""Opening pictures: everything becomes RGB, everything broken becomes BadImage."""

import io
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.images import full_image, open_image, random_crop


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA", "RGBA"])
def test_every_mode_becomes_rgb(picture, mode):
    """Grey, palette, CMYK, 16-bit and transparent pictures all open."""
    kind = "TIFF" if mode == "CMYK" else "PNG"
    source = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    assert open_image(encoded(source, kind)).mode == "RGB"


def test_transparency_becomes_white():
    """What a viewer shows on a white page is what the model sees, not black."""
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_orientation_is_applied(picture):
    """A photograph that says it is turned comes upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert open_image(encoded(picture, "JPEG", exif=exif)).size == picture.size[::-1]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"no picture", "UnidentifiedImageError"),
        ("no/such/file.png", "there is no such file"),
        ({"bytes": None, "path": None}, "expected a mapping"),
        (42, "int is no image"),
    ],
)
def test_what_cannot_be_opened_says_why(source, reason):
    """The error names the source and the reason."""
    with pytest.raises(iq.BadImage, match=reason):
        open_image(source)


def test_a_truncated_file_is_bad(picture):
    """Half a file is an error, not half a picture."""
    data = encoded(picture)
    with pytest.raises(iq.BadImage, match="OSError"):
        open_image(data[: len(data) // 2])


def test_too_many_pixels_are_refused_before_decoding(monkeypatch, picture):
    """A decompression bomb costs nothing."""
    monkeypatch.setattr("idefics_qlora.images.MAX_PIXELS", 1000)
    with pytest.raises(iq.BadImage, match="120 x 160 pixels are over 1000"):
        open_image(encoded(picture))


def test_bad_image_survives_a_worker_process():
    """The error keeps its parts when a loader worker sends it to the main process."""
    error = pickle.loads(pickle.dumps(iq.BadImage("'a.png'", "broken")))
    assert (error.source, error.reason) == ("'a.png'", "broken")


@pytest.fixture
def server(picture):
    """An http server on loopback: /ok.png is a picture, everything else is missing."""
    data = encoded(picture)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/ok.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(data if found else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_downloaded(server, picture, monkeypatch):
    """An http URL works like a file; a missing one, or too large a one, is a BadImage."""
    assert open_image(f"{server}/ok.png").tobytes() == picture.tobytes()
    with pytest.raises(iq.BadImage, match="the server answered 404"):
        open_image(f"{server}/missing.png")
    monkeypatch.setattr("idefics_qlora.images.MAX_BYTES", 100)
    with pytest.raises(iq.BadImage, match="more than 100 bytes"):
        open_image(f"{server}/ok.png")


def test_crop_depends_on_its_seed_alone(picture):
    """The same seed gives the same crop, and the global generators are left as they were."""
    picture = picture.resize((160, 160))
    before = torch.get_rng_state()
    first = random_crop(picture, 64, seed=1)
    torch.rand(5)
    again = random_crop(picture, 64, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, random_crop(picture, 64, seed=2))
    assert not torch.equal(first, full_image(picture, 64))
    torch.set_rng_state(before)
    random_crop(picture, 64, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_image_equals_the_processor(picture, processor):
    """Evaluation pictures are, to the bit, what the checkpoint's own processor makes of them."""
    expected = processor.image_processor(
        [picture], do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    assert torch.equal(full_image(picture, 64), expected[0])
