"""The gradient of a batch, and which parts of a model it reaches."""

import torch

from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.precision import (
    autocast,
)


def backward(model, batch, dtype=torch.float32):
    """The loss of a batch, its gradients in the model's parameters."""
    with autocast(torch.device("cpu"), dtype):
        logits = model(**batch.inputs(), use_cache=False).logits
    loss = summed_cross_entropy(logits, batch.labels) / batch.num_targets
    loss.backward()
    return loss.detach()


def parts_with_gradient(model):
    """For each part of the model: how many of its LoRA matrices have a non-zero gradient."""
    counts = {"vision": [0, 0], "perceiver": [0, 0], "cross_attn": [0, 0], "self_attn": [0, 0]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(part for part in counts if part in name)
            counts[part][0] += parameter.grad is not None and bool(parameter.grad.any())
            counts[part][1] += 1
    return {part: tuple(count) for part, count in counts.items()}


def open_adapters(model):
    """Give the second LoRA matrices values, so that the first ones get a gradient too."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
