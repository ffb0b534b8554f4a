"""The published bases: their configurations, written down here so that nothing is downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from random_model import ARCHITECTURES
from transformers import (
    Idefics2Config,
    Idefics3Config,
    IdeficsConfig,
    PretrainedConfig,
    SmolVLMConfig,
)

IDEFICS = {"use_resampler": True, "qk_layer_norms": True, "alpha_type": "float"}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
BASE_16 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 512,
}
PERCEIVER = {
    "hidden_size": 4096,
    "rms_norm_eps": 1e-5,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
}


def text(model_type: str, *sizes: int) -> dict[str, Any]:
    """Text layers: vocabulary, width, that of an MLP, layers, heads, heads of keys and values."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads"),
    )
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True))}


class Base(NamedTuple):
    """A published base."""

    config_class: type[PretrainedConfig]
    settings: dict[str, Any]
    parameters: int
    """Without adapters."""
    default_lora: int
    """Trainable parameters of ``add_lora(model)``."""
    makers_lora: int | None
    """Those of ``add_lora(model, "makers")``."""

    def configuration(self) -> PretrainedConfig:
        """A new one."""
        return self.config_class(**self.settings, tie_word_embeddings=False)


PUBLISHED: dict[str, Base] = {
    "HuggingFaceM4/idefics-9b": Base(
        IdeficsConfig,
        {**ARCHITECTURES["9b"], **IDEFICS},
        *(8_929_679_632, 19_750_912, None),
    ),
    "HuggingFaceM4/idefics-80b": Base(
        IdeficsConfig,
        {**ARCHITECTURES["80b"], **IDEFICS},
        *(79_967_843_624, 78_962_688, None),
    ),
    "HuggingFaceM4/idefics2-8b": Base(
        Idefics2Config,
        {
            "vision_config": {**SO400M, "image_size": 980},
            "perceiver_config": PERCEIVER,
            "text_config": text("mistral", 32003, 4096, 14336, 32, 32, 8),
        },
        *(8_402_768_112, 13_123_584, 23_326_720),
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": Base(
        Idefics3Config,
        {
            "vision_config": {**SO400M, "image_size": 364},
            "scale_factor": 2,
            "text_config": text("llama", 128259, 4096, 14336, 32, 32, 8),
        },
        *(8_462_086_384, 12_423_168, 22_464_512),
    ),
    "HuggingFaceTB/SmolVLM-Instruct": Base(
        Idefics3Config,
        {
            "vision_config": {**SO400M, "image_size": 384},
            "scale_factor": 3,
            "text_config": text("llama", 49155, 2048, 8192, 24, 32, 32),
        },
        *(2_246_272_880, 7_704_576, 10_536_960),
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": Base(
        SmolVLMConfig,
        {
            "vision_config": {**SO400M, "image_size": 384},
            "scale_factor": 3,
            "text_config": text("llama", 49280, 2048, 8192, 24, 32, 32),
        },
        *(2_246_784_880, 7_704_576, 10_536_960),
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": Base(
        SmolVLMConfig,
        {
            "vision_config": BASE_16,
            "scale_factor": 4,
            "text_config": text("llama", 49280, 960, 2560, 32, 15, 5),
        },
        *(507_482_304, 3_178_496, 4_784_128),
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Base(
        Idefics3Config,
        {
            "vision_config": BASE_16,
            "scale_factor": 4,
            "text_config": text("llama", 49280, 576, 1536, 30, 9, 3),
        },
        *(256_484_928, 2_174_976, 2_884_608),
    ),
}
"""By Hub id."""
