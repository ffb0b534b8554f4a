"""Captions and answers from a model."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import compress, islice, takewhile
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from transformers import StoppingCriteria

from idefics_qlora.config import OnBadRow, check_choice, check_whole
from idefics_qlora.data.bad_rows import BadRow
from idefics_qlora.data.batches import Collator, Tokens
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.rows import Rows
from idefics_qlora.data.templates import trained_captions
from idefics_qlora.data.workers import Loading
from idefics_qlora.evaluation.prompts import TOGETHER, Prompt, Prompts, loading_prompts
from idefics_qlora.families import check_model_and_processor, family_of
from idefics_qlora.families.family import Model, Processor
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.model.precision import evaluation_mode
from idefics_qlora.notices import Notices, advising
from idefics_qlora.progress import Counting, counting

logger = logging.getLogger(__name__)

ONE_TEXT = {"num_return_sequences": 1, "return_dict_in_generate": False}
"""Options of transformers that hold in any case, whatever the model's own settings are."""


BatchSize: TypeAlias = "int | Literal['auto']"
NumWorkers: TypeAlias = "int | Literal['auto']"

FIRST_SIZE, LARGEST_SIZE = 8, 64
"""Of batches whose size is found: with the former they begin, the latter they do not pass."""


@overload
def generate(
    model: Model,
    processor: Processor,
    prompts: Rows | Iterable[Any],
    *,
    on_bad_row: Literal["raise"] = ...,
    **options: Any,
) -> list[str]: ...
@overload
def generate(
    model: Model,
    processor: Processor,
    prompts: Rows | Iterable[Any],
    *,
    on_bad_row: OnBadRow,
    **options: Any,
) -> list[str | None]: ...
def generate(
    model: Model,
    processor: Processor,
    prompts: Rows | Iterable[Any],
    *,
    to_example: ToExample | None = None,
    max_new_tokens: int = 50,
    batch_size: BatchSize = 8,
    on_bad_row: OnBadRow = "raise",
    num_workers: NumWorkers = "auto",
    return_full_text: bool = False,
    access: ImageAccess = DEFAULT_ACCESS,
    **generate_options: Any,
) -> Any:
    """Continue prompts of interleaved images and texts, or answer what rows ask.

    Greedy unless ``generate_options`` say otherwise: a text is then the same whatever batch it is
    generated in (up to rounding, which may turn a tie in fp16 and bf16). Image tokens are never
    produced, and a text ends at the end-of-sequence token, or at ``<end_of_utterance>`` where the
    checkpoint has it. For several texts of a prompt, pass it as often, with ``do_sample=True``.

    Args:
        model: The base, or the base with an adapter.
        processor: The base's processor.
        prompts: Lists of images and texts, or of chat messages, as in
            :class:`~idefics_qlora.Example`; or rows as in ``train``, of which the answer is not
            looked at and may be missing; or a stream or an iterator of either. For pictures alone,
            ``[{"image": path}, ...]``.
        to_example: As in ``train``; it may return a prompt instead of an example. ``None``: rows
            with a picture that say nothing of what is asked are asked the question that the model
            was trained with (``model.trained_templates``), or else the default.
        max_new_tokens: Tokens at most per text.
        batch_size: Prompts in one batch. ``auto``: on a GPU doubled from 8 up to 64 while the
            memory suffices, and halved where it does not; on a CPU 8.
        on_bad_row: What to do with one that cannot be read: ``raise``, or ``skip``, which logs a
            line and gives ``None`` in its place.
        num_workers: Processes that read rows and open their pictures ahead. ``auto``: 2 for rows, 1
            for a stream, 0 for prompts, an iterator, and few rows.
        return_full_text: Return the prompt's text as well (images are left out of it).
        access: As in ``train``.
        **generate_options: For ``transformers``' ``generate``, such as ``do_sample=True``.

    Returns:
        One text per prompt, in order.

    Raises:
        TypeError: If model and processor are swapped, or what is asked is passed as an option.
        ValueError: If a prompt or row is not valid; the message names it (``BadImage`` for an
            image). If an option asks for something else than one text per prompt.
        LoaderError: If a process that reads rows died.
        torch.OutOfMemoryError: If the GPU's memory does not suffice; the message says what to
            lower.
    """
    answers = generate_iter(
        model,
        processor,
        prompts,
        to_example=to_example,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_bad_row=on_bad_row,
        num_workers=num_workers,
        return_full_text=return_full_text,
        access=access,
        **generate_options,
    )
    return list(answers)


