"""Decoded pictures that are kept: the same pixels, whatever happens to what is kept."""

import io
import multiprocessing
import os
import time

import numpy as np
import pytest
from PIL import Image

from idefics_qlora.images.access import BadImage, ImageAccess
from idefics_qlora.images.kept import KeptInMemory, KeptOnDisk, kept_pictures, key_of
from idefics_qlora.images.opening import open_image, opening_for

PLACES = ["disk", "memory"]
ACCESS = ImageAccess()


def encoded(image, kind="JPEG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


class Counting:
    """What is kept, with a count of what was found there."""

    def __init__(self, kept):
        self.kept, self.found = kept, 0

    def get(self, key):
        image = self.kept.get(key)
        self.found += image is not None
        return image

    def put(self, key, image):
        self.kept.put(key, image)


def files(access=ACCESS):
    return [p for p in KeptOnDisk(access).folder.glob("*/*") if p.is_file()]


@pytest.mark.parametrize("where", PLACES)
def test_a_kept_picture_is_the_decoded_one(where, picture, tmp_path):
    """Turned, transparent, grey and 16-bit pictures, from files and bytes: found, and equal."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "a.png"
    picture.save(file)
    clear = picture.convert("RGBA")
    clear.putalpha(90)
    wide = Image.fromarray(np.arange(120 * 100, dtype=np.uint16).reshape(100, 120) * 5)
    sources = [
        *(file, str(file), {"path": str(file), "bytes": None}),
        *(encoded(picture, exif=exif), {"bytes": encoded(clear, "PNG"), "path": None}),
        *(encoded(picture.convert("L")), encoded(wide, "PNG")),
    ]
    kept = Counting(kept_pictures(where, ACCESS))
    for source in sources:
        plain = open_image(source)
        with opening_for(64, kept):
            first, found = open_image(source), kept.found
            again = open_image(source)
        assert kept.found == found + 1
        assert plain.mode == again.mode == "RGB"
        assert plain.info == again.info == {}
        assert plain.size == again.size
        assert plain.tobytes() == first.tobytes() == again.tobytes()


@pytest.mark.parametrize("where", PLACES)
def test_a_changed_file_is_decoded_anew(where, tmp_path):
    """Even one of the same name, size and time: the content decides."""
    file = tmp_path / "a.bmp"
    kept = kept_pictures(where, ACCESS)
    with opening_for(64, kept):
        for seed in range(2):
            noise(50, 40, seed).save(file)
            os.utime(file, (1e9, 1e9))
            assert open_image(file).tobytes() == noise(50, 40, seed).tobytes()


def test_whatever_is_damaged_is_decoded_again(picture):
    """A flipped bit, a cut file, an empty one, another size: never other pixels, and mended."""
    data = encoded(picture)
    plain = open_image(data).tobytes()
    kept = Counting(KeptOnDisk(ACCESS))
    with opening_for(64, kept):
        open_image(data)
        (file,) = files()
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[5000] ^= 4
        turned = whole[:4] + whole[8:12] + whole[4:8] + whole[12:]
        for damaged in (bytes(flipped), whole[:-1], whole[:3], b"", turned, whole + b"x"):
            file.write_bytes(damaged)
            found = kept.found
            assert open_image(data).tobytes() == plain
            assert kept.found == found
            assert file.read_bytes() == whole


@pytest.mark.parametrize("where", PLACES)
def test_limits_hold_for_kept_pictures(where, picture, tmp_path):
    """What one access may open, another that allows less still may not."""
    file = tmp_path / "a.png"
    picture.save(file)
    with opening_for(64, kept_pictures(where, ACCESS)):
        open_image(file)
        with pytest.raises(BadImage, match="pixels are over 100"):
            open_image(file, ImageAccess(max_pixels=100))
        with pytest.raises(BadImage, match="more than 100 bytes"):
            open_image(file, ImageAccess(max_bytes=100))
        file.unlink()
        with pytest.raises(BadImage, match="no such file"):
            open_image(file)


def open_all(kept, pictures, failed):
    for data in pictures:
        with opening_for(64, kept):
            image = open_image(data)
        if image.tobytes() != open_image(data).tobytes():
            failed.set()


@pytest.mark.parametrize("where", PLACES)
def test_processes_share_what_they_keep(where):
    """Workers that write the same pictures at the same time read them whole, and so does the
    process they were forked from."""
    pictures = [encoded(noise(90, 70, seed)) for seed in range(20)]
    kept = Counting(kept_pictures(where, ACCESS))
    context = multiprocessing.get_context("fork")
    failed = context.Event()
    workers = [
        context.Process(target=open_all, args=(kept, pictures[::order], failed))
        for order in (1, -1, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not failed.is_set()
    open_all(kept, pictures, failed)
    assert kept.found == len(pictures)
    assert not failed.is_set()


def test_pictures_in_use_are_not_removed_for_others(caplog):
    """Epochs go round: what is kept stays, and only what no run has used for long gives way."""
    access = ImageAccess(max_cache_bytes=20 * 10_000)
    pictures = [encoded(noise(60, 50, seed)) for seed in range(30)]  # 9,016 bytes each
    with opening_for(64, KeptOnDisk(access)):
        for data in pictures:
            open_image(data)
    names = {file.name for file in files()}
    assert 19 <= len(names) <= 23  # a 20th more at most
    (told,) = [r.getMessage() for r in caplog.records if "keeps no more" in r.getMessage()]
    assert "max_cache_bytes=200000 are used" in told
    again = KeptOnDisk(access)
    with opening_for(64, again):
        for data in pictures:
            open_image(data)
    assert names <= {file.name for file in files()}
    assert len(files()) <= len(names) + 2  # another process may exceed it as far
    past = time.time() - 1000
    for file in files():
        os.utime(file, (past, past))
    others = [encoded(noise(60, 50, 100 + seed)) for seed in range(15)]
    with opening_for(64, KeptOnDisk(access)):
        for data in others:
            open_image(data)
    kept = {file.name for file in files()}
    assert all(key_of(data, access, None).hex()[2:] in kept for data in others)


def test_memory_that_is_full_keeps_what_it_has(caplog):
    """The first pictures stay, the others are decoded; it is told once."""
    kept = Counting(KeptInMemory(40_000))
    pictures = [encoded(noise(60, 50, seed)) for seed in range(10)]
    with opening_for(64, kept):
        for _ in range(2):
            for data in pictures:
                assert open_image(data).tobytes() == open_image(data).tobytes()
    assert kept.found == 4 * (1 + 2)  # once in the first round, twice in the second
    assert len([r for r in caplog.records if "are taken" in r.getMessage()]) == 1


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, picture, caplog):
    """The run goes on without."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with opening_for(64, KeptOnDisk(ImageAccess(cache_dir=blocked))):
        for seed in range(3):
            assert open_image(encoded(noise(60, 50, seed)))
    (told,) = [r.getMessage() for r in caplog.records if "keeps no more" in r.getMessage()]
    assert "Not a directory" in told


def test_nothing_is_kept_unless_asked():
    """No setting, or a limit of 0 bytes."""
    assert kept_pictures(None, ACCESS) is None
    assert kept_pictures("disk", ImageAccess(max_cache_bytes=0)) is None


def test_a_draft_is_kept_apart_from_the_whole():
    """A run with ``draft`` and one without never see each other's pixels."""
    data = encoded(noise(400, 300))
    small = ImageAccess(draft=True)
    for where in PLACES:
        with opening_for(64, kept_pictures(where, ACCESS)):
            for _ in range(2):
                assert open_image(data).size == (400, 300)
                assert open_image(data, small).size == (200, 150)
