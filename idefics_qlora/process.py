"""What can go wrong while training: signals, values that are not finite, a folder in use.

Nothing here knows the loop; it asks these objects and decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from idefics_qlora.config import OnBadRow, check_choice
from idefics_qlora.data.batches import Batch
from idefics_qlora.data.windows import BadRow

logger = logging.getLogger(__name__)


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request that the loop meets after its step.

    The first signal is noted in :attr:`received`. A second one does at once what it would have done
    without us. Signals that the process ignores stay ignored. Handlers can be set in the main
    thread only; elsewhere nothing is installed, and a log line says so.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

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


MAX_BAD_SHARE = 0.05
"""Share of the rows seen that may be bad before a run stops."""


def with_words(error: Exception, words: str) -> Exception:
    """An exception of the same type (or a ``RuntimeError`` that names it) with words added."""
    message = f"{error}; {words}"
    with contextlib.suppress(Exception):  # a type that wants other arguments
        told = type(error)(message)
        if words in str(told):
            return told
    return RuntimeError(f"{type(error).__name__}: {message}")


@contextlib.contextmanager
def advising(
    what: str, otherwise: str = "shorten the longest examples (max_length)", **settings: int
) -> Iterator[None]:
    """Say what to lower when the GPU's memory does not suffice.

    Args:
        what: For what it does not suffice.
        otherwise: What helps where no setting can be lowered.
        **settings: What decides its size, with the present values; 1 cannot be lowered.

    Raises:
        torch.OutOfMemoryError: In the place of PyTorch's own.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        lower = " or ".join(f"{name} (now {size})" for name, size in settings.items() if size > 1)
        raise torch.OutOfMemoryError(
            f"{what} does not fit into the memory: {f'lower {lower}' if lower else otherwise}, or "
            "free the GPU from other processes"
        ) from error


class BadRows:
    """What happens to rows that cannot be read: noted and left out, or raised.

    Args:
        policy: As in ``TrainConfig``.
        ledger: File that gets a line of JSON (``row``, ``source``, ``reason``) for each bad row,
            once, also over restarts; ``None``: no file.
    """

    def __init__(self, policy: OnBadRow, ledger: Path | None = None) -> None:
        check_choice("on_bad_row", policy, OnBadRow)
        self.policy = policy
        self.ledger = ledger
        self.reasons: dict[str, str] = {}
        if ledger is None or not os.path.lexists(ledger):
            return
        try:
            if not ledger.is_file():  # a pipe would block
                raise OSError(errno.EINVAL, "it is no file")
            lines = ledger.read_bytes().splitlines()
        except OSError as error:
            logger.warning(
                "%s cannot be read (%s): bad rows are not noted there; delete it",
                *(ledger, error.strerror),
            )
            self.ledger = None
            return
        for line in lines:  # a killed process may have left half of one
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(line)
                self.reasons[record["row"]] = f"{record['row']}: {record['reason']}"

    def note(self, bad: Iterable[BadRow]) -> None:
        """Raise, or note the rows that are new.

        Raises:
            ValueError: With the policy ``raise`` (``BadImage`` if a picture is the reason).
        """
        for row in bad:
            if self.policy == "raise":
                raise row.error()
            if row.row in self.reasons:
                continue
            self.reasons[row.row] = str(row.error())
            logger.warning("left out: %s", row.error())
            if self.ledger is not None:
                record = {"row": row.row, "source": row.source, "reason": row.reason}
                try:
                    torn = self.ledger.exists() and not self.ledger.read_bytes().endswith(b"\n")
                    with self.ledger.open("a") as file:  # a kill may have left half a line
                        file.write(("\n" if torn else "") + f"{json.dumps(record)}\n")
                except OSError as error:  # a full disk is for the next checkpoint to report
                    logger.warning("%s cannot be written: %s", self.ledger, error)

    def check_share(self, num_bad: int, num_seen: int, few: int = 0) -> None:
        """Stop when too many rows are bad to be an accident.

        Args:
            num_bad: Bad rows.
            num_seen: Rows, the bad ones included.
            few: Of fewer rows, as many may be bad as of this number.

        Raises:
            ValueError: With the first reasons.
        """
        if num_bad <= MAX_BAD_SHARE * max(num_seen, few):
            return
        first = "\n".join(f"  - {reason}" for reason in islice(self.reasons.values(), 5))
        where = "" if self.ledger is None else f"; all of them are in {self.ledger}"
        raise ValueError(
            f"{num_bad} of {num_seen} rows seen cannot be read, more than {MAX_BAD_SHARE:.0%}"
            f"{where}. The first:\n{first}\nMend the rows, or the to_example function"
        )


class RunLock:
    """Keeps a second run out of an output folder for as long as this one lives.

    An ``flock`` on ``.lock`` in the folder: the kernel drops it when the process dies, however it
    dies. Loader workers inherit it, so they close it first of all.

    Args:
        folder: The run's output folder; created when missing.

    Raises:
        OSError: If the folder cannot be made or written to; the message names it.
        RuntimeError: If another live run holds it.
    """

    _files: ClassVar[set[int]] = set()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder.resolve() / ".lock"  # whatever the working directory is by the end
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked()
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
        RunLock._files.add(self._file)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):  # a file left behind locks nobody out
            self._path.unlink()  # while it is still locked
        RunLock._files.discard(self._file)
        os.close(self._file)

    @classmethod
    def close_in_child(cls) -> None:
        """Give up what a forked process has inherited, without unlocking it."""
        for file in cls._files:
            os.close(file)
        cls._files.clear()

    def _locked(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between our open and our lock its last holder may have removed the file.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self._path).st_ino == os.fstat(file).st_ino:
                        holder = f"process {os.getpid()} on {socket.gethostname()}"
                        os.ftruncate(file, 0)
                        os.pwrite(file, holder.encode(), 0)
                        return file
            except BlockingIOError:
                holder = os.read(file, 200).decode(errors="replace").strip()
                os.close(file)
                raise RuntimeError(
                    f"output_dir={str(self.folder)!r} is in use by another run ({holder}): choose "
                    "another folder, or stop that run first"
                ) from None
            except OSError:
                os.close(file)
                raise
            os.close(file)


def first_nonfinite_module(model: nn.Module, batches: Iterable[Batch]) -> str | None:
    """Name of the first module, in the order of execution, with an output that is not finite.

    Runs the forward pass again, without gradients, under the caller's autocast; every module waits
    for the device, so it is for the one window that needs explaining.

    Returns:
        The module's name, or ``None`` if all outputs are finite.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def check(_: nn.Module, __: Any, output: Any) -> None:
            if not found and any(not t.isfinite().all() for t in _tensors(output)):  # sync
                found.append(name)

        return check

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch.inputs(), use_cache=False)
                if found:
                    return found[0]
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):  # a model's output
        yield from _tensors(list(output.values()))
