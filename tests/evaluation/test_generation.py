"""Texts from a model."""

from pathlib import Path

import pytest
import torch
from helpers import every_family
from PIL import Image

import idefics_qlora as iq
from idefics_qlora.families.idefics import AROUND_IMAGE, IMAGE_TOKEN
from idefics_qlora.model.precision import set_compute_dtype

QUESTION = "Question: What's on the picture? Answer:"


@every_family
def test_batches_give_what_single_prompts_give(base, processor, picture, cards):
    """Left padding, several images, text alone and text before images do not disturb each other."""
    set_compute_dtype(base, torch.float32)  # rounding in fp16 could turn a near tie
    image = cards[0]["image"]
    prompts = [
        [picture, QUESTION],
        ["A long text before the picture. It goes on.", image, "What?"],
        [picture, image, "Which one is"],
        ["No picture at all"],
        [image, "A"],
    ]
    together = iq.generate(base, processor, prompts, max_new_tokens=10)
    alone = [iq.generate(base, processor, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert together == alone
    assert together == iq.generate(base, processor, prompts, max_new_tokens=10, batch_size=2)


def test_only_the_new_text_unless_asked(base, processor, picture):
    """The prompt is not repeated; return_full_text gives it too, without image tokens."""
    prompt = [picture, "A picture of"]
    new = iq.generate(base, processor, [prompt], max_new_tokens=6)[0]
    full = iq.generate(base, processor, [prompt], max_new_tokens=6, return_full_text=True)[0]
    assert full.strip().startswith("A picture of")
    assert full.endswith(new)
    assert IMAGE_TOKEN not in full


def test_image_tokens_are_never_produced(base, processor, picture):
    """Even a model that wants nothing but image tokens writes none."""
    ids = processor.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, AROUND_IMAGE])

    def wants_images(module, inputs, logits):
        logits[..., ids] = 1e4
        return logits

    base.lm_head.register_forward_hook(wants_images)
    produced = []
    base.register_forward_hook(lambda m, i, out: produced.append(out.logits.argmax(-1)))
    text = iq.generate(base, processor, [[picture, QUESTION]], max_new_tokens=5)[0]
    assert all(torch.isin(p, torch.tensor(ids)).all() for p in produced)  # it did want them
    encoded = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(encoded)
    assert IMAGE_TOKEN not in text


@every_family
def test_it_stops_at_the_end_token(base, processor, picture):
    """A model that says the end token says nothing more."""
    end = processor.tokenizer.eos_token_id
    calls = []

    def ends(module, inputs, logits):
        calls.append(1)
        logits[..., end] = 1e4
        return logits

    base.lm_head.register_forward_hook(ends)
    assert iq.generate(base, processor, [[picture, QUESTION]], max_new_tokens=50) == [""]
    assert len(calls) == 1


def test_an_answer_ends_with_its_utterance(base, instruct_processor, picture):
    """Chat messages are prompts, and an -instruct base stops where the turn ends."""
    end = instruct_processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    prompts = []

    def ends(module, inputs, logits):
        prompts.append(logits.shape)
        logits[..., end] = 1e4
        return logits

    base.lm_head.register_forward_hook(ends)
    image = {"type": "image", "image": picture}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    assert iq.generate(base, instruct_processor, [messages], max_new_tokens=9) == [""]
    assert len(prompts) == 1


def test_greedy_unless_asked(base, processor, picture):
    """The same prompt gives the same text; sampling is an option of transformers' generate."""
    prompt = [[picture, QUESTION]]
    texts = {iq.generate(base, processor, prompt, max_new_tokens=8)[0] for _ in range(2)}
    assert len(texts) == 1
    sampled = {
        iq.generate(base, processor, prompt, max_new_tokens=8, do_sample=True, temperature=5.0)[0]
        for _ in range(4)
    }
    assert len(sampled) > 1


def test_modes_are_restored(lora, processor, picture):
    """Generating in the middle of training does not switch dropout off."""
    lora.train()
    modes = [module.training for module in lora.modules()]
    iq.generate(lora, processor, [[picture, QUESTION]], max_new_tokens=2)
    assert [module.training for module in lora.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["What?", ["fine"]], r"prompts\[0\]: prompt='What\?': expected a list"),
        ([Image.new("RGB", (9, 9)), "What?"], r"one alone is passed as \[\[image, "),
        (["a.png", Path("b.png")], r"prompts=\['a.png', \.\.\.\]: pictures alone are rows, \["),
        ([Image.new("RGB", (9, 9))], r"prompts=\[<PIL.*>\]: pictures alone are rows, \[\{"),
        (
            [{"file_name": "a.png"}],
            r"rows\[0\]: .* no picture: did you mean `image` for `file_name`\?",
        ),
        ([["fine"], []], r"prompts\[1\]: prompt=\[\] is empty"),
        ([[{"path": "no.png"}]], r"'no.png' of prompts\[0\]: there is no such file"),
    ],
)
def test_bad_prompts_are_named(base, processor, prompts, message):
    """The error says which prompt."""
    with pytest.raises(ValueError, match=message):
        iq.generate(base, processor, prompts)


@pytest.mark.parametrize(
    ("rows", "way"),
    [
        *(
            (one, "one picture: expected a list of rows")
            for one in ("a.png", Path("a.png"), b"png")
        ),
        (Image.new("RGB", (9, 9)), "one picture: expected a list of rows"),
        ({"image": "a.png"}, "one row: put it into a list"),
        ({"file_name": "a.png"}, "one row: put it into a list"),
    ],
)
def test_a_single_picture_is_no_rows(base, processor, rows, way):
    """The way to pass one is named."""
    with pytest.raises(TypeError, match=f"prompts=.* is {way}"):
        iq.generate(base, processor, rows)


def test_a_question_is_no_option(base, processor, picture):
    """It would reach transformers, whose error does not say where a question stands."""
    with pytest.raises(TypeError, match=r"question='What.*\{\"image\": \.\.\., \"question\": "):
        iq.generate(base, processor, [{"image": picture}], question="What?")


@pytest.mark.parametrize("rows", ["photos", Path("photos")])
def test_a_path_is_no_rows(base, processor, rows):
    """Its letters are not taken for rows; what reads a folder is named."""
    for use in (iq.evaluate, iq.generate):
        with pytest.raises(TypeError, match="=.*photos.*: expected a list of rows .* by load_rows"):
            use(base, processor, rows)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
    ],
)
def test_there_is_one_text_per_prompt(base, processor, options):
    """More texts than prompts would be taken for those of others; the way to have them is told."""
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: generate returns one text per prompt"):
        iq.generate(base, processor, [["What?"], ["And?"]], **options)
    texts = iq.generate(
        base,
        processor,
        [["What?"], ["And?"]],
        max_new_tokens=2,
        num_return_sequences=1,
        return_dict_in_generate=None,
    )
    assert len(texts) == 2


def test_the_models_own_settings_change_no_numbers(base, processor):
    """A checkpoint's generation_config may ask for what generate does not return."""
    base.generation_config.return_dict_in_generate = True
    base.generation_config.num_return_sequences = 2
    base.generation_config.do_sample = True
    assert len(iq.generate(base, processor, [["What?"], ["And?"]], max_new_tokens=2)) == 2


@pytest.mark.parametrize("numbers", [{"batch_size": 0}, {"max_new_tokens": 0}])
def test_numbers_are_checked(base, processor, numbers):
    """The error names the argument."""
    (name,) = numbers
    with pytest.raises(ValueError, match=f"{name}=0: expected a whole number of at least 1"):
        iq.generate(base, processor, [["What?"]], **numbers)
