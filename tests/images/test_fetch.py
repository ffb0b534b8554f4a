"""Pictures behind URLs: servers that misbehave, hosts that are refused, the cache, prefetching."""

import functools
import gzip
import io
import multiprocessing
import os
import random
import socket
import socketserver
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import httpcore2
import numpy as np
import pytest
import torch
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.images import fetch
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.cache import Cache
from idefics_qlora.images.fetch import is_public, retry_after_s
from idefics_qlora.images.opening import open_image
from idefics_qlora.images.prefetch import prefetch_images

PICTURE = io.BytesIO()
Image.new("RGB", (30, 20), "green").save(PICTURE, "PNG")
PICTURE = PICTURE.getvalue()
CERTIFICATE = Path(__file__).parent / "pictures.test.pem"  # self-signed, for tests only

access = functools.partial(
    ImageAccess,
    allow_private_hosts=True,
    connect_timeout_s=2.0,
    read_timeout_s=0.15,
    total_timeout_s=5.0,
    max_retries=2,
)


def answer(body: bytes = PICTURE, status: int = 200, length: int | None = None, **more) -> bytes:
    headers = {"Content-Length": len(body) if length is None else length, "Connection": "close"}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Because\r\n{lines}\r\n".encode() + body


class Server:
    """Answers on loopback with whatever bytes, at whatever speed, a test says for a path."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, bytes | list | Callable] = {"/ok.png": answer()}
        self.requests: list[str] = []  # the heads, as they came
        self.closing = threading.Event()
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer._handle(
                    tls.wrap_socket(self.request, server_side=True) if tls else self.request
                )

        class Listener(socketserver.ThreadingTCPServer):
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # the client went away: that is what many tests are about

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.port = self._listener.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,))
        self._thread.start()

    def _handle(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5)
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := connection.recv(65536)):
                    return
                head += data
            self.requests.append(head.decode())
            found = self.answers.get(head.split()[1].decode(), answer(b"", 404))
            if isinstance(found, list):  # one after the other, the last one for ever
                found = found.pop(0) if len(found) > 1 else found[0]
            if callable(found):
                found(connection)
            else:
                connection.sendall(found)

    def close(self) -> None:
        self.closing.set()
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """Seconds it would have waited between tries; no test waits."""
    waited: list[float] = []
    monkeypatch.setattr(fetch, "_wait", waited.append)
    return waited


# ---------------------------------------------------------------------------- one that behaves


def test_a_url_works_like_a_file(server):
    """The picture comes, with the name and the wishes we told the server."""
    image = open_image(f" {server.url}/ok.png ", access(user_agent="tests (mail@example.com)"))
    assert image.getpixel((0, 0)) == (0, 128, 0)
    head = server.requests[0].lower()
    assert "user-agent: tests (mail@example.com)\r\n" in head
    assert "accept-encoding: identity\r\n" in head
    assert f"host: 127.0.0.1:{server.port}\r\n" in head


@pytest.mark.parametrize("coding", ["", "chunked"])
def test_a_body_without_a_length_is_read(server, coding):
    """Many servers tell no Content-Length."""
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PICTURE), PICTURE) if coding else PICTURE
    more = f"Transfer-Encoding: {coding}\r\n" if coding else ""
    server.answers["/a"] = f"HTTP/1.1 200 OK\r\n{more}\r\n".encode() + body
    assert open_image(f"{server.url}/a", access()).size == (30, 20)


# ------------------------------------------------------------------------- one that misbehaves


def drip(start: bytes, drop: bytes, server: Server, pause_s: float) -> Callable:
    """Sends ``start``, then ``drop`` again and again, for ever."""

    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        while not server.closing.wait(pause_s):
            connection.sendall(drop)

    return send


def reset(connection: socket.socket, after: bytes = b"") -> None:
    connection.sendall(after)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


MISBEHAVIOURS = {
    "no headers": (lambda s: drip(b"", b"", s, 0.02), "no answer in time", 3),
    "slow headers": (lambda s: drip(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n", s, 0.02), "over|time", 1),
    "stalls mid-body": (
        lambda s: drip(answer()[:-10], b"", s, 0.02),
        "no answer in time",
        3,
    ),
    "drips mid-body": (lambda s: drip(answer(length=10**5), b".", s, 0.02), "time", 1),
    "endless body": (
        lambda s: drip(b"HTTP/1.1 200 OK\r\n\r\n", b"." * 10**6, s, 0),
        "more than 200000 bytes",
        1,
    ),
    "announces too much": (lambda s: answer(length=10**12), "more than 200000 bytes", 1),
    "announces too little": (lambda s: answer(length=60), "truncated|OSError", 1),
    "announces more than comes": (lambda s: answer(length=5000), "the connection failed", 3),
    "a negative length": (lambda s: answer(length=-1), "the connection failed", 3),
    "closes at once": (lambda s: b"", "the connection failed", 3),
    "reset": (lambda s: reset, "the connection failed", 3),
    "reset mid-body": (
        lambda s: functools.partial(reset, after=answer()[:-10]),
        "the connection failed",
        3,
    ),
    "garbage": (lambda s: b"\x00\xff garbage \r\n\r\n" * 20, "the connection failed", 3),
    "huge headers": (
        lambda s: b"HTTP/1.1 200 OK\r\na: " + b"b" * 300_000,
        "the connection failed",
        3,
    ),
    "404": (lambda s: answer(b"no", 404), "the server answered 404", 1),
    "403": (lambda s: answer(b"no", 403), "the server answered 403", 1),
    "204": (lambda s: b"HTTP/1.1 204 No\r\nConnection: close\r\n\r\n", "answered 204", 1),
    "500 for ever": (lambda s: answer(b"", 500), r"answered 500 \(tried 3 times\)", 3),
    "gzip bomb": (
        lambda s: answer(gzip.compress(bytes(2**24)), Content_Encoding="gzip"),
        r"compressed the picture \(gzip\)",
        1,
    ),
    "an HTML page": (lambda s: answer(b"<!DOCTYPE html><html>Sign in"), "an HTML page", 1),
    "nothing": (lambda s: answer(b""), "it is empty", 1),
    "redirect without a target": (lambda s: answer(b"", 302), "answered 302", 1),
    "redirect loop": (lambda s: answer(b"", 302, Location="/x"), "more than 5 redirects", 6),
    "redirect to a file": (
        lambda s: answer(b"", 302, Location="file:///etc/hostname"),
        r"redirected to 'file:/+etc/hostname': expected an http",
        1,
    ),
    "redirect to nonsense": (
        lambda s: answer(b"", 301, Location="http://a\tb/"),
        "non-printable",
        1,
    ),
    "redirect with a password": (
        lambda s: answer(b"", 301, Location=f"http://a:b@127.0.0.1:{s.port}/ok.png"),
        "redirected to a URL with a user name",
        1,
    ),
}


@pytest.mark.parametrize("kind", MISBEHAVIOURS)
def test_a_server_that_misbehaves_is_a_bad_image(server, kind):
    """Soon, with a reason, tried again only where that can help, and nothing is kept."""
    make, reason, num_requests = MISBEHAVIOURS[kind]
    server.answers["/x"] = make(server)
    limits = access(max_bytes=200_000, total_timeout_s=0.6 if num_requests == 1 else 30)
    began = time.monotonic()
    with pytest.raises(iq.BadImage, match=reason) as caught:
        open_image(f"{server.url}/x", limits)
    assert time.monotonic() - began < 3
    assert caught.value.source == f"'{server.url}/x'"
    assert len(server.requests) == num_requests
    assert not [path for path in Cache(limits).folder.rglob("*") if path.is_file()]


def test_nobody_listens(server):
    """A refused connection is tried again, then a BadImage."""
    server.close()
    with pytest.raises(iq.BadImage, match=r"the connection failed: .*refused.*tried 3 times"):
        open_image(f"{server.url}/ok.png", access())


def test_what_fails_at_first_is_tried_again(server, waits):
    """Twice 500, then a picture: the training does not notice."""
    server.answers["/a"] = [answer(b"", 500), reset, answer()]
    assert open_image(f"{server.url}/a", access()).size == (30, 20)
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_retry_after_is_honoured(server, waits):
    """A server that asks for patience gets it, in both forms, but not without end."""
    soon = datetime.now(timezone.utc) + timedelta(seconds=40)
    for value in ("7", format_datetime(soon, usegmt=True), "86400", "-3", "soon", "9" * 5000):
        server.answers["/a"] = [answer(b"", 429, Retry_After=value), answer(b"", 503), answer()]
        patient = access(max_wait_s=50, total_timeout_s=100, max_cache_bytes=0)
        assert open_image(f"{server.url}/a", patient).size == (30, 20)
    first = waits[::2]
    assert first[0] == 7
    assert first[1] == pytest.approx(39.5, abs=1)
    assert first[2] == 50
    assert all(0.5 <= wait_s <= 1 for wait_s in first[3:])
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 -0000") == 0


def test_no_try_begins_that_the_time_does_not_allow(server, waits):
    """The total time-out holds for the waiting, too."""
    server.answers["/a"] = answer(b"", 429, Retry_After="20")
    with pytest.raises(iq.BadImage, match="answered 429; 5 s are too short to try again"):
        open_image(f"{server.url}/a", access())
    assert not waits


def test_redirects_are_followed(server):
    """Relative and absolute ones, up to five."""
    for i in range(5):
        server.answers[f"/{i}"] = answer(b"", [301, 302, 303, 307, 308][i], Location=f"{i + 1}")
    server.answers["/5"] = answer()
    assert open_image(f"{server.url}/0", access()).size == (30, 20)
    with pytest.raises(iq.BadImage, match="more than 4 redirects"):
        open_image(f"{server.url}/0", access(max_redirects=4, max_cache_bytes=0, cache_dir="none"))


# ------------------------------------------------------------------------------- private hosts


NOT_PUBLIC = """
    127.0.0.1 127.9.9.9 ::1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 fe80::1 fe80::1%1
    fc00::1 fd00:ec2::254 0.0.0.0 :: 224.0.0.1 ff02::1 255.255.255.255 240.0.0.1 100.64.0.1
    192.0.0.8 192.0.2.1 192.88.99.1 198.18.0.1 203.0.113.5 2001:db8::1 100::1 fec0::1 ::7f00:1
    ::ffff:127.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::1 2002:7f00:1::
    2001:0:7f00:1::
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public(address):
    """Loopback, private, link-local, shared, multicast, reserved, and what wraps such a one."""
    assert not is_public(address)


