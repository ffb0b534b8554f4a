"""What tells one base model from another."""

from __future__ import annotations

import hashlib
import json

import torch
from peft import (
    PeftModel,
)

from idefics_qlora.families.family import Model
from idefics_qlora.model.precision import compute_dtype


def base_fingerprint(model: Model) -> dict[str, str]:
    """What tells one base model from another, whether in 4 bits or not, on whatever device.

    Returns:
        ``architecture``: a hash of the names and shapes of norms and embeddings.
        ``weights``: a hash of the first 256 values of each, as fp32; equal for fp16 and fp32 copies
        of a model. ``rounding``: ``bf16`` values are another rounding and are not compared.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    shapes, samples = [], []
    for name, parameter in base.named_parameters():
        # Linear weights are left out: they may be packed, and a GPU packs a little differently.
        # So is what an adapter may train: biases, and peft's copies of whole modules.
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        kept = name.endswith("weight") and ".lora_" not in name and ".modules_to_save." not in name
        if kept and (parameter.dim() == 1 or name.endswith("embed_tokens.weight")):
            shapes.append((name, list(parameter.shape)))
            samples.append(parameter.detach().flatten()[:256].float())
    weights = torch.cat(samples).cpu().numpy().tobytes()  # sync
    return {
        "architecture": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "weights": hashlib.sha256(weights).hexdigest()[:16],
        "rounding": "bf16" if compute_dtype(model) == torch.bfloat16 else "none",
    }


def same_base(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two fingerprints can be of one base."""
    if a["rounding"] != b["rounding"]:
        return a["architecture"] == b["architecture"]
    return a == b
