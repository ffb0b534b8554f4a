"""Fixtures of the tests of pictures: servers, and who is asked in their place."""

import socket
from collections.abc import Iterator

import httpcore2
import pytest
from servers import Server

from idefics_qlora.images import fetch


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
