"""A run in a few numbers and words: what it came to, and what to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from idefics_qlora.reporting.folder import RunFolder, mappings, number
from idefics_qlora.reporting.plots import shown


@dataclass(frozen=True)
class Finding:
    """Something about a run that is as it should be, or is not."""

    is_good: bool
    text: str


def status(run: RunFolder) -> str:
    """Whether the run has ended, and how."""
    last = max((record["step"] for record in run.log), default=0)
    if not run.result:
        return f"under way or broken off; the last record is of step {last}"
    done = run.result.get("global_step", last)
    by = run.result.get("stopped_by")
    if by is None:
        return f"finished after {done} steps"
    if by == "early_stopping":
        return f"ended by early stopping after {done} steps"
    return f"stopped by {by} after {done} steps: started again, it goes on"


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """Names and values of the numbers that one looks for first."""
    metrics = run.result.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    evaluations = _evaluations(run)
    best = _best(run, evaluations)
    found: list[tuple[str, Any]] = [
        ("steps", max((record["step"] for record in run.log), default=0)),
        ("epochs", _last(run, "epoch")),
        ("training loss", _last(run, "loss")),
        ("held-out loss", number((best or {}).get("eval_loss"))),
        ("best checkpoint", run.best or None),
        ("examples/s", _middle(run, "examples_per_second")),
        ("wait for data", _per_cent(_share_waited(run))),
        ("tokens/s in all", number(metrics.get("train_tokens_per_second"))),
        ("time", _time(number(metrics.get("train_runtime")))),
        ("peak memory", _bytes(number(metrics.get("peak_memory_bytes")))),
        ("micro-batch", metrics.get("micro_batch_size")),
        ("precision", _precision(run)),
        ("rows left out", len(run.bad_rows)),
    ]
    return [(name, shown(value)) for name, value in found if value is not None]


def diagnostics(run: RunFolder) -> list[Finding]:
    """What was found out about the run, what is wrong first."""
    found = [*_learning(run), *_looking(run), *_arithmetic(run), *_feeding(run), *_told(run)]
    return sorted(found, key=lambda finding: finding.is_good)


def _learning(run: RunFolder) -> list[Finding]:
    """Whether the held-out loss falls."""
    points = [
        (r["step"], n) for r in _evaluations(run) if (n := number(r["eval_loss"])) is not None
    ]
    if len(points) < 2:
        return []
    (_, first), (step, last) = points[0], points[-1]
    lowest_at, lowest = min(points, key=lambda point: point[1])
    if last > 1.05 * lowest and lowest_at != step:
        return [
            Finding(
                False,
                f"the held-out loss was lowest at step {lowest_at} ({shown(lowest)}) and is "
                f"{shown(last)} at step {step}: more training made it worse",
            )
        ]
    if last >= first:
        return [Finding(False, f"the held-out loss has not fallen: {shown(first)}, {shown(last)}")]
    return [Finding(True, f"the held-out loss fell from {shown(first)} to {shown(last)}")]


def _looking(run: RunFolder) -> list[Finding]:
    """Whether the model looks at the pictures, where that was measured."""
    measured = [r for r in run.log if number(r.get("eval_looks")) is not None]
    if not measured:
        return []
    record = measured[-1]
    gain = number(record.get("eval_image_gain"))
    by = "" if gain is None else f": its own picture lowers the loss by {shown(gain)} per token"
    if record["eval_looks"]:
        return [Finding(True, f"at step {record['step']} the model looked at the pictures{by}")]
    return [Finding(False, f"at step {record['step']} the model did not look at the pictures{by}")]


def _arithmetic(run: RunFolder) -> list[Finding]:
    """Overflows, and values that are not finite."""
    found = []
    ledger = run.result.get("fp16_ledger")
    ledger = ledger if isinstance(ledger, dict) else {}
    skipped = number(ledger.get("skipped_windows")) or _last(run, "skipped_windows")
    if skipped:
        text = f"{shown(int(skipped))} windows were skipped, for their fp16 gradients overflowed"
        if module := ledger.get("first_nonfinite_module"):
            text += f"; the first module that did: {module}"
        if advice := ledger.get("advice"):
            text += f"; {advice}"
        found.append(Finding(False, text))
    elif skipped is not None:
        found.append(Finding(True, "no window was skipped in fp16"))
    spoiled = [
        f"{name} at step {record['step']}"
        for record in run.log
        for name, value in record.items()
        if isinstance(value, float) and number(value) is None
    ]
    if spoiled:
        more = f" and {len(spoiled) - 5} more" if len(spoiled) > 5 else ""
        found.append(Finding(False, f"not finite: {', '.join(spoiled[:5])}{more}"))
    return found


def _feeding(run: RunFolder) -> list[Finding]:
    """Whether data came as fast as it was used, and all of it."""
    found = []
    share = _share_waited(run)
    if share is not None:
        text = f"{_per_cent(share)} of the training time was spent waiting for data"
        found.append(Finding(share < 0.1, text))
    if run.bad_rows:
        found.append(
            Finding(False, f"{len(run.bad_rows)} rows could not be read and were left out")
        )
    return found


def _told(run: RunFolder) -> list[Finding]:
    """What the run warned of."""
    told = run.result.get("diagnostics")
    told = told if isinstance(told, dict) else {}
    warnings, unmoved = told.get("warnings"), told.get("unmoved_adapters")
    found = []
    for kind, times in warnings.items() if isinstance(warnings, dict) else ():
        found.append(
            Finding(False, f"warned of: {kind}" + (f" ({times} times)" if times != 1 else ""))
        )
    if isinstance(unmoved, list) and unmoved:
        more = ", ..." if len(unmoved) > 5 else ""
        names = ", ".join(map(str, unmoved[:5])) + more
        found.append(Finding(False, f"{len(unmoved)} adapters never moved: {names}"))
    return found


def _evaluations(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in run.log if "eval_loss" in record]


def _best(run: RunFolder, evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation of the best checkpoint, or the last."""
    of_best = [r for r in evaluations if f"checkpoint-{r['step']}" == run.best]
    found = of_best or list(evaluations)
    return found[-1] if found else None


def _precision(run: RunFolder) -> str | None:
    precision = run.setting["precision"]
    return None if precision == "auto" else str(precision)


def _last(run: RunFolder, key: str) -> float | None:
    return next((n for r in reversed(run.log) if (n := number(r.get(key))) is not None), None)


def _values(run: RunFolder, key: str) -> list[float]:
    return [n for record in mappings(run.log) if (n := number(record.get(key))) is not None]


def _middle(run: RunFolder, key: str) -> float | None:
    values = sorted(_values(run, key))
    return values[len(values) // 2] if values else None


def _share_waited(run: RunFolder) -> float | None:
    """Share of the time of training that was spent waiting for data, as far as it is known."""
    batch = number(run.setting.get("global_batch_size"))
    waited = taken = 0.0
    for record in run.log[1:]:  # nothing could be read ahead of the first window
        wait, rate = number(record.get("data_wait_s")), number(record.get("examples_per_second"))
        if wait is not None and rate and batch:
            waited, taken = waited + wait, taken + batch / rate
    return min(1.0, waited / taken) if taken else None


def _per_cent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _bytes(number_of: float | None) -> str | None:
    return None if number_of is None else f"{number_of / 2**30:.3g} GiB"
