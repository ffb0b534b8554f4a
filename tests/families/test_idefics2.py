"""What is peculiar to Idefics2: pictures in their own shape, quarters, words behind images."""

import copy

import pytest
import torch
from pictures import painted
from tokenizers import Tokenizer
from transformers import Idefics2Processor, PreTrainedTokenizerFast

import idefics_qlora as iq
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.rows import RowReader
from idefics_qlora.model.precision import set_compute_dtype

pytestmark = pytest.mark.parametrize("family", ["idefics2"], indirect=True)


def read(collator, prompts, padding_side="right"):
    pixels = [collator.pixels(prompt) for prompt in prompts]
    tokens = map(collator.placed, collator.prompt_tokens(prompts), pixels)
    return collator.collate(list(tokens), pixels, padding_side)


@pytest.mark.parametrize(("split", "expected"), [(False, 66), (True, 326)])
def test_published_sizes_equal_the_processors(processor, split, expected):
    """With edges of 378 to 980 pixels; 66 tokens for an image, 326 with its quarters."""
    images = processor.image_processor
    processor.image_seq_len, images.do_image_splitting = 64, split
    images.size = {"shortest_edge": 378, "longest_edge": 980}
    pictures = [painted(*shape) for shape in ((640, 480), (50, 300), (1500, 1100), (2100, 500))]
    for picture in pictures:
        batch = read(Collator(processor), [[picture]])
        theirs = processor(text=["<image>"], images=[[picture]], return_tensors="pt")
        begin = 1
        assert batch.input_ids.shape == (1, begin + expected)
        assert torch.equal(batch.input_ids, theirs["input_ids"])
        assert torch.equal(batch.inputs()["pixel_values"], theirs["pixel_values"])


def test_a_picture_padded_is_the_picture_alone(successor, processor):
    """Its features do not depend on larger pictures beside it, for the mask says where it ends."""
    model = copy.deepcopy(successor[0])
    set_compute_dtype(model, torch.float32)
    small, wide = [painted(80, 70), "?"], [painted(300, 64), painted(90, 200), "?"]
    alone, both = (read(Collator(processor), p).inputs() for p in ([small], [small, wide]))
    assert both["pixel_values"].shape[3:] != alone["pixel_values"].shape[3:]

    def features(inputs, mask):
        with torch.no_grad():
            return model.get_image_features(inputs["pixel_values"], mask).pooler_output[0]

    expected = features(alone, alone["pixel_attention_mask"])
    found = features(both, both["pixel_attention_mask"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (features(both, None) - expected).abs().max() > 0.03  # what the mask is for


def test_a_part_of_a_batch_has_no_pixels_to_spare(processor):
    """A micro-batch of small pictures does not pay for a large one beside it in the window."""
    batch = Collator(processor)(
        [iq.Example([painted(60, 60), "?"], " A."), iq.Example([painted(300, 300), "?"], " B.")]
    )
    assert batch.vision.pixel_values.shape == (2, 5, 3, 128, 128)
    small = batch.part(slice(0, 1), 9, 5)
    assert small.vision.pixel_values.shape == (1, 5, 3, 64, 64)
    assert small.inputs()["pixel_attention_mask"].all()
    assert small.inputs()["pixel_attention_mask"].shape == (1, 5, 64, 64)


@pytest.mark.parametrize("words", ["What", " What", "\nWhat", "<3", ".", "", "  "])
@pytest.mark.parametrize("completion", ["That", " That", "\nThat"])
def test_words_behind_an_image(processor, words, completion):
    """A space parts them from it as the processor does, in the prompt and in what is learnt."""
    picture = painted(64, 64)
    prompt = [picture, words] if words else [picture]
    batch = Collator(processor)([iq.Example(prompt, completion)])
    text = f"<image>{words}{completion}"
    theirs = processor(text=[text], images=[[picture]], return_tensors="pt")
    assert torch.equal(batch.input_ids[:, :-1], theirs["input_ids"])
    said = processor.tokenizer.decode(batch.input_ids[batch.labels != IGNORE])
    assert said.strip(" ") == f"{completion}</s>".strip(" ")


def test_a_picture_that_cannot_be_quartered_is_a_bad_row(processor):
    """The processor itself fails on it with no name; whole it can be read."""
    example = iq.Example([painted(1, 30), "?"], " A.")
    with pytest.raises(RuntimeError, match="invalid for input of size 0"):
        processor(text=["<image>"], images=[[painted(1, 30)]], return_tensors="pt")
    reader = RowReader([example], "rows", None, Collator(processor))
    with pytest.raises(ValueError, match=r"rows\[0\]: a picture of 1 x 30 pixels cannot be cut"):
        reader.read(0)
    processor.image_processor.do_image_splitting = False
    reader = RowReader([example], "rows", None, Collator(processor))
    assert [p.shape for p in reader.read(0)[1]] == [(3, 64, 64)]


@pytest.mark.parametrize("knows", ["all", "no control token", "attributes"])
def test_tokenizers_that_lack_what_it_needs(processor, knows):
    """Ids are the processor's, who adds what is missing; beyond the embedding is an error."""
    states = processor.tokenizer.backend_tokenizer.to_str()
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    if knows == "no control token":
        for number, name in enumerate(names):
            states = states.replace(name, f"<other{number}>")
    if knows == "attributes":
        special["extra_special_tokens"] = {
            "image_token": "<image>",
            "image_boundary_token": "<fake_token_around_image>",
        }
    size = len(Tokenizer.from_str(states).get_vocab())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(states), **special)
    other = Idefics2Processor(processor.image_processor, tokenizer, image_seq_len=4)
    prompt = ["See", painted(70, 50), painted(50, 70), "both."]
    theirs = other(text=["See<image><image>both."], images=[prompt[1:3]], return_tensors="pt")
    batch = read(Collator(other), [prompt])
    assert torch.equal(batch.input_ids, theirs["input_ids"])
    assert int((batch.input_ids == other.image_token_id).sum()) == 2 * 5 * 4
    collator = Collator(other, num_embeddings=size)
    if knows == "no control token":
        with pytest.raises(ValueError, match=r"has id \d+, but the model embeds only ids below"):
            collator.prompt_tokens([prompt])
    else:
        collator.prompt_tokens([prompt])


def test_whole_pictures_are_trained_on_too(successor, processor, examples):
    """Without image splitting an image is one tile; the loss is finite, and so is the cost."""
    processor.image_processor.do_image_splitting = False
    batch = Collator(processor)(examples[:3])
    assert batch.vision.grids == (((0, 0),),) * 3
    assert int((batch.input_ids == processor.image_token_id).sum()) == 3 * 4
    assert 0 < iq.evaluate(successor[0], processor, examples[:3])["eval_loss"] < 20
