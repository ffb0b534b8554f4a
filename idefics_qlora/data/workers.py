"""Worker processes that load windows and evaluation batches ahead, watched over.

A worker that dies or hangs is found, named, and cannot take the run's state with it.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sized
from itertools import count
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from idefics_qlora.process import child_signals, ignore_stop_signals

T = TypeVar("T", covariant=True)

LOOK_S = 1.0
"""Seconds between two looks at the workers while an item is awaited."""


class LoaderError(RuntimeError):
    """A loader worker died, hangs or cannot hand over what it has read; the message names it.

    Attributes:
        items: Numbers of the items of which it was loading one.
    """

    def __init__(self, message: str, items: range) -> None:
        super().__init__(message)
        self.items = items


class Loading(Generic[T]):
    """Items of a dataset in order, from number ``first`` on, loaded ahead; a context manager.

    Args:
        items: What to load; without a length, without end. A stream must begin at ``first`` itself.
        first: Number of the first item.
        num_workers: Processes; 0, and any number where none can be forked (Windows), loads in this
            one.
        pin: Whether the tensors shall be in page-locked memory, for a GPU.
        timeout_s: Seconds to wait for an item from a worker; ``None`` for any time.
    """

    def __init__(
        self,
        items: Dataset[T],
        *,
        first: int = 0,
        num_workers: int = 0,
        pin: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self.number = self._first = first
        self.timeout_s = timeout_s
        self.total = len(items) - first if isinstance(items, Sized) else None
        order: Iterable[int] | None = count(first)
        if isinstance(items, IterableDataset):
            order = None
            num_workers = min(num_workers, 1)  # a stream has one reader
        elif isinstance(items, Sized):
            order = range(first, len(items))
            num_workers = min(num_workers, len(items))
        if "fork" not in multiprocessing.get_all_start_methods():
            num_workers = 0  # on Windows
        self._loader = DataLoader(
            items,
            batch_size=None,
            sampler=None if order is None else _Order(order),
            num_workers=num_workers,
            pin_memory=pin,
            timeout=min(LOOK_S, timeout_s or LOOK_S) if num_workers else 0,
            collate_fn=_packed if num_workers else _as_it_is,
            worker_init_fn=_start_worker,
            # Rows and their conversion need not be picklable where processes can be forked.
            multiprocessing_context="fork" if num_workers else None,
            # Without a generator of its own, each iterator would draw a seed from the global one,
            # and an evaluation or a restart would shift the dropout masks.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[T] | None = None
        self._workers: list[BaseProcess] = []

    def __enter__(self) -> Loading[T]:
        return self

    def __exit__(self, *_: object) -> None:
        # Not left to the iterator's end: the traceback of an error may keep it alive.
        shut_down = getattr(self._iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        for worker in self._workers:  # one that hangs would keep the interpreter from ending
            if worker.is_alive():
                worker.kill()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item.

        Raises:
            LoaderError: If a worker died, could not hand the item over, or did not give it in time.
        """
        started = time.monotonic()
        while True:
            self._check_alive()
            try:
                item = self._get()
                break
            except (EOFError, ConnectionError) as error:
                self._check_alive()
                raise LoaderError(
                    f"{_name(self._next_worker())} broke off while it handed over what it has read "
                    f"({type(error).__name__}); standard error has its reason, mostly a limit on "
                    "open files: lift it (ulimit -n), or use num_workers=0",
                    self._in_flight(),
                ) from error
            except RuntimeError as error:
                if not str(error).startswith("DataLoader"):
                    raise
                self._check_alive()
                if not str(error).startswith("DataLoader timed out"):
                    raise LoaderError(str(error), self._in_flight()) from error
                if self.timeout_s is not None and time.monotonic() - started >= self.timeout_s:
                    worker = self._next_worker()
                    worker.kill()  # it would not end by itself
                    raise LoaderError(
                        f"{_name(worker)} gave nothing for {self.timeout_s:g} s: a row is never "
                        "read to its end, or loader_timeout_s is too short",
                        range(self.number, self.number + 1),
                    ) from error
        if isinstance(item, _NotHandedOver):
            raise LoaderError(
                f"{_name(self._next_worker())} cannot hand over what it has read: {item.reason}",
                range(self.number, self.number + 1),
            )
        self.number += 1
        return item

    def _get(self) -> T:
        with child_signals():
            if self._iterator is None:  # the workers start with the first item
                before = multiprocessing.active_children()
                self._iterator = iter(self._loader)
                children = multiprocessing.active_children()
                self._workers = [child for child in children if child not in before]
                self._workers.sort(key=lambda worker: worker.pid or 0)
            return next(self._iterator)

    def _next_worker(self) -> BaseProcess:
        """The one whose turn it is to give the next item."""
        return self._workers[(self.number - self._first) % len(self._workers)]

    def _in_flight(self) -> range:
        number = (self._loader.prefetch_factor or 1) * len(self._workers)
        return range(self.number, self.number + number)

    def _check_alive(self) -> None:
        for worker in self._workers:
            if not worker.is_alive():
                raise LoaderError(
                    f"{_name(worker)} ended with exit code {worker.exitcode} "
                    f"({_exit_cause(worker.exitcode)}): use fewer num_workers, or 0 to see an "
                    "error where it happens",
                    self._in_flight(),
                )
        pinning = getattr(self._iterator, "_pin_memory_thread", None)
        if pinning is not None and not pinning.is_alive():
            raise LoaderError(
                "the thread that takes items from the loader workers has ended; standard error "
                "has its reason; num_workers=0 does without it",
                self._in_flight(),
            )


