"""A server of pictures on loopback, and an access that may ask it."""

import functools
import io
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable

from PIL import Image

from idefics_qlora.images.access import ImageAccess

PICTURE = io.BytesIO()
Image.new("RGB", (30, 20), "green").save(PICTURE, "PNG")
PICTURE = PICTURE.getvalue()

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
