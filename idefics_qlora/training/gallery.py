"""What the report shows of held-out rows and no other file has: pictures, losses, captions.

Pictures are kept as the rows have them, for people would take those that a model sees, squeezed
into squares, for damaged ones; beside each is the size in which the model sees it, ``seen``.

Everything is in the folder ``gallery`` of the run. It follows from the run's state alone: a run
that was killed and went on ends with the same as one that was not.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from idefics_qlora.data.checks import items_of
from idefics_qlora.data.example import PromptItem, Turn, prompt_images
from idefics_qlora.durable import CheckpointError, json_mapping, read_whole, write_whole
from idefics_qlora.evaluation.samples import Sample, captions, read_samples
from idefics_qlora.images.opening import file_name
from idefics_qlora.model.adapters import without_adapter
from idefics_qlora.reporting.folder import GALLERY, GALLERY_ROWS
from idefics_qlora.training.inputs import Inputs
from idefics_qlora.training.state import TrainState

logger = logging.getLogger(__name__)

FEWEST, MOST = 4, 12
"""Rows shown, whatever ``eval_samples`` is; fewer only if there are no more."""
HIGHEST = 6
"""Rows of the highest loss that are shown."""
MOST_IMAGES = 4
"""Pictures of a row at most."""
_PICTURE = re.compile(r"\.?row-\d+-image-\d\.webp(\.incomplete)?")


class Gallery:
    """Keeps the gallery of a run. What fails is told, and the run goes on without it.

    Args:
        inputs: Those of the run, with held-out rows.
        folder: ``output_dir``, resolved.
        state: As it is at the start: what does not belong to it is deleted.
    """

    def __init__(self, inputs: Inputs, folder: Path, state: TrainState) -> None:
        assert inputs.held_out is not None
        self._reader, self._config = inputs.held_out.reader, inputs.config
        self._folder, self._state = folder, state
        self._shown: list[Sample] | None = None
        self._known: dict[int, Sample] = {}
        try:
            self._kept = json_mapping(folder, read_whole(folder / GALLERY_ROWS))
        except (OSError, CheckpointError):
            self._kept = {}
        step = self._kept.get("step")
        is_ours = self._kept.get("run") == state.run
        if not (is_ours and isinstance(step, int) and step <= state.global_step):
            self._kept = {}
            with self._telling():
                (folder / GALLERY_ROWS).unlink(missing_ok=True)
                self._clear()

    def evaluated(self, losses: Mapping[int, float], says: Sequence[Mapping[str, Any]]) -> None:
        """Keep what an evaluation has found.

        Args:
            losses: Of each row that could be read, per target token, by its number.
            says: The samples as the evaluation's record has them.
        """
        with self._telling():
            rows = self._rows(losses)
            if self._config.eval_samples:  # asked at the first evaluation, then it is known
                self._ask_base()
            self._write(self._state.global_step, rows, losses, _texts(says))

    def ended(self, step: int) -> None:
        """Caption the rows with the adapter of a step, which the model holds now, unless done."""
        if self._kept.get("captioned") == step:
            return
        with self._telling():
            losses = self._losses()
            rows = self._rows(losses)
            self._ask_base()
            of_step = (r for r in self._state.log_history if r["step"] == step)
            said = _texts([s for record in of_step for s in record.get("eval_samples", ())])
            asked = [row for row in rows if row.name not in said]
            texts = self._captions(asked)
            said |= zip((row.name for row in asked), texts, strict=True)
            self._write(self._kept.get("step", step), rows, losses, said, step)

    def _losses(self) -> dict[int, float]:
        """Those of the last evaluation, as far as they were kept."""
        kept = [*self._kept.get("rows", ()), *self._kept.get("highest", ())]
        return {row["index"]: row["loss"] for row in kept if row["loss"] is not None}

    def _rows(self, losses: Mapping[int, float]) -> list[Sample]:
        """The first rows, and those of the highest loss; each is read once."""
        if self._shown is None:
            number = min(max(FEWEST, self._config.eval_samples), MOST)
            self._shown = read_samples(self._reader, range(len(self._reader)), number)
            self._known |= {row.index: row for row in self._shown}
        highest = _highest(losses)
        for row in read_samples(
            self._reader, (i for i in highest if i not in self._known), HIGHEST
        ):
            self._known[row.index] = row
        worst = [self._known[i] for i in highest if i in self._known]
        self._known = {row.index: row for row in (*self._shown, *worst)}
        return [*self._known.values()]

    def _ask_base(self) -> None:
        """See that it is known what the base says of the first rows."""
        base = self._kept.setdefault("base", {})
        asked = [row for row in self._shown or () if row.name not in base]
        if asked:
            with without_adapter(self._state.model):
                texts = self._captions(asked)
            base |= zip((row.name for row in asked), texts, strict=True)

    def _captions(self, rows: Sequence[Sample]) -> list[str]:
        if not rows:
            return []
        to_do = self._state.model, self._reader.collator, rows
        try:
            return captions(*to_do, len(rows))  # a token of many rows takes hardly longer
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # here, where the failed try's tensors are gone
        return captions(*to_do, min(len(rows), self._config.eval_batch_size))

    def _write(
        self,
        step: int,
        rows: Sequence[Sample],
        losses: Mapping[int, float],
        said: Mapping[str, str],
        captioned: int | None = None,
    ) -> None:
        assert self._shown is not None
        base = self._kept.get("base", {})
        (self._folder / GALLERY).mkdir(parents=True, exist_ok=True)
        entries = {}
        for row in rows:
            images = row.pictures[:MOST_IMAGES]
            files = [f"{GALLERY}/row-{row.index}-image-{n}.webp" for n in range(len(images))]
            for file, picture in zip(files, images, strict=True):
                if not (self._folder / file).exists():
                    write_whole(self._folder / file, webp(picture))
            entries[row.index] = {
                "row": row.name,
                "index": row.index,
                "images": files,
                "files": [*map(file_name, prompt_images(row.example.prompt)[:MOST_IMAGES])],
                "more_images": len(row.pixels) - len(images),
                "seen": [[p.shape[2], p.shape[1]] for p in row.pixels[:MOST_IMAGES]],
                "prompt": "\n".join(i for i in items_of(row.example.prompt) if isinstance(i, str)),
                **_asked(row.example.prompt),
                "right": [*(row.example.references or (row.example.completion,))],
                "base": base.get(row.name),
                "text": said.get(row.name),
                "loss": losses.get(row.index),
            }
        self._kept = {
            "run": self._state.run,
            "step": step,
            "captioned": captioned,
            "rows": [entries[row.index] for row in self._shown],
            "highest": [entries[i] for i in _highest(losses) if i in entries],
            "base": base,
        }
        write_whole(self._folder / GALLERY_ROWS, json.dumps(self._kept, indent=1).encode())
        self._clear({Path(file).name for entry in entries.values() for file in entry["images"]})

    def _clear(self, but: Container[str] = ()) -> None:
        """Delete pictures of rows that are shown no more, and what a killed process left behind."""
        for file in (self._folder / GALLERY).glob("*"):
            if file.name not in but and _PICTURE.fullmatch(file.name):
                file.unlink(missing_ok=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            with torch.random.fork_rng(devices=[]):  # a to_example may draw
                yield
        except Exception as error:  # a full disk, no memory: a page is not worth a run
            logger.warning(
                "the report's gallery is not complete (%s: %s): the run goes on",
                *(type(error).__name__, error),
            )


def webp(picture: Image.Image) -> bytes:
    """A picture as a small file."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _highest(losses: Mapping[int, float]) -> list[int]:
    """Numbers of the rows of the highest loss; one that is not finite comes first."""
    return sorted(losses, key=lambda i: (losses[i] == losses[i], -losses[i], i))[:HIGHEST]


def _asked(prompt: Sequence[PromptItem]) -> dict[str, Any]:
    """How a row asks: what a page needs that asks the same of other pictures.

    There is a question if the prompt is nothing but pictures and one text behind them.
    """
    *before, last = items_of(prompt)
    is_dialogue = isinstance(prompt[0], Turn)
    is_one = isinstance(last, str) and not any(isinstance(item, str) for item in before)
    if is_dialogue:
        is_one &= len(prompt) == 1
    return {"question": last if is_one else None, "dialogue": is_dialogue}


def _texts(samples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {sample["row"]: sample["text"] for sample in samples}
