"""Whether a model looks is decided so that it holds over the evaluations of a run."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import config_of, warnings_of

import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.evaluation.image_use import LEAST_GAIN, LEVEL, chance_of
from idefics_qlora.families import FAMILIES

ROWS, EVALUATIONS, RUNS = 64, 50, 1000
NAN3 = (math.nan,) * 3


def row_losses(rng, size):
    """What pictures add to rows' losses, summed over a row: skewed, of very heavy tails, and rows
    differ by orders of magnitude (long texts, hard ones)."""
    scale = rng.lognormal(0.0, 1.5, size=(*size[:-1], 1))  # the row's
    return scale * (rng.pareto(2.5, size=size) + np.abs(rng.standard_t(2, size=size)))


def judged(own, another, tokens):
    """The verdict on rows' summed losses."""
    differences = another - own
    gain = differences.sum() / tokens.sum()
    loss = {"own": own.sum() / tokens.sum(), "another": another.sum() / tokens.sum(), "blank": 0.0}
    interval = (gain, gain, gain)
    return iq.ImageUse(len(own), loss, interval, NAN3, {}, chance_of(differences))


def test_no_false_alarm_in_fifty_evaluations():
    """Of models that do not look fewer than 1 % are called lookers in any of 50 evaluations; by the
    95 % interval that decided before, most would be."""
    rng = np.random.default_rng(0)
    alarms = certain = before = 0
    for _ in range(RUNS):
        tokens = rng.integers(2, 60, size=ROWS)
        # Without looking, a row's own picture is one drawn like any other.
        own, another = np.moveaxis(row_losses(rng, (EVALUATIONS, ROWS, 2)), 2, 0)
        own, another = own + tokens, another + tokens  # the text's own loss: 1 nat a token
        verdicts = [judged(*pair, tokens) for pair in zip(own, another, strict=True)]
        alarms += any(use.looks for use in verdicts)
        certain += any(use.p_value <= LEVEL for use in verdicts)
        differences = another - own
        standard_error = differences.std(axis=1) / ROWS**0.5
        before += bool((differences.mean(axis=1) > 1.96 * standard_error).any())
    assert certain < 0.01 * RUNS  # the level alone, whatever the gain
    assert alarms <= certain
    assert before > 0.5 * RUNS


