"""The loss on held-out rows, which changes nothing."""

import copy

import pytest
import torch
from helpers import config_of, every_family, same
from steps import snapshot
from torch.nn import functional as F

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator


@every_family
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_evaluating_changes_nothing(base, processor, examples, tmp_path, precision):
    """Train, evaluate, train gives the weights of train, train; dropout goes on where it was."""
    results = []
    for eval_rows in (None, examples[:5]):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(
            tmp_path / str(bool(eval_rows)), precision=precision, eval_steps=1, save_steps=4
        )
        iq.train(model, processor, examples, eval_rows, config=config)
        results.append(snapshot(model))
    assert same(*results)


def test_evaluate_averages_over_tokens(base, processor, examples):
    """The loss is per target token of all rows together, whatever the batch size; modes stay."""
    base.model.vision_model.train()
    modes = [module.training for module in base.modules()]
    losses = [
        iq.evaluate(base, processor, examples[:7], batch_size=size)["eval_loss"] for size in (1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # fp16
    assert [module.training for module in base.modules()] == modes
    batch = Collator(processor)(examples[:1])
    with torch.no_grad():
        logits = base(**batch.inputs()).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    assert iq.evaluate(base, processor, examples[:1])["eval_loss"] == pytest.approx(
        expected.item(), rel=1e-3
    )


def test_evaluating_ends_when_the_rows_are_certainly_bad(base, processor, examples):
    """Not after hours: 4 of 70 are more than 5 %, whatever follows, and nothing after them is
    read; a share that later rows may still mend does not end it."""
    read = []

    class Rows(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rows = Rows([{"image": None, "text": "x"}] * 4 + examples[:1] * 66)
    with pytest.raises(ValueError, match=r"4 of 4 rows seen cannot be read, more than 5%"):
        iq.evaluate(base, processor, rows, batch_size=4)
    assert max(read) < 8
    few = Rows([{"image": None, "text": "x"}] * 3 + examples[:1] * 2)
    assert iq.evaluate(base, processor, few)["eval_bad_rows"] == 3