def generate_iter(
    model: Model,
    processor: Processor,
    rows: Rows | Iterable[Any],
    *,
    to_example: ToExample | None = None,
    max_new_tokens: int = 50,
    batch_size: BatchSize = 8,
    on_bad_row: OnBadRow = "raise",
    num_workers: NumWorkers = "auto",
    return_full_text: bool = False,
    access: ImageAccess = DEFAULT_ACCESS,
    **generate_options: Any,
) -> Iterator[str | None]:
    """Texts one after the other, as :func:`generate` gives them, for any number of rows.

    A batch is generated when its first text is asked for, and few rows are read ahead, so memory
    does not grow with their number. Whoever stops, or is stopped, has the texts up to there; the
    processes that read end with the iterator.

    Args:
        model: The base, or the base with an adapter.
        processor: The base's processor.
        rows: As the ``prompts`` of :func:`generate`.
        to_example: As in :func:`generate`, like all that follows.
        max_new_tokens: Tokens at most per text.
        batch_size: Prompts in one batch, or ``auto``.
        on_bad_row: ``raise`` (after the texts of the rows before) or ``skip``.
        num_workers: Processes that read ahead, or ``auto``.
        return_full_text: Give the prompt's text as well.
        access: As in ``train``.
        **generate_options: For ``transformers``' ``generate``.

    Returns:
        An iterator of one text per row, in order; ``None`` for a bad row that is skipped.

    Raises:
        TypeError, ValueError, LoaderError, torch.OutOfMemoryError: As :func:`generate`.
    """
    check_model_and_processor(model, processor)
    check_choice("on_bad_row", on_bad_row, OnBadRow)
    check_whole(max_new_tokens=max_new_tokens)
    if batch_size != "auto":
        check_whole(batch_size=batch_size)
    if num_workers != "auto":
        check_whole(0, num_workers=num_workers)
    for name in ("question", "prompt", "image", "images"):  # which transformers calls model_kwargs
        if name in generate_options:
            raise TypeError(
                f"{name}={generate_options[name]!r:.80} is no option of generate: what is asked "
                'stands in the rows, [{"image": ..., "question": ...}, ...]'
            )
    for name, only in ONE_TEXT.items():
        if generate_options.get(name, only) not in (only, None):
            raise ValueError(
                f"{name}={generate_options[name]!r}: generate returns one text per prompt; for "
                "several, pass the prompt as often, with do_sample=True; for more than texts, call "
                "model.generate"
            )
    if isinstance(rows, Sized) and len(rows) == 0:
        return iter(())
    collator = Collator(
        processor, num_embeddings=family_of(model).num_embeddings(model), access=access
    )
    together = TOGETHER if batch_size == "auto" else min(TOGETHER, batch_size)
    how = to_example, collator, num_workers, together, trained_captions(model)
    loading = loading_prompts(rows, *how)

    def write(prompts: Sequence[Prompt], counted: Counting) -> list[str]:
        return generate_from_tokens(
            model,
            collator,
            [prompt.tokens for prompt in prompts],
            [prompt.pixels for prompt in prompts],
            len(prompts),
            max_new_tokens,
            counted.note,
            return_full_text=return_full_text,
            **generate_options,
        )

    on_gpu = next(model.parameters()).device.type == "cuda"
    largest = LARGEST_SIZE if on_gpu else FIRST_SIZE
    if batch_size != "auto":
        largest = batch_size
    total = len(rows) if isinstance(rows, Sized) else None
    return _answers(loading, write, batch_size, largest, on_bad_row, total)


