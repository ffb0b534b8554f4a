"""A headless Chromium, driven over a pipe by its DevTools protocol: looks at pages as people do.

Where there is none, :func:`find` says so; Debian's package is ``chromium``.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update"),
)
_START = (  # the browser reads descriptor 3 and writes 4
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
PHONE, DESKTOP = (390, 844), (1280, 900)


def find() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A browser with one page; everything it complains of is in ``complaints``.

    Args:
        timeout_s: How long to wait for an answer.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        program = find()
        if program is None:
            raise FileNotFoundError(f"no browser: expected one of {', '.join(NAMES)} in PATH")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._timeout_s, self._number, self._read_so_far = timeout_s, 0, b""
        self._events: list[dict[str, Any]] = []
        self._home = tempfile.mkdtemp()
        ours, theirs = os.pipe(), os.pipe()  # what it writes, what it reads
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _START, str(theirs[0]), str(ours[1])),
                *(program, *OPTIONS, f"--user-data-dir={self._home}", "about:blank"),
            ],
            pass_fds=(theirs[0], ours[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._home},
        )
        os.close(theirs[0])
        os.close(ours[1])
        self._incoming, self._outgoing = ours[0], theirs[1]
        self._session: str | None = None
        try:
            self._attach()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _attach(self) -> None:
        """Open a page and listen to it."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._incoming)
        os.close(self._outgoing)
        shutil.rmtree(self._home, ignore_errors=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; what it returns.

        Raises:
            RuntimeError: If the browser refuses, or does not answer.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._outgoing, content) :]
        while True:
            answer = self._next(method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer.get("result", {})
                return result
            self._note(answer)

    def open(
        self, page: Path | str, size: tuple[int, int] = DESKTOP, *, dark: bool = False
    ) -> None:
        """Show a file or an address, in a window of so many pixels, and wait until it is loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.send("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._note(self._next("Page.navigate"))

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page.

        Raises:
            RuntimeError: If it raises.
        """
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression in the page is true.

        Raises:
            RuntimeError: If it raises, or stays false for as long as the browser may take.
        """
        look = f"const look = () => ({script}) ? done(true) : setTimeout(look, 20); look()"
        caught = f"new Promise((done, failed) => {{ try {{ {look} }} catch (e) {{ failed(e) }} }})"
        found = self.send("Runtime.evaluate", expression=caught, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")

    def choose(self, selector: str, *files: Path) -> None:
        """Give files to an input of a page, as if they had been chosen or dropped there."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        names = [str(file.resolve()) for file in files]
        self.send("DOM.setFileInputFiles", nodeId=node, files=names)

    def click(self, selector: str) -> None:
        """Click an element once it is there, wherever it has moved to."""
        self.wait_for(f"document.querySelector({json.dumps(selector)})")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Write a text over what stands in a field."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press and release a key, such as ``ArrowLeft`` or ``Tab``."""
        code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            known = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", **known)

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, file: Path, *, top: float = 0, height: float | None = None) -> None:
        """Write the page, or a stretch of it, to a WebP file."""
        size = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": size[0], "height": height or size[1] - top, "scale": 1}
        shot = self.send(
            "Page.captureScreenshot",
            **{"format": "webp", "quality": 80, "clip": clip, "captureBeyondViewport": True},
        )
        file.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def _next(self, waiting_for: str) -> dict[str, Any]:
        until = time.monotonic() + self._timeout_s
        while b"\0" not in self._read_so_far:
            left = max(0.0, until - time.monotonic())
            if not select.select([self._incoming], [], [], left)[0]:
                raise RuntimeError(f"the browser did not answer {waiting_for}")
            part = os.read(self._incoming, 2**16)
            if not part:
                raise RuntimeError(f"the browser has ended ({waiting_for})")
            self._read_so_far += part
        message, _, self._read_so_far = self._read_so_far.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
