"""Which evaluation is the best, and when there have been enough that were not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from idefics_qlora.config import TrainConfig
from idefics_qlora.evaluation.metrics import BY_NAME
from idefics_qlora.evaluation.predictions import (
    RECORDED,
    RECORDED_OF_IMAGE_USE,
    Metric,
    greater_is_better,
)


@dataclass(frozen=True)
class Criterion:
    """How evaluations are compared: by one of the numbers that each records."""

    key: str = "eval_loss"
    greater: bool = False
    """Whether more of it is better."""
    patience: int | None = None
    """Evaluations without a gain after which a run ends."""
    threshold: float = 0.0
    """What counts as a gain is more than this."""
    of_answers: bool = False
    """Whether it is a metric of what the model says."""

    def gain(self, value: float, best: float) -> float:
        """By how much a value is better than another."""
        return value - best if self.greater else best - value

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far; one that is NaN never is."""
        return not math.isnan(value) and (best is None or self.gain(value, best) > 0)

    def check(self, record: Mapping[str, Any], what: str) -> None:
        """See that a new evaluation has the number.

        Raises:
            ValueError: If not; the message names the numbers that it has.
        """
        if self.key not in record:
            numbers = [key for key, value in record.items() if isinstance(value, (int, float))]
            raise ValueError(
                f"metric_for_best_model={self.key!r} is not among what {what} gave: expected one "
                f"of {', '.join(numbers)}"
            )

    def is_over(self, records: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the last ``patience`` evaluations were without a gain.

        A function of the history alone, so that a restart at any point decides alike. The best is
        that of the last gain: many small gains that add up to the threshold are one.
        """
        if self.patience is None:
            return False
        best, without = None, 0
        for record in records:
            if self.key not in record:
                continue
            value = float(record[self.key])
            if not math.isnan(value) and (best is None or self.gain(value, best) > self.threshold):
                best, without = value, 0
            else:
                without += 1
        return without >= self.patience


def criterion_of(config: TrainConfig, metrics: Mapping[str, Metric]) -> Criterion:
    """The criterion of settings that are sound."""
    greater = config.greater_is_better
    if greater is None:
        greater = bool(_known_direction(config, metrics))
    return Criterion(
        key=config.metric_for_best_model,
        greater=greater,
        patience=config.early_stopping_patience,
        threshold=config.early_stopping_threshold,
        of_answers=config.metric_for_best_model not in RECORDED | RECORDED_OF_IMAGE_USE,
    )


def criterion_problems(config: TrainConfig, metrics: Mapping[str, Metric]) -> Iterator[str]:
    """What is wrong with ``metric_for_best_model`` and its direction, given the metrics' names."""
    key, said = config.metric_for_best_model, config.greater_is_better
    known = [*_numbers_of(config, metrics), *(f"eval_{name}" for name in metrics)]
    if key not in known and not any(key.startswith(f"eval_{name}_") for name in metrics):
        meant = f"eval_{key}" if f"eval_{key}" in known else None
        meant = meant or next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.75)), None)
        name = key.removeprefix("eval_")
        ours = next(iter(difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.75)), None)
        there = f"; there are {', '.join(known)}"
        if key in RECORDED_OF_IMAGE_USE:
            hint = "it needs eval_image_use=True"
        elif meant:
            hint = f"did you mean {meant!r}?"
        elif ours and ours not in metrics:
            function = BY_NAME[ours].__name__
            hint = f"for 'eval_{ours}' pass metrics={{{ours!r}: iq.metrics.{function}}}{there}"
        else:
            hint = f"for a score of your own pass metrics={{name: function}}{there}"
        yield (
            f"metric_for_best_model={key!r} is nothing that an evaluation of this run records: "
            f"{hint}"
        )
        return
    direction = _known_direction(config, metrics)
    if said is None and direction is None:
        yield (
            f"greater_is_better=None: whether more of {key} is better is not known: expected True "
            "or False"
        )
    elif said is not None and direction is not None and said != direction:
        yield (
            f"greater_is_better={said} contradicts metric_for_best_model={key!r}, of which "
            f"{'more' if direction else 'less'} is better: leave it out"
        )


def _numbers_of(config: TrainConfig, metrics: Mapping[str, Metric]) -> dict[str, bool | None]:
    """What every evaluation records beside metrics, and whether more is better."""
    recorded = RECORDED | (RECORDED_OF_IMAGE_USE if config.eval_image_use else {})
    absent = {"eval_samples", "eval_bad_rows"}
    if not metrics and not config.eval_predictions:
        absent.add("eval_generate_s")
    return {key: more for key, more in recorded.items() if key not in absent}


def _known_direction(config: TrainConfig, metrics: Mapping[str, Metric]) -> bool | None:
    key = config.metric_for_best_model
    if (name := key.removeprefix("eval_")) in metrics and name != key:
        return greater_is_better(metrics[name])
    for name, metric in metrics.items():
        if key.startswith(f"eval_{name}_"):
            return greater_is_better(metric)
    return _numbers_of(config, metrics).get(key)
