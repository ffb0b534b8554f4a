"""Downloads on disk: kept, shared, verified, removed; never more than may be."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from servers import PICTURE, access, answer

import idefics_qlora as iq
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.cache import Cache
from idefics_qlora.images.opening import open_image
from idefics_qlora.images.prefetch import prefetch_images


def test_a_url_is_downloaded_once(server):
    """Later epochs read the disk, even when the server is gone."""
    for fragment in ("", "#part", ""):
        assert open_image(f"{server.url}/ok.png{fragment}", access()).size == (30, 20)
    assert len(server.requests) == 1
    open_image(f"{server.url}/ok.png", access(max_cache_bytes=0, cache_dir="nowhere"))
    assert len(server.requests) == 2
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("prefetched", [False, True])
def test_pictures_of_private_hosts_need_the_access_again(server, names, connected, prefetched):
    """What was kept with allow_private_hosts is not shown, counted or overwritten without it."""
    urls = [f"{server.url}/ok.png", "http://public.example/a", "http://public.example/b"]
    names["public.example"] = [["93.184.216.34"]]
    moved = answer(b"", 302, Location=urls[0])  # through a private host is private as well
    server.answers |= {"/a": answer(), "/b": [moved, answer(status=404)]}
    rows = [{"image_url": url} for url in urls]
    if prefetched:
        assert prefetch_images(rows, access=access()).num_downloaded == 3
    else:
        assert [open_image(url, access()).size for url in urls] == [(30, 20)] * 3
    refused = [(0, "no public address"), (2, "answered 404")]
    for row, reason in refused:
        with pytest.raises(iq.BadImage, match=reason):
            open_image(urls[row], access(allow_private_hosts=False))
    result = prefetch_images(rows, access=access(allow_private_hosts=False))
    assert (result.num_downloaded, result.num_already_there) == (0, 1)
    assert [failed.row for failed in result.failed] == [0, 2]
    number = len(server.requests)
    for allow in (False, True):  # a public picture, whoever fetched it
        open_image(urls[1], access(allow_private_hosts=allow))
    assert [open_image(url, access()).size for url in urls] == [(30, 20)] * 3
    assert len(server.requests) == number


def test_the_place_of_the_cache(server, tmp_path, monkeypatch):
    """The argument, else the environment variable, else the user's cache folder."""
    assert Cache(access()).folder == tmp_path / "cache" / "pictures"
    assert Cache(access(cache_dir=tmp_path / "a")).folder == tmp_path / "a" / "pictures"
    monkeypatch.delenv("IDEFICS_QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert Cache(access()).folder == tmp_path / "x" / "idefics_qlora" / "pictures"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache(access()).folder == tmp_path / ".cache" / "idefics_qlora" / "pictures"


def test_failures_are_not_kept(server):
    """A server that was down is asked again by the next call."""
    server.answers["/a"] = [answer(b"", 404), answer(b"<html>"), answer()]
    for _ in range(2):
        with pytest.raises(iq.BadImage):
            open_image(f"{server.url}/a", access())
    assert open_image(f"{server.url}/a", access()).size == (30, 20)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_in_the_cache_is_downloaded_again(server, damage):
    """What the disk lost comes back; a flipped bit that still decodes is noticed, too."""
    url = f"{server.url}/ok.png"
    open_image(url, access())
    path = Cache(access()).path(url)
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"flip": flipped, "cut": whole[:50], "empty": b""}[damage])
    assert open_image(url, access()).size == (30, 20)
    assert len(server.requests) == 2
    assert path.read_bytes() == whole


def test_the_least_recently_used_are_removed(tmp_path):
    """The folder never exceeds its limit, and what was used lately stays."""
    cache = Cache(ImageAccess(max_cache_bytes=10_000))
    for i in range(9):
        cache.put(f"http://host/{i}", bytes(968))  # 1000 with the checksum
        os.utime(cache.path(f"http://host/{i}"), (i + 1, i + 1))
    assert cache.get("http://host/0") == bytes(968)  # used now
    for i in range(9, 12):
        cache.put(f"http://host/{i}", bytes(968))
        assert sum(p.stat().st_size for p in cache.folder.glob("*/*")) <= 10_000
    kept = [i for i in range(12) if cache.touch(f"http://host/{i}")]
    assert kept == [0, 4, 5, 6, 7, 8, 9, 10, 11]
    cache.put("http://host/large", bytes(20_000))
    assert not cache.touch("http://host/large")
    assert cache.touch("http://host/0")


def test_what_a_killed_process_left_is_removed():
    """Unfinished files do not stay for ever, but another process' file at work does."""
    cache = Cache(ImageAccess(max_cache_bytes=10_000))
    folder = cache.path("http://host/").parent
    folder.mkdir(parents=True)
    (folder / ".old").write_bytes(b"half")
    (folder / ".new").write_bytes(b"half")
    os.utime(folder / ".old", (1, 1))
    cache.put("http://host/", b"data")
    assert sorted(p.name for p in folder.iterdir()) == [".new", cache.path("http://host/").name]


def test_making_room_leaves_files_at_work_alone():
    """Another thread's unfinished file is not the least recently used picture."""
    cache = Cache(ImageAccess(max_cache_bytes=2_000))
    at_work = cache.path("http://host/0").parent / ".new"
    at_work.parent.mkdir(parents=True)
    at_work.write_bytes(bytes(100))
    os.utime(at_work, (time.time() - 60, time.time() - 60))
    for i in range(4):
        cache.put(f"http://host/{i}", bytes(968))
    assert at_work.exists()
    assert sum(cache.touch(f"http://host/{i}") for i in range(4)) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(server, tmp_path):
    """The picture is there all the same."""
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*set IDEFICS_QLORA_CACHE"):
        image = open_image(f"{server.url}/ok.png", access(cache_dir=tmp_path / "file"))
    assert image.size == (30, 20)


def open_all(url: str, num_pictures: int) -> int:
    small = access(max_cache_bytes=8 * len(PICTURE), read_timeout_s=5.0, total_timeout_s=20.0)
    rounds = [i for _ in range(5) for i in range(num_pictures)]
    random.Random(os.getpid()).shuffle(rounds)
    return sum(open_image(f"{url}/{i}", small).size == (30, 20) for i in rounds)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_several_processes_share_the_cache(server):
    """Loader workers read, write and evict at once, and every picture comes whole."""
    server.answers |= {f"/{i}": answer() for i in range(12)}
    with multiprocessing.get_context("fork").Pool(3) as pool:
        opened = pool.starmap(open_all, [(server.url, 12)] * 3)
        pool.close()
        pool.join()
    assert opened == [60, 60, 60]
    assert not list(Cache(access()).folder.glob("*/.*"))
