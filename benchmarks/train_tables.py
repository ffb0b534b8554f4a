"""What ``train.py`` writes into the documentation: tables and one picture, from its records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from train_arms import ARMS
from train_meter import ELEMENTWISE, KINDS

BEGIN, END = "<!-- written by benchmarks/train.py -->\n", "<!-- end of what it wrote -->\n"
NOT_YET = "Not measured yet.\n"
ORDER = list(ARMS)


def write_tables(files: Iterable[Path], docs: Path) -> None:
    """Write the figures into the pages, between the two marks, and the picture beside them.

    Raises:
        ValueError: If a page has no marks.
    """
    contents = [json.loads(file.read_text()) for file in sorted(files)]
    for name, text in (("measurements.md", tables(contents)), ("speed.md", summary(contents))):
        page = (docs / name).read_text()
        if BEGIN not in page or END not in page:
            raise ValueError(f"{docs / name}: expected the lines {BEGIN!r} and {END!r}")
        head, _, rest = page.partition(BEGIN)
        (docs / name).write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    drawn = picture(contents)
    if drawn is not None:
        (docs / "speed.svg").write_text(drawn)


class Figures:
    """The records of one device: medians over the rounds."""

    def __init__(self, device: str, content: dict[str, Any]) -> None:
        self.device = device
        self.versions = content["versions"]
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.absent: dict[str, str] = {}
        for record in content["records"]:
            if record["device"] != device:
                continue
            if why := record.get("not_available") or record.get("error"):
                self.absent[record["arm"]] = why
            else:
                self.records.setdefault(record["arm"], []).append(record)
        for key in self.records:
            self.absent.pop(key, None)

    def arms(self, *, recipe: bool) -> list[str]:
        """Those measured, in the order of ``ARMS``."""
        wanted = (key for key in ORDER if key in self.records and not ARMS[key].model)
        return [key for key in wanted if ARMS[key].recipe == recipe]

    def successors(self) -> list[str]:
        """Those measured whose images are tokens of the text."""
        return [key for key in ORDER if key in self.records and ARMS[key].model]

    def middle(self, key: str, *path: str) -> float | None:
        """The median of a figure over an arm's rounds; of a list, of its first."""
        values = []
        for record in self.records.get(key, ()):
            value: Any = record
            for name in path:
                value = None if value is None else value.get(name)
            value = value[0] if isinstance(value, list) else value
            if value is not None:
                values.append(value)
        return statistics.median(values) if values else None

    def cell(self, key: str, form: str, *path: str) -> str:
        """The figure as text."""
        value = self.middle(key, *path)
        return "-" if value is None else format(value, form)

    def ratio(self, a: str, b: str, name: str = "examples_per_second") -> float | None:
        """One arm's figure over another's."""
        over, under = self.middle(a, name), self.middle(b, name)
        return None if over is None or under is None else over / under

    def split(self, key: str) -> dict[str, float] | None:
        """Milliseconds of a step by what the GPU does, the idle ones last."""
        busy, step = self.middle(key, "busy_ms"), self.middle(key, "step_ms", "median")
        if busy is None or step is None:
            return None
        kinds = {kind: self.middle(key, "gpu_ms", kind) or 0.0 for kind in STACK}
        return {**kinds, "idle": max(0.0, step - busy)}


STACK = ("matrix products", "dequantisation", "attention", ELEMENTWISE, "optimizer", "copies")
assert {*STACK} == {*KINDS, ELEMENTWISE}

COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "examples/s": (".1f", ("examples_per_second",)),
    "tokens/s": (".0f", ("tokens_per_second",)),
    "of the matmul rate": (".0%", ("share_of_matmul_rate",)),
    "step: p10, ms": (".0f", ("step_ms", "p10")),
    "median": (".0f", ("step_ms", "median")),
    "p90": (".0f", ("step_ms", "p90")),
    "GPU busy": (".0%", ("busy_share",)),
    "kernels": (".0f", ("kernels_per_step",)),
    "syncs": (".1f", ("syncs_per_step",)),
    "optimizer, ms": (".1f", ("optimizer_ms",)),
    "data wait, ms": (".1f", ("data_wait_ms",)),
    "padding": (".0%", ("padding_share",)),
    "peak GiB": (".1f", ("peak_allocated_gib",)),
    "reserved": (".1f", ("peak_reserved_gib",)),
    "graphs": (".0f", ("graph_captures",)),
    "their s": (".1f", ("graph_capture_s",)),
    "to step 1, s": (".1f", ("first_step_s",)),
    "warm-up, s": (".1f", ("warmup_s",)),
    "loss": (".3f", ("losses",)),
}
SUCCESSORS_COLUMNS = (
    *("examples/s", "tokens/s", "of the matmul rate", "median", "GPU busy", "kernels"),
    *("peak GiB", "estimate of it"),
)


