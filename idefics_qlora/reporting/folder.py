"""The files of a run's folder, read as far as they go: a run may be under way, or killed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from idefics_qlora.config import RECIPE, TrainConfig
from idefics_qlora.durable import CheckpointError, read_whole
from idefics_qlora.families import FAMILIES
from idefics_qlora.nearby import did_you_mean

LOG, SAMPLES, RESULT = "log.jsonl", "samples.jsonl", "result.json"
CONFIG, ENVIRONMENT, BAD_ROWS = "config.yaml", "environment.json", "bad_rows.jsonl"
GALLERY, GALLERY_ROWS = "gallery", "gallery/rows.json"
REPORT = "report.html"


_USUAL = {
    **{f"lora.{name}": value for name, value in RECIPE.items()},
    **{"model.quantize": True, "model.base_weights": "4bit"},
}
"""Defaults beside those of ``TrainConfig``."""


@dataclass(frozen=True)
class RunFolder:
    """What a run's folder tells; what is missing or torn is empty."""

    path: Path
    log: list[dict[str, Any]]
    """Log records, in order; each has a ``step``."""
    samples: list[dict[str, Any]]
    """What the model said of the samples at each evaluation."""
    gallery: dict[str, Any]
    """Held-out rows with pictures and captions, and those of the highest loss."""
    result: dict[str, Any]
    """What the run came to; empty while it has not ended."""
    settings: dict[str, dict[str, Any]]
    """The sections of its configuration."""
    environment: dict[str, Any]
    bad_rows: list[dict[str, Any]]
    best: str
    """Name of the best checkpoint, empty if none is known."""
    last: str

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not the defaults, by ``section.name``; all there are of the others."""
        found = {
            name: value
            for name, value in self._others.items()
            if name not in _USUAL or value != _USUAL[name]
            if name != "lora.target_modules" or not _is_of_family(value)
        }
        defaults = {f.name: _plain(f.default) for f in fields(TrainConfig)}
        for name, value in self.settings.get("train", {}).items():
            # What "auto" came to is kept as the precision: it is among the facts.
            if name == "precision" or defaults.get(name) is MISSING:
                continue
            if value != defaults.get(name):
                found[name] = value
        return found

    @property
    def _others(self) -> dict[str, Any]:
        """Settings of the base, the adapter and the rows, by ``section.name``."""
        return {
            f"{section}.{name}": value
            for section in ("model", "lora", "data")
            for name, value in self.settings.get(section, {}).items()
        }

    @property
    def setting(self) -> dict[str, Any]:
        """All settings, by the same names."""
        train = {f.name: _plain(f.default) for f in fields(TrainConfig)}
        return {**_USUAL, **train, **self.settings.get("train", {}), **self._others}


def read_run(path: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        ValueError: If it is none.
    """
    if not (path / LOG).is_file():
        why = "it has no log.jsonl"
        if not path.is_dir():
            why = f"there is no such folder{did_you_mean(path)}"
        raise ValueError(
            f"{path}: {why}: expected the output_dir of a run (one of 0.1 gets its log when it "
            "goes on)"
        )
    settings = {}
    with suppress(OSError, yaml.YAMLError, RecursionError):
        settings = yaml.safe_load(_text(path / CONFIG))
    sections = settings.items() if isinstance(settings, dict) else ()
    return RunFolder(
        path=path,
        log=[record for record in _lines(path / LOG) if isinstance(record.get("step"), int)],
        samples=[s for s in _lines(path / SAMPLES) if isinstance(s.get("step"), int)],
        gallery=_mapping(path / GALLERY_ROWS),
        result=_mapping(path / RESULT),
        settings={name: values for name, values in sections if isinstance(values, dict)},
        environment=_mapping(path / ENVIRONMENT),
        bad_rows=list(_lines(path / BAD_ROWS)),
        best=_text(path / "best").strip(),
        last=_text(path / "last").strip(),
    )


def number(value: Any) -> float | None:
    """A value that is a finite number, as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in what should be a list of them."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _is_of_family(modules: Any) -> bool:
    """Whether LoRA is in those modules that a family names for it, as without a choice."""
    named = sorted(map(str, modules)) if isinstance(modules, (list, set)) else []
    return any(named == sorted(family.lora_targets) for family in FAMILIES.values())


def _plain(value: Any) -> Any:
    """A default as a configuration file has it."""
    return list(value) if isinstance(value, tuple) else value


def _text(path: Path) -> str:
    with suppress(OSError, CheckpointError):  # a pipe of that name is not waited for
        return read_whole(path).decode(errors="replace")
    return ""


def _mapping(path: Path) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(_text(path)), dict):
            return value
    return {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that is being written is passed over."""
    for line in _text(path).split("\n"):
        with suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(line), dict):
                yield value
