"""Idefics3 and SmolVLM (v1 and 2): a vision tower whose tiles are tokens of the text."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    Idefics3ForConditionalGeneration,
    PretrainedConfig,
    SmolVLMForConditionalGeneration,
)

from idefics_qlora.families.family import Family, Model, Processor
from idefics_qlora.families.tiles import LARGEST_SIDE, Idefics3Reader

if TYPE_CHECKING:
    from peft import PeftModel


class Idefics3(Family):
    """Vision tower, connector and text layers; tiles are tokens of the text."""

    model_type = "idefics3"
    processor_type = "Idefics3Processor"
    known_bases = "Idefics3-8B-Llama3, SmolVLM-Instruct, SmolVLM-256M-Instruct, ..."
    parts = ("vision tower", "connector", "text layers")
    not_quantized = ("lm_head", "embed_tokens")
    lora_targets = ("q_proj", "k_proj", "v_proj")
    makers_lora = MappingProxyType(
        {
            "r": 8,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "init_lora_weights": "gaussian",
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

    def num_embeddings(self, model: Model) -> int:
        """Token ids that a model can embed."""
        return int(model.get_input_embeddings().num_embeddings)

    def vocabulary(self, config: PretrainedConfig) -> int:
        """V, the classes of the model's logits."""
        return int(config.text_config.vocab_size)

    def most_targets(self, config: PretrainedConfig, num_tokens: int, num_images: int) -> int:
        """Tokens that are no tile's."""
        return max(1, num_tokens - num_images * self._tokens_of_a_tile(config))

    def _tokens_of_a_tile(self, config: PretrainedConfig) -> int:
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size // config.scale_factor) ** 2)

    def training_flops(self, config: PretrainedConfig, num_tokens: int, num_images: int) -> float:
        """Floating-point operations of forward and backward over a frozen base.

        Counted as for IDEFICS; ``num_images`` are tiles, and ``num_tokens`` has theirs.
        """
        text, vision = config.text_config, config.vision_config
        hidden, width = text.hidden_size, vision.hidden_size
        head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        attention = 2 * hidden * head * (text.num_attention_heads + text.num_key_value_heads)
        mlp = 3 * hidden * text.intermediate_size
        per_token = text.num_hidden_layers * (attention + mlp) + hidden * text.vocab_size
        patches = (vision.image_size // vision.patch_size) ** 2
        per_tile = patches * (
            vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
            + width * hidden  # the connector: fewer and wider tokens
        )
        return 4.0 * (per_token * num_tokens + per_tile * num_images)

    def traced_inputs(
        self,
        config: PretrainedConfig,
        micro_batch: int,
        text_tokens: int,
        images: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Tiles, and a text in which they have no place yet; ``images`` are tiles."""
        side, hidden = config.vision_config.image_size, config.text_config.hidden_size
        return {
            "pixel_values": torch.empty(micro_batch * images, 3, side, side, dtype=dtype),
            "inputs_embeds": torch.empty(micro_batch, text_tokens, hidden, dtype=dtype),
        }

    def traced_forward(self, model: PeftModel, inputs: dict[str, Tensor]) -> Any:
        """The model's parts one after the other.

        Its own forward looks for padding among the tiles and for the places of their features,
        which without data cannot be.
        """
        base = model.get_base_model()
        vision = base.model.vision_model
        tiles = inputs["pixel_values"]
        side = vision.embeddings.num_patches_per_side
        seen = torch.ones(len(tiles), side, side, dtype=torch.bool)
        embedded = vision.embeddings(pixel_values=tiles, patch_attention_mask=seen)
        encoded = vision.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
        features = base.model.connector(vision.post_layernorm(encoded)).flatten(0, 1)
        texts = inputs["inputs_embeds"]
        num_places = texts.shape[0] * texts.shape[1]
        # A copy of the texts with features at some places, as the model makes it.
        merged = torch.cat([features, texts.flatten(0, 1)])[:num_places].view_as(texts)
        output = base.model.text_model(inputs_embeds=merged.to(texts.dtype), use_cache=False)
        return base.lm_head(output.last_hidden_state)

    def why_not(self, config: PretrainedConfig, processor: Processor) -> str:
        """Tiles must be as large, and have as many tokens, as the model's."""
        vision = config.vision_config
        num_tokens = self._tokens_of_a_tile(config)
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
