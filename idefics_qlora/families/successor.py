"""What Idefics2, Idefics3 and SmolVLM have in common: images are tokens of the text."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from idefics_qlora.families.family import Family, Model, Processor
from idefics_qlora.families.patches import patches_of, place_exactly

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MAKERS_LORA = MappingProxyType(
    {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}
)
"""What the makers published for all of them, but for the modules."""


class Successor(Family):
    """Vision tower, connector and text layers; tiles are tokens of the text."""

    not_quantized = ("lm_head", "embed_tokens")
    lora_targets = ("q_proj", "k_proj", "v_proj")

    def mend(self, model: PreTrainedModel) -> None:
        """Patches get the places that the vision tower was trained with."""
        place_exactly(model.model.vision_model.embeddings)

    def set_image_splitting(self, processor: Processor, splits: bool) -> None:
        """Let a processor cut pictures into tiles, or leave them whole."""
        processor.image_processor.do_image_splitting = splits

    def num_embeddings(self, model: Model) -> int:
        """Token ids that a model can embed."""
        return int(model.get_input_embeddings().num_embeddings)

    def vocabulary(self, config: PretrainedConfig) -> int:
        """V, the classes of the model's logits."""
        return int(config.text_config.vocab_size)

    def training_flops(self, config: PretrainedConfig, num_tokens: int, num_images: int) -> float:
        """Floating-point operations of forward and backward over a frozen base.

        Counted as for IDEFICS; ``num_images`` are tiles, as large as they may be, and
        ``num_tokens`` has theirs.
        """
        text, vision = config.text_config, config.vision_config
        hidden, width = text.hidden_size, vision.hidden_size
        head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        attention = 2 * hidden * head * (text.num_attention_heads + text.num_key_value_heads)
        mlp = 3 * hidden * text.intermediate_size
        per_token = text.num_hidden_layers * (attention + mlp) + hidden * text.vocab_size
        patches = (vision.image_size // vision.patch_size) ** 2
        per_patch = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
        per_tile = patches * per_patch + self.connector_products(config, patches)
        return 4.0 * (per_token * num_tokens + per_tile * num_images)

    def most_targets(self, config: PretrainedConfig, num_tokens: int, num_images: int) -> int:
        """Tokens that are no tile's."""
        return max(1, num_tokens - num_images * self.tokens_of_a_tile(config))

    @abstractmethod
    def tokens_of_a_tile(self, config: PretrainedConfig) -> int:
        """``<image>`` tokens of a tile."""

    @abstractmethod
    def connector_products(self, config: PretrainedConfig, patches: int) -> int:
        """Multiplications between the vision tower and the text for a tile of so many patches."""

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
        embedded = patches_of(vision.embeddings, tiles, seen)
        encoded = vision.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
        connected = self.connected(base.model.connector, vision.post_layernorm(encoded))
        features = connected.flatten(0, 1)
        texts = inputs["inputs_embeds"]
        num_places = texts.shape[0] * texts.shape[1]
        # A copy of the texts with features at some places, as the model makes it.
        merged = torch.cat([features, texts.flatten(0, 1)])[:num_places].view_as(texts)
        output = base.model.text_model(inputs_embeds=merged.to(texts.dtype), use_cache=False)
        return base.lm_head(output.last_hidden_state)

    @abstractmethod
    def connected(self, connector: Any, features: Tensor) -> Tensor:
        """What the connector makes of the features of tiles of which everything is seen."""
