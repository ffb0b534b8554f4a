"""Charts of a run elsewhere: its log records, for TensorBoard, Weights & Biases or Trackio.

Each gets the numbers of a training record as ``train/...`` and those of an evaluation as
``eval/...``, over optimizer steps, and the samples with their pictures. When a run goes on, so do
its charts. What fails there is told once, and training goes on without it.

Steps between the checkpoint and a kill are drawn twice but in TensorBoard: wandb's ``resume_from``
rewinds on its server alone, by its own count of steps, and Trackio deletes no point of a run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from idefics_qlora.config import TrainConfig
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)

PROJECT = "idefics_qlora"
"""Unless the tracker's own variable (``WANDB_PROJECT``, ``TRACKIO_PROJECT``) names another one."""


class Tracker(Protocol):
    """A place that draws charts."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Draw numbers after an optimizer step."""

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Show what the model said: each with ``row``, ``images``, ``target`` and ``text``."""

    def close(self) -> None:
        """See that all of it has arrived."""


class _TensorBoard:
    """Event files in ``tensorboard`` in the run's folder."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._pictures = folder, set[str]()
        # What an earlier process drew beyond the checkpoint is purged, and drawn again.
        purged_from = state.global_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged_from)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a checkpoint may have the record next

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        from numpy import asarray
        from PIL import Image

        for sample in samples:
            said = f"says: {sample['text']}\n\nis: {sample['target']}"
            self._writer.add_text(f"samples/{sample['row']}", said, step)
            for file in sample["images"]:
                if file not in self._pictures:  # they are the same at each evaluation
                    with Image.open(self._folder / file) as image:
                        self._writer.add_image(file, asarray(image), step, dataformats="HWC")
                    self._pictures.add(file)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, by the run's own id."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        import wandb

        self._folder, self._wandb = folder, wandb
        with _off_stdout(state.config):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=state.run,
                resume="allow",
                dir=str(folder),
                config=state.config.to_json(),
                settings=wandb.Settings(silent=state.config.progress == "none"),
            )
        # Not by its own count of calls, which could not go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        images = [
            self._wandb.Image(str(self._folder / file), caption=caption)
            for file, caption in _captions(samples)
        ]
        self._run.log({"samples": images, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of Trackio, by the folder's name and the run's id."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        import trackio

        self._folder, self._trackio, self._config = folder, trackio, state.config
        with _off_stdout(self._config):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{folder.name}-{state.run}",
                resume="allow",
                config=state.config.to_json(),
                embed=False,
            )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        images = {
            f"samples/{Path(file).stem}": self._trackio.Image(self._folder / file, caption=caption)
            for file, caption in _captions(samples)
        }
        self._run.log(images, step=step)

    def close(self) -> None:
        with _off_stdout(self._config):
            self._trackio.finish()  # the run's own method would be called again at exit


_TRACKERS: dict[str, Callable[[Path, TrainState], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def tracker_problems(config: TrainConfig) -> Iterator[str]:
    """What ``report_to`` names and is not installed, with the way out."""
    for name in config.report_to:
        if find_spec(name) is None:
            yield (
                f'report_to={name!r} needs the package {name}: pip install "idefics_qlora[{name}]"'
            )


class Trackers:
    """Hands a run's records to the trackers of ``report_to``.

    Args:
        folder: ``output_dir``, resolved.
        state: At the run's beginning, or as it was resumed.

    Raises:
        RuntimeError: If a tracker cannot be started; the message names it.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        self._open: dict[str, Tracker] = {}
        if state.is_over and state.finished_step == state.global_step:  # nothing will be told
            return
        for name in state.config.report_to:
            try:
                self._open[name] = _TRACKERS[name](folder, state)
            except Exception as error:
                self.close()
                raise RuntimeError(
                    f"{name}, which report_to names, does not start: {error}"
                ) from error

    def record(self, record: Mapping[str, Any]) -> None:
        """Draw a record everywhere."""
        for name, tracker in list(self._open.items()):
            with self._going_on(name):
                _draw(tracker, record)

    def close(self) -> None:
        """See that all of it has arrived."""
        for name, tracker in list(self._open.items()):
            with self._going_on(name):
                tracker.close()
        self._open.clear()

    @contextlib.contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            logger.warning(
                "%s has failed (%s: %s): training goes on without it",
                *(name, type(error).__name__, error),
            )


def _draw(tracker: Tracker, record: Mapping[str, Any]) -> None:
    if values := _numbers(record):
        tracker.numbers(record["step"], values)
    if samples := record.get("eval_samples"):
        tracker.samples(record["step"], samples)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    is_training = "loss" in record
    return {
        f"train/{name}" if is_training else f"eval/{name.removeprefix('eval_')}": value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "step"
        if is_training or name.startswith("eval_")
    }


def _captions(samples: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each picture's file, and what was said of it and should have been."""
    for sample in samples:
        for file in sample["images"]:
            yield file, f"{sample['row']} says: {sample['text']} | is: {sample['target']}"


@contextlib.contextmanager
def _off_stdout(config: TrainConfig) -> Iterator[None]:
    """What a tracker prints goes where progress goes: stdout is the program's own."""
    none = config.progress == "none" or sys.stderr is None
    with contextlib.redirect_stdout(io.StringIO() if none else sys.stderr):
        yield
