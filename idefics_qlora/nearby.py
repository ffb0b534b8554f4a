"""What a path that leads nowhere, or a name that there is not, may have meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of these names that is most like another, if any is."""
    return next(iter(difflib.get_close_matches(name, [*names], n=1, cutoff=0.6)), None)


def did_you_mean(path: str | os.PathLike[str]) -> str:
    """A similar name that is there, as a question; empty if there is none.

    Args:
        path: Of which there is no file or folder.
    """
    missing = Path(path).expanduser()
    if not missing.name:
        return ""
    below: list[str] = []
    while not missing.parent.is_dir():
        if missing == missing.parent:
            return ""
        below.insert(0, missing.name)
        missing = missing.parent
    try:
        names = sorted(os.listdir(missing.parent))
    except OSError:
        return ""
    for name in difflib.get_close_matches(missing.name, names, n=1, cutoff=0.7):
        found = missing.with_name(name)
        whole = found.joinpath(*below)
        return f" (did you mean {str(whole if whole.exists() else found)!r}?)"
    return ""
