"""Idefics3 and SmolVLM (v1 and 2): a vision tower whose tiles are tokens of the text."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import (
    Idefics3ForConditionalGeneration,
    PretrainedConfig,
    SmolVLMForConditionalGeneration,
)

from idefics_qlora.families.family import Processor
from idefics_qlora.families.idefics3_reader import LARGEST_SIDE, Idefics3Reader
from idefics_qlora.families.successor import MAKERS_LORA, Successor


class Idefics3(Successor):
    """Vision tower, connector and text layers; tiles are tokens of the text."""

    model_type = "idefics3"
    processor_type = "Idefics3Processor"
    known_bases = "Idefics3-8B-Llama3, SmolVLM-Instruct, SmolVLM-256M-Instruct, ..."
    parts = ("vision tower", "connector", "text layers")
    makers_lora = MappingProxyType(
        {
            **MAKERS_LORA,
            "target_modules": [
                *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
            ],
        }
    )

    def model_class(self) -> type[Any]:
        """The class in ``transformers``."""
        return Idefics3ForConditionalGeneration

    def part_of(self, name: str) -> str:
        """The part of the model that a module or parameter of this name belongs to."""
        if "vision_model" in name:
            return "vision tower"
        return "connector" if "connector" in name else "text layers"

    def connector_products(self, config: PretrainedConfig, patches: int) -> int:
        """A product with fewer and wider tokens."""
        return int(patches * config.vision_config.hidden_size * config.text_config.hidden_size)

    def tokens_of_a_tile(self, config: PretrainedConfig) -> int:
        """``<image>`` tokens of a tile."""
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size // config.scale_factor) ** 2)

    def connected(self, connector: Any, features: Tensor) -> Tensor:
        """What the connector makes of the features of tiles of which everything is seen."""
        connected: Tensor = connector(features)
        return connected

    def why_not(self, config: PretrainedConfig, processor: Processor) -> str:
        """Tiles must be as large, and have as many tokens, as the model's."""
        vision = config.vision_config
        num_tokens = self.tokens_of_a_tile(config)
        tile = processor.image_processor.max_image_size["longest_edge"]
        image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        if tile != vision.image_size:
            return f"its tiles have {tile} pixels, the model's {vision.image_size}"
        if processor.image_seq_len != num_tokens:
            return f"its tiles have {processor.image_seq_len} tokens, the model's {num_tokens}"
        if image_id != config.image_token_id:
            return f"its image token is {image_id}, the model's {config.image_token_id}"
        return ""

    def set_longest_edge(self, processor: Processor, pixels: int) -> None:
        """Let a processor make the longest side of pictures so many pixels."""
        tile = processor.image_processor.max_image_size["longest_edge"]
        if not tile <= pixels <= LARGEST_SIDE:
            raise ValueError(
                f"longest_edge={pixels}: expected pixels from {tile}, one tile, to {LARGEST_SIDE}, "
                f"best a multiple of {tile}"
            )
        processor.image_processor.size = {"longest_edge": pixels}

    def reader(self, processor: Processor) -> Idefics3Reader:
        """The family bound to a base's processor."""
        return Idefics3Reader(processor)


class SmolVLM(Idefics3):
    """The same under other names: with the same weights it computes the same."""

    model_type = "smolvlm"
    processor_type = "SmolVLMProcessor"
    known_bases = "SmolVLM2-2.2B-Instruct, SmolVLM2-500M-Video-Instruct, ..."

    def model_class(self) -> type[Any]:
        """The class in ``transformers``."""
        return SmolVLMForConditionalGeneration
