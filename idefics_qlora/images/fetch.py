"""Pictures behind URLs: downloading them, and keeping them on disk; knows nothing of formats."""

from __future__ import annotations

import email.utils
import functools
import ipaddress
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, NamedTuple

import httpcore2
import httpx2

from idefics_qlora.images.access import BadImage, ImageAccess


class Downloader:
    """Downloads over connections that are kept open; safe for several threads, not for a fork.

    Proxies of the environment are not used: a proxy looks names up by itself, so that no address
    could be checked.
    """

    def __init__(self, access: ImageAccess) -> None:
        self._access = access
        self._pool = httpcore2.ConnectionPool(
            ssl_context=_ssl_context(),
            max_connections=None,
            max_keepalive_connections=16,
            keepalive_expiry=5.0,
            network_backend=_CheckedNetwork(access.allow_private_hosts),
        )

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def download(self, url: str) -> Download:
        """The body behind an http(s) URL.

        Raises:
            BadImage: If it cannot be had, may not be had, is too large, or takes too long.
        """
        access = self._access
        name = f"{url!r:.500}"
        deadline = time.monotonic() + access.total_timeout_s
        token = _deadline.set(deadline)
        try:
            for num_tries in range(1, access.max_retries + 2):
                try:
                    return self._follow(url.strip())
                except _Temporary as error:
                    reason, wait_s = str(error), error.retry_after_s
                if num_tries > access.max_retries:
                    break
                if wait_s is None:
                    wait_s = 2 ** (num_tries - 1) * _JITTER.uniform(0.5, 1.0)
                wait_s = min(wait_s, access.max_wait_s)
                if time.monotonic() + wait_s >= deadline:
                    reason += f"; {access.total_timeout_s:g} s are too short to try again"
                    break
                _wait(wait_s)
            raise BadImage(name, f"{reason} (tried {num_tries} times)")
        except (_Refused, httpx2.InvalidURL) as error:
            raise BadImage(name, str(error)) from error
        finally:
            _deadline.reset(token)

    def _follow(self, text: str) -> Download:
        url = _checked_url(text)
        is_public = True
        for _ in range(self._access.max_redirects + 1):
            try:
                answer, was_public = self._ask(url)
            except httpcore2.TimeoutException as error:
                raise _Temporary(f"no answer in time: {error or type(error).__name__}") from error
            except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
                if _is_certificate_error(error):
                    raise _Refused(f"the server's certificate is not valid: {error}") from error
                raise _Temporary(f"the connection failed: {error}") from error
            is_public = is_public and was_public
            if isinstance(answer, bytes):
                return Download(answer, is_public)
            url = _checked_url(answer, "redirected to ")
        raise _Refused(f"more than {self._access.max_redirects} redirects, lastly to {url}")

    def _ask(self, url: httpx2.URL) -> tuple[bytes | str, bool]:
        """The body, or the address that the server redirects to; whether its host is public."""
        access = self._access
        timeouts = {"connect": access.connect_timeout_s, "read": access.read_timeout_s}
        with self._pool.stream(
            "GET",
            httpcore2.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers={
                "Host": url.netloc,
                "User-Agent": access.user_agent,
                "Accept": "image/*,*/*;q=0.8",
                # Pictures are compressed already; what a server compressed again could be a bomb.
                "Accept-Encoding": "identity",
            },
            extensions={"timeout": {**timeouts, "write": access.read_timeout_s}},
        ) as response:
            headers = {key.lower(): value for key, value in response.headers}
            status = response.status
            was_public = response.extensions["network_stream"].get_extra_info(_IS_PUBLIC)
            if status in (301, 302, 303, 307, 308) and b"location" in headers:
                location = headers[b"location"].decode("utf-8", "replace")
                return str(url.join(location)), was_public
            if status in (408, 425, 429) or status >= 500:
                wait_s = retry_after_s(headers.get(b"retry-after", b"").decode("latin-1"))
                raise _Temporary(f"the server answered {status}", wait_s)
            if status != 200:
                raise _Refused(f"the server answered {status}")
            encoding = headers.get(b"content-encoding", b"identity").strip().lower()
            if encoding not in (b"", b"identity"):
                raise _Refused(f"the server compressed the picture ({encoding.decode('latin-1')})")
            too_large = _Refused(f"more than {access.max_bytes} bytes (ImageAccess.max_bytes)")
            if int(headers.get(b"content-length", b"0")) > access.max_bytes:
                raise too_large
            body = bytearray()
            for chunk in response.iter_stream():
                body += chunk
                if len(body) > access.max_bytes:
                    raise too_large
            return bytes(body), was_public


