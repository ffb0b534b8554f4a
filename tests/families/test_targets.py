"""Logits are computed for targets alone, and the loss is the model's own."""

import copy

import pytest
import torch
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.families import family_of
from idefics_qlora.model.loss import predictions, summed_cross_entropy


@pytest.fixture
def rows(cards, examples):
    """Of different lengths; two pictures, one, none."""
    wide = cards[1]["image"].resize((200, 60))
    return [
        *examples[:3],
        iq.Example([wide, examples[3].prompt[0], "Which is wider?"], " The first."),
        iq.Example(["Is there a picture?"], " No."),
    ]


@pytest.fixture
def lora(base):
    """In fp32, its adapters not zero."""
    model = iq.add_lora(base).float()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_the_loss_is_the_models_own(lora, processor, rows, loss_on):
    """Value and gradient, though the model's own has logits for every token."""
    batch = Collator(processor, loss_on)(rows)
    model_loss = lora(**batch.inputs(), labels=batch.labels, use_cache=False).loss
    theirs = gradients(lora, model_loss)
    ours = predictions(lora, batch).summed() / batch.num_targets
    torch.testing.assert_close(ours, model_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(lora, ours), theirs, rtol=1e-4, atol=1e-6)
    by_example = predictions(lora, batch).by_example(len(rows))
    for n, row in enumerate(rows):
        alone = Collator(processor, loss_on)([row])
        logits = lora(**alone.inputs(), use_cache=False).logits
        expected = summed_cross_entropy(logits, alone.labels)
        torch.testing.assert_close(by_example[n], expected, rtol=1e-4, atol=1e-4)


def test_everything_that_wants_a_loss_has_few_logits(lora, processor, rows, tmp_path):
    """Training layer by layer, evaluation and image use: a row for each target, and no other."""
    rows, seen = rows[:4], []
    head = lora.get_base_model().lm_head
    watched = head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1]))
    batch = Collator(processor)(rows)
    targets = int((batch.labels != IGNORE).sum())
    iq.evaluate(lora, processor, rows, batch_size=4)
    assert seen == [(targets,)]
    seen.clear()
    iq.image_use(lora, processor, rows, batch_size=4)
    assert seen == [(targets,)] * 3
    seen.clear()
    iq.train(
        *(lora, processor, rows),
        config=config_of(
            tmp_path, max_steps=1, global_batch_size=4, micro_batch_size=4, fast=False
        ),
    )
    assert seen == [(targets,)]
    watched.remove()
    assert not head._forward_pre_hooks


def test_what_is_hooked_on_the_model_runs(lora, processor, rows):
    """The pass is the model's own call."""
    batch, seen = Collator(processor)(rows), []
    base = lora.get_base_model()
    base.register_forward_hook(lambda _, __, output: seen.append(len(output.logits)))
    predictions(lora, batch)
    assert seen == [batch.num_targets]


def test_idefics_computes_as_it_did(loaded, examples):
    """The first of the family keeps all logits, and so its loss to the bit."""
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    batch = Collator(processor)(examples[:3])
    with torch.no_grad():
        logits = model(**batch.inputs(), use_cache=False).logits
        found = predictions(model, batch)
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.summed(), summed_cross_entropy(logits, batch.labels))
    each = [
        summed_cross_entropy(a[None], b[None]) for a, b in zip(logits, batch.labels, strict=True)
    ]
    assert torch.equal(found.by_example(3), torch.stack(each))


def test_the_estimate_counts_logits_of_what_can_be_a_target(successor, monkeypatch):
    """Tokens of tiles never are."""
    config = successor[0].config
    family = family_of(successor[0])
    assert family.most_targets(config, 100, 5) == 100 - 5 * 4

    def kept():
        settings = {"text_tokens": 100, "images": 5, "fast": False, "precision": "fp32"}
        return iq.estimate_memory(config, **settings).kept.per_example

    few = kept()
    monkeypatch.setattr(type(family), "head_on_targets", False)
    assert kept() - few == 4 * family.vocabulary(config) * 5 * 4
