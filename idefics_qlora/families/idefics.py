"""IDEFICS, the first of the family: idefics-9b, idefics-80b and their -instruct bases.

Shapes: B examples, T tokens, N images per example, S the side in pixels of the model's square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from idefics_qlora.families.family import (
    Family,
    Model,
    Piece,
    Processor,
    Reader,
    Said,
    Vision,
)
from idefics_qlora.images.cropping import full_image, random_crop

IMAGE_TOKEN = "<image>"
AROUND_IMAGE = "<fake_token_around_image>"
END_OF_UTTERANCE = "<end_of_utterance>"
"""Ends each turn of a dialogue; only the -instruct bases have it."""


class Idefics(Family):
    """Vision tower, perceiver and text layers with gated cross-attention; a decoupled head."""

    model_type = "idefics"
    processor_type = "IdeficsProcessor"
    known_bases = "idefics-9b, idefics-9b-instruct, idefics-80b, ..."
    parts = ("vision tower", "perceiver", "cross-attention", "text layers")
    not_quantized = ("lm_head", "embed_tokens")
    lora_targets = ("q_proj", "k_proj", "v_proj")
    precision = "fp16"
    head_on_targets = False  # as in version 0.1, to the bit

    def model_class(self) -> type[IdeficsForVisionText2Text]:
        """The class in ``transformers``."""
        return IdeficsForVisionText2Text

    def part_of(self, name: str) -> str:
        """The part of the model that a module or parameter of this name belongs to."""
        if "vision_model" in name:
            return "vision tower"
        if "perceiver_resampler" in name:
            return "perceiver"
        return "cross-attention" if "gated_cross_attn_layers" in name else "text layers"

    def num_embeddings(self, model: Model) -> int:
        """Token ids the model can embed: the vocabulary and the additional tokens."""
        embedding = model.get_input_embeddings()
        return int(embedding.num_embeddings + embedding.num_additional_embeddings)

    def vocabulary(self, config: IdeficsConfig) -> int:
        """V, the additional tokens included."""
        return int(config.vocab_size + config.additional_vocab_size)

    def training_flops(self, config: IdeficsConfig, num_tokens: int, num_images: int) -> float:
        """Floating-point operations of forward and backward over a frozen base.

        Each weight costs a multiplication and an addition per token in the forward pass, and the
        same again for the activations' gradient; attention scores and the adapter's few operations
        are left out, and nothing is recomputed.
        """
        hidden, mlp = config.hidden_size, 3 * config.hidden_size * config.intermediate_size
        vision, width = config.vision_config, config.vision_config.embed_dim
        cross_layers = config.num_hidden_layers // config.cross_layer_interval
        per_token = (
            config.num_hidden_layers * (4 * hidden**2 + mlp)
            + cross_layers * (2 * hidden**2 + mlp)
            + hidden * self.vocabulary(config)
        )
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        per_image = patches * (
            vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
        )
        latents = patches  # without a resampler the text attends to the patches
        if config.use_resampler:
            perceiver = config.perceiver_config
            latents = perceiver.resampler_n_latents
            inner = perceiver.resampler_n_heads * perceiver.resampler_head_dim
            queries = latents * 2 * width * inner  # query and output projections
            keys_values = (patches + latents) * 2 * width * inner
            per_image += perceiver.resampler_depth * (
                queries + keys_values + latents * 8 * width**2
            )
        per_image += cross_layers * latents * 2 * width * hidden
        return 4.0 * (per_token * num_tokens + per_image * num_images)

    def traced_inputs(
        self,
        config: IdeficsConfig,
        micro_batch: int,
        text_tokens: int,
        images: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Arguments of a forward pass without data."""
        side = config.vision_config.image_size
        return {
            # Looking additional tokens up depends on their number, that is, on data.
            "inputs_embeds": torch.empty(micro_batch, text_tokens, config.hidden_size, dtype=dtype),
            "attention_mask": torch.ones(micro_batch, text_tokens, dtype=torch.int64),
            "pixel_values": torch.empty(micro_batch, images, 3, side, side),
            "image_attention_mask": torch.ones(micro_batch, text_tokens, images, dtype=torch.bool),
        }

    def reader(self, processor: Processor) -> IdeficsReader:
        """The family bound to a base's processor."""
        return IdeficsReader(processor)


