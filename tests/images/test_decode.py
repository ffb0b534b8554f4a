"""From the bytes of a picture to RGB: every format and mode, limits, and what is broken."""

import io
import multiprocessing
import os
import random
import struct
import subprocess
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, textured
from PIL import Image, PngImagePlugin

import idefics_qlora as iq
from idefics_qlora.images import decode
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.cropping import full_image
from idefics_qlora.images.opening import open_image


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA", "RGBA"])
def test_every_mode_becomes_rgb(picture, mode):
    """Grey, palette, CMYK, 16-bit and transparent pictures all open."""
    kind = "TIFF" if mode == "CMYK" else "PNG"
    source = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    assert open_image(encoded(source, kind)).mode == "RGB"


MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA I;16".split()  # noqa: SIM905


@pytest.mark.parametrize("mode", [*MODES, "RGBX", "RGBa", "La", "I;16L", "I;16B", "I;16N"])
def test_every_mode_of_a_pil_image_becomes_rgb(mode):
    """A white picture is white in each of Pillow's modes, and the caller's image is untouched."""
    white = {"CMYK": 0, "LAB": (255, 128, 128), "I": 255, "F": 1.0, "YCbCr": (255, 128, 128)}
    white |= {"HSV": (0, 0, 255), "RGB": "white", "RGBX": "white"}
    white |= {"P": 0}
    deep = mode.startswith("I;16")
    image = Image.new(mode, (3, 2), 65535 if deep else white.get(mode, 255))
    if mode == "P":
        image.putpalette([255, 255, 255])
    if mode in ("RGBA", "RGBa", "La", "LA", "PA"):
        image = Image.new("LA", (3, 2), (255, 255))
        image = image.convert(mode if mode in ("LA", "La") else "RGBA")
        image = image.convert(mode) if mode in ("RGBa", "PA") else image
    assert open_image(image).getpixel((2, 1)) == pytest.approx((255, 255, 255), abs=1)
    assert image.size == (3, 2)


def test_transparency_becomes_white():
    """What a viewer shows on a white page is what the model sees, not black."""
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    for image in (clear, clear.convert("LA"), clear.convert("RGBa"), clear.convert("PA")):
        assert open_image(image).getpixel((0, 0)) == (255, 255, 255)
    half = open_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(("mode", "colour"), [("1", 0), ("L", 7), ("P", 0), ("RGB", (9, 8, 7))])
def test_a_transparent_colour_becomes_white(mode, colour):
    """Pictures without an alpha channel may name one colour as transparent."""
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 1 if mode in ("1", "P") else 200 if mode == "L" else (200,) * 3)
    opened = open_image(encoded(image, transparency=colour))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    opaque = open_image(encoded(image))
    assert opened.getpixel((1, 0)) == opaque.getpixel((1, 0))


def test_16_bit_grey_is_scaled():
    """Half of 65535 is middle grey: convert() would clip nearly everything to white."""
    ramp = np.array([[0, 256, 32768, 65535]], np.uint16)
    clipped = Image.fromarray(ramp).convert("RGB")
    assert np.asarray(clipped)[0, :, 1].tolist() == [0, 255, 255, 255]  # else no need for our own
    for data in (
        encoded(Image.fromarray(ramp)),
        encoded(Image.fromarray(ramp), "TIFF"),
        b"P5 4 1 65535\n" + ramp.astype(">u2").tobytes(),
    ):
        assert np.asarray(open_image(data))[0, :, 1].tolist() == [0, 1, 128, 255]
    clear = encoded(Image.fromarray(ramp), transparency=256)
    assert np.asarray(open_image(clear))[0, :, 1].tolist() == [0, 255, 128, 255]


def peak_bytes(path: Path) -> int:
    """Most memory that opening a picture takes of this process, the picture itself included."""

    def memory(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])

    before = memory("VmRSS")
    open_image(path)
    return memory("VmHWM") - before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_wide_grey_takes_little_memory(tmp_path, dtype):
    """Not much more than its levels and its RGB pixels; all at once it took over 20 bytes each."""
    levels = np.add.outer(np.arange(3000), np.arange(4000)).astype(dtype)
    path = tmp_path / "wide.tif"
    Image.fromarray(levels).save(path)
    stored = np.dtype(dtype).itemsize
    with multiprocessing.get_context("fork").Pool(1) as pool:
        peak = pool.apply(peak_bytes, (path,))
        pool.close()
        pool.join()
    # The file's bytes, the same in Pillow, and 4 bytes for each RGB pixel.
    assert peak / levels.size < 1.5 * (2 * stored + 4)


