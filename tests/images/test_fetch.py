"""Pictures behind URLs: servers that misbehave, and hosts that are refused."""

import functools
import gzip
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import PICTURE, Server, access, answer

import idefics_qlora as iq
from idefics_qlora.images import fetch
from idefics_qlora.images.cache import Cache
from idefics_qlora.images.fetch import is_public, retry_after_s
from idefics_qlora.images.opening import open_image

CERTIFICATE = Path(__file__).parent / "pictures.test.pem"  # self-signed, for tests only


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


def test_loading_draws_no_random_numbers(server):
    """Retries are spread in time without touching the generators that training depends on."""
    server.answers["/a"] = [answer(b"", 500), answer()]
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    open_image(f"{server.url}/a", access())
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after