@dataclass(frozen=True)
class IdeficsVision(Vision):
    """Images beside the text, and which of them each token attends to."""

    pixel_values: Tensor
    """(B, N, 3, S, S) uint8, not normalised; zeros where an example has fewer than N images."""
    image_attention_mask: Tensor
    """(B, T, N) bool: which image a token attends to, the latest one before it."""
    pixel_mean: Tensor
    """(3,) float32, in units of 0..255."""
    pixel_std: Tensor
    """(3,) float32, in units of 0..255."""

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward; images become normalised float32."""
        # The same operations in the same order as the image processor's, so equal to the bit.
        pixels = self.pixel_values.float()
        pixels = (pixels - self.pixel_mean.view(3, 1, 1)) / self.pixel_std.view(3, 1, 1)
        present = self.image_attention_mask.any(dim=1)  # (B, N); images that pad a row stay zero
        return {
            "pixel_values": pixels * present[:, :, None, None, None],
            "image_attention_mask": self.image_attention_mask,
        }

    def part(self, examples: slice, num_tokens: int, num_images: int) -> IdeficsVision:
        """Some of the examples, cut to their first tokens and images."""
        return replace(
            self,
            pixel_values=self.pixel_values[examples, :num_images],
            image_attention_mask=self.image_attention_mask[examples, :num_tokens, :num_images],
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> IdeficsVision:
        """The same with every tensor changed."""
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """Pixels and the mask of images."""
        names = ("pixel_values", "image_attention_mask")
        return {name: getattr(self, name) for name in names}

    def sees(self) -> Tensor:
        """(B, T, N) bool: which images a token attends to."""
        return self.image_attention_mask

    def image(self, example: int, number: int) -> Tensor:
        """(3, S, S) uint8: an image as the model sees it, before it is normalised."""
        return self.pixel_values[example, number]


class IdeficsReader(Reader):
    """Texts and images as ``IdeficsProcessor(text=...)`` reads them.

    An image becomes ``<fake_token_around_image><image><fake_token_around_image>``, adjacent images
    share the token between them.

    A dialogue is written as the base knows it. One whose tokenizer has the token
    ``<end_of_utterance>`` (the -instruct bases) reads
    ``User:<image>What?<end_of_utterance>\\nAssistant: That.<end_of_utterance>``, any other
    ``<image>Question: What? Answer: That.``, with a line for each question.

    Args:
        processor: The base's ``IdeficsProcessor``.

    Raises:
        ValueError: If its tokenizer lacks the image tokens or a begin token.
    """

    image_token = IMAGE_TOKEN
    image_tokens = (IMAGE_TOKEN, AROUND_IMAGE)

    def __init__(self, processor: Processor) -> None:
        self.tokenizer = processor.tokenizer
        ids = self.tokenizer.convert_tokens_to_ids(list(self.image_tokens))
        special = [*ids, self.tokenizer.bos_token_id]
        if self.tokenizer.unk_token_id in special or None in special:
            raise ValueError(
                f"the tokenizer lacks {IMAGE_TOKEN}, {AROUND_IMAGE} or a begin token: "
                "it is not the processor of an IDEFICS model"
            )
        self.begin = self.tokenizer.bos_token
        self.image_ids = ids[:1]
        self.is_instruct = END_OF_UTTERANCE in self.tokenizer.get_added_vocab()
        self.end_tokens = (self.tokenizer.eos_token, END_OF_UTTERANCE)[: 1 + self.is_instruct]
        self.control_tokens = frozenset({IMAGE_TOKEN, AROUND_IMAGE, END_OF_UTTERANCE})
        images = processor.image_processor
        self.side = int(images.size["height"])
        scale = 1 / images.rescale_factor
        self.pixel_mean = torch.tensor(images.image_mean) * scale
        self.pixel_std = torch.tensor(images.image_std) * scale

    def interleaved(self, items: Sequence[Any], completion: str = "") -> list[Piece]:
        """Texts and images in reading order, written out."""
        pieces: list[Piece] = []
        around = Piece(AROUND_IMAGE, is_control=True)
        for item in items:
            if isinstance(item, str):
                pieces.append(Piece(item.strip(" ")))
            else:
                after_image = pieces and pieces[-1] is around
                pieces += [] if after_image else [around]
                pieces += [Piece(IMAGE_TOKEN, is_control=True), around]
        return pieces + [Piece(completion, is_target=True)] * bool(completion)

    def dialogue(self, turns: Sequence[Said], completion: str) -> list[Piece]:
        """A dialogue up to the completion, written out with its begin token."""
        pieces = [Piece(self.begin, is_control=True)]
        answer = (completion.strip(),) if completion else ()
        for n, (role, content, is_target) in enumerate([*turns, Said("assistant", answer, True)]):
            new_line = "\n" if n else ""
            texts = self.interleaved(content)
            if self.is_instruct:
                pieces.append(Piece(f"{new_line}{role.capitalize()}:"))
            elif role == "user":
                # The picture comes before its question, as in the captions.
                images = tuple(takewhile(lambda item: not isinstance(item, str), content))
                texts = self.interleaved(content[len(images) :])
                pieces += [Piece(new_line), *self.interleaved(images)]
                pieces += [Piece("Question:")] if texts else []
            elif role == "assistant":
                after_text = not pieces[-1].is_control
                pieces.append(Piece(" Answer:" if after_text else "Answer:"))
            else:
                pieces.append(Piece(new_line))
            if texts and not texts[0].is_control and pieces[-1].text.endswith(":"):
                pieces.append(Piece(" ", is_target))
            pieces += [piece._replace(is_target=is_target) for piece in texts]
            if self.is_instruct and n < len(turns):
                pieces.append(Piece(END_OF_UTTERANCE, is_target, is_control=True))
        return pieces

    def pixels(self, image: Image.Image, crop_seed: int | None) -> Tensor:
        """(3, S, S) uint8: the picture squashed to the model's square, whole or cropped."""
        if crop_seed is None:
            return full_image(image, self.side)
        return random_crop(image, self.side, crop_seed)

    def image_token_ids(self, pixels: Tensor) -> list[int]:
        """One for each image: what it is made of stands beside the text."""
        return self.image_ids

    def num_tiles(self, pixels: Tensor) -> int:
        """One: an image is a square."""
        return 1

    def blank(self, pixels: Tensor) -> Tensor:
        """(3, S, S) uint8: grey, about 0 when normalised."""
        grey = self.pixel_mean.round().to(torch.uint8)
        return grey[:, None, None].expand(3, self.side, self.side)

    def vision(
        self, input_ids: Tensor, is_token: Tensor, pixels: Sequence[Sequence[Tensor]]
    ) -> IdeficsVision:
        """The images of a batch, N being the most of an example (at least 1)."""
        most_images = max(1, *(len(row) for row in pixels))
        stacked = torch.zeros(len(pixels), most_images, 3, self.side, self.side, dtype=torch.uint8)
        for b, row in enumerate(pixels):
            for n, image in enumerate(row):
                stacked[b, n] = image
        image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        latest_image = (input_ids == image_id).cumsum(1) - 1  # (B, T), -1 before the first
        sees = latest_image[:, :, None] == torch.arange(most_images)  # (B, T, N)
        return IdeficsVision(
            pixel_values=stacked,
            image_attention_mask=sees & is_token[:, :, None],
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )
