"""What tells one base model from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

import torch
from peft import (
    PeftModel,
)
from torch import Tensor, nn

from idefics_qlora.families.family import Model
from idefics_qlora.model.precision import compute_dtype


def wrong_shape(model: nn.Module) -> str | None:
    """The first layer whose weight has another shape than the layer, in words.

    ``transformers`` lets weights pass that are quantised while they are loaded.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = (module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            expected = (module.num_embeddings, module.embedding_dim)
        else:
            continue
        found = tuple(getattr(module.weight, "quant_state", module.weight).shape)
        if found != expected:
            return f"{name}.weight has shape {found}, not {expected}"
    return None


def base_fingerprint(model: Model) -> dict[str, str]:
    """What tells one base model from another, whether in 4 bits or not, on whatever device.

    Returns:
        ``architecture``: a hash of the names and shapes of norms and embeddings.
        ``weights``: a hash of the first 256 values of each, as fp32; equal for fp16 and fp32 copies
        of a model. ``rounding``: ``bf16`` values are another rounding and are not compared.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # What an adapter may train is left out: biases, and peft's copies of whole modules.
    parameters = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in base.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    is_bf16 = compute_dtype(model) == torch.bfloat16
    return fingerprint(shapes, lambda name: parameters[name].detach(), is_bf16)


def fingerprint(
    shapes: Mapping[str, tuple[int, ...]], tensor_of: Callable[[str], Tensor], is_bf16: bool
) -> dict[str, str]:
    """:func:`base_fingerprint` of parameters by name, in the model's order.

    Args:
        shapes: Of all parameters.
        tensor_of: Gives a parameter's values.
        is_bf16: Whether they are rounded to bf16.
    """
    # Linear weights are left out: they may be packed, and a GPU packs a little differently.
    sampled = {
        name: shape
        for name, shape in shapes.items()
        if name.endswith("weight") and (len(shape) == 1 or name.endswith("embed_tokens.weight"))
    }
    samples = [tensor_of(name).flatten()[:256].float() for name in sampled]
    weights = torch.cat(samples).cpu().numpy().tobytes()  # sync
    architecture = json.dumps([(name, list(shape)) for name, shape in sampled.items()])
    return {
        "architecture": hashlib.sha256(architecture.encode()).hexdigest()[:16],
        "weights": hashlib.sha256(weights).hexdigest()[:16],
        "rounding": "bf16" if is_bf16 else "none",
    }


def same_base(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two fingerprints can be of one base."""
    if a["rounding"] != b["rounding"]:
        return a["architecture"] == b["architecture"]
    return a == b
