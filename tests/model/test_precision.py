"""Dtypes of a run, and the same gradients whether activations are kept or recomputed."""

import pytest
import torch
from gradients import backward, open_adapters, parts_with_gradient

from idefics_qlora.data.batches import Collator
from idefics_qlora.model.precision import (
    compute_dtype,
    set_activation_checkpointing,
    set_compute_dtype,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compute_dtype_can_change(lora, dtype):
    """A run in bf16 or fp32 casts the frozen parts; the adapter stays fp32."""
    set_compute_dtype(lora, dtype)
    assert compute_dtype(lora) == dtype
    dtypes = {p.dtype for p in lora.parameters() if not p.requires_grad}
    assert dtypes == {dtype, torch.uint8}
    assert all(p.dtype == torch.float32 for p in lora.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_adapter_gets_a_gradient(lora, processor, examples, checkpointing, dtype):
    """Vision, perceiver, cross-attention and text all learn, also when layers are recomputed."""
    open_adapters(lora)
    set_compute_dtype(lora, dtype)
    set_activation_checkpointing(lora, checkpointing)
    lora.train()
    backward(lora, Collator(processor)(examples[:2]), dtype)
    for part, (with_gradient, all_of_them) in parts_with_gradient(lora).items():
        assert with_gradient == all_of_them > 0, part


def test_recomputing_activations_changes_no_gradient(lora, processor, examples):
    """Activation checkpointing trades time for memory and nothing else, dropout included."""
    open_adapters(lora)
    set_compute_dtype(lora, torch.float32)
    lora.train()
    batch = Collator(processor)(examples[:2])

    def gradients(recompute, seed):
        set_activation_checkpointing(lora, recompute)
        lora.zero_grad()
        torch.manual_seed(seed)
        backward(lora, batch)
        return [p.grad.clone() for p in lora.parameters() if p.requires_grad]

    kept, recomputed, control = gradients(False, 1), gradients(True, 1), gradients(True, 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, control, strict=True))
