"""The architectures of the family with random weights, in 4 bits or 16, built without a download.

Every linear layer is made and quantised on the device, one at a time, so the fp16 model never
exists as a whole. The gates of the cross-attention are set to 1 (``alpha_initializer="ones"``);
closed, as a fresh configuration has them, the images would be without effect. Losses of random
weights mean nothing beyond being finite and falling.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import IdeficsConfig, PretrainedConfig

from idefics_qlora.families import family_of_config
from idefics_qlora.model.precision import set_compute_dtype

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "9b": {
        "vocab_size": 32000,
        "additional_vocab_size": 2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "cross_layer_interval": 4,
        "vision_config": {
            "embed_dim": 1280,
            "image_size": 224,
            "patch_size": 14,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 64,
            "resampler_depth": 6,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "qk_layer_norms_perceiver": True,
        },
    },
    "small": {
        "vocab_size": 1000,
        "additional_vocab_size": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "vision_config": {
            "embed_dim": 128,
            "image_size": 56,
            "patch_size": 14,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
    },
}
ARCHITECTURES["80b"] = {
    **ARCHITECTURES["9b"],
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def configuration(architecture: str) -> IdeficsConfig:
    """The configuration of an architecture of IDEFICS, its gates open."""
    return IdeficsConfig(
        **ARCHITECTURES[architecture],
        use_resampler=True,
        qk_layer_norms=True,
        alpha_type="float",
        alpha_initializer="ones",
    )


def random_4bit_model(config: IdeficsConfig, device: torch.device) -> Any:
    """The model with random weights, NF4 like ``load_model`` makes it, built on the device."""
    return random_model(config, device)


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    *,
    quantize: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Any:
    """A model with random weights as ``load_model`` would leave it, built on the device."""
    family = family_of_config(config)
    with torch.device("meta"):
        model: Any = family.model_class()(config)
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: torch.Size, std: float = 0.02) -> torch.Tensor:
        weight = torch.empty(shape, dtype=dtype, device=device)
        return weight.normal_(std=std, generator=generator)

    for name, module in list(model.named_modules()):
        is_linear = quantize and type(module) is nn.Linear
        if is_linear and not any(part in name for part in family.not_quantized):
            quantised = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            weight = normal(module.weight.shape)
            quantised.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", module=quantised
            ).to(device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised)
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        if "alpha" in child or ("norm" in parent.lower() and child == "weight"):
            value = torch.ones(parameter.shape, dtype=dtype, device=device)
        elif child == "bias":
            value = torch.zeros(parameter.shape, dtype=dtype, device=device)
        else:
            value = normal(parameter.shape)
        setattr(module, child, nn.Parameter(value, requires_grad=False))
    fresh_buffers(model, device)
    # transformers sets this on loading; without it peft takes its adapter for unquantised layers.
    model.is_loaded_in_4bit = quantize
    model.requires_grad_(False)
    set_compute_dtype(model, dtype)
    return model.eval()


def fresh_buffers(model: nn.Module, device: torch.device) -> None:
    """Fill the buffers that ``__init__`` computed on the meta device."""
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.num_positions, device=device)[None]
        if hasattr(module, "inv_freq"):
            inv_freq, _ = module.compute_default_rope_parameters(module.config)
            module.inv_freq = inv_freq.to(device)
            module.original_inv_freq = inv_freq.clone().to(device)