def _answers(
    loading: Loading[Prompts],
    write: Callable[[Sequence[Prompt], Counting], list[str]],
    batch_size: BatchSize,
    largest: int,
    on_bad_row: OnBadRow,
    total: int | None,
) -> Iterator[str | None]:
    """A text for each prompt, batch by batch; ``None`` for a bad row."""
    size = FIRST_SIZE if batch_size == "auto" else batch_size
    notices = Notices()
    waiting: deque[Prompt | BadRow] = deque()
    is_read, broken = False, ""
    with loading as chunks, counting("generating", total, "texts") as counted:
        while True:
            while len(waiting) < size and not is_read:
                chunk = next(chunks, Prompts([]))
                broken = chunk.broken
                is_read = bool(broken) or not chunk.prompts  # what has ended is not asked again
                for prompt in chunk.prompts:
                    waiting.append(prompt)
                    if isinstance(prompt, Prompt):
                        # A tensor from another process holds a file descriptor while it lives.
                        prompt.pixels[:] = [square.clone() for square in prompt.pixels]
            batch = list(islice(waiting, size))
            if not batch:
                break
            if on_bad_row == "raise":
                batch = list(takewhile(lambda row: isinstance(row, Prompt), batch))
                if not batch and isinstance(bad := waiting[0], BadRow):
                    raise bad.error()
            good = [prompt for prompt in batch if isinstance(prompt, Prompt)]
            try:
                texts = iter(write(good, counted) if good else ())
            except torch.OutOfMemoryError:
                if batch_size != "auto" or len(good) == 1:
                    raise
                texts = None  # tried again outside, where the error no longer holds tensors
            if texts is None:
                size = largest = max(1, min(size, len(batch)) // 2)
                logger.info("generating goes on with batches of %d: the memory ended", size)
                torch.cuda.empty_cache()
                continue
            counted.advance(len(batch))
            counted.clear()  # whoever gets a text may print it
            for row in batch:
                waiting.popleft()
                if isinstance(row, BadRow):
                    logger.warning("left out: %s", row.error())
                    yield None
                    continue
                for kind, line in row.findings:
                    notices.warn(kind, f"{row.name}: {line}")
                yield next(texts)
            if len(batch) == size:
                size = min(2 * size, largest)
    if broken:
        raise ValueError(broken)


class _Noting(StoppingCriteria):  # type: ignore[misc]
    """Is asked after each token of a batch, and never stops one."""

    def __init__(self, note: Callable[[str], None], max_new_tokens: int) -> None:
        self._note, self._of, self._tokens = note, max_new_tokens, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._tokens += 1
        self._note(f"token {self._tokens} of {self._of}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_from_tokens(
    model: Model,
    collator: Collator,
    tokens: Sequence[Tokens],
    pixels: Sequence[Sequence[Tensor]],
    batch_size: int,
    max_new_tokens: int,
    note: Callable[[str], None],
    *,
    return_full_text: bool = False,
    **generate_options: Any,
) -> list[str]:
    """Continue prompts that are tokens and pixels already; otherwise as :func:`generate`.

    Args:
        model: The base, or the base with an adapter.
        collator: Made the tokens.
        tokens: One per prompt.
        pixels: For each, its images (3, H, W) uint8.
        batch_size: Prompts in one batch.
        max_new_tokens: Tokens at most per text.
        note: Told in words how far a batch has come, after each token.
        return_full_text: Return the prompt's text as well.
        **generate_options: For ``transformers``' ``generate``.
    """
    tokenizer = collator.tokenizer
    device = next(model.parameters()).device
    options = {
        "do_sample": False,
        "eos_token_id": collator.end_ids,
        "pad_token_id": tokenizer.pad_token_id,
        **generate_options,
        **ONE_TEXT,
        "suppress_tokens": [
            *(generate_options.get("suppress_tokens") or ()),
            *collator.image_ids,
        ],
    }
    texts: list[str] = []
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        batch = collator.collate(tokens[part], pixels[part], padding_side="left")
        options["stopping_criteria"] = [
            *(generate_options.get("stopping_criteria") or ()),
            _Noting(note, max_new_tokens),
        ]
        with (
            advising("generating", batch_size=batch_size, max_new_tokens=max_new_tokens),
            evaluation_mode(model),
        ):
            inputs = batch.to(device).inputs()
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        said = ids[:, batch.input_ids.shape[1] :].tolist()
        if return_full_text:
            asked = [compress(row.ids, row.is_beside_images()) for row in tokens[part]]
            said = [[*before, *new] for before, new in zip(asked, said, strict=True)]
        texts += tokenizer.batch_decode(said, skip_special_tokens=True)
    return texts
