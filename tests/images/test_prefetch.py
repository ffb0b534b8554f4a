"""Pictures of many rows, downloaded ahead."""

import socket
import threading
from collections import Counter

import pytest
from servers import PICTURE, access, answer

from idefics_qlora.images.opening import open_image
from idefics_qlora.images.prefetch import prefetch_images


def test_prefetched_pictures_are_read_from_the_disk(server, tmp_path, caplog):
    """Each URL is fetched once, failures are named by row, and training needs no server."""
    server.answers |= {f"/{i}": answer() for i in range(5)}
    server.answers["/page"] = answer(b"<html>")
    server.answers["/cut"] = answer(PICTURE[:-30])
    (tmp_path / "local.png").write_bytes(PICTURE)
    urls = [f"{server.url}/{name}" for name in [0, 1, 2, 3, 4, 0, "page", "cut", "missing", "page"]]
    others = [str(tmp_path / "local.png"), tmp_path / "none.png", None, "ftp://x/y", PICTURE]
    rows = [{"image_url": source, "name": "x"} for source in urls + others]
    open_image(urls[4], access())
    result = prefetch_images(rows, access=access())
    assert (result.num_downloaded, result.num_already_there) == (4, 2)
    assert [failure.row for failure in result.failed] == [6, 7, 8, 9, 11, 12, 13]
    reasons = [failure.reason for failure in result.failed]
    for reason, part in zip(
        reasons, ["HTML", "truncated", "404", "HTML", "no such", "no picture", "ftp"], strict=True
    ):
        assert part.lower() in reason.lower()
    assert result.failed[2].source == f"'{server.url}/missing'"
    assert "4 pictures downloaded, 2 already there, 7 rows failed" in str(result)
    assert "row 8" in caplog.text

    num_requests = len(server.requests)
    server.close()
    for url in urls[:6]:
        assert open_image(url, access()).size == (30, 20)
    again = prefetch_images(rows[:6], access=access())
    assert (again.num_downloaded, again.num_already_there, again.failed) == (0, 5, [])
    assert len(server.requests) == num_requests


def test_a_host_is_not_overrun(server):
    """At most so many downloads at the same time from one host."""
    lock, now, most = threading.Lock(), Counter(), Counter()
    too_many = threading.Event()

    def count(connection: socket.socket) -> None:
        with lock:
            now["all"] += 1
            most["all"] = max(most["all"], now["all"])
            if now["all"] > 2:
                too_many.set()
        too_many.wait(0.1)  # time for a third to come, if one may
        with lock:
            now["all"] -= 1
        connection.sendall(answer())

    server.answers |= {f"/{i}": count for i in range(12)}
    rows = [{"url": f"{server.url}/{i}"} for i in range(12)]
    result = prefetch_images(rows, "url", access(read_timeout_s=3.0), num_threads=8, max_per_host=2)
    assert result.num_downloaded == 12
    assert most["all"] == 2


def test_a_dataset_can_be_prefetched(server):
    """Rows of `datasets` are read by column; a column that is not there is named."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"image_url": f"{server.url}/ok.png"}] * 3)
    assert prefetch_images(rows, access=access()).num_downloaded == 1
    for wrong in (rows, list(rows)):
        with pytest.raises(ValueError, match=r"column='url': the rows have \['image_url'\]"):
            prefetch_images(wrong, "url", access())
    assert prefetch_images([], access=access()).failed == []
    with pytest.raises(ValueError, match="max_per_host=0: expected 1 or more"):
        prefetch_images(rows, access=access(), max_per_host=0)


def test_a_cache_too_small_for_the_rows_is_said(server):
    """What was downloaded and removed again would be downloaded in each epoch."""
    server.answers |= {f"/{i}": answer() for i in range(8)}
    rows = [{"image_url": f"{server.url}/{i}"} for i in range(8)]
    small = access(max_cache_bytes=4 * (len(PICTURE) + 32), read_timeout_s=2.0)
    result = prefetch_images(rows, access=small)
    assert result.num_downloaded == 8
    assert len(result.failed) >= 4
    assert "max_cache_bytes" in result.failed[0].reason
