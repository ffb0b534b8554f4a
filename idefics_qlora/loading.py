"""Worker processes that load windows and evaluation batches ahead, watched over.

A worker that dies or hangs is found, named, and cannot take the run's state with it.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from idefics_qlora.faults import RunLock, ignore_stop_signals

T = TypeVar("T", covariant=True)


class LoaderError(RuntimeError):
    """A loader worker died or hangs; the message names it.

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
        num_workers: Processes; 0 loads in this one.
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
        order: Iterable[int] | None = count(first)
        if isinstance(items, IterableDataset):
            order = None
            num_workers = min(num_workers, 1)  # a stream has one reader
        elif isinstance(items, Sized):
            order = range(first, len(items))
            num_workers = min(num_workers, len(items))
        self._loader = DataLoader(
            items,
            batch_size=None,
            sampler=None if order is None else _Order(order),
            num_workers=num_workers,
            pin_memory=pin,
            timeout=timeout_s or 0 if num_workers else 0,
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
            LoaderError: If a worker died, or did not give the item in time.
        """
        self._check_alive()
        try:
            with _child_signals():
                if self._iterator is None:  # the workers start with the first item
                    before = multiprocessing.active_children()
                    self._iterator = iter(self._loader)
                    children = multiprocessing.active_children()
                    self._workers = [child for child in children if child not in before]
                    self._workers.sort(key=lambda worker: worker.pid or 0)
                item = next(self._iterator)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            self._check_alive()
            hanging = self._workers[(self.number - self._first) % len(self._workers)]
            name = f"loader worker {hanging.name} (process {hanging.pid})"
            hanging.kill()  # it would not end by itself
            raise LoaderError(
                f"{name} gave nothing for {self.timeout_s:g} s: a row is never read to its end, or "
                "loader_timeout_s is too short",
                range(self.number, self.number + 1),
            ) from error
        self.number += 1
        return item

    def _check_alive(self) -> None:
        for worker in self._workers:
            if not worker.is_alive():
                in_flight = (self._loader.prefetch_factor or 1) * len(self._workers)
                raise LoaderError(
                    f"loader worker {worker.name} (process {worker.pid}) ended with exit code "
                    f"{worker.exitcode} (a negative one is a signal, -9 often no memory left): use "
                    "fewer num_workers, or 0 to see an error where it happens",
                    range(self.number, self.number + in_flight),
                )


class _Order(Sampler[int]):
    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


@contextmanager
def guarded_children() -> Iterator[None]:
    """Keep PyTorch's SIGCHLD handler, which raises when a worker dies, out of a whole run.

    It would raise in the middle of whatever is being computed. :class:`Loading` lets it act while
    an item is awaited. Afterwards it is in place again, for other loaders of the process.
    """
    if threading.current_thread() is not threading.main_thread():
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
def _child_signals() -> Iterator[None]:
    """Let PyTorch's SIGCHLD handler act in this block."""
    if threading.current_thread() is not threading.main_thread():
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


_handlers: list[Any] = []
"""PyTorch's handler, once it has set it."""


def _start_worker(_: int) -> None:
    ignore_stop_signals()
    RunLock.close_in_child()
    torch.set_num_threads(1)  # workers share the cores; each resizes one picture at a time
