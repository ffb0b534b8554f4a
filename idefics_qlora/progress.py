"""What a person sees while something runs: bars and tables, or lines where nobody watches.

It goes to stderr, so that stdout stays the program's own. On a terminal a run is a bar below the
table of its evaluations; in a notebook both are one live HTML table; elsewhere there is a line for
each log record, at once. Whatever else takes longer than two seconds shows how far it has come.

More than 400 lines: the same figures, in each of the three ways.
"""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from idefics_qlora.config import Progress

AFTER_S = 2.0
"""Seconds that something takes before it is shown."""
REFRESH_S = 0.5
"""Seconds between two views of it where the newer one takes the older one's place."""
LINES_S = 30.0
"""Seconds between two lines of it."""
SAMPLES = 2
"""Samples shown below an evaluation."""
GIB = 2**30

_asked: ContextVar[Progress] = ContextVar("progress", default="auto")
"""What the run in whose course something happens was told."""


def way_of(progress: Progress | None = None) -> str:
    """``bar``, ``notebook``, ``lines`` or ``none``: what is shown here and now.

    Args:
        progress: The setting; by default that of the run that goes on, or ``auto``.
    """
    progress = _asked.get() if progress is None else progress
    if progress == "none" or sys.stderr is None:
        return "none"
    if progress in ("auto", "bar") and _in_notebook():
        return "notebook"
    if progress == "auto":
        return "bar" if sys.stderr.isatty() else "lines"
    return progress


@contextlib.contextmanager
def asked(progress: Progress) -> Iterator[None]:
    """Whatever happens in this block is shown as the setting says."""
    token = _asked.set(progress)
    try:
        yield
    finally:
        _asked.reset(token)


def say(text: str) -> None:
    """Write a line at once, above a bar if there is one; a closed stderr stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


# --- something that takes long ----------------------------------------------------------------


class Counting:
    """Shows how far something has come, once it takes longer than two seconds."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._note = 0, ""
        self._way = way_of()
        self._started = time.monotonic()
        self._next = self._started + AFTER_S
        self._bar: Any = None
        self._handle: Any = None
        self._shown = False

    def advance(self, number: int = 1, note: str = "") -> None:
        """Count some more; ``note`` is shown behind the count."""
        self._done += number
        self._note = note
        self.show_if_due()

    def note(self, note: str) -> None:
        """Show this behind the count, if that is due."""
        self._note = note
        self.show_if_due()

    def clear(self) -> None:
        """Let what is printed next stand on a line of its own, until it is shown again."""
        if self._bar is not None:
            self._bar.clear()

    def show_if_due(self) -> None:
        """Show it, if it takes long and was not shown just now."""
        now = time.monotonic()
        if self._way == "none" or now < self._next:
            return
        self._next = now + (LINES_S if self._way == "lines" else REFRESH_S)
        self._shown = True
        if self._way == "bar":
            if self._bar is None:
                plain = "{desc}: {n_fmt} {unit}, {elapsed}{postfix}"
                self._bar = tqdm(
                    desc=self._what,
                    total=self._total,
                    unit=self._unit or "s",
                    leave=False,
                    file=sys.stderr,
                    dynamic_ncols=True,
                    bar_format=(plain if self._unit else "{desc}: {elapsed}")
                    if self._total is None
                    else None,
                )
                self._bar.start_t -= now - self._started
            self._bar.n = self._done
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.refresh()
        elif self._way == "notebook":
            self._handle = _displayed(self._handle, f"<p>{html.escape(self._words(now))}</p>")
        else:
            say(self._words(now))

    def close(self) -> None:
        """Take it away, or say how long it took."""
        if self._bar is not None:
            self._bar.close()
        if self._handle is not None:
            _displayed(self._handle, "")
        if self._shown and self._way == "lines":
            say(f"{self._words(time.monotonic())}, over")

    def _words(self, now: float) -> str:
        of = "" if self._total is None else f" of {self._total}"
        count = f"{self._done}{of} {self._unit}, " if self._unit else ""
        note = f", {self._note}" if self._note else ""
        return f"{self._what}: {count}{_clock(now - self._started)}{note}"


