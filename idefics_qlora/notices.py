"""The warnings of a run: each kind is told once, all are counted at the end."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)


class Notices:
    """Tells each kind of warning the first time and counts the others.

    ``str()`` sums them up in one line, empty if there were none.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def warn(self, kind: str, message: str, number: int = 1) -> None:
        """Tell of something that may be meant, or may be a mistake.

        Args:
            kind: What it is called when warnings are counted, such as ``duplicate rows``.
            message: One line, with the row or the setting, and the way out.
            number: How often it was found.
        """
        if kind not in self.counts:
            logger.warning("%s", message)
        self.counts[kind] += number

    def __str__(self) -> str:
        if not self.counts:
            return ""
        kinds = "; ".join(
            kind if number == 1 else f"{kind} ({number} times)"
            for kind, number in self.counts.items()
        )
        plural = "warning" if len(self.counts) == 1 else "warnings"
        return f"{len(self.counts)} {plural} in this run, told where first found: {kinds}"


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


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Show the library's warnings, also where something has set up logging without them."""
    logger, handler = logging.getLogger("idefics_qlora"), logging.lastResort
    assert handler is not None
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