def _name(worker: BaseProcess) -> str:
    return f"loader worker {worker.name} (process {worker.pid})"


def _exit_cause(code: int | None) -> str:
    if hasattr(signal, "SIGBUS") and code == -signal.SIGBUS:
        return f"SIGBUS, mostly no room in shared memory; {_shared_memory()}"
    return "a negative one is a signal, -9 often no memory left"


def _as_it_is(item: Any) -> Any:
    return item


class _Packed:
    """An item that is in shared memory already, and unpickles as the item itself."""

    def __init__(self, item: object) -> None:
        self.data = bytes(ForkingPickler.dumps(item))

    def __reduce__(self) -> Any:
        return pickle.loads, (self.data,)


class _NotHandedOver:
    """Comes in the place of an item that could not be put into shared memory."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _packed(item: object) -> _Packed | _NotHandedOver:
    """Put an item into shared memory, in the worker's own thread.

    Left to the thread behind the worker's queue, a failure would be printed there, and the main
    process would wait for an item that never comes.
    """
    try:
        return _Packed(item)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if os.strerror(errno.ENOSPC) in said:
            way_out = (
                f"{_shared_memory()}: use fewer num_workers, or 0, which needs none, or give the "
                "machine more (a container: docker run --shm-size=8g)"
            )
        elif os.strerror(errno.EFBIG) in said:
            way_out = "lift the limit on the size of files (ulimit -f), or use num_workers=0"
        elif os.strerror(errno.EMFILE) in said:
            way_out = "lift the limit on open files (ulimit -n), or use num_workers=0"
        else:
            way_out = "use num_workers=0, where nothing is handed over"
        return _NotHandedOver(f"{said}; {way_out}")


def _shared_memory() -> str:
    try:
        there = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return f"/dev/shm cannot be looked at: {error.strerror}"
    free, size = there.free / 2**20, there.total / 2**20
    return f"{free:.1f} of {size:.1f} MiB of shared memory (/dev/shm) are free"


class _Order(Sampler[int]):
    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def _start_worker(_: int) -> None:
    ignore_stop_signals()
    torch.set_num_threads(1)  # workers share the cores; each resizes one picture at a time
