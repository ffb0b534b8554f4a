"""Each family learns to read cards, from a base whose weights are random."""

import copy

import pytest
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.families import family_of

CHANCE = 1 / len(iq.tiny.FIELDS["type"])


def asked(cards):
    """Cards as examples: a creature's type is the card's colour."""
    types = [iq.tiny.card_fields(pokemon_card_example(card).completion)["type"] for card in cards]
    return [
        iq.Example([card["image"], "Which type?"], f" {kind}")
        for card, kind in zip(cards, types, strict=True)
    ]


def share_right(model, processor, examples):
    prompts = [example.prompt for example in examples]
    texts = iq.generate(model, processor, prompts, max_new_tokens=4, batch_size=30)
    answers = [example.completion.strip() for example in examples]
    return sum(t.strip() == a for t, a in zip(texts, answers, strict=True)) / len(answers)


@pytest.mark.slow
def test_types_are_read_from_cards_never_seen(successor, tmp_path):
    """All parts trained whole, for forty steps: above 90 % right, and chance with pictures of other
    cards, on which image_use agrees."""
    name = successor[0].name_or_path
    base, processor = iq.load_model(name, device="cpu", quantize=False, longest_edge=64)
    model = iq.add_lora(base, train_parts=family_of(base).parts)
    cards = iq.tiny.creature_cards(192, seed=0)
    held_out = asked(iq.tiny.creature_cards(60, seed=1, split="held_out"))
    assert share_right(model, processor, held_out) < 2 * CHANCE
    config = config_of(
        tmp_path,
        max_steps=40,
        global_batch_size=16,
        micro_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        optim="adamw_torch",
        logging_steps=20,
    )
    iq.train(model, processor, asked(cards), config=config)
    assert share_right(model, processor, held_out) > 0.9
    shuffled = copy.copy(held_out)
    for i, example in enumerate(held_out):
        other = held_out[(i + 23) % len(held_out)]
        shuffled[i] = iq.Example([other.prompt[0], *example.prompt[1:]], example.completion)
    assert share_right(model, processor, shuffled) < 2 * CHANCE
    use = iq.image_use(model, processor, held_out)
    assert use.looks
    assert use.loss["own"] < 0.5 < min(use.loss["another"], use.loss["blank"])
