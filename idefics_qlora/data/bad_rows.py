"""Rows that cannot be read: noted, left out, and counted."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from idefics_qlora.config import OnBadRow, check_choice
from idefics_qlora.images.access import BadImage

logger = logging.getLogger(__name__)


MAX_BAD_SHARE = 0.05
"""Share of the rows seen that may be bad before a run stops."""


class BadRows:
    """What happens to rows that cannot be read: noted and left out, or raised.

    Args:
        policy: As in ``TrainConfig``.
        ledger: File that gets a line of JSON (``row``, ``source``, ``reason``) for each bad row,
            once, also over restarts; ``None``: no file.
        told: Names of the rows of which the log has told already; those told here are added.
    """

    def __init__(
        self, policy: OnBadRow, ledger: Path | None = None, told: set[str] | None = None
    ) -> None:
        check_choice("on_bad_row", policy, OnBadRow)
        self.policy = policy
        self.ledger = ledger
        self.reasons: dict[str, str] = {}
        self._told = set() if told is None else told
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

    def note(self, bad: Iterable[BadRow], tell: bool = True) -> None:
        """Raise, or note the rows that are new.

        Args:
            bad: The rows.
            tell: Whether to tell of them now, or by :meth:`tell`.

        Raises:
            ValueError: With the policy ``raise`` (``BadImage`` if a picture is the reason).
        """
        for row in bad:
            if self.policy == "raise":
                raise row.error()
            if row.row in self.reasons:
                continue
            self.reasons[row.row] = str(row.error())
            if tell:
                self.tell([row])
            if self.ledger is not None:
                record = {"row": row.row, "source": row.source, "reason": row.reason}
                try:
                    torn = self.ledger.exists() and not self.ledger.read_bytes().endswith(b"\n")
                    # A kill may have left half a line.
                    with self.ledger.open("a", encoding="utf-8") as file:
                        file.write(("\n" if torn else "") + f"{json.dumps(record)}\n")
                except OSError as error:  # a full disk is for the next checkpoint to report
                    logger.warning("%s cannot be written: %s", self.ledger, error)

    def tell(self, bad: Iterable[BadRow]) -> None:
        """Log that rows are left out, each once."""
        for row in bad:
            if row.row not in self._told:
                self._told.add(row.row)
                logger.warning("left out: %s", row.error())

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
            f"{where}. The first:\n{first}\n{self._way()}"
        )

    def _way(self) -> str:
        """What to do, by the faults."""
        if all("there is no such file" in reason for reason in self.reasons.values()):
            return "Mend the paths, put the pictures there, or leave these rows out"
        return "Mend the rows, or the to_example function, or leave these rows out"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learnt from."""

    row: str
    """Its name, such as ``train_rows[3]``."""
    source: str
    """What could not be opened, if it was a picture; else the row's name."""
    reason: str

    def error(self) -> ValueError:
        """What is wrong, as an exception that names the row."""
        if self.source == self.row:
            return ValueError(f"{self.row}: {self.reason}")
        return BadImage(f"{self.source} of {self.row}", self.reason)
