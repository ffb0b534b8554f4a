"""Files by which a run's folder explains itself, to people and to programs without this library.

========================  =====================================================================
``config.yaml``           the settings: base, adapter, templates, training
``environment.json``      the machine and the versions of libraries
``log.jsonl``             every log record, one a line, without samples
``samples.jsonl``         what the model said of the samples, a line for each at each evaluation
``best``, ``last``        one line that names a checkpoint (``checkpoint.py``)
``result.json``           what the run came to; not there while it has not ended
``gallery``               pictures and captions of some rows (``gallery.py``)
``report.html``           the page made of all these (``reporting``)
========================  =====================================================================

None of them is read by training. What cannot be written is told once, and the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from idefics_qlora.checkpoint import point_to
from idefics_qlora.config import RECIPE, TrainConfig
from idefics_qlora.data.captions import Captions
from idefics_qlora.durable import (
    CheckpointError,
    json_bytes,
    json_mapping,
    read_whole,
    write_whole,
)
from idefics_qlora.evaluation.metrics import BY_NAME
from idefics_qlora.images.access import DEFAULT_ACCESS
from idefics_qlora.machine import environment
from idefics_qlora.model.adapters import adapter_config
from idefics_qlora.reporting.folder import CONFIG, ENVIRONMENT, LOG, RESULT, SAMPLES
from idefics_qlora.training.inputs import Inputs
from idefics_qlora.training.result import TrainResult
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)

_OF_PEFT = {
    *("peft_type", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("base_model_name_or_path", "revision"),
}
"""What peft writes into an adapter's configuration by itself."""


class RunFiles:
    """Writes a run's files; made when the run is at its beginning or has been resumed.

    The log is brought to the state's history: what a killed process wrote after the checkpoint is
    cut, what it did not come to write is added.

    Args:
        folder: ``output_dir``, resolved.
        state: Has the history.
        inputs: Those of the run.
    """

    def __init__(self, folder: Path, state: TrainState, inputs: Inputs) -> None:
        self._folder = folder
        self._is_told: set[str] = set()
        logged, said = b"", b""
        for record in state.log_history:
            line, samples = _lines(record)
            logged += line
            said += samples
        self._write(CONFIG, config_yaml(state, inputs).encode())
        self._write(ENVIRONMENT, json_bytes(environment()))
        self._write(LOG, logged)
        if said or (folder / SAMPLES).exists():
            self._write(SAMPLES, said)
        with self._telling("best"):
            point_to(folder, state.best_step, state.global_step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a record; one that follows a result says that the run goes on."""
        line, samples = _lines(record)
        with self._telling(RESULT):
            (self._folder / RESULT).unlink(missing_ok=True)
        for name, content in ((LOG, line), (SAMPLES, samples)):
            if content:
                with self._telling(name), (self._folder / name).open("ab", buffering=0) as file:
                    file.write(content)  # at once, in one piece

    def end(self, result: TrainResult, diagnostics: Mapping[str, Any]) -> None:
        """Write what the run came to, unless it had ended with the same before."""
        values = {**asdict(result), "diagnostics": dict(diagnostics)}
        del values["log_history"]
        best = result.best_checkpoint
        values["best_checkpoint"] = None if best is None else best.name
        # A record would have removed the file; another metric or patience may decide without one.
        with contextlib.suppress(OSError, CheckpointError):
            there = json_mapping(self._folder / RESULT, read_whole(self._folder / RESULT))
            if all(there.get(key) == values[key] for key in ("stopped_by", "best_checkpoint")):
                return
        self._write(RESULT, json_bytes(values))

    def _write(self, name: str, content: bytes) -> None:
        with self._telling(name):
            write_whole(self._folder / name, content)

    @contextlib.contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name not in self._is_told:
                logger.warning(
                    "%s cannot be written (%s): training goes on; the checkpoints have it all",
                    *(self._folder / name, error),
                )
            self._is_told.add(name)


def config_yaml(state: TrainState, inputs: Inputs) -> str:
    """The settings of a run, in the sections of a configuration file of the command line.

    Of the adapter's there are those of the recipe, which are the command line's defaults, and those
    that differ from ``peft``'s; of the rows the templates of ``Captions`` and what may be opened;
    of metrics those of ours. Rows and functions of the user's own have no name to be known by.
    """
    config: TrainConfig = state.config
    adapter = adapter_config(state.model)
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=sorted))
    base = {"base": adapter.get("base_model_name_or_path"), "revision": adapter.get("revision")}
    sections = {
        "model": {
            **{name: value for name, value in base.items() if value is not None},
            **getattr(state.model.get_base_model(), "loaded_with", {}),
        },
        "lora": {
            name: value
            for name, value in adapter.items()
            if name in RECIPE or (name not in _OF_PEFT and value != plain.get(name))
        },
        "data": _data(inputs),
        "train": json.loads(json.dumps(config.to_json())),
        "metrics": [name for name, metric in inputs.metrics.items() if BY_NAME.get(name) is metric],
    }
    sections = {name: section for name, section in sections.items() if section}
    return str(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))


def _data(inputs: Inputs) -> dict[str, Any]:
    reader, data = inputs.reader, {}
    if isinstance(captions := reader.to_example, Captions):
        for name in ("answer", "question", "image"):
            if (value := getattr(captions, name)) is not None:
                data[name] = value
    access, usual = asdict(reader.collator.access), asdict(DEFAULT_ACCESS)
    if other := {name: value for name, value in access.items() if value != usual[name]}:
        data["access"] = json.loads(json.dumps(other, default=str))
    return data


def _lines(record: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """A record's line in the log, and those of its samples."""
    logged = {name: value for name, value in record.items() if name != "eval_samples"}
    step = {"step": record["step"]}
    samples = [{**step, **sample} for sample in record.get("eval_samples", ())]
    return _json_lines([logged]), _json_lines(samples)


def _json_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