def devices(contents: Iterable[dict[str, Any]]) -> list[Figures]:
    """The figures of each file by device."""
    return [
        Figures(device, content)
        for content in contents
        for device in dict.fromkeys(record["device"] for record in content["records"])
    ]


def tables(contents: list[dict[str, Any]]) -> str:
    """All figures as Markdown."""
    return "\n".join(map(_tables, devices(contents))) or NOT_YET


def _tables(figures: Figures) -> str:
    rate = statistics.median(
        record["matmul_tflops"] for records in figures.records.values() for record in records
    )
    versions = ", ".join(f"{name} {version}" for name, version in figures.versions.items())
    lines = [
        f"{figures.device}, {versions}; medians of the rounds. Matrix products in the minutes of "
        f"the measurements: {rate:.0f} TFLOP/s (median).",
    ]
    if figures.arms(recipe=False):
        lines += ["", *_row("arm", COLUMNS, head=True)]
    for key in figures.arms(recipe=False):
        lines += _row(
            _name(key), (figures.cell(key, form, *path) for form, path in COLUMNS.values())
        )
    split = {key: s for key in figures.arms(recipe=False) if (s := figures.split(key))}
    if split:
        lines += [
            "",
            "Where a step's time goes, in ms:",
            "",
            *_row("arm", [*STACK, "idle"], head=True),
        ]
        for key, kinds in split.items():
            lines += _row(_name(key), (f"{ms:.1f}" for ms in kinds.values()))
    lines += _successors(figures, SUCCESSORS_COLUMNS)
    if recipes := figures.arms(recipe=True):
        columns = ["steps", "seconds", "evaluations"]
        lines += ["", *_row("whole recipe, loading of the base excluded", columns, head=True)]
        for key in recipes:
            record = figures.records[key][0]
            losses = ", ".join(f"{loss:.3f}" for loss in record["evaluations"])
            seconds = figures.cell(key, ".1f", "seconds")
            lines += _row(_name(key), [str(record["num_steps"]), seconds, losses])
    if ratios := _ratios(figures):
        lines += ["", "; ".join(ratios) + "."]
    shared = sorted(
        {key for key in figures.records for r in figures.records[key] if r["process"]["after"]}
    )
    if shared:
        lines += ["", f"Not the first in their process: {', '.join(shared)}."]
    if figures.absent:
        absent = "; ".join(f"({key}) {why}" for key, why in figures.absent.items())
        lines += ["", f"Not measured: {absent}."]
    return "\n".join(lines) + "\n"


def _successors(figures: Figures, columns: Iterable[str]) -> list[str]:
    """A table of the bases whose images are tokens of the text, if any were measured."""
    if not (successors := figures.successors()):
        return []
    columns = [*columns]
    lines = ["", *_row("pictures as text, without a loader", [*columns, "÷ Trainer"], head=True)]
    for key in successors:
        cells = [figures.cell(key, *_column(name)) for name in columns]
        ratio = figures.ratio(key, f"{key}-trainer")
        lines += _row(_name(key), [*cells, "-" if ratio is None else f"{ratio:.1f}"])
    return lines


def _name(key: str) -> str:
    if ARMS[key].model:
        return ARMS[key].what
    mixed = ", mixed" if ARMS[key].rows == "mixed" else ""
    return f"({key.partition('-')[0]}) {ARMS[key].what}{mixed}"


def _row(first: str, cells: Iterable[str], *, head: bool = False) -> list[str]:
    cells = [first, *cells]
    lines = [f"| {' | '.join(cells)} |"]
    return [*lines, "| --- " * len(cells) + "|"] if head else lines


def _ratios(figures: Figures) -> list[str]:
    ratios = []
    best = max(
        (key for key in ("b-fp16", "b-bf16") if key in figures.records),
        key=lambda key: figures.middle(key, "examples_per_second") or 0.0,
        default="b-fp16",
    )
    for a, b in (("d", "a"), ("c", "a"), ("d", best), ("d", "f"), ("h", "d")):
        ratio = figures.ratio(a, b)
        if ratio is not None:
            ratios.append(f"({a}) ÷ ({b}) = {ratio:.1f}")
    for key in ("c-recipe", "d-recipe"):
        ratio = figures.ratio("a-recipe", key, "seconds")
        if ratio is not None:
            ratios.append(f"the whole recipe, (a) ÷ ({key[0]}) = {ratio:.1f}")
    fixed, mixed = (
        figures.middle("d", "tokens_per_second"),
        figures.middle("d-mixed", "warm_tokens_per_second"),
    )
    if fixed is not None and mixed is not None:
        ratios.append(f"mixed lengths ÷ fixed, per token in replayed steps: {mixed / fixed:.0%}")
    return ratios


# --- the page about speed ------------------------------------------------------------------------