def test_bands_of_wide_grey_fit_together():
    """The extremes are those of the whole picture, and no line is lost between two bands."""
    lines = 5 * decode._BAND_PIXELS // 4000 + 3
    levels = np.add.outer(np.arange(lines), np.arange(4000)).astype(np.int32) * 1000
    opened = np.asarray(open_image(Image.fromarray(levels)))[:, :, 0]
    assert np.array_equal(opened, np.rint(levels * (255 / levels.max())))


@pytest.mark.parametrize(
    ("levels", "dtype", "grey"),
    [
        ([0, 128, 255], np.int32, [0, 128, 255]),
        ([0, 32768, 65535], np.int32, [0, 128, 255]),
        ([0, 2**29, 2**30], np.int32, [0, 128, 255]),
        ([-1000, 0, 1000], np.int32, [0, 128, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 2, 4], np.float32, [0, 128, 255]),
        ([-1, 0, 1], np.float32, [0, 128, 255]),
        ([np.nan, 0.5, np.inf], np.float32, [0, 128, 255]),
        ([np.nan, np.nan, np.nan], np.float32, [0, 0, 0]),
        ([0, 0, 0], np.float32, [0, 0, 0]),
    ],
)
def test_wide_levels_are_scaled(levels, dtype, grey):
    """32-bit and floating-point pictures are neither black nor white, whatever their range."""
    image = Image.fromarray(np.array([levels], dtype))
    assert np.asarray(open_image(encoded(image, "TIFF")))[0, :, 0].tolist() == grey


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(picture, orientation):
    """A photograph that says it is turned comes upright, also when what came is opened again."""
    turn = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # how such a camera held the picture
    stored = picture if turn is None else picture.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for data in (encoded(stored, exif=exif), encoded(stored, "TIFF", exif=exif)):
        opened = open_image(data)
        assert opened.tobytes() == picture.tobytes()
        assert open_image(opened).tobytes() == picture.tobytes()


