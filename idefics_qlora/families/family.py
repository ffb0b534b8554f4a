"""The seam between kinds of models: what differs between them, and nothing else.

A :class:`Family` is facts and functions of an architecture. Bound to a base's processor it is a
:class:`Reader`, which knows how texts and images become that base's tokens and pixels.

Shapes: B examples, T tokens, N images per example, S the side in pixels of the model's square.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from idefics_qlora.config import Precision

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

Model: TypeAlias = "PreTrainedModel | PeftModel"
"""The base, or the base with an adapter."""

Processor: TypeAlias = Any
"""The base's processor; its call signature is not used here."""


class Piece(NamedTuple):
    """A piece of an example's text: data, or a control token that data must not forge."""

    text: str
    is_target: bool = False
    is_control: bool = False


class Said(NamedTuple):
    """A turn of a dialogue, in the words of this module."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: tuple[Any, ...]
    """Texts and images in reading order; what is no string is an image."""
    is_target: bool = False


class Vision(ABC):
    """The images of a batch as the model takes them: tensors that begin with B."""

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""

    @abstractmethod
    def part(self, examples: slice, num_tokens: int, num_images: int) -> Vision:
        """Some of the examples, cut to their first tokens and images."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> Vision:
        """The same with every tensor changed: moved to a device, or into page-locked memory."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The batch's own tensors by name, as a dump of a window holds them."""

    @abstractmethod
    def sees(self) -> Tensor:
        """(B, T, N) bool: which images a token attends to."""

    @abstractmethod
    def image(self, example: int, number: int) -> Tensor:
        """(3, H, W) uint8: an image as the model sees it, before it is normalised."""

    def described(self, example: int, number: int) -> str:
        """What an image is cut into, in words; empty where it stays whole."""
        return ""


class Reader(ABC):
    """How one base's processor writes texts and reads images.

    Attributes:
        tokenizer: The processor's.
        begin: Token with which a text begins; empty if there is none.
        image_token: Stands for an image in a text, until the image is there; one for each.
        image_tokens: Tokens that only images have: never a target, never generated.
        control_tokens: Tokens with a meaning of their own, which no text may forge.
        end_tokens: End an answer: that of a sequence, and of a turn where the base has one.
        side: S; where images are cut into tiles, the longest side that a picture is resized to.
        splits: Whether pictures are cut into tiles.
    """

    tokenizer: Any
    begin: str
    image_token: str
    image_tokens: tuple[str, ...]
    control_tokens: frozenset[str]
    end_tokens: tuple[str, ...]
    side: int
    splits: bool = False

    @property
    def longest_edge(self) -> int:
        """What ``longest_edge`` of ``load_model`` would have to be for the processor as it is."""
        return self.side

    @abstractmethod
    def interleaved(self, items: Sequence[Any], completion: str = "") -> list[Piece]:
        """Texts and images in reading order, and what shall follow, written out."""

    @abstractmethod
    def dialogue(self, turns: Sequence[Said], completion: str) -> list[Piece]:
        """A dialogue up to the completion, written out with its begin token.

        An empty completion stands for the prompt.
        """

    @abstractmethod
    def pixels(self, image: Image.Image, crop_seed: int | None) -> Tensor:
        """(3, H, W) uint8 of an RGB picture: whole, or cropped as the seed says.

        H and W do not depend on the crop; they are S where the model sees squares.
        """

    @abstractmethod
    def image_token_ids(self, pixels: Tensor) -> list[int]:
        """The tokens that an image, as :meth:`pixels` gave it, has in a text."""

    @abstractmethod
    def num_tiles(self, pixels: Tensor) -> int:
        """How many squares the vision tower sees of an image, as :meth:`pixels` gave it."""

    @abstractmethod
    def blank(self, pixels: Tensor) -> Tensor:
        """uint8: a picture like another of which nothing can be read, about 0 when normalised."""

    @abstractmethod
    def vision(
        self, input_ids: Tensor, is_token: Tensor, pixels: Sequence[Sequence[Tensor]]
    ) -> Vision:
        """The images of a batch.

        Args:
            input_ids: (B, T) int64.
            is_token: (B, T) bool, False on padding.
            pixels: For each example its images, as :meth:`pixels` gave them.
        """


