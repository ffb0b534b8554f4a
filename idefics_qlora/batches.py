"""Windows and batches: which rows an optimizer step sees, and as which tensors.

Shapes: B examples, T tokens, N images per example, S the side in pixels of the model's square.

A window is the unit of training: the ``global_batch_size`` examples of one optimizer step. Item
``w`` of :class:`Windows` is a pure function of ``(rows, seed, w)``; the number of worker processes,
the micro-batch size or a restart do not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from idefics_qlora.config import LossOn
from idefics_qlora.examples import Example, PromptItem, ToExample, as_example, is_text, naming_row
from idefics_qlora.images import full_image, open_image, random_crop

IGNORE = -100
"""Label of a token that is no target (the default ``ignore_index`` of PyTorch's cross-entropy)."""

IMAGE_TOKEN = "<image>"
AROUND_IMAGE = "<fake_token_around_image>"


class Rows(Protocol):
    """Anything with a length and rows by number: a list, a ``datasets.Dataset``, ..."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Examples padded to one length, as the model takes them."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64, 0 on padding."""
    labels: Tensor
    """(B, T) int64, the token itself where it is a target, else -100."""
    pixel_values: Tensor
    """(B, N, 3, S, S) uint8, not normalised; zeros where an example has fewer than N images."""
    image_attention_mask: Tensor
    """(B, T, N) bool: which image a token attends to, the latest one before it."""
    pixel_mean: Tensor
    """(3,) float32, in units of 0..255."""
    pixel_std: Tensor
    """(3,) float32, in units of 0..255."""

    @property
    def num_targets(self) -> int:
        """Target tokens; call it before the batch goes to the GPU, there it would wait for it."""
        return int((self.labels != IGNORE).sum())

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward; images become normalised float32."""
        # The same operations in the same order as the image processor's, so equal to the bit.
        pixels = self.pixel_values.float()
        pixels = (pixels - self.pixel_mean.view(3, 1, 1)) / self.pixel_std.view(3, 1, 1)
        present = self.image_attention_mask.any(dim=1)  # (B, N); images that pad a row stay zero
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": pixels * present[:, :, None, None, None],
            "image_attention_mask": self.image_attention_mask,
        }

    def part(self, examples: slice, num_tokens: int, num_images: int) -> Batch:
        """Some of the examples, cut to their first tokens and images (right padding only)."""
        return replace(
            self,
            input_ids=self.input_ids[examples, :num_tokens],
            attention_mask=self.attention_mask[examples, :num_tokens],
            labels=self.labels[examples, :num_tokens],
            pixel_values=self.pixel_values[examples, :num_images],
            image_attention_mask=self.image_attention_mask[examples, :num_tokens, :num_images],
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; from pinned memory the copies do not wait."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (a ``DataLoader`` calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Window:
    """What one optimizer step sees: all examples of a window, the longest first."""

    batch: Batch
    rows: tuple[int, ...]
    """Row number of each example, in the order of the window."""
    lengths: tuple[int, ...]
    """Text tokens of each example of ``batch``."""
    images: tuple[int, ...]
    """Images of each example of ``batch``."""
    num_targets: int
    """Target tokens of the whole window: what its loss is divided by."""

    def micro_batches(self, size: int) -> list[Batch]:
        """The window in parts of ``size`` examples, each cut to its own longest example.

        Neighbours have similar lengths, so little is padding. The parts share the window's memory.
        """
        return [
            self.batch.part(
                slice(start, start + size),
                num_tokens=self.lengths[start],
                num_images=max(1, *self.images[start : start + size]),
            )
            for start in range(0, len(self.rows), size)
        ]

    def to(self, device: torch.device) -> Window:
        """The window on ``device``; from pinned memory the copies do not wait."""
        return replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> Window:
        """The window in page-locked memory (a ``DataLoader`` calls this)."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Tokens:
    """One example's text as token ids; ids from ``first_target`` on belong to the completion."""

    ids: list[int]
    first_target: int


class Collator:
    """Turns examples into a :class:`Batch`; owns how images and texts interleave.

    The text of an example is ``<s>``, then its items in order; an image becomes
    ``<fake_token_around_image><image><fake_token_around_image>``, adjacent images share the token
    between them. Equal to ``IdeficsProcessor(text=...)`` on prompts, a hundred times faster on the
    image mask, and it cannot put an image behind its question.

    Targets are the completion and the end token (``loss_on="completion"``), or all text
    (``"all"``). Padding, image tokens and the begin token are never targets.

    Args:
        processor: The checkpoint's ``IdeficsProcessor``.
        loss_on: Which text tokens are targets.
        num_embeddings: Rows of the model's embedding, additional ones included; ids at or above it
            are an error here instead of a device assert later. ``None``: not checked.
    """

    def __init__(
        self, processor: Any, loss_on: LossOn = "completion", num_embeddings: int | None = None
    ) -> None:
        self.tokenizer = processor.tokenizer
        self.loss_on = loss_on
        self.num_embeddings = num_embeddings
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        around_id = self.tokenizer.convert_tokens_to_ids(AROUND_IMAGE)
        special = [self.image_id, around_id, self.tokenizer.bos_token_id]
        if self.tokenizer.unk_token_id in special or None in special:
            raise ValueError(
                f"the tokenizer lacks {IMAGE_TOKEN}, {AROUND_IMAGE} or a begin token: "
                "it is not the processor of an IDEFICS checkpoint"
            )
        self.never_target = torch.tensor(special)
        self.control_tokens = [IMAGE_TOKEN, AROUND_IMAGE, *map(str, self._named_tokens())]
        images = processor.image_processor
        self.side = int(images.size["height"])
        scale = 1 / images.rescale_factor
        self.pixel_mean = torch.tensor(images.image_mean) * scale
        self.pixel_std = torch.tensor(images.image_std) * scale

    def _named_tokens(self) -> set[str]:
        tokenizer = self.tokenizer
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
        return {token for token in named if token is not None}

    def text(self, prompt: Sequence[PromptItem]) -> str:
        """The prompt as one string with the image tokens in place."""
        parts = [self.tokenizer.bos_token]
        after_image = False
        for item in prompt:
            if is_text(item):
                parts.append(self._plain(str(item)).strip(" "))
            else:
                parts.append(("" if after_image else AROUND_IMAGE) + IMAGE_TOKEN + AROUND_IMAGE)
            after_image = not is_text(item)
        return "".join(parts)

    def _plain(self, text: str) -> str:
        # Text never forges control tokens: a literal "<image>" in the data becomes "< image>".
        for token in self.control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def tokens(self, examples: Sequence[Example]) -> list[Tokens]:
        """Token ids of examples, with the end token appended.

        Raises:
            ValueError: If an id lies beyond the model's embedding.
        """
        prompts = [self.text(example.prompt) for example in examples]
        texts = []
        for example, prompt in zip(examples, prompts, strict=True):
            # The spaces that text() stripped from the prompt's end belong to the completion: tokens
            # of this family carry the space before a word, and generation sees the prompt without.
            last = example.prompt[-1]
            spaces = len(last) - len(last.rstrip(" ")) if isinstance(last, str) else 0
            texts.append(prompt + " " * spaces + self._plain(example.completion))
        ids = self._ids(prompts + texts)
        tokens = []
        for prompt_ids, text_ids in zip(ids[: len(prompts)], ids[len(prompts) :], strict=True):
            # A token that spans the boundary belongs to the completion.
            pairs = enumerate(zip(prompt_ids, text_ids, strict=False))
            first_target = next((i for i, (a, b) in pairs if a != b), len(prompt_ids))
            tokens.append(Tokens([*text_ids, self.tokenizer.eos_token_id], first_target))
        return tokens

    def prompt_tokens(self, prompts: Sequence[Sequence[PromptItem]]) -> list[Tokens]:
        """Token ids of prompts alone, as generation needs them; nothing is a target."""
        ids = self._ids([self.text(prompt) for prompt in prompts])
        return [Tokens(row, len(row)) for row in ids]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        if self.num_embeddings is not None:
            largest = max(map(max, ids))
            if largest >= self.num_embeddings:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                raise ValueError(
                    f"token {token!r} has id {largest}, but the model embeds only ids below "
                    f"{self.num_embeddings}: use the processor of the same checkpoint as the model"
                )
        return ids

    def pixels(self, prompt: Sequence[PromptItem], crop_seed: int | None = None) -> list[Tensor]:
        """The prompt's images as the model's square.

        Args:
            prompt: Items of an example's prompt.
            crop_seed: Seed of the random crops of training; ``None`` for the whole picture.

        Returns:
            One uint8 tensor (3, S, S) per image.

        Raises:
            BadImage: If an image cannot be opened.
        """
        images = [open_image(item) for item in prompt if not is_text(item)]
        if crop_seed is None:
            return [full_image(image, self.side) for image in images]
        return [random_crop(image, self.side, crop_seed + n) for n, image in enumerate(images)]

    def collate(
        self,
        tokens: Sequence[Tokens],
        pixels: Sequence[Sequence[Tensor]],
        padding_side: Literal["left", "right"] = "right",
    ) -> Batch:
        """Pad examples to one length.

        Args:
            tokens: B token lists.
            pixels: For each, its images (3, S, S) uint8.
            padding_side: Where the padding goes; generation needs it on the left.

        Returns:
            The batch, T being the longest example's length and N the most images (at least 1).
        """
        lengths = torch.tensor([len(row.ids) for row in tokens])  # (B,)
        columns = torch.arange(int(lengths.max()))
        if padding_side == "right":
            is_token = columns < lengths[:, None]  # (B, T)
        else:
            is_token = columns >= (columns.numel() - lengths)[:, None]
        input_ids = torch.full(is_token.shape, self.tokenizer.pad_token_id)
        input_ids[is_token] = torch.tensor([i for row in tokens for i in row.ids])

        if self.loss_on == "all":
            is_target = is_token
        else:
            first = torch.tensor([row.first_target for row in tokens])
            position = is_token.cumsum(1) - 1  # of a token within its example
            is_target = is_token & (position >= first[:, None])
        is_target = is_target & ~torch.isin(input_ids, self.never_target)

        most_images = max(1, *(len(row) for row in pixels))
        stacked = torch.zeros(len(tokens), most_images, 3, self.side, self.side, dtype=torch.uint8)
        for b, row in enumerate(pixels):
            for n, image in enumerate(row):
                stacked[b, n] = image
        latest_image = (input_ids == self.image_id).cumsum(1) - 1  # (B, T), -1 before the first
        sees = latest_image[:, :, None] == torch.arange(most_images)  # (B, T, N)
        return Batch(
            input_ids=input_ids,
            attention_mask=is_token.long(),
            labels=input_ids.masked_fill(~is_target, IGNORE),
            pixel_values=stacked,
            image_attention_mask=sees & is_token[:, :, None],
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples, images preprocessed as the checkpoint does."""
        return self.collate(self.tokens(examples), [self.pixels(e.prompt) for e in examples])


class RowReader:
    """Rows as tokens and pixels; every error names the row.

    Args:
        rows: Training or evaluation rows.
        name: What to call them in errors, such as ``train_rows``.
        to_example: The user's conversion of a row, or ``None``.
        collator: Tokenises and prepares images.
    """

    def __init__(
        self, rows: Rows, name: str, to_example: ToExample | None, collator: Collator
    ) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise TypeError(
                f"{name} is a {type(rows).__name__}: expected a sequence of rows with a length, "
                "such as a list or a datasets.Dataset"
            )
        if len(rows) == 0:
            raise ValueError(f"{name} is empty: there is no row to learn or to evaluate")
        self.rows = rows
        self.name = name
        self.to_example = to_example
        self.collator = collator

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, crop_seed: int | None = None) -> tuple[Tokens, list[Tensor]]:
        """Tokens and pixels of one row.

        Raises:
            ValueError: If the row is no valid example (``BadImage`` if an image is the reason).
        """
        with naming_row(f"{self.name}[{index}]"):
            example = as_example(self.rows[index], self.to_example)
            (tokens,) = self.collator.tokens([example])
            return tokens, self.collator.pixels(example.prompt, crop_seed)

    def check(self, indices: Iterable[int]) -> str:
        """Read these rows once, so that a bad one is reported before any training starts.

        Returns:
            The rows' fingerprint: their number, and a hash of what was read.
        """
        digest = hashlib.sha256()
        for index in indices:
            tokens, pixels = self.read(index)
            digest.update(repr((index, tokens)).encode())
            for image in pixels:
                digest.update(image.numpy().tobytes())
        return f"{len(self)} rows, {digest.hexdigest()[:16]}"


class Windows(Dataset[Window]):
    """All windows of a run, by number.

    Rows are drawn epoch after epoch, each in a permutation of its own, without a break between
    epochs: a window at the border holds the last rows of one and the first of the next.

    Args:
        reader: The training rows.
        seed: Seed of the run.
        global_batch_size: Examples per window.
        augment: Whether images are cropped at random.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        seed: int,
        global_batch_size: int,
        augment: bool,
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.augment = augment

    def positions(self, window: int) -> list[tuple[int, int]]:
        """(epoch, row) of each example of a window, in order."""
        first = window * self.global_batch_size
        n = len(self.reader)
        return [
            (i // n, int(epoch_order(self.seed, i // n, n)[i % n]))
            for i in range(first, first + self.global_batch_size)
        ]

    def first_rows(self, number: int) -> list[int]:
        """The first rows of the run in the order of their use, at most ``number`` of them."""
        return [int(row) for row in epoch_order(self.seed, 0, len(self.reader))[:number]]

    def __getitem__(self, window: int) -> Window:
        positions = self.positions(window)
        read = [
            self.reader.read(row, self._crop_seed(epoch, row) if self.augment else None)
            for epoch, row in positions
        ]
        read.sort(key=lambda item: len(item[0].ids), reverse=True)  # stable
        tokens, pixels = zip(*read, strict=True)
        batch = self.reader.collator.collate(tokens, pixels)
        return Window(
            batch=batch,
            rows=tuple(row for _, row in positions),
            lengths=tuple(len(row.ids) for row in tokens),
            images=tuple(len(row) for row in pixels),
            num_targets=batch.num_targets,
        )

    def _crop_seed(self, epoch: int, row: int) -> int:
        return int(np.random.SeedSequence((self.seed, epoch, row)).generate_state(1)[0])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in one epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


class EvalBatches(Dataset[Batch]):
    """The rows in order, ``batch_size`` at a time, images as the checkpoint preprocesses them."""

    def __init__(self, reader: RowReader, batch_size: int) -> None:
        self.reader = reader
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.reader) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        first = index * self.batch_size
        last = min(first + self.batch_size, len(self.reader))
        read = [self.reader.read(row) for row in range(first, last)]
        tokens, pixels = zip(*read, strict=True)
        return self.reader.collator.collate(tokens, pixels)