class Download(NamedTuple):
    """What came from a URL."""

    data: bytes
    is_public: bool
    """Whether every host on the way, those that redirected included, has a public address."""


class _Refused(Exception):
    """There is no use in trying again."""


class _Temporary(Exception):
    """Another try may help."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


_JITTER = random.Random()
"""Of its own: loading pictures must not draw from the global generators."""

_wait = time.sleep

_deadline: ContextVar[float] = ContextVar("deadline")
"""``time.monotonic()`` at which the download under way is given up. Not a field of the connection,
because connections are kept for other downloads."""


def _seconds_left(timeout: float | None) -> float:
    left = _deadline.get() - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the time for the whole download is over")
    return left if timeout is None else min(timeout, left)


def _is_certificate_error(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # once per process: it reads all root certificates


def _checked_url(text: str, how: str = "") -> httpx2.URL:
    url = httpx2.URL(text)
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 2**16:
        raise _Refused(f"{how}{text!r:.200}: expected an http(s) URL with a host")
    if url.userinfo:
        raise _Refused(f"{how}a URL with a user name: expected one that needs no password")
    return url


def retry_after_s(text: str) -> float | None:
    """Seconds that a ``Retry-After`` header (a number or a date) asks for; ``None`` if none."""
    try:
        if re.fullmatch(r"\s*\d{1,9}\s*", text):
            return float(text)
        then = email.utils.parsedate_to_datetime(text)
        if then.tzinfo is None:
            then = then.replace(tzinfo=timezone.utc)
        return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())
    except (IndexError, OverflowError, TypeError, ValueError):
        return None


class _CheckedNetwork(httpcore2.NetworkBackend):
    """Looks a name up once, and connects to the very addresses that were checked.

    A look-up of its own by the connection could give another address (DNS rebinding). TLS still
    verifies the certificate against the name, because only the socket knows of the address.
    """

    def __init__(self, allow_private_hosts: bool) -> None:
        self._allow_private_hosts = allow_private_hosts
        self._network = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = _resolve(host, port, _seconds_left(timeout))
        if not self._allow_private_hosts:
            public = [address for address in addresses if is_public(address)]
            if not public:
                raise _Refused(
                    f"{host} is at {addresses[0]}, which is no public address: pass "
                    "access=ImageAccess(allow_private_hosts=True) to train, evaluate, generate or "
                    "open_image if you trust where the URLs come from"
                )
            addresses = public
        for address in addresses[:4]:
            try:
                stream = self._network.connect_tcp(address, port, _seconds_left(timeout))
                return _TimedStream(stream, is_public(address))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


_IS_PUBLIC = "idefics_qlora.is_public"
"""What a connection is asked about its address."""


class _TimedStream(httpcore2.NetworkStream):
    """A connection whose every wait ends at the download's deadline.

    A time-out per read alone would let a server send a byte now and then for ever. It remembers
    whether the address it was opened to is public, for it may serve many requests.
    """

    def __init__(self, stream: httpcore2.NetworkStream, is_public: bool) -> None:
        self._stream = stream
        self._is_public = is_public

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _seconds_left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _seconds_left(timeout))

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left = _seconds_left(timeout)
        stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return _TimedStream(stream, self._is_public)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._is_public if info == _IS_PUBLIC else self._stream.get_extra_info(info)


def _resolve(host: str, port: int, timeout_s: float) -> list[str]:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)

    # getaddrinfo knows no time-out, so it is asked in a thread that can be left behind.
    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise httpcore2.ConnectTimeout(f"the name {host} was not resolved") from None
    if isinstance(found, socket.gaierror) and found.errno == socket.EAI_AGAIN:
        raise httpcore2.ConnectError(f"the name {host} cannot be resolved now: {found}")
    if isinstance(found, Exception) or not found:
        raise _Refused(f"the name {host} cannot be resolved: {found}")
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


_SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        *("64:ff9b::/96", "64:ff9b:1::/48"),  # NAT64
        *(
            "192.0.0.0/24",
            "192.88.99.0/24",
            "fec0::/10",
        ),  # Pythons differ in what they say of these
    )
]


def is_public(address: str) -> bool:
    """Whether an IP address is one of a public host.

    Addresses that wrap an IPv4 address (mapped, 6to4, Teredo, NAT64) are not: they could lead to a
    private one, and a public host has its IPv4 address besides.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo):
        return False
    if any(ip in network for network in _SPECIAL if network.version == ip.version):
        return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast
    return ip.is_global and not (special or ip.is_reserved or ip.is_unspecified)
