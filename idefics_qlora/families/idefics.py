"""IDEFICS: the first of the family (idefics-9b, idefics-80b, and their -instruct checkpoints)."""

from __future__ import annotations

from transformers import (
    IdeficsConfig,
)

from idefics_qlora.families.family import Model


def part_of(name: str) -> str:
    """The part of the model that a module or parameter of this name belongs to."""
    if "vision_model" in name:
        return "vision tower"
    if "perceiver_resampler" in name:
        return "perceiver"
    return "cross-attention" if "gated_cross_attn_layers" in name else "text layers"


def num_embeddings(model: Model) -> int:
    """Token ids the model can embed: the vocabulary and the additional tokens."""
    embedding = model.get_input_embeddings()
    return int(embedding.num_embeddings + embedding.num_additional_embeddings)


def training_flops(config: IdeficsConfig, num_tokens: int, num_images: int) -> float:
    """Floating-point operations of forward and backward over a frozen base.

    Each weight costs a multiplication and an addition per token in the forward pass, and the same
    again for the activations' gradient; attention scores and the adapter's few operations are left
    out, and nothing is recomputed.

    Args:
        config: The base model's configuration.
        num_tokens: Text tokens.
        num_images: Images.
    """
    hidden, mlp = config.hidden_size, 3 * config.hidden_size * config.intermediate_size
    vision, width = config.vision_config, config.vision_config.embed_dim
    cross_layers = config.num_hidden_layers // config.cross_layer_interval
    per_token = (
        config.num_hidden_layers * (4 * hidden**2 + mlp)
        + cross_layers * (2 * hidden**2 + mlp)
        + hidden * (config.vocab_size + config.additional_vocab_size)
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
        per_image += perceiver.resampler_depth * (queries + keys_values + latents * 8 * width**2)
    per_image += cross_layers * latents * 2 * width * hidden
    return 4.0 * (per_token * num_tokens + per_image * num_images)
