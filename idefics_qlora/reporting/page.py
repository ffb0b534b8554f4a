"""A page of one run, or of several side by side: one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from idefics_qlora.durable import write_whole
from idefics_qlora.evaluation.predictions import RECORDED, RECORDED_OF_IMAGE_USE
from idefics_qlora.reporting.folder import REPORT, RunFolder, number, read_run
from idefics_qlora.reporting.plots import Chart, Curve, drawn, shown, thinned
from idefics_qlora.reporting.rows import Pictures, gallery, highest
from idefics_qlora.reporting.summary import diagnostics, facts, status

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
PICTURE_BYTES = 2_500_000
"""For all pictures of a page, as text."""
POINTS = 2400
"""Of a page's curves of one chart together."""
MOST_CHARTS = 18
MOST_BAD_ROWS = 20
COLOURS = 6
EMBEDDED = ("idefics_qlora", "tiny", "base")
"""The last names of the embedded base's folder."""


def report(*runs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run anew, or one that lays several runs side by side.

    The page is one file that opens anywhere and fetches nothing: results, curves, what the model
    says of held-out rows, and which settings differ, from the defaults or between the runs.

    Args:
        *runs: Folders of runs (their ``output_dir``), finished or not.
        output: The file. By default ``report.html`` in the run's folder; of several runs, in the
            folder that holds them all.

    Returns:
        The file's path.

    Raises:
        ValueError: If there is no run, or a folder is none of a run.
        OSError: If the file cannot be written.
    """
    if not runs:
        raise ValueError("report(): expected the folder of at least one run")
    folders = [Path(run).resolve() for run in runs]
    read = [read_run(folder) for folder in dict.fromkeys(folders)]
    if output is None:
        holder = folders[0] if len(read) == 1 else os.path.commonpath([f.parent for f in folders])
        output = Path(holder) / REPORT
    path = Path(output)
    write_whole(path, page(read).encode("utf-8", errors="replace"))
    return path


def keep_report(folder: Path) -> float:
    """Write a run's page; what fails is told, and the run goes on.

    Returns:
        The seconds that it took.
    """
    started = time.monotonic()
    try:
        report(folder)
    except Exception as error:
        logger.warning(
            "%s cannot be written (%s: %s): training goes on; idefics-qlora report %s makes it",
            *(folder / REPORT, type(error).__name__, error, folder),
        )
    return time.monotonic() - started


def page(runs: Sequence[RunFolder]) -> str:
    """The page as HTML."""
    labelled = list(zip(_labels([run.path for run in runs]), runs, strict=True))
    pictures = Pictures(PICTURE_BYTES)
    rows = gallery(labelled, pictures)  # before others take the room
    charts = [found for chart in _charts(labelled) if (found := drawn(chart)) is not None]
    style, script = _asset("page.css"), _asset("page.js")
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=labelled[0][0] if len(runs) == 1 else f"{len(runs)} runs",
            style=style,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            runs=[_run(label, run, pictures, len(runs)) for label, run in labelled],
            charts=charts[:MOST_CHARTS],
            left_out=[chart["title"] for chart in charts[MOST_CHARTS:]],
            gallery=rows,
            differences=_differences(runs) if len(runs) > 1 else [],
            fact_names=list(dict.fromkeys(name for _, run in labelled for name, _ in facts(run))),
            shown=shown,
        )
    )


def _run(label: str, run: RunFolder, pictures: Pictures, num_runs: int) -> dict[str, Any]:
    """What the page says of one run alone."""
    return {
        "label": label,
        "status": status(run),
        "facts": facts(run),
        "diagnostics": diagnostics(run),
        "highest": highest(run, pictures)[: max(2, 12 // num_runs)],
        "bad_rows": [
            {name: _short(row.get(name, "")) for name in ("row", "reason", "source")}
            for row in run.bad_rows[:MOST_BAD_ROWS]
        ],
        "num_bad_rows": len(run.bad_rows),
        "settings": [(name, _setting(value)) for name, value in run.changed.items()],
        "environment": _environment(run),
    }


# --- curves ---------------------------------------------------------------------------------------


def _charts(runs: Sequence[tuple[str, RunFolder]]) -> list[Chart]:
    """All charts, the losses first."""
    records = [(label, run.log) for label, run in runs]
    metrics = sorted(
        {
            name
            for _, log in records
            for record in log
            for name, value in record.items()
            if name.startswith("eval_") and name not in {*RECORDED, *RECORDED_OF_IMAGE_USE}
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
    )
    others = {"eval_loss_another_image": "another picture", "eval_loss_blank_image": "blank"}
    wanted = [
        ("Loss", "nats per target token", {"loss": "training", "eval_loss": "held out"}),
        *((_title(name), "held-out rows", {name: _title(name)}) for name in metrics),
        ("Loss by picture", "nats per token, held out", {"eval_loss": "own picture", **others}),
        ("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
        ("Gradient norm", "L2 norm before clipping", {"grad_norm": "gradient norm"}),
        ("Loss scale", "factor in fp16", {"loss_scale": "loss scale"}),
        ("Skipped windows", "so far", {"skipped_windows": "skipped windows"}),
        ("Throughput", "examples/s", {"examples_per_second": "examples/s"}),
        ("Wait for data", "s per window", {"data_wait_s": "wait for data"}),
    ]
    charts = []
    for title, unit, keys in wanted:
        needed = {"Loss by picture": others, "Skipped windows": keys}.get(title)
        if needed and not any(number(r.get(k)) for _, log in records for r in log for k in needed):
            continue
        most = max(20, min(300, POINTS // (len(records) * len(keys))))
        curves = [
            _curve(log, key, name if len(runs) == 1 else f"{label}, {name}", most, *look)
            for n, (label, log) in enumerate(records)
            for m, (key, plain) in enumerate(keys.items())
            for name in [plain + (_of_steps(log) if key == "loss" else "")]
            for look in [(m, m) if len(runs) == 1 else (n, m + n // COLOURS)]
        ]
        charts.append(Chart(title, unit, curves, title.startswith(("Loss", "Gradient"))))
    return charts


def _curve(
    log: Sequence[Mapping[str, Any]], key: str, name: str, most: int, colour: int, dash: int
) -> Curve:
    pairs = [(record["step"], record[key]) for record in log if key in record]
    points = [(step, n) for step, value in pairs if (n := number(value)) is not None]
    gaps = [step for step, value in pairs if number(value) is None]
    return Curve(name, thinned(points, most), colour % COLOURS, dash % 4, gaps)


def _of_steps(log: Sequence[Mapping[str, Any]]) -> str:
    """Of how many steps a record's training loss is the mean, as words; of one none."""
    steps = [0, *(record["step"] for record in log if "loss" in record)]
    most = max((b - a for a, b in pairwise(steps)), default=1)
    return f" (mean of {most} steps)" if most > 1 else ""


def _title(metric: str) -> str:
    return metric.removeprefix("eval_").replace("_", " ")


# --- settings and environment ---------------------------------------------------------------------


def _differences(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs, with the value of each."""
    names = dict.fromkeys(name for run in runs for name in run.setting)
    return [
        {"name": name, "values": [_setting(run.setting.get(name, "-")) for run in runs]}
        for name in names
        if name != "output_dir"
        if any(run.setting.get(name) != runs[0].setting.get(name) for run in runs)
    ]


def _setting(value: Any) -> str:
    """A setting's value; of a path of this machine its last name, for pages are sent around."""
    path = Path(value) if isinstance(value, str) else Path()
    if path.is_absolute():
        return "the embedded tiny base" if path.parts[-3:] == EMBEDDED else _short(path.name)
    return _short(value)


def _environment(run: RunFolder) -> list[tuple[str, str]]:
    """Names and values; CUDA's version is that of the library, also where there is no GPU."""
    named = {"versions cuda": "versions torch built for CUDA"}
    found = [(named.get(name, name), value) for name, value in _flat(run.environment)]
    return [*found, ("gpus", "none")] if run.environment.get("gpus") == [] else found


def _short(value: Any) -> str:
    value = sorted(value, key=str) if isinstance(value, set) else value  # YAML's
    text = ", ".join(map(str, value)) if isinstance(value, list) else shown(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _flat(values: Mapping[str, Any], above: str = "") -> Any:
    """Names and values of a tree; what is not known is left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name} ")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for n, item in zip(count(), value, strict=False):
                yield from _flat(
                    item if isinstance(item, dict) else {"": item}, f"{above}{name} {n} "
                )
        elif value not in (None, []):
            yield f"{above}{name}", _short(value)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many above them as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


# --- template -------------------------------------------------------------------------------------


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # names of rows, texts and metrics are anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
