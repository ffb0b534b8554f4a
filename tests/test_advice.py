"""Errors and warnings advise on the command line what a command takes."""

import logging

import pytest

from idefics_qlora import cli
from idefics_qlora.advice import in_options, telling_in_options

TRAIN = ("model.base", "model.quantize", "model.base_weights", "train.load_best_model_at_end")
TRAIN += ("data.train", "data.eval", "data.answer", "data.image", "data.access.draft", "metrics")
TRAIN += ("data.access.allow_private_hosts", "data.access.max_bytes", "train.eval_steps", "adapter")
TRAIN += ("train.num_workers", "train.precision", "output", "question", "data.question")


@pytest.mark.parametrize(
    ("told", "in_words"),
    [
        (
            "needs eval_rows (every eval_steps=20 steps), but there are none: pass eval_rows, or "
            "set load_best_model_at_end=False",
            "needs data.eval (every train.eval_steps=20 steps), but there are none: pass "
            "--data.eval, or set --train.load_best_model_at_end false",
        ),
        (
            "data.train[0]: no known format; otherwise pass to_example=idefics_qlora.Captions("
            'answer=" {your_column}") or a function of your own',
            'data.train[0]: no known format; otherwise pass --data.answer " {your_column}"',
        ),
        (
            'pass to_example=idefics_qlora.Captions(image="picture_column", answer=" {text}")',
            'pass --data.image "picture_column" --data.answer " {text}"',
        ),
        (
            "the row has ['a']: pass image=its picture column",
            "the row has ['a']: pass --data.image its picture column",
        ),
        (
            "host is private: pass access=ImageAccess(allow_private_hosts=True) to train, "
            "evaluate, generate or open_image if you trust",
            "host is private: pass --data.access.allow_private_hosts true if you trust",
        ),
        ("more (ImageAccess.max_bytes)", "more (data.access.max_bytes)"),
        (
            "are in 4 bits: load the base with quantize=False, as an argument of load_model or "
            "load_finetuned",
            "are in 4 bits: load the base with --model.quantize false",
        ),
        (
            "it works with load_model(..., quantize=False)",
            "it works with --model.quantize false",
        ),
        (
            "load_model(compute_dtype=torch.bfloat16) and precision='bf16'",
            "train.precision='bf16'",
        ),
        ("pass the right one as base=...", "pass the right one as --model.base ..."),
        (
            "holds an adapter: load both with load_finetuned",
            "holds an adapter: pass it as --adapter",
        ),
        (
            "eval_rows[3]: image='a.png' question='' ?revision=3",
            "data.eval[3]: image='a.png' question='' ?revision=3",
        ),
        (
            "nothing: for 'eval_cider' pass metrics={'cider': iq.metrics.cider_d}; there are",
            "nothing: for 'eval_cider' pass --metrics cider; there are",
        ),
        ("command line: metrics='x': expected", None),
        ("train.eval_steps=3: expected", None),
        ("train: eval_steps=3: expected", "train.eval_steps=3: expected"),
        ("indices=[0, 77]: expected", "--rows [0, 77]: expected"),
        ("say it with question='Why?'", None),
    ],
)
def test_arguments_become_options(told, in_words):
    """As an option where something is advised, by its name in a file where it is stated; columns of
    rows, and what is said of options already, stay."""
    assert in_options(told, TRAIN) == (told if in_words is None else in_words)


def test_a_command_without_sections_has_its_own():
    """`push` and `merge` take each argument as an option of its name; a value may need quotes."""
    options = cli._options("push")
    assert in_options("public: pass private=False if so", options) == (
        "public: pass --private false if so"
    )
    assert in_options("pass base='its/hub-id', or merge", options) == (
        "pass --base its/hub-id, or merge"
    )
    assert in_options("it is, base='a b'", options) == "it is, --base 'a b'"
    assert in_options("repo_id='x': expected a name", options) == "repo_id='x': expected a name"
    assert in_options("text_tokens=0", cli._options("memory")) == "--text-tokens 0"


def test_warnings_and_errors_are_told_alike(caplog):
    """In a command also the library's warnings and what it raises speak so, and nobody else's."""

    def failing():
        with telling_in_options(lambda: ["private"]):
            logging.getLogger("idefics_qlora.data").warning("pass %s", "private=False")
            logging.getLogger("another").warning("pass private=False")
            raise ValueError("set private=False")

    with pytest.raises(ValueError, match=r"^set --private false$"):
        failing()
    assert [record.getMessage() for record in caplog.records] == [
        "pass --private false",
        "pass private=False",
    ]
