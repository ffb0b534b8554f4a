"""Batches: examples as the tensors that the model takes.

More than 400 lines: a batch, and the one class that makes it.

Shapes: B examples, T tokens, N images per example, S the side in pixels of the model's square.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise, repeat
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idefics_qlora.config import LossOn, check_choice
from idefics_qlora.data.example import (
    Example,
    PromptItem,
    Turn,
    prompt_images,
)
from idefics_qlora.families import family_of_processor
from idefics_qlora.families.family import Piece, Said, Vision
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.images.kept import Kept
from idefics_qlora.images.opening import open_image, opening_for

IGNORE = -100
"""Label of a token that is no target (the default ``ignore_index`` of PyTorch's cross-entropy)."""


@dataclass(frozen=True)
class Batch:
    """Examples padded to one length, as the model takes them."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64, 0 on padding."""
    labels: Tensor
    """(B, T) int64, the token itself where it is a target, else -100."""
    vision: Vision
    """The examples' images."""

    @property
    def num_targets(self) -> int:
        """Target tokens; call it before the batch goes to the GPU, there it would wait for it."""
        return int((self.labels != IGNORE).sum())

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward; images become normalised float32."""
        texts = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return texts | self.vision.inputs()

    def tensors(self) -> dict[str, Tensor]:
        """The batch's own tensors by name."""
        names = ("input_ids", "attention_mask", "labels")
        return {name: getattr(self, name) for name in names} | self.vision.tensors()

    def part(self, examples: slice, num_tokens: int, num_images: int) -> Batch:
        """Some of the examples, cut to their first tokens and images (right padding only)."""
        return Batch(
            input_ids=self.input_ids[examples, :num_tokens],
            attention_mask=self.attention_mask[examples, :num_tokens],
            labels=self.labels[examples, :num_tokens],
            vision=self.vision.part(examples, num_tokens, num_images),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; from pinned memory the copies do not wait."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (a ``DataLoader`` calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.input_ids),
            change(self.attention_mask),
            change(self.labels),
            self.vision.map(change),
        )


@dataclass(frozen=True)
class Tokens:
    """One example's text as token ids, and which of them are to be learnt."""

    ids: list[int]
    is_target: list[bool]
    images: tuple[tuple[int, int], ...] = ()
    """Where the tokens of each image begin and end."""

    def is_beside_images(self) -> np.ndarray:
        """(T,) bool: which tokens are not those of an image."""
        is_text = np.ones(len(self.ids), dtype=bool)
        for start, end in self.images:
            is_text[start:end] = False
        return is_text


class Collator:
    """Turns examples into a :class:`Batch`; owns how images, texts and turns interleave.

    The text of an example is the begin token, then its items in order, each image and each dialogue
    written as the base's :class:`~idefics_qlora.families.family.Reader` knows it. How many tokens
    an image has may depend on its size, so :meth:`placed` puts them in when it is there. Equal to
    the processor's own reading of prompts, a hundred times faster on the image mask, and it cannot
    put an image behind its question.

    Targets are the completion and the end token, in a dialogue also the turns that are targets,
    each with its own end token (``loss_on="completion"``), or all text (``"all"``).
    Padding, image tokens and the begin token are never targets.

    Args:
        processor: The base's processor.
        loss_on: Which text tokens are targets.
        num_embeddings: Rows of the model's embedding, additional ones included; ids at or above it
            are an error here instead of a device assert later. ``None``: not checked.
        max_length: Text tokens of an example at most, image tokens included. A longer example
            loses the end of its completion, with the end token; in a dialogue, later turns and
            their images first. ``None``: no limit.
        access: What pictures are opened with.
        kept: Decoded pictures, looked up before one is decoded.
    """

    def __init__(
        self,
        processor: Any,
        loss_on: LossOn = "completion",
        num_embeddings: int | None = None,
        max_length: int | None = None,
        access: ImageAccess = DEFAULT_ACCESS,
        kept: Kept | None = None,
    ) -> None:
        check_choice("loss_on", loss_on, LossOn)
        self.reader = family_of_processor(processor).reader(processor)
        self.tokenizer = self.reader.tokenizer
        self.loss_on = loss_on
        self.num_embeddings = num_embeddings
        self.max_length = max_length
        self.access = access
        self.kept = kept
        ids_of = self.tokenizer.convert_tokens_to_ids
        self.image_id = ids_of(self.reader.image_token)
        self.image_ids: list[int] = ids_of(list(self.reader.image_tokens))
        self.never_target = torch.tensor(
            [
                *self.image_ids,
                *[self.tokenizer.bos_token_id] * (self.tokenizer.bos_token is not None),
            ]
        )
        self.end_ids: list[int] = ids_of(list(self.reader.end_tokens))
        # Added tokens that are not special are words of the vocabulary: data may hold them.
        tokens = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {*self.reader.control_tokens, *self.tokenizer.all_special_tokens}
        self.control_ids = set(ids_of(sorted(tokens)))
        self.control_ids -= {self.tokenizer.unk_token_id}  # what text becomes without a token
        # What in a text would be read as a control token.
        self.forged = re.compile("|".join(re.escape(t) for t in tokens if re.match(r"\S\S+$", t)))

    def tokens(self, examples: Sequence[Example]) -> list[Tokens]:
        """Token ids of examples, with the end token appended, cut to ``max_length``.

        Raises:
            ValueError: If an id lies beyond the model's embedding, or a prompt leaves no room for
                the completion within ``max_length``.
        """
        pieces = [self._pieces(example.prompt, example.completion) for example in examples]
        tokens = []
        for example, row in zip(examples, self._encode(pieces), strict=True):
            is_dialogue = isinstance(example.prompt[0], Turn)
            end = self.end_ids[-1 if is_dialogue else 0]
            whole = Tokens([*row.ids, end], [*row.is_target, True], row.images)
            tokens.append(self.shortened(whole))
        return tokens

    def prompt_tokens(self, prompts: Sequence[Sequence[PromptItem]]) -> list[Tokens]:
        """Token ids of prompts alone, as generation needs them."""
        return self._encode([self._pieces(prompt) for prompt in prompts])

    def _pieces(self, prompt: Sequence[PromptItem], completion: str = "") -> list[Piece]:
        """The text of an example without its end token, or of a prompt alone."""
        turns = [item for item in prompt if isinstance(item, Turn)]
        if turns:
            said = [Said(turn.role, tuple(turn.content), turn.is_target) for turn in turns]
            return self._harmless(self.reader.dialogue(said, completion))
        begin = Piece(self.reader.begin, is_control=True)
        if completion:
            # The spaces stripped from the prompt's end belong to the completion: tokens of this
            # family carry the space before a word, and generation sees the prompt without.
            last = prompt[-1]
            spaces = len(last) - len(last.rstrip(" ")) if isinstance(last, str) else 0
            completion = " " * spaces + completion
        pieces = [begin] * bool(begin.text) + self.reader.interleaved(prompt, completion)
        return self._harmless(pieces)

    def _harmless(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with no control token in the data: a literal ``<image>`` gets a space."""
        harmless: list[Piece] = []
        for is_control, run in groupby(pieces, lambda piece: piece.is_control):
            if is_control:
                harmless += run
                continue
            # A run of data as a whole, for two harmless texts may form a token where they meet. A
            # space behind its first character breaks a token; the next may overlap with it.
            data = list(run)
            text = "".join(piece.text for piece in data)
            at, spaces = 0, []
            while found := self.forged.search(text, at):
                at = found.start() + 1
                spaces.append(at)
            first = 0
            for piece in data:
                last = first + len(piece.text)
                borders = [first, *(at for at in spaces if first < at < last), last]
                parts = [text[i:j] for i, j in pairwise(borders)]
                space = " " if first in spaces and first < last else ""
                harmless.append(piece._replace(text=space + " ".join(parts)))
                first = last
        return harmless

    def _encode(self, rows: Sequence[Sequence[Piece]]) -> list[Tokens]:
        # Where a token stands in the text matters only for targets; without, it is twice as fast.
        has_targets = any(piece.is_target for pieces in rows for piece in pieces)
        encoded = self.tokenizer(
            ["".join(piece.text for piece in pieces) for pieces in rows],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=has_targets,
        )
        every_span = encoded["offset_mapping"] if has_targets else repeat(())
        tokens = []
        for pieces, ids, spans in zip(rows, encoded["input_ids"], every_span, strict=False):
            largest = max(ids)
            if self.num_embeddings is not None and largest >= self.num_embeddings:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                raise ValueError(
                    f"token {token!r} has id {largest}, but the model embeds only ids below "
                    f"{self.num_embeddings}: use the processor of the same base as the model"
                )
            control = [piece.text for piece in pieces if piece.is_control]
            found = [i for i in ids if i in self.control_ids]
            if found != self.tokenizer.convert_tokens_to_ids(control):
                names = self.tokenizer.convert_ids_to_tokens(found)
                raise ValueError(
                    f"the text would be read as the control tokens {names}, where {control} are "
                    "meant: remove them from the text"
                )
            images = tuple((n, n + 1) for n, i in enumerate(ids) if i == self.image_id)
            if not has_targets:
                tokens.append(Tokens(ids, [False] * len(ids), images))
                continue
            # A token that spans a border is learnt: the model has to say it.
            learnt = [piece.is_target for piece in pieces for _ in piece.text]
            is_target = [any(learnt[start : max(end, start + 1)]) for start, end in spans]
            tokens.append(Tokens(ids, is_target, images))
        return tokens

    def placed(self, tokens: Tokens, pixels: Sequence[Tensor]) -> Tokens:
        """The tokens with those of these images at the places of their images.

        Args:
            tokens: With an image token for each image, or with the tokens of other images.
            pixels: As many images as there are places.
        """
        ids: list[int] = []
        is_target: list[bool] = []
        images: list[tuple[int, int]] = []
        done = 0
        for (start, end), image in zip(tokens.images, pixels, strict=True):
            ids += tokens.ids[done:start]
            is_target += tokens.is_target[done:start]
            own = self.reader.image_token_ids(image)
            images.append((len(ids), len(ids) + len(own)))
            ids += own
            is_target += [False] * len(own)
            done = end
        return Tokens(ids + tokens.ids[done:], is_target + tokens.is_target[done:], tuple(images))

    def shortened(self, tokens: Tokens) -> Tokens:
        """The tokens cut to ``max_length``, never within an image.

        Raises:
            ValueError: If the prompt leaves no room for the completion.
        """
        if self.max_length is None or len(tokens.ids) <= self.max_length:
            return tokens
        # Up to a token that is learnt, so that nothing the model does not have to say, such as an
        # image's tokens, is cut in two or stands at the end in vain.
        kept = self.max_length
        while kept and not tokens.is_target[kept - 1]:
            kept -= 1
        if not kept:
            prompt = tokens.is_target.index(True)
            raise ValueError(
                f"the prompt has {prompt} tokens, image tokens included, so that within "
                f"max_length={self.max_length} nothing is left for the completion's "
                f"{sum(tokens.is_target)}: shorten the prompt, raise max_length, or remove the row"
            )
        images = tuple(image for image in tokens.images if image[1] <= kept)
        return Tokens(tokens.ids[:kept], tokens.is_target[:kept], images)

    def pixels(
        self,
        prompt: Sequence[PromptItem],
        crop_seed: int | None = None,
        tokens: Tokens | None = None,
    ) -> list[Tensor]:
        """The prompt's images as the model sees them.

        Args:
            prompt: Items of an example's prompt.
            crop_seed: Seed of the random crops of training; ``None`` for the whole picture.
            tokens: The example's tokens; images that ``max_length`` cut off are left out.

        Returns:
            One uint8 tensor (3, H, W) per image; (3, S, S) where the model sees squares.

        Raises:
            BadImage: If an image cannot be opened.
        """
        return self.squares(self.pictures(prompt, tokens), crop_seed)

    def pictures(
        self, prompt: Sequence[PromptItem], tokens: Tokens | None = None
    ) -> list[Image.Image]:
        """The prompt's images as RGB pictures; otherwise as :meth:`pixels`."""
        number = None if tokens is None else len(tokens.images)
        with self.opening():
            return [open_image(item, self.access) for item in prompt_images(prompt)[:number]]

    @contextmanager
    def decoding_all(self) -> Iterator[None]:
        """Let nothing that is kept be used in this block, so that its time is that of decoding."""
        kept, self.kept = self.kept, None
        try:
            yield
        finally:
            self.kept = kept

    def opening(self) -> AbstractContextManager[None]:
        """Lets pictures opened in this block be meant for the model, wherever that is done."""
        return opening_for(self.reader.side, self.kept)

    def squares(self, pictures: Sequence[Image.Image], crop_seed: int | None) -> list[Tensor]:
        """RGB pictures as the model sees them; otherwise as :meth:`pixels`."""
        seeds = [None if crop_seed is None else crop_seed + n for n in range(len(pictures))]
        return [self.reader.pixels(*pair) for pair in zip(pictures, seeds, strict=True)]

    def collate(
        self,
        tokens: Sequence[Tokens],
        pixels: Sequence[Sequence[Tensor]],
        padding_side: Literal["left", "right"] = "right",
    ) -> Batch:
        """Pad examples to one length.

        Args:
            tokens: B token lists, images placed.
            pixels: For each, its images (3, H, W) uint8.
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
        ids = np.concatenate([np.array(row.ids, dtype=np.int64) for row in tokens])
        input_ids[is_token] = torch.from_numpy(ids)

        if self.loss_on == "all":
            targets = np.concatenate([row.is_beside_images() for row in tokens])
        else:
            targets = np.concatenate([np.array(row.is_target, dtype=bool) for row in tokens])
        is_target = torch.zeros_like(is_token)
        is_target[is_token] = torch.from_numpy(targets)
        is_target &= ~torch.isin(input_ids, self.never_target)
        is_target &= is_token.cumsum(1) > 1  # nothing predicts the first

        return Batch(
            input_ids=input_ids,
            attention_mask=is_token.long(),
            labels=input_ids.masked_fill(~is_target, IGNORE),
            vision=self.reader.vision(input_ids, is_token, pixels),
        )

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples, images preprocessed as the base does."""
        read = []
        for example, tokens in zip(examples, self.tokens(examples), strict=True):
            pixels = self.pixels(example.prompt, tokens=tokens)
            tokens = self.shortened(self.placed(tokens, pixels))
            read.append((tokens, pixels[: len(tokens.images)]))
        placed, images = zip(*read, strict=True)
        return self.collate(placed, images)