@pytest.mark.parametrize(
    ("rows", "share", "gain"),
    [(ROWS, 1.0, 0.2), (ROWS, 0.5, 0.5), (256, 0.33, 1.0), (256, 1.0, 0.05)],
)
def test_a_model_that_looks_is_found(rows, share, gain):
    """Whether every row gains a little or a third of them much, amid the same heavy tails."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        tokens = rng.integers(10, 60, size=rows)
        own, another = 0.02 * np.moveaxis(row_losses(rng, (rows, 2)), 1, 0) + tokens
        another = another + gain * tokens * (rng.random(rows) < share)
        found += judged(own, another, tokens).looks
    assert found >= 0.95 * 200


def use_of(gain, p_value, num_rows=64, another=1.0):
    loss = {"own": another - gain[0], "another": another, "blank": another}
    return iq.ImageUse(num_rows, loss, gain, gain, {}, p_value)


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (use_of((0.0009, -0.0002, 0.002), 0.1), "This model does not look"),
        (use_of((0.0009, 0.0002, 0.0016), 0.01), "This model hardly looks"),
        (use_of((0.0009, 0.0007, 0.0011), 1e-9), "This model hardly looks"),
        (use_of((0.019, 0.015, 0.023), 1e-9), "This model hardly looks"),
        (use_of((0.021, 0.015, 0.027), 1e-9), "This model looks"),
        (use_of((0.5, 0.3, 0.7), 1e-3, num_rows=9), "9 rows cannot tell"),
        (use_of((-0.01, -0.1, 0.08), 1.0), "64 rows cannot tell"),
        (use_of((0.011, 0.008, 0.013), 1e-9, another=0.3), "This model looks"),
    ],
)
def test_the_verdict_fits_the_numbers(use, verdict):
    """A gain needs to be certain and to matter; the smallest that does is named."""
    assert str(use).startswith(f"{verdict}")
    assert use.looks == verdict.endswith("model looks")
    least = f"a gain counts from {max(LEAST_GAIN, 0.02 * use.loss['another']):+.4f} on"
    assert (least in str(use)) != use.looks


def test_few_rows_cannot_tell():
    """However large the gains: fourteen rows cannot reach the level, fifteen can."""
    assert chance_of(np.ones(14)) > LEVEL > chance_of(np.ones(15))
    assert chance_of(np.zeros(64)) == 1.0
    assert chance_of(-np.ones(64)) == 1.0


@pytest.fixture(scope="session")
def taught(loaded, tmp_path_factory):
    """A tiny model that has begun to read cards, and held-out cards."""
    base, processor = loaded
    model = iq.add_lora(copy.deepcopy(base))
    config = iq.TrainConfig(
        output_dir=tmp_path_factory.mktemp("taught"),
        max_steps=24,
        global_batch_size=16,
        micro_batch_size=16,
        learning_rate=8e-3,
        load_best_model_at_end=False,
        num_workers=0,
    )
    torch.manual_seed(0)
    cards = iq.tiny.creature_cards(400, seed=0)
    iq.train(model, processor, cards, config=config, to_example=pokemon_card_example)
    return model, processor, iq.tiny.creature_cards(24, seed=1, split="held_out")


def test_a_model_that_looks(taught):
    """Its loss is lower with the own picture, beyond the interval; its texts read the picture."""
    model, processor, cards = taught
    before = torch.get_rng_state()
    use = iq.image_use(
        model, processor, cards, to_example=pokemon_card_example, fields=iq.tiny.card_fields
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert use.looks
    assert use.num_rows == 24
    assert use.loss["own"] < min(use.loss["another"], use.loss["blank"])
    assert 0 < use.gain[1] < use.gain[0] < use.gain[2]
    assert use.gain[0] == pytest.approx(use.loss["another"] - use.loss["own"], rel=1e-6)
    texts = iq.generate(model, processor, [pokemon_card_example(card).prompt for card in cards])
    right = [
        iq.tiny.card_fields(text).get("name") == card["name"]
        for text, card in zip(texts, cards, strict=True)
    ]
    assert use.fields["name"]["own"] == pytest.approx(sum(right) / len(right))
    assert use.fields.keys() == iq.tiny.FIELDS.keys()
    assert str(use).startswith("This model looks at the pictures")
    again = iq.image_use(model, processor, cards, to_example=pokemon_card_example)
    assert again.gain == use.gain
    other = iq.image_use(model, processor, cards, to_example=pokemon_card_example, seed=1)
    assert other.loss["own"] == use.loss["own"]
    assert other.gain != use.gain


def test_a_model_that_does_not_look(taught, tmp_path, caplog):
    """With its pictures hidden from the text it answers as well with any: said in a sentence."""
    model, processor, cards = taught
    blind = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "alpha" in name:  # the gates of the cross-attention
                parameter.zero_()
    use = iq.image_use(blind, processor, cards, to_example=pokemon_card_example)
    assert not use.looks
    assert use.gain[0] == pytest.approx(0.0, abs=1e-6)
    assert str(use).startswith("This model does not look at the pictures")
    config = config_of(
        tmp_path,
        eval_image_use=True,
        eval_steps=2,
        global_batch_size=4,
        allow_dead_parts=FAMILIES["idefics"].parts,
        max_steps=2,
    )
    result = iq.train(
        blind, processor, cards, cards[:4], config=config, to_example=pokemon_card_example
    )
    (record,) = [r for r in result.log_history if "eval_loss" in r]
    assert record["eval_looks"] == 0.0
    assert record["eval_loss_another_image"] == pytest.approx(record["eval_loss"], rel=1e-5)
    assert any("does not look at the pictures" in text for text in warnings_of(caplog))


def test_a_model_that_all_but_ignores_pictures(taught):
    """Gates nearly shut: a gain above its 95 % interval's zero, and yet too little to matter."""
    model, processor, cards = taught
    dim = copy.deepcopy(model)
    for name, parameter in dim.named_parameters():
        if "alpha" in name:
            parameter.data *= 0.003
    use = iq.image_use(dim, processor, cards, to_example=pokemon_card_example)
    assert use.gain[1] > 0
    assert not use.looks
    assert str(use).startswith("This model hardly looks at the pictures")


def test_rows_that_share_a_picture_are_one_witness(taught):
    """Four pictures asked about eight times each tell no more than four rows do."""
    model, processor, cards = taught
    use = iq.image_use(model, processor, cards[:4] * 8, to_example=pokemon_card_example)
    assert use.num_rows == 32
    assert use.gain[1] > 0.1
    assert str(use).startswith("32 rows cannot tell")


def test_pictures_are_needed_to_tell(base, processor, examples):
    """Fewer than two rows with pictures cannot be compared."""
    rows = [examples[0], iq.Example(["What?"], " Nothing.")]
    with pytest.raises(ValueError, match="1 of 2 rows have a picture: expected two or more"):
        iq.image_use(base, processor, rows)


def test_rows_with_several_pictures_are_exchanged(base, processor, examples, picture):
    """A row keeps its number of pictures, all of them from other rows."""
    rows = [
        iq.Example([examples[0].prompt[0], picture, "Two?"], " Yes."),
        examples[1],
        iq.Example(["None?"], " No."),
    ]
    assert iq.image_use(base, processor, rows).num_rows == 2


def test_rows_that_share_a_picture_get_others(base, processor, examples, picture):
    """Several questions about one picture are not exchanged among themselves."""
    shared = [iq.Example([picture, f"Question {i}?"], " Yes.") for i in range(3)]
    use = iq.image_use(base, processor, [*shared, examples[0]])
    assert use.gain[0] != 0.0
    with pytest.raises(ValueError, match="all rows show the same pictures"):
        iq.image_use(base, processor, shared)
