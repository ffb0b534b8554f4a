"""Dtypes: which parameters have which, autocast, and evaluation without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import (
    PeftModel,
)
from torch.nn import Parameter

from idefics_qlora.config import Precision
from idefics_qlora.families.family import Family, Model
from idefics_qlora.model.base_weights import linear4bit_layers

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def default_precision(family: Family, device: torch.device) -> Precision:
    """What a family's makers trained in; fp16 on a GPU whose bf16 is emulated."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "fp16"
    return family.precision


def check_finite(parameters: Mapping[str, Parameter], way_out: str) -> None:
    """See that no weight is NaN or infinite already: no arithmetic could mend it.

    A quantised weight is judged by the numbers it is put together from.

    Args:
        parameters: By name, all on one device.
        way_out: What to do about one that is.

    Raises:
        ValueError: Naming the modules.
    """
    names, extremes = [], []
    for name, parameter in parameters.items():
        numbers = [parameter.detach()]
        if (quantised := getattr(parameter, "quant_state", None)) is not None:
            numbers = [quantised.absmax, quantised.code]
            if quantised.nested:
                numbers = [quantised.offset, quantised.state2.absmax, quantised.code]
        for tensor in numbers:
            if tensor.is_floating_point() and tensor.numel():
                names.append(name)
                extremes.append(torch.stack(tensor.aminmax()).float())  # NaN if one is
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist() if extremes else []  # sync
    bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
    modules = [name.removeprefix("base_model.model.").rpartition(".")[0] for name in bad]
    if modules := list(dict.fromkeys(modules)):
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        raise ValueError(
            f"weights that are NaN or infinite before training: {', '.join(modules[:3])}{more}; "
            f"every loss would be NaN: {way_out}"
        )


def compute_dtype(model: Model) -> torch.dtype:
    """The dtype of the unquantised frozen parts, in which the quantised layers compute as well."""
    # Norms are never quantised; trainable copies (peft's modules_to_save) are fp32 in any case, and
    # so is the weight of a norm whose bias is trained.
    named = dict(model.named_parameters())
    trained = {name.rpartition(".")[0] for name, p in named.items() if p.requires_grad}
    return next(
        p.dtype
        for name, p in named.items()
        if p.dim() == 1 and not p.requires_grad and name.rpartition(".")[0] not in trained
    )


def set_compute_dtype(model: Model, dtype: torch.dtype) -> None:
    """Let the whole frozen base compute in ``dtype``; the adapter stays fp32.

    From fp16 to fp32 nothing is lost; between fp16 and bf16 the unquantised weights are rounded,
    which those of a dequantised base are as well. In fp32 such a base takes twice the memory.
    """
    if compute_dtype(model) == dtype:
        return
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in linear4bit_layers(model).values():
        module.compute_dtype = dtype
        module.weight.quant_state.dtype = dtype  # dequantise straight to it, without a cast


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Automatic mixed precision in ``dtype``; fp32 switches it off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """No gradients, no dropout; afterwards every module is back in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), autocast(next(model.parameters()).device, compute_dtype(model)):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def set_activation_checkpointing(model: PeftModel, enabled: bool) -> None:
    """Recompute layers in the backward pass instead of keeping their activations, or stop that."""
    base = model.get_base_model()
    # transformers renames gradient_checkpointing_* to activation_checkpointing_*.
    prefix = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if enabled:
        # Reentrant checkpointing gives no gradient to layers whose input requires none, which is
        # the whole vision tower.
        before = len(base.get_input_embeddings()._forward_hooks)
        getattr(base, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
        # What transformers hooks on for reentrant checkpointing is of no use here, and with a hook
        # nothing is computed the fast way.
        if not before:
            base.disable_input_require_grads()
    else:
        getattr(base, f"{prefix}_checkpointing_disable")()
