"""Micro-batches and models for the tests of the fast path, on a CPU and on a GPU."""

import torch
from peft import LoraConfig
from torch import nn

import idefics_qlora as iq
from idefics_qlora.data.batches import Batch, Collator
from idefics_qlora.model.precision import DTYPES, set_compute_dtype
from idefics_qlora.model.shapes import shape_of

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


def text_model_of(base):
    """What has the decoder's layers."""
    return getattr(base.model, "text_model", base.model)


def lengths_of(batch: Batch) -> list[int]:
    return batch.attention_mask.sum(1).tolist()


def images_of(batch: Batch) -> list[int]:
    """Of each example; tiles, where images have some."""
    if hasattr(batch.vision, "is_tile"):
        return batch.vision.is_tile.sum(1).tolist()
    return batch.vision.sees().any(1).sum(1).tolist()


def shape_for(path, batch):
    """That a micro-batch has on a GPU."""
    lengths, images = lengths_of(batch), images_of(batch)
    image_tokens = sum(images) * path.architecture.tokens_of_an_image(path.base)
    num_images = path.architecture.num_images(batch.vision, images)
    targets = sum(lengths) - image_tokens
    return shape_of(
        *(len(lengths), sum(lengths), max(lengths), targets, num_images, sum(images), image_tokens)
    )


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_equal(actual, expected, tolerance):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    difference = (actual[1] - expected[1]).norm() / expected[1].norm()
    assert difference < tolerance, difference