SHOWN = ("a", "b-fp16", "b-bf16", "f", "c", "d", "h", "e", "i")
SHORT_OF_SUCCESSORS = ("examples/s", "of the matmul rate", "peak GiB", "estimate of it")
SHORT = ("examples/s", "of the matmul rate", "GPU busy", "peak GiB", "optimizer, ms", "syncs")
BARS = {
    "a": "Trainer, 2 x 8",
    "f": "0.1's way, 16 x 1",
    "c": "now, 2 x 8",
    "d": "now, 16 x 1",
}


def summary(contents: list[dict[str, Any]]) -> str:
    """The figures that tell most, and the picture where there is one."""
    parts = []
    for figures in devices(contents):
        lines = [f"{figures.device}:"]
        shown = [key for key in SHOWN if key in figures.records]
        if shown:
            lines += ["", *_row("", SHORT, head=True)]
        for key in shown:
            lines += _row(_name(key), (figures.cell(key, *_column(name)) for name in SHORT))
        lines += _successors(figures, SHORT_OF_SUCCESSORS)
        if ratios := _ratios(figures):
            lines += ["", "; ".join(ratios) + "."]
        parts.append("\n".join(lines) + "\n")
    if picture(contents) is not None:
        parts.append("![Where a step's time goes](speed.svg)\n")
    return "\n".join(parts) or NOT_YET


def _column(name: str) -> tuple[str, ...]:
    if name == "estimate of it":
        return ".0%", "estimate_of_peak"
    form, path = COLUMNS[name]
    return form, *path


COLOURS = {
    "matrix products": "#2563eb",
    "dequantisation": "#0891b2",
    "attention": "#7c3aed",
    ELEMENTWISE: "#d97706",
    "optimizer": "#be185d",
    "copies": "#65a30d",
}


def picture(contents: list[dict[str, Any]]) -> str | None:
    """A bar for Trainer, 0.1's way and now: how a step's time is divided; ``None`` without figures.

    All bars are equally long, since one step takes up to thirty times as long as another; at the
    end of each is what its step takes.
    """
    for figures in devices(contents):
        bars = {key: split for key in BARS if (split := figures.split(key))}
        if "d" in bars and len(bars) > 1:
            return _drawn(figures, bars)
    return None


def _drawn(figures: Figures, bars: dict[str, dict[str, float]]) -> str:
    left, length, height, pitch, top = 150, 620, 30, 46, 44
    parts = []
    x = left
    for kind in (*STACK, "idle"):
        parts.append(
            f'<rect x="{x}" y="12" width="12" height="12" class="{_class(kind)}"/>'
            f'<text x="{x + 17}" y="22" class="small">{kind}</text>'
        )
        x += 30 + 7 * len(kind)
    y = top
    for key, split in bars.items():
        total = sum(split.values())
        parts.append(f'<text x="{left - 10}" y="{y + 20}" class="name">{escape(BARS[key])}</text>')
        start = float(left)
        for kind, ms in split.items():
            width = length * ms / total
            parts.append(
                f'<rect x="{start:.1f}" y="{y}" width="{width:.1f}" height="{height}" '
                f'class="{_class(kind)}"><title>{kind}: {ms:.1f} ms, {ms / total:.0%}</title>'
                "</rect>"
            )
            if width > 34:
                parts.append(
                    f'<text x="{start + width / 2:.1f}" y="{y + 20}" '
                    f'class="{"on-idle" if kind == "idle" else "on"}">{ms / total:.0%}</text>'
                )
            start += width
        parts.append(f'<text x="{left + length + 10}" y="{y + 20}">{total:,.0f} ms a step</text>')
        y += pitch
    said = f"{figures.device}, idefics-9b's architecture in fp16, 16 examples a step"
    parts.append(f'<text x="{left}" y="{y + 8}" class="small">{escape(said)}</text>')
    colours = "\n".join(f".{_class(kind)} {{fill: {c}}}" for kind, c in COLOURS.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {y + 20}" role="img" '
        'aria-label="Stacked bars: the shares of matrix products, dequantisation, attention, '
        "elementwise work, optimizer, copies and idle time in a step of Trainer, of 0.1's way and "
        'of the present one"><style>\n'
        "text {font: 14px system-ui, sans-serif; fill: #1f2937}\n"
        ".small {font-size: 12px}\n.name {text-anchor: end}\n"
        ".on, .on-idle {font-size: 12px; text-anchor: middle}\n.on {fill: #fff}\n"
        f"{colours}\n.idle {{fill: #d1d5db}}\n.page {{fill: #fff}}\n"
        "@media (prefers-color-scheme: dark) {\n"
        "text {fill: #e5e7eb}\n.on {fill: #fff}\n.idle {fill: #4b5563}\n.page {fill: #0d1117}\n}\n"
        f'</style><rect width="900" height="{y + 20}" class="page"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _class(kind: str) -> str:
    return kind.replace(" ", "-")
