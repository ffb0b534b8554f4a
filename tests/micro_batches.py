"""Micro-batches and models for the tests of the fast path, on a CPU and on a GPU."""

import torch
from peft import LoraConfig
from torch import nn

import idefics_qlora as iq
from idefics_qlora.data.batches import Batch, Collator
from idefics_qlora.model.precision import DTYPES, set_compute_dtype

QKV = ["q_proj", "k_proj", "v_proj"]


def adapted(base, dropout=0.0, precision="fp32", **changes):
    """The tiny base with adapters that are not zero, in training mode."""
    settings = {"r": 8, "lora_alpha": 16, "lora_dropout": dropout, "target_modules": QKV}
    model = iq.add_lora(base, LoraConfig(**{**settings, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    set_compute_dtype(model, DTYPES[precision])
    return model.train()


def a_batch(processor, cards, images=1, longest=7):
    """Examples of very different lengths, the longest first, with 1 ... ``images`` images each."""
    prompts = [[card["image"]] * (1 + i % images) for i, card in enumerate(cards)]
    examples = [
        iq.Example([*prompt, "Question: What?", "Answer:"], " It is." * (longest - i))
        for i, prompt in enumerate(prompts)
    ]
    return Collator(processor)(examples)


def lengths_of(batch: Batch) -> list[int]:
    return batch.attention_mask.sum(1).tolist()


def images_of(batch: Batch) -> list[int]:
    return batch.vision.sees().any(1).sum(1).tolist()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_equal(actual, expected, tolerance):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    difference = (actual[1] - expected[1]).norm() / expected[1].norm()
    assert difference < tolerance, difference
