"""What a run measures on held-out rows, each time an evaluation is due."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idefics_qlora.data.bad_rows import BadRows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.workers import Loading
from idefics_qlora.evaluation.held_out import mean_loss
from idefics_qlora.evaluation.image_use import image_use
from idefics_qlora.evaluation.predictions import Answers, keep_answers
from idefics_qlora.evaluation.samples import EvalSamples
from idefics_qlora.training.gallery import Gallery
from idefics_qlora.training.inputs import ROWS_CHECKED, Inputs

logger = logging.getLogger(__name__)


class Evaluations:
    """The loss of the held-out rows, metrics, whether the model looks, and what it says of some.

    Args:
        inputs: Those of the run, with held-out rows.
        folder: ``output_dir``, resolved: samples and predictions go there.
        device: The model's.
        loading: Loads batches as the run's settings say.
        bad_rows: Takes down the rows that cannot be used.
        gallery: Keeps what the report shows of them.
    """

    def __init__(
        self,
        inputs: Inputs,
        folder: Path,
        device: torch.device,
        loading: Callable[..., Loading[Any]],
        bad_rows: BadRows,
        gallery: Gallery,
    ) -> None:
        assert inputs.held_out is not None
        self._inputs, self._held_out, self._device = inputs, inputs.held_out, device
        self._folder, self._gallery = folder, gallery
        self._loading, self._bad_rows = loading, bad_rows
        self._samples = None
        if num := inputs.config.eval_samples:
            self._samples = EvalSamples(self._held_out.reader, num, folder)

    def sizes(self) -> dict[str, Any]:
        """The settings that decide how much memory an evaluation takes."""
        config = self._inputs.config
        sizes: dict[str, Any] = {"eval_batch_size": config.eval_batch_size}
        asks = self._held_out.num_asked > 0
        return sizes | ({"eval_max_new_tokens": config.eval_max_new_tokens} if asks else {})

    def record(self, step: int) -> dict[str, Any]:
        """Everything that an evaluation after a step tells, ``eval_loss`` first."""
        config, model = self._inputs.config, self._inputs.model
        answers = Answers(model, self._held_out.reader.collator, config.eval_max_new_tokens)
        loading = self._loading(self._held_out)
        losses: dict[int, float] = {}
        record = mean_loss(model, loading, self._device, self._bad_rows, answers, losses)
        if config.eval_predictions:
            keep_answers(self._folder / "predictions.jsonl", step, answers.lines)
        if self._held_out.num_asked:
            record |= answers.scores(self._inputs.metrics, f"after step {step}")
        if config.eval_image_use:
            record |= self._image_use(self._held_out.reader)
        if self._samples is not None:
            record["eval_samples"] = self._samples.caption(model, config.eval_batch_size)
        self._gallery.evaluated(losses, record.get("eval_samples", ()))
        return record

    def _image_use(self, reader: RowReader) -> dict[str, float]:
        try:
            use = image_use(
                self._inputs.model,
                self._inputs.processor,
                reader.rows,
                to_example=reader.to_example,
                max_rows=ROWS_CHECKED,
                batch_size=self._inputs.config.eval_batch_size,
                loss_on=self._inputs.config.loss_on,
                max_length=self._inputs.config.max_length,
                access=reader.collator.access,
            )
        except ValueError as error:
            logger.warning("whether the model looks cannot be told: %s", error)
            return {}
        if use.looks:
            logger.info("%s", use)
        else:
            self._inputs.notices.warn("an evaluation in which the model did not look", str(use))
        return {
            "eval_loss_another_image": use.loss["another"],
            "eval_loss_blank_image": use.loss["blank"],
            "eval_image_gain": use.gain[0],
            "eval_looks": float(use.looks),
        }