@contextlib.contextmanager
def counting(what: str, total: int | None, unit: str) -> Iterator[Counting]:
    """Show how far something has come that takes longer than two seconds.

    Args:
        what: What is done, such as ``evaluating``.
        total: How much there is to do; ``None`` if that is not known.
        unit: What is counted.
    """
    counted = Counting(what, total, unit)
    try:
        yield counted
    finally:
        counted.close()


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Show that something is being done of which nothing can be counted, and for how long."""
    if way_of() == "none":
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(max(0.01, counted._next - time.monotonic())):
            counted.show_if_due()

    with counting(what, None, "") as counted:
        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


# --- a run ------------------------------------------------------------------------------------


class RunProgress:
    """Shows a run; this one shows nothing.

    Args:
        total: Optimizer steps of the run.
        done: Those that were done before.
        memory: Bytes in use at most so far.
    """

    def __init__(self, total: int, done: int, memory: Callable[[], int]) -> None:
        self.total, self.done, self._first = total, done, done
        self._memory = memory
        self._table = EvalTable()
        self._started = time.monotonic()

    def begin(self, words: str) -> None:
        """The first step of a new run is about to be done."""

    def step(self, step: int) -> None:
        """So many optimizer steps are done."""
        self.done = step

    def record(self, record: Mapping[str, Any]) -> None:
        """There is a new log record."""

    def tell(self, *lines: str) -> None:
        """There is something to be said."""

    def close(self) -> None:
        """The run is over, or has failed."""

    def figures(self, record: Mapping[str, Any]) -> str:
        """A training record in a few words."""
        speed = record.get("examples_per_second")
        return ", ".join(
            [
                f"loss {record['loss']:.4f}",
                f"lr {record['learning_rate']:.2e}",
                *([] if speed is None else [f"{speed:.4g} examples/s"]),
                f"waited {record['data_wait_s']:.3f} s a step",
                f"{self._memory() / GIB:.1f} GiB",
            ]
        )

    def left(self) -> str:
        """The time that is left, as words, if it can be told."""
        steps = self.done - self._first
        if not steps:
            return ""
        seconds = (time.monotonic() - self._started) / steps * (self.total - self.done)
        return f"{_clock(seconds)} left"


class _Lines(RunProgress):
    """A line for each record, and one before the first, which may take long to come."""

    def begin(self, words: str) -> None:
        """Write it as a line."""
        say(words)

    def record(self, record: Mapping[str, Any]) -> None:
        """Write it as a line."""
        start = f"step {record['step']}/{self.total}"
        if "loss" in record:
            words = [self.figures(record), self.left()]
        else:
            words = [
                f"{name} {_number(value)}"
                for name, value in record.items()
                if name == "eval_loss" or _is_metric(name, value)
            ]
            words += [f"{record['eval_runtime']:.1f} s"] if "eval_runtime" in record else []
        say(f"{start}: {', '.join(word for word in words if word)}")
        for line in sample_lines(record):
            say(line)

    def tell(self, *lines: str) -> None:
        """Write the lines."""
        for line in lines:
            say(line)


class _Bar(_Lines):
    """A bar, and above it the table of evaluations."""

    def __init__(self, total: int, done: int, memory: Callable[[], int]) -> None:
        super().__init__(total, done, memory)
        self._bar = tqdm(
            total=total,
            initial=done,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:9}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )

    def begin(self, words: str) -> None:
        """The bar is there already."""

    def step(self, step: int) -> None:
        """Move the bar."""
        super().step(step)
        self._bar.update(step - self._bar.n)

    def record(self, record: Mapping[str, Any]) -> None:
        """Show the figures behind the bar, or a line of the table above it."""
        for line in self._table.add(record):
            say(line)
        for line in sample_lines(record, self._bar.format_dict["ncols"] or 100):
            say(line)
        if "loss" in record:
            self._bar.set_postfix_str(self.figures(record))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class _Notebook(RunProgress):
    """A live table of HTML."""

    def __init__(self, total: int, done: int, memory: Callable[[], int]) -> None:
        super().__init__(total, done, memory)
        self._figures, self._samples, self._said = "", "", ""
        self._shown = time.monotonic()
        self._handle = _displayed(None, self.page())

    def step(self, step: int) -> None:
        """Move the bar, if it did not move just now."""
        super().step(step)
        if time.monotonic() - self._shown > REFRESH_S:
            self._show()

    def record(self, record: Mapping[str, Any]) -> None:
        """Show the record, or a row of the table."""
        self._table.add(record)
        if "loss" in record:
            self._figures = self.figures(record)
        if lines := sample_lines(record, 400):
            self._samples = "\n".join(lines)
        self._show()

    def tell(self, *lines: str) -> None:
        """Show the lines below the table."""
        self._said += "\n".join([*lines, ""])
        self._show()

    def close(self) -> None:
        """Show how far it came."""
        self._show()

    def page(self) -> str:
        """What is shown, as HTML."""
        words = [f"step {self.done} of {self.total}", self._figures, self.left()]
        parts = [
            f'<progress value="{self.done}" max="{self.total}" style="width: 20em"></progress> '
            + html.escape(", ".join(word for word in words if word))
        ]
        if self._table.rows:
            for tag, rows in (("th", [self._table.titles]), ("td", self._table.rows)):
                parts += [
                    "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
                    for row in rows
                ]
            parts[1:] = ["<table>", *parts[1:], "</table>"]
        parts += [
            f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
            for text in (self._samples, self._said)
            if text
        ]
        return "\n".join(parts)

    def _show(self) -> None:
        self._shown = time.monotonic()
        _displayed(self._handle, self.page())


_WAYS: dict[str, type[RunProgress]] = {"bar": _Bar, "notebook": _Notebook, "lines": _Lines}


@contextlib.contextmanager
def showing_run(
    progress: Progress, total: int, done: int, memory: Callable[[], int]
) -> Iterator[RunProgress]:
    """Show a run as the setting says, and in the same way all that happens in its course."""
    with asked(progress):
        shown = _WAYS.get(way_of(), RunProgress)(total, done, memory)
        try:
            yield shown
        finally:
            shown.close()


class EvalTable:
    """A table of evaluations: step, training loss, held-out loss, and each metric there is."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self._training_loss = float("nan")

    def add(self, record: Mapping[str, Any]) -> list[str]:
        """Take a record; returns the lines that an evaluation adds: a row, and a head if needed."""
        if "loss" in record:
            self._training_loss = record["loss"]
        if "eval_loss" not in record:
            return []
        metrics = [name for name in record if _is_metric(name, record[name])]
        shown = {
            "Step": str(record["step"]),
            "Training loss": f"{self._training_loss:.4f}",
            "Held-out loss": f"{record['eval_loss']:.4f}",
            **{name.removeprefix("eval_"): _number(record[name]) for name in metrics},
        }
        lines = []
        titles = list(shown)
        if titles != self.titles:
            known = [dict(zip(self.titles, row, strict=True)) for row in self.rows]
            self.rows = [[row.get(title, "") for title in titles] for row in known]
            self.titles = titles
            lines.append(_in_columns(titles, titles))
        self.rows.append(list(shown.values()))
        return [*lines, _in_columns(titles, self.rows[-1])]


def sample_lines(record: Mapping[str, Any], width: int = 200) -> list[str]:
    """What the model said of the first samples, and what it should have said."""
    lines = []
    for sample in record.get("eval_samples", ())[:SAMPLES]:
        for what, text in (("says", sample["text"]), ("is", sample["target"])):
            name = sample["row"] if what == "says" else ""
            line = f"  {name:>14} {what:>4}: {' '.join(text.split())}"
            lines.append(line if len(line) <= width else f"{line[: width - 3]}...")
    return lines


def _is_metric(name: str, value: Any) -> bool:
    is_other = name in ("eval_loss", "eval_bad_rows", "eval_generate_s")
    is_other |= name.endswith(("runtime", "_per_second"))
    return name.startswith("eval_") and isinstance(value, (int, float)) and not is_other


def _in_columns(titles: list[str], cells: list[str]) -> str:
    widths = [6, *(max(10, len(title) + 3) for title in titles[1:])]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _clock(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))


def _displayed(handle: Any, page: str) -> Any:
    """Show HTML in a notebook, in the place of what the handle shows; returns the handle."""
    from IPython.display import HTML, display

    if handle is None:
        return display(HTML(page), display_id=True)
    handle.update(HTML(page))
    return handle
