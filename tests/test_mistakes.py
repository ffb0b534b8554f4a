"""Mistakes in a call's arguments are told in one line, before anything is computed."""

import pytest
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.evaluation.held_out import FEW_ROWS


def calls(model, processor, rows, tmp_path):
    return {
        "train": lambda: iq.train(model, processor, rows, config=config_of(tmp_path)),
        "evaluate": lambda: iq.evaluate(model, processor, rows),
        "generate": lambda: iq.generate(model, processor, [["What?"]]),
        "image_use": lambda: iq.image_use(model, processor, rows),
    }


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "image_use"])
def test_model_and_processor_are_told_apart(name, lora, processor, examples, tmp_path):
    """Swapped, or the pair of load_model not taken apart."""
    with pytest.raises(TypeError, match="model is of type IdeficsProcessor: .* the model first"):
        calls(processor, lora, examples, tmp_path)[name]()
    with pytest.raises(TypeError, match="model is of type tuple: .*the two that load_model"):
        calls((lora, processor), processor, examples, tmp_path)[name]()
    with pytest.raises(TypeError, match="processor is of type .*Tokenizer.*: expected the proc"):
        calls(lora, processor.tokenizer, examples, tmp_path)[name]()


def test_a_preview_needs_the_processor(lora, examples):
    """The model in its place is told by name."""
    with pytest.raises(TypeError, match="processor is of type PeftModel: expected the processor"):
        iq.preview_batch(lora, examples)


def test_choices_of_an_evaluation_are_checked(base, processor, examples):
    """What is none of the choices is not taken for the default."""
    expected = "loss_on='everything': expected one of completion, all"
    with pytest.raises(ValueError, match=expected):
        iq.evaluate(base, processor, examples, loss_on="everything")
    with pytest.raises(ValueError, match=expected):
        iq.preview_batch(processor, examples, loss_on="everything")
    with pytest.raises(ValueError, match=expected):
        iq.image_use(base, processor, examples, loss_on="everything")
    with pytest.raises(ValueError, match="on_bad_row='ignore': expected one of skip, raise"):
        iq.evaluate(base, processor, examples, on_bad_row="ignore")


def test_bad_rows_are_counted_as_they_are(base, processor, examples):
    """The numbers of the error are those of the rows, whatever share of how many is allowed."""
    bad = [{"no": "format"}] * 10
    with pytest.raises(ValueError, match="^10 of 10 rows seen cannot be read, more than 5%"):
        iq.evaluate(base, processor, bad, batch_size=16)  # it ends with the first of such batches
    with pytest.raises(ValueError, match="^10 of 12 rows seen cannot be read, more than 5%"):
        iq.evaluate(base, processor, [*examples[:2], *bad], batch_size=16)
    few = int(0.05 * FEW_ROWS)
    metrics = iq.evaluate(base, processor, [*examples[:2], *bad[:few]])
    assert metrics["eval_bad_rows"] == few
