"""What can go wrong while training: signals, and a folder in use.

Nothing here knows the loop; it asks these objects and decides.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request that the loop meets after its step.

    The first signal is noted in :attr:`received`. A second one does at once what it would have done
    without us. Signals that the process ignores stay ignored. Handlers can be set in the main
    thread only; elsewhere nothing is installed, and a log line says so.
    """

    SIGNALS = tuple(
        signal.Signals[name]
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        if hasattr(signal, name)  # Windows has no SIGUSR1
    )

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "train() runs outside the main thread, where signals cannot be handled: SIGTERM or "
                "Ctrl-C will not save a checkpoint first"
            )
            return self
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        # Not through logging: the signal may have come while a logging lock was held.
        message = f"\n{self.received.name}: finishing this step and saving; again to stop at once\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())


def ignore_stop_signals() -> None:
    """Let a loader worker live on when its whole process group is signalled.

    The main process decides when its workers end; a worker that died of Ctrl-C would take the step
    that is being finished with it.
    """
    for number in StopSignals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class RunLock:
    """Keeps a second run out of an output folder for as long as this one lives.

    A lock of the kernel on ``.lock`` in the folder: it falls with the process, however that dies.
    ``filelock`` closes the file in every forked process, so that a loader worker which outlives a
    run does not hold it.

    Args:
        folder: The run's output folder; created when missing.

    Raises:
        OSError: If the folder cannot be made or written to; the message names it.
        RuntimeError: If another live run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder.resolve() / ".lock"  # whatever the working directory is by the end
        self._lock = FileLock(self._path, thread_local=False, fallback_to_soft=False)

    def __enter__(self) -> RunLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and not self._path.is_file():  # a pipe would open as well
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self._lock.acquire(blocking=False)
        except Timeout:
            holder = "one that has not said its name"
            with contextlib.suppress(OSError):  # Windows does not let others read what is locked
                holder = self._path.read_text("utf-8", "replace")[:200].strip() or holder
            raise RuntimeError(
                f"output_dir={str(self.folder)!r} is in use by another run ({holder}): choose "
                "another folder, or stop that run first"
            ) from None
        except OSError as error:
            way_out = "choose another folder"
            if os.path.lexists(self._path) and not self._path.is_file():
                way_out = f"delete {self._path}, which is no file"
            raise type(error)(
                error.errno,
                f"output_dir={str(self.folder)!r} cannot be written to ({error.strerror}): "
                f"{way_out}",
                str(self._path),
            ) from error
        with contextlib.suppress(OSError):  # as above; it is only what others are told
            self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a file left behind locks nobody out
            self._path.unlink()  # while it is still locked
        self._lock.release()


@contextmanager
def guarded_children() -> Iterator[None]:
    """Keep PyTorch's SIGCHLD handler, which raises when a worker dies, out of a whole run.

    It would raise in the middle of whatever is being computed. :class:`Loading` lets it act while
    an item is awaited. Afterwards it is in place again, for other loaders of the process.
    """
    if not _child_signals_can_be_handled():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch."):
        _handlers[:] = [before]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, _handlers[-1] if _handlers else before)


@contextmanager
def child_signals() -> Iterator[None]:
    """Let PyTorch's SIGCHLD handler act in this block."""
    if not _child_signals_can_be_handled():
        yield
        return
    outside = signal.getsignal(signal.SIGCHLD)
    if _handlers:
        signal.signal(signal.SIGCHLD, _handlers[-1])
    try:
        yield
    finally:
        inside = signal.getsignal(signal.SIGCHLD)
        if inside != outside:
            _handlers[:] = [inside]
            signal.signal(signal.SIGCHLD, outside)


def _child_signals_can_be_handled() -> bool:
    """In the main thread, and not on Windows, which has none."""
    return hasattr(signal, "SIGCHLD") and (threading.current_thread() is threading.main_thread())


_handlers: list[Any] = []
"""PyTorch's handler, once it has set it."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and of ``device`` for this block.

    Afterwards they are as they were; those of other devices are not touched, as
    ``torch.manual_seed`` would.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
