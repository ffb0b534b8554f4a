"""Idefics2: a vision tower for pictures in their own shape, a perceiver, and text layers."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import Idefics2ForConditionalGeneration, PretrainedConfig

from idefics_qlora.families.family import Processor
from idefics_qlora.families.idefics2_reader import Idefics2Reader
from idefics_qlora.families.successor import MAKERS_LORA, Successor


class Idefics2(Successor):
    """Vision tower, projection, perceiver and text layers; tiles are tokens of the text."""

    model_type = "idefics2"
    processor_type = "Idefics2Processor"
    known_bases = "idefics2-8b, idefics2-8b-base, idefics2-8b-chatty"
    parts = ("vision tower", "projection", "perceiver", "text layers")
    makers_lora = MappingProxyType(
        {
            **MAKERS_LORA,
            "target_modules": r".*(text_model|modality_projection|perceiver_resampler).*"
            r"(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj)",
        }
    )

    def model_class(self) -> type[Any]:
        """The class in ``transformers``."""
        return Idefics2ForConditionalGeneration

    def part_of(self, name: str) -> str:
        """The part of the model that a module or parameter of this name belongs to."""
        if "vision_model" in name:
            return "vision tower"
        if "perceiver_resampler" in name:
            return "perceiver"
        return "projection" if "modality_projection" in name else "text layers"

    def tokens_of_a_tile(self, config: PretrainedConfig) -> int:
        """``<image>`` tokens of a tile."""
        return int(config.perceiver_config.resampler_n_latents)

    def connector_products(self, config: PretrainedConfig, patches: int) -> int:
        """The projection of each patch, and the perceiver."""
        text, perceiver = config.text_config, config.perceiver_config
        hidden, latents = text.hidden_size, perceiver.resampler_n_latents
        inner = perceiver.resampler_n_heads * perceiver.resampler_head_dim
        keys_values = 2 * perceiver.num_key_value_heads * perceiver.resampler_head_dim
        projection = text.intermediate_size * (2 * config.vision_config.hidden_size + hidden)
        layer = (
            latents * 2 * hidden * inner  # query and output projections
            + (patches + latents) * hidden * keys_values
            + latents * 12 * hidden**2  # three matrices, four times as wide
        )
        return int(patches * projection + perceiver.resampler_depth * layer)

    def connected(self, connector: Any, features: Tensor) -> Tensor:
        """What the connector makes of the features of tiles of which everything is seen."""
        perceiver, context = connector.perceiver_resampler, connector.modality_projection(features)
        latents = perceiver.latents.expand(len(features), -1, -1)
        for layer in perceiver.layers:
            latents = layer(latents, context)
        normed: Tensor = perceiver.norm(latents)
        return normed

    def why_not(self, config: PretrainedConfig, processor: Processor) -> str:
        """Pictures must have as many tokens as the model's."""
        num_tokens = self.tokens_of_a_tile(config)
        image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        if processor.image_seq_len != num_tokens:
            return f"its tiles have {processor.image_seq_len} tokens, the model's {num_tokens}"
        if image_id != config.image_token_id:
            return f"its image token is {image_id}, the model's {config.image_token_id}"
        return ""

    def set_longest_edge(self, processor: Processor, pixels: int) -> None:
        """Let a processor make the longest side of larger pictures so many pixels."""
        size = processor.image_processor.size
        shortest, longest = int(size["shortest_edge"]), int(size["longest_edge"])
        if not shortest <= pixels <= longest:
            raise ValueError(
                f"longest_edge={pixels}: expected pixels from {shortest}, the shortest edge of a "
                f"picture, to {longest}, as the base has it"
            )
        processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": pixels}

    def reader(self, processor: Processor) -> Idefics2Reader:
        """The family bound to a base's processor."""
        return Idefics2Reader(processor)
