"""Texts for rows on a GPU: larger batches while they fit, rows read by processes beside CUDA."""

import pytest
import torch
from helpers import encoded

import idefics_qlora as iq
from idefics_qlora.model.precision import set_compute_dtype

pytestmark = pytest.mark.gpu


def test_batches_grow_and_texts_stay(cards):
    """Doubled while the memory suffices; the texts are those of single rows."""
    model, processor = iq.tiny.load_model(device="cuda:0")
    set_compute_dtype(model, torch.float32)
    rows = [{"image": encoded(card["image"])} for card in cards]
    sizes = []

    def note(module, _, inputs):
        if inputs["input_ids"].shape[1] > 1:  # a batch's first pass reads its prompts
            sizes.append(len(inputs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    texts = iq.generate(model, processor, rows, batch_size="auto", max_new_tokens=8, num_workers=2)
    assert sizes == [8, 16, 16]
    assert texts == iq.generate(model, processor, rows, batch_size=1, max_new_tokens=8)
