"""Texts for rows: as training takes them, any number of them, with bad ones among them."""

import copy
import multiprocessing
from itertools import count, islice

import datasets
import pytest
import torch
from helpers import encoded
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.model.precision import set_compute_dtype


@pytest.fixture
def model(base):
    """In fp32: rounding in fp16 could turn a near tie."""
    set_compute_dtype(base, torch.float32)
    return base


@pytest.fixture
def captions(cards):
    """Twenty rows of a known format, their pictures encoded."""
    return [{"image": encoded(card["image"]), "text": card["name"]} for card in cards[:20]]


@pytest.fixture
def expected(model, processor, captions):
    """What is generated for their prompts, one by one."""
    prompts = [[row["image"], QUESTION] for row in captions]
    return [
        texts for prompt in prompts for texts in iq.generate(model, processor, [prompt], **SHORT)
    ]


SHORT = {"max_new_tokens": 6}


def test_rows_give_what_their_prompts_give(model, processor, captions, expected):
    """Whatever the size of batches, the number of processes, and the kind of the rows."""

    def generated(rows, **options):
        return iq.generate(model, processor, rows, **SHORT, **options)

    assert len(set(expected)) > 1
    assert generated(captions) == expected  # read by processes: there are more than 16
    assert generated(captions, batch_size=3, num_workers=0) == expected
    assert generated(captions, batch_size=16, num_workers=1) == expected
    assert generated(captions, batch_size="auto") == expected
    assert generated(iter(captions)) == expected
    asked = [{"picture": row["image"]} for row in captions]  # no answer at all
    template = iq.Captions(answer=" {text}", image="picture")
    assert generated(asked, to_example=template) == expected
    assert generated(asked, to_example=lambda row: [row["picture"], QUESTION]) == expected
    table = datasets.Dataset.from_list(captions).cast_column("image", datasets.Image())
    assert generated(table) == expected
    assert generated(table.to_iterable_dataset()) == expected
    assert generated(table.to_pandas()) == expected
    assert generated([]) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_has_its_place(model, processor, captions, expected, caplog, num_workers):
    """Skipped, it is `None` there and one line names it; else it raises after the texts before."""
    captions[5]["image"] = b"no picture"
    captions[6] = {"unknown": 1}
    options = {"num_workers": num_workers, "batch_size": 4, **SHORT}
    texts = iq.generate(model, processor, captions, on_bad_row="skip", **options)
    assert texts == [*expected[:5], None, None, *expected[7:]]
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("left out")]
    assert len(told) == 2
    assert "of rows[5]: no format that Pillow reads" in told[0]
    assert "rows[6]: a row with columns ['unknown']" in told[1]
    before = []
    with pytest.raises(iq.BadImage, match=r"of rows\[5\]"):
        before.extend(iq.generate_iter(model, processor, captions, **options))
    assert before == expected[:5]


def test_a_bad_picture_of_a_stream_spoils_its_own_row(model, processor, captions, expected):
    """`datasets` would decode the pictures of a stream outside of any row."""
    captions[1]["image"] = b"no picture"
    table = datasets.Dataset.from_list(captions).cast_column("image", datasets.Image())
    texts = iq.generate(
        model, processor, table.to_iterable_dataset(), on_bad_row="skip", batch_size=2, **SHORT
    )
    assert texts == [expected[0], None, *expected[2:]]


def test_any_number_of_rows(model, processor, captions, expected):
    """An endless iterator is read no further than the texts that were asked for, and one batch."""
    asked = []

    def endless():
        for i in count():
            asked.append(i)
            yield captions[i % 20]

    texts = iq.generate_iter(model, processor, endless(), batch_size=4, **SHORT)
    assert asked == []
    assert list(islice(texts, 10)) == expected[:10]
    assert len(asked) == 12
    texts.close()


def test_an_interrupt_keeps_what_was_given(model, processor, captions, expected):
    """The texts up to there are the caller's; no process that reads stays behind."""
    batches = []

    def interrupts(module, _, inputs):
        batches.append(inputs["input_ids"].shape[1] > 1)  # a batch's first pass reads its prompts
        if sum(batches) == 3:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupts, with_kwargs=True)
    kept = []
    options = {"batch_size": 4, "num_workers": 2, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        kept.extend(iq.generate_iter(model, processor, captions, **options))
    assert kept == expected[:8]
    assert multiprocessing.active_children() == []


def test_a_stream_that_breaks_off(model, processor, captions, expected):
    """The texts before are given; then the row is named, also where bad rows are skipped."""

    def broken():
        yield from captions[:3]
        raise OSError("the connection is gone")

    kept = []
    texts = iq.generate_iter(model, processor, broken(), on_bad_row="skip", batch_size=1, **SHORT)
    with pytest.raises(ValueError, match=r"rows\[3\]: the stream breaks off: OSError: the conn"):
        kept.extend(texts)
    assert kept == expected[:3]


def test_batches_that_do_not_fit_are_halved(model, processor, captions, expected, caplog):
    """With `auto` the same prompts are tried again, and all texts come in order."""
    sizes = []

    def small_memory(module, _, inputs):
        size = len(inputs["input_ids"])
        if inputs["input_ids"].shape[1] > 1:
            sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("injected")

    model.register_forward_pre_hook(small_memory, with_kwargs=True)
    with caplog.at_level("INFO"):
        texts = iq.generate(model, processor, captions, batch_size="auto", **SHORT)
    assert texts == expected
    assert sizes == [8, 4, *[2] * 10]
    assert [r.getMessage() for r in caplog.records if "batches of" in r.getMessage()] == [
        "generating goes on with batches of 4: the memory ended",
        "generating goes on with batches of 2: the memory ended",
    ]
    with pytest.raises(torch.OutOfMemoryError, match=r"lower batch_size \(now 4\) or max_new_tok"):
        iq.generate(model, processor, captions, batch_size=4, **SHORT)


def test_a_batch_of_one_that_does_not_fit(model, processor, captions):
    """There is nothing left to halve: said with what to lower."""

    def no_memory(*_):
        raise torch.OutOfMemoryError("injected")

    model.register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"lower max_new_tokens \(now 6\)"):
        iq.generate(model, processor, captions, batch_size="auto", **SHORT)


def test_odd_texts_are_told_once(model, processor, captions, caplog):
    """A token typed in a question is a likely mistake, in rows as in prompts."""
    rows = [{"image": row["image"], "question": "What </s> is it?"} for row in captions]
    iq.generate(model, processor, rows, **SHORT)
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert told.startswith("rows[0]: '</s>' is typed in the text")


def test_generating_from_rows_changes_no_random_number(lora, processor, captions):
    """Reading in processes draws no seed, so training goes on as if nothing had been generated."""
    before = torch.random.get_rng_state()
    weights = copy.deepcopy(lora.state_dict())
    iq.generate(lora, processor, captions, num_workers=2, **SHORT)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(weights[name], value) for name, value in lora.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "large"}, "batch_size='large': expected a whole number"),
        ({"num_workers": -1}, "num_workers=-1: expected a whole number of at least 0"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore': expected one of skip, raise"),
    ],
)
def test_settings_are_checked_at_once(base, processor, options, message):
    """Not when the first text is asked for."""
    with pytest.raises(ValueError, match=message):
        iq.generate_iter(base, processor, [{"image": Image.new("RGB", (9, 9))}], **options)