class Family(ABC):
    """What differs between architectures.

    Attributes:
        model_type: As in a base's ``config.json``.
        processor_type: Name of the processor's class in ``transformers``.
        known_bases: Some of them, for messages.
        parts: Parts of the model that have adapters of their own, the text's last.
        not_quantized: Linear layers that stay in the compute dtype.
        lora_targets: Modules that get adapters by default.
        makers_lora: Arguments of the ``peft.LoraConfig`` that the makers published for fine-tuning;
            ``None`` if there is none.
        precision: What the makers trained in.
        head_on_targets: Whether the model's own pass computes logits for targets alone.
    """

    model_type: str
    processor_type: str
    known_bases: str
    parts: tuple[str, ...]
    not_quantized: tuple[str, ...]
    lora_targets: tuple[str, ...]
    makers_lora: Mapping[str, Any] | None = None
    precision: Precision = "bf16"
    head_on_targets: bool = True

    @property
    def text_part(self) -> str:
        """The part that learns from texts without images as well."""
        return self.parts[-1]

    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """The class in ``transformers``."""

    @abstractmethod
    def part_of(self, name: str) -> str:
        """The part of the model that a module or parameter of this name belongs to."""

    @abstractmethod
    def num_embeddings(self, model: Model) -> int:
        """Token ids that a model can embed."""

    @abstractmethod
    def vocabulary(self, config: PretrainedConfig) -> int:
        """V, the classes of the model's logits."""

    def most_targets(self, config: PretrainedConfig, num_tokens: int, num_images: int) -> int:
        """How many of an example's tokens can be targets at most.

        Args:
            config: The base model's configuration.
            num_tokens: Text tokens, those of images included.
            num_images: Images, or tiles.
        """
        return num_tokens

    @abstractmethod
    def training_flops(self, config: PretrainedConfig, num_tokens: int, num_images: int) -> float:
        """Floating-point operations of forward and backward over a frozen base.

        Args:
            config: The base model's configuration.
            num_tokens: Text tokens.
            num_images: Images.
        """

    @abstractmethod
    def traced_inputs(
        self,
        config: PretrainedConfig,
        micro_batch: int,
        text_tokens: int,
        images: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Arguments of :meth:`traced_forward`, without data."""

    def traced_forward(self, model: PeftModel, inputs: dict[str, Tensor]) -> Any:
        """A training's forward pass that depends on no data; what it returns holds the graph."""
        return model(**inputs, use_cache=False)

    def why_not(self, config: PretrainedConfig, processor: Processor) -> str:
        """Why a processor of this family is not that of a model of it; empty if it can be."""
        return ""

    def mend(self, model: PreTrainedModel) -> None:  # noqa: B027  # most need nothing
        """Put right what versions of ``transformers`` get wrong, in a base that was just loaded."""

    def set_longest_edge(self, processor: Processor, pixels: int) -> None:
        """Let a processor make the longest side of pictures so many pixels.

        Raises:
            ValueError: If pictures of this family have one size.
        """
        raise ValueError(
            f"longest_edge={pixels}: pictures of {self.model_type!r} models have one size; leave "
            "it out"
        )

    def set_image_splitting(self, processor: Processor, splits: bool) -> None:
        """Let a processor cut pictures into tiles, or leave them whole.

        Raises:
            ValueError: If pictures of this family are always whole.
        """
        raise ValueError(
            f"image_splitting={splits}: pictures of {self.model_type!r} models are always whole; "
            "leave it out"
        )

    @abstractmethod
    def reader(self, processor: Processor) -> Reader:
        """The family bound to a base's processor.

        Raises:
            ValueError: If it is the processor of another family.
        """


def check_processor(processor: Any) -> None:
    """See that this is a processor of images and texts.

    Raises:
        TypeError: If it is something else.
    """
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise TypeError(
            f"processor is of type {type(processor).__name__}: expected the processor, the second "
            "of the two that load_model returns"
        )
