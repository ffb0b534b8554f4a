"""The loss: over target tokens and all additional tokens, where transformers' own raises."""

import pytest
import torch

from idefics_qlora.data.batches import Collator
from idefics_qlora.model.loss import summed_cross_entropy


def test_the_models_own_loss_raises(base, processor, examples):
    """transformers' loss forgets the additional tokens; when this fails, it was mended."""
    batch = Collator(processor)(examples[:2])
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        base(**batch.inputs(), labels=batch.labels)


def test_loss_equals_pytorchs_over_the_targets():
    """Shifted, in fp32, over the whole decoupled vocabulary, padding left out."""
    logits = torch.randn(2, 5, 12).half()
    labels = torch.tensor([[-100, 3, 11, 10, -100], [-100, -100, 0, -100, -100]])
    expected = torch.stack(
        [
            -logits[b, t - 1].float().log_softmax(0)[labels[b, t]]
            for b in range(2)
            for t in range(1, 5)
            if labels[b, t] != -100
        ]
    ).sum()
    loss = summed_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