def test_public_addresses():
    """Ordinary hosts are not refused."""
    assert all(map(is_public, ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "172.32.0.1"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1"])
def test_private_hosts_are_refused(server, host):
    """By default no row can make this machine ask another one in its own network."""
    with pytest.raises(iq.BadImage, match=r"no public address: .*allow_private_hosts=True"):
        open_image(f"http://{host}:{server.port}/ok.png")
    assert not server.requests


@pytest.fixture
def names(monkeypatch) -> dict[str, list[list[str]]]:
    """Answers of the name look-up, by host: each look-up takes the next, the last one stays."""
    known: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *arguments, **more) -> list:
        if host not in known:
            return real(host, port, *arguments, **more)
        answers = known[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in real(address, port, *arguments, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.fixture
def connected(monkeypatch, server) -> list[str]:
    """Addresses that were connected to; whichever it is, the server answers."""
    addresses: list[str] = []
    real = httpcore2.SyncBackend.connect_tcp

    def connect(self, host, port, *arguments, **more):
        addresses.append(host)
        return real(self, "127.0.0.1", server.port, *arguments, **more)

    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", connect)
    return addresses


def test_the_checked_address_is_the_one_connected_to(server, names, connected):
    """A name that is public when checked and private when connected to (DNS rebinding) is not."""
    names["rebound.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    assert open_image("http://rebound.test/ok.png").size == (30, 20)
    assert connected == ["8.8.8.8"]
    assert names["rebound.test"] == [["127.0.0.1"]]  # it was looked up once
    names["mixed.test"] = [["10.0.0.1", "::1", "1.1.1.1"]]
    assert open_image("http://mixed.test/ok.png").size == (30, 20)
    assert connected == ["8.8.8.8", "1.1.1.1"]


def test_every_redirect_is_checked(server, names, connected):
    """A public host cannot send us to a private one."""
    names["public.test"] = [["8.8.8.8"]]
    names["metadata.test"] = [["169.254.169.254"]]
    for target in ("http://metadata.test/", "http://127.0.0.1/", "http://[::1]/"):
        server.answers["/a"] = answer(b"", 302, Location=target)
        with pytest.raises(iq.BadImage, match="no public address"):
            open_image("http://public.test/a")
    assert set(connected) == {"8.8.8.8"}


def test_a_proxy_of_the_environment_is_not_used(server, names, connected, monkeypatch):
    """It would look names up by itself, past our check."""
    names["public.test"] = [["8.8.8.8"]]
    monkeypatch.setenv("http_proxy", "http://proxy.test:3128")
    assert open_image("http://public.test/ok.png").size == (30, 20)
    assert connected == ["8.8.8.8"]
    assert server.requests[0].startswith("GET /ok.png HTTP/1.1")


def test_names_that_are_not_found(names, monkeypatch):
    """A name that does not exist is not asked for again; a look-up that hangs is left behind."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(iq.BadImage, match=r"the name nowhere.test cannot be resolved: .*unknown"):
        open_image("http://nowhere.test/a.png")
    asked = threading.Event()
    released = threading.Event()

    def hang(*_: object, **__: object) -> list:
        asked.set()
        released.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(iq.BadImage, match="was not resolved"):
        open_image("http://hangs.test/", access(connect_timeout_s=0.05, max_retries=0))
    assert asked.is_set()
    released.set()


def test_tls_verifies_the_name_not_the_address(names, monkeypatch):
    """The connection goes to an address, and the certificate is still that of the name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    told: list[str] = []
    context.sni_callback = lambda _, name, __: told.append(name)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    server = Server(tls=context)
    names["pictures.test"] = names["other.test"] = [["127.0.0.1"]]
    try:
        with pytest.raises(iq.BadImage, match="certificate is not valid"):  # nobody trusts it
            open_image(f"https://pictures.test:{server.port}/ok.png", access())
        monkeypatch.setattr(fetch, "_ssl_context", lambda: trusting)
        image = open_image(f"https://pictures.test:{server.port}/ok.png", access())
        assert image.size == (30, 20)
        with pytest.raises(iq.BadImage, match="certificate is not valid: .*other.test"):
            open_image(f"https://other.test:{server.port}/ok.png", access())
        with pytest.raises(iq.BadImage, match="certificate is not valid"):
            open_image(f"https://127.0.0.1:{server.port}/ok.png", access())
    finally:
        server.close()
    assert told[:3] == ["pictures.test", "pictures.test", "other.test"]


# --------------------------------------------------------------------------------------- cache


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


def test_loading_draws_no_random_numbers(server):
    """Retries are spread in time without touching the generators that training depends on."""
    server.answers["/a"] = [answer(b"", 500), answer()]
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    open_image(f"{server.url}/a", access())
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after


# ------------------------------------------------------------------------------------ prefetch


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
