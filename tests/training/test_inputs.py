"""What a run is given is checked before anything is changed or written."""

import pytest
from helpers import config_of, same
from steps import snapshot

import idefics_qlora as iq
from idefics_qlora.model.adapters import trainable_parameters


def test_never_refuses_to_overwrite(lora, processor, examples, tmp_path):
    """resume="never" keeps an earlier run from being mixed up with a new one."""
    config = config_of(tmp_path, max_steps=1, resume="never")
    iq.train(lora, processor, examples, config=config)
    with pytest.raises(ValueError, match="checkpoint-1 exists: choose another output_dir"):
        iq.train(lora, processor, examples, config=config)


def bad_image(examples):
    return [*examples[:3], iq.Example([{"path": "no/such.png"}, "What?"], " x")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda examples: [], "train_rows is empty"),
        (lambda examples: [*examples[:2], {"text": 1}], r"train_rows\[2\]: .*no known format"),
        (bad_image, r"'no/such.png' of train_rows\[3\]: there is no such file"),
    ],
)
def test_bad_rows_stop_before_training(lora, processor, examples, tmp_path, rows, message):
    """Nothing is trained and nothing written when a row is bad."""
    before = snapshot(lora)
    with pytest.raises(ValueError, match=message):
        iq.train(lora, processor, rows(examples), config=config_of(tmp_path / "run"))
    assert same(snapshot(lora), before)
    assert not (tmp_path / "run").exists()


def test_bad_evaluation_rows_stop_before_training(lora, processor, examples, tmp_path):
    """A bad held-out row is found now, not at the first evaluation."""
    with pytest.raises(ValueError, match=r"eval_rows\[1\]"):
        iq.train(
            lora, processor, examples, [examples[0], 3],
            config=config_of(tmp_path, on_bad_row="raise"),
        )  # fmt: skip


def test_the_best_needs_evaluation_rows(lora, processor, examples, tmp_path):
    """load_best_model_at_end without evaluation rows cannot work, and says so."""
    config = config_of(tmp_path, load_best_model_at_end=True, save_steps=20)
    with pytest.raises(ValueError, match="needs held-out rows.*eval_steps=20"):
        iq.train(lora, processor, examples, config=config)


def test_warm_up_fits_the_epochs(lora, processor, examples, tmp_path):
    """A warm-up longer than the steps that the epochs come to is refused."""
    config = config_of(tmp_path, max_steps=None, warmup_steps=6)
    with pytest.raises(ValueError, match="warmup_steps=6 is more than the 5 steps"):
        iq.train(lora, processor, examples, config=config)


def test_a_model_without_adapters_is_refused(base, processor, examples, tmp_path):
    """Forgetting add_lora, or fp16 adapters, is said before anything else happens."""
    with pytest.raises(ValueError, match="call add_lora"):
        iq.train(base, processor, examples, config=config_of(tmp_path))
    model = iq.add_lora(base)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.half()
    with pytest.raises(ValueError, match=r"is torch\.float16: expected float32"):
        iq.train(model, processor, examples, config=config_of(tmp_path))
