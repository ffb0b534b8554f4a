"""The warnings of a run: each kind is told once, all are counted at the end."""

from __future__ import annotations

import logging
from collections import Counter

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