def test_broken_exif_does_not_make_a_picture_bad(picture):
    """The pixels are what counts."""
    data = encoded(picture, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0" * 9)
    assert open_image(data).tobytes() == picture.tobytes()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    """A picture, not a film."""
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = encoded(red, kind, save_all=True, append_images=[blue])
    assert open_image(data).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize(("side", "scale"), [(1400, 2), (2800, 4)])
def test_a_large_jpeg_may_be_decoded_small(side, scale):
    """The model sees the same, to about one level of 256, even of a noisy picture."""
    data = encoded(textured(side, seed=side), "JPEG", quality=92)
    full, draft = open_image(data), open_image(data, min_side=224)
    assert draft.width == -(-full.width // scale)
    for first, last in [(0, 1), (0, 0.9), (0.05, 0.95), (0.1, 1)]:  # the whole, the smallest crops
        box = [round(n * part) for part in (first, last) for n in draft.size]
        small = full_image(draft.crop(box), 224)
        large = full_image(full.crop([n * scale for n in box]), 224)
        assert (small.float() - large.float()).abs().mean() < 1.2
    assert open_image(data, min_side=1000).size == full.size
    assert open_image(encoded(full), min_side=224).size == full.size


def test_the_smallest_crop_of_a_draft_is_large_enough():
    """Whatever is cropped from a picture decoded small, it is scaled down by 2 or more."""
    for size in [(997, 1400), (1000, 1000), (5000, 1100), (1990, 2000)]:
        small = open_image(encoded(Image.new("RGB", size), "JPEG"), min_side=224)
        assert small.size == size or min(small.size) * 0.9 >= 2 * 224


def test_a_truncated_file_is_bad(picture):
    """Half a file is an error, not half a picture."""
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded(picture, kind)
        with pytest.raises(iq.BadImage):
            open_image(data[: len(data) // 2])


def opens_or_is_bad(source) -> bool:
    try:
        return open_image(source).mode == "RGB"
    except iq.BadImage:
        return False


def all_files() -> dict[str, bytes]:
    """A small picture in every format and mode that Pillow writes."""
    Image.init()
    files = {}
    base = textured(32, seed=0).convert("RGBA")
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            image = base.convert("RGB") if mode == "LAB" else base.convert("L")
            if mode == "LAB":
                image = Image.merge("LAB", image.split())
            elif mode not in ("I;16", "I", "F"):
                image = base.convert(mode)
            else:
                image = image.convert(mode)
            try:
                files[f"{kind} {mode}"] = encoded(image, kind)
            except Exception:  # this format does not know this mode
                continue
    return files


def test_whatever_is_done_to_a_file_only_bad_image_is_raised(capfd):
    """Each format in each mode opens; cut, with flipped bits, or in part garbage, it may be bad."""
    chance = random.Random(0)
    files = all_files()
    assert len(files) > 90
    kinds = {name.split()[0] for name, data in files.items() if opens_or_is_bad(data)}
    readable = {"AVIF", "BLP", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM"}
    assert kinds >= (readable | {"QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM"}) & set(Image.SAVE)
    num_bad = num_broken = 0
    for data in files.values():
        broken = [b"", data[:7], data[: len(data) // 2], data[:-1], data + data]
        broken.append(chance.randbytes(16) + data[16:])
        for _ in range(8):
            flipped = bytearray(data)
            for _ in range(chance.choice([1, 1, 8])):
                reach = min(len(data), chance.choice([64, 512, 2**20]))  # headers most of all
                flipped[chance.randrange(reach)] ^= 1 << chance.randrange(8)
            broken.append(bytes(flipped))
        num_bad += sum(not opens_or_is_bad(each) for each in broken)
        num_broken += len(broken)
    assert 0.3 < num_bad / num_broken < 0.95
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_of_odd_files_can_be_tried():
    """Set PILLOW_TEST_IMAGES to a folder, such as that of Pillow's own tests, to run over it."""
    folder = os.environ.get("PILLOW_TEST_IMAGES")
    if not folder:
        pytest.skip("PILLOW_TEST_IMAGES names no folder")
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    opened = sum(opens_or_is_bad(path) for path in files)
    print(f"{opened} of {len(files)} files opened, the others were BadImage")


def test_no_program_is_started(picture, monkeypatch):
    """An EPS file is a program for Ghostscript; it is refused, also inside an IPTC file."""
    for name in ("check_call", "run", "Popen", "call"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program started"))
    eps = encoded(picture, "EPS")
    with pytest.raises(iq.BadImage, match="another program"):
        open_image(eps)
    with Image.open(io.BytesIO(eps)) as image, pytest.raises(iq.BadImage, match="another program"):
        open_image(image)

    def field(*tag: int, value: bytes) -> bytes:
        return bytes([0x1C, *tag]) + struct.pack(">H", len(value)) + value

    iptc = (
        field(3, 60, value=b"\1\0") + field(3, 20, value=b"\0\x78") + field(3, 30, value=b"\0\xa0")
    )
    iptc += field(3, 120, value=b"\5") + field(8, 10, value=eps[:30000])
    with Image.open(io.BytesIO(iptc)) as image:
        assert image.format == "IPTC"
        with pytest.raises(iq.BadImage, match="another program"):
            open_image(image)
    with pytest.raises(iq.BadImage, match="no format"):
        open_image(iptc)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * (width + 1) * min(height, 10)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_before_decoding(monkeypatch, picture):
    """A decompression bomb costs nothing; Pillow's warning of one never comes through."""
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda _: pytest.fail("load"))
    small = ImageAccess(max_pixels=1000)
    for source in (encoded(picture), picture):
        with pytest.raises(iq.BadImage, match="120 x 160 pixels are over 1000"):
            open_image(source, small)
    for side in (9_000, 10_000, 60_000):
        with pytest.raises(iq.BadImage, match="pixels"):
            open_image(png(side, side))


def test_an_icon_cannot_hide_its_size():
    """The directory of an icon tells another size than the picture in it."""

    def icon(width: int, height: int) -> bytes:
        inside = encoded(Image.new("1", (width, height)))
        entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
        return struct.pack("<HHH", 0, 1, 1) + entry + inside

    assert open_image(icon(400, 300)).size == (400, 300)
    with pytest.raises(iq.BadImage, match="400 x 300 pixels are over 1000"):
        open_image(icon(400, 300), ImageAccess(max_pixels=1000))
    with pytest.raises(iq.BadImage, match="DecompressionBomb"):  # not decoded even once
        open_image(icon(10_000, 9_000))


def test_compressed_metadata_is_no_bomb():
    """Text and colour profiles that unpack to very much are an error, or never unpacked."""
    bomb = zlib.compress(bytes(80 * 2**20), 9)
    for kind in (b"zTXt", b"iCCP"):
        opens_or_is_bad(png(10, 10, chunk(kind, b"name\0\0" + bomb)))
    with pytest.raises(iq.BadImage, match="MAX_TEXT_CHUNK"):
        open_image(png(10, 10, chunk(b"zTXt", b"name\0\0" + bomb)))


def test_pillows_state_is_left_alone(picture):
    """Neither the warning filters nor Pillow's limits change, however many threads decode."""
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    odd = encoded(picture, "TIFF").replace(b"\x11\x01\x04\x00\x01", b"\x11\x01\x04\x00\xff")
    threads = [
        threading.Thread(target=lambda: [opens_or_is_bad(odd) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before
