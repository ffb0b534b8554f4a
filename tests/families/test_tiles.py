"""Texts and tiles of Idefics2, Idefics3 and SmolVLM are those of their processors.

Shapes: B examples, T tokens, N tiles per example, S the side in pixels of a tile.
"""

import copy

import pytest
import torch
from pictures import painted
from transformers import (
    Idefics2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    SmolVLMImageProcessorPil,
)

import idefics_qlora as iq
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.rows import RowReader

SHAPES = [
    *((1, 1), (1, 500), (500, 1), (2, 3), (17, 5), (31, 33), (63, 64), (64, 64), (64, 65)),
    *((65, 64), (64, 128), (128, 64), (127, 128), (128, 128), (129, 128), (160, 216), (216, 160)),
    *((90, 30), (30, 91), (200, 101), (99, 200), (301, 300), (300, 301), (224, 224), (320, 240)),
    *((13, 200), (257, 255), (72, 128), (128, 73), (411, 207), (2, 500), (500, 2), (3, 2)),
]
BY_ROWS = pytest.mark.parametrize("family", ["smolvlm", "idefics3"], indirect=True)
"""For what only families have whose images are cut into rows of tiles."""


def shapes_for(processor):
    """What the processor can read: one that cuts quarters needs two pixels either way."""
    has_quarters = processor.image_processor.do_image_splitting and is_idefics2(processor)
    return [shape for shape in SHAPES if min(shape) > 1 or not has_quarters]


def is_idefics2(processor):
    return type(processor).__name__ == "Idefics2Processor"


def by_the_processor(processor, prompts):
    """What the processor itself makes of prompts, padded on the right."""
    image = processor.image_token
    texts = ["".join(i if isinstance(i, str) else image for i in prompt) for prompt in prompts]
    images = [[i for i in prompt if not isinstance(i, str)] for prompt in prompts]
    return processor(
        text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"
    )


def assert_equal(processor, prompts, exact=True):
    collator = Collator(processor)
    tokens = collator.prompt_tokens(prompts)
    pixels = [collator.pixels(prompt) for prompt in prompts]
    placed = list(map(collator.placed, tokens, pixels))
    batch = collator.collate(placed, pixels)
    ours, theirs = batch.inputs(), by_the_processor(processor, prompts)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    if exact:
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    else:
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    seen = theirs["pixel_attention_mask"].bool()
    if "pixel_attention_mask" in ours:
        assert torch.equal(ours["pixel_attention_mask"], seen)
        return
    # The model takes all of a tile as seen where it is given no mask.
    assert torch.equal(seen.any(dim=(2, 3)), batch.vision.is_tile)
    assert torch.equal(seen.all(dim=(2, 3)), batch.vision.is_tile)


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("number", range(1, 6))
def test_prompts_equal_the_processors(processor, split, number):
    """Ids and pixels, to the bit, for pictures of thirty shapes, one to five in a prompt."""
    processor.image_processor.do_image_splitting = split
    assert processor.image_processor.backend == "torchvision"
    shapes = shapes_for(processor)
    assert len(shapes) >= 30
    for start in range(0, len(shapes), 2):
        prompts = []
        for first in (start, start + 1):
            some = [shapes[(first + n) % len(shapes)] for n in range(number)]
            pictures = [painted(*shape, seed=n) for n, shape in enumerate(some)]
            prompts.append(["A:", *pictures, "What is it?\n\nB"][first % 2 :])
        assert_equal(processor, prompts)


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_a_processor_that_uses_pillow_is_equalled_too(processor, split):
    """Its pixels differ from torchvision's; which are used is told by the processor at hand."""
    kinds = (SmolVLMImageProcessorPil, Idefics3ImageProcessorPil, Idefics2ImageProcessorPil)
    name = f"{type(processor.image_processor).__name__}Pil"
    (kind,) = (kind for kind in kinds if kind.__name__ == name)
    settings = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}
    if is_idefics2(processor):
        settings = {"size": {"shortest_edge": 64, "longest_edge": 128}}
    processor.image_processor = kind(**settings)
    processor.image_processor.do_image_splitting = split
    assert processor.image_processor.backend == "pil"
    for number, shape in enumerate(shapes_for(processor)):
        assert_equal(processor, [["A", painted(*shape, seed=number), "B"]], exact=False)


def test_spaces_are_as_they_were_typed(processor):
    """Around texts, between images and where two texts meet; those at the end of a prompt are the
    answer's, and part of what is learnt."""
    one, two = painted(64, 64), painted(160, 216)
    assert_equal(processor, [[" Look at ", one, " and ", two, "  now"]])
    assert_equal(processor, [["Hello ", "world ", one, " ", two, "\n"]])
    assert_equal(processor, [[one, "  What?"]])
    collator = Collator(processor)
    tokens, spaced = (
        collator.tokens([iq.Example([one, text], answer)])
        for text, answer in (("What?", "  It"), ("What?  ", "It"))
    )
    assert tokens == spaced
    prompts = collator.prompt_tokens([[one, "What?"], [one, "What?  "]])
    assert prompts[0] == prompts[1]


@BY_ROWS
@pytest.mark.parametrize(("tile", "tokens"), [(364, 169), (384, 81), (512, 64)])
def test_published_sizes_equal_the_processors(processor, tile, tokens):
    """As the published bases have them: four tiles long; 640 x 480 is 13 tiles."""
    processor.image_seq_len = tokens
    processor.image_processor.max_image_size = {"longest_edge": tile}
    processor.image_processor.size = {"longest_edge": 4 * tile}
    reader = Collator(processor).reader
    assert_equal(processor, [[painted(w, h), "?"] for w, h in ((640, 480), (50, 300))])
    assert reader.num_tiles(reader.pixels(painted(640, 480), None)) == 13
    assert reader.num_tiles(reader.pixels(painted(224, 224), None)) == 17


@BY_ROWS
def test_tiles_of_another_size_are_refused(successor, processor):
    """A processor of another base: what would fail deep in the model is told first."""
    processor.image_processor.max_image_size = {"longest_edge": 32}
    with pytest.raises(ValueError, match="its tiles have 32 pixels, the model's 64"):
        iq.evaluate(successor[0], processor, iq.tiny.creature_cards(2))


@pytest.mark.parametrize("family", ["smolvlm"], indirect=True)  # whose vocabulary has row tokens
def test_tokens_of_a_picture_are_counted_as_published(successor, processor):
    """862 tokens for 640 x 480 on SmolVLM2-500M, where rows and columns are tokens."""
    assert "<row_1_col_1>" in processor.tokenizer.get_added_vocab()
    for tile, tokens, expected in ((512, 64, 862), (384, 81, 1083)):
        processor.image_seq_len = tokens
        processor.image_processor.max_image_size = {"longest_edge": tile}
        processor.image_processor.size = {"longest_edge": 4 * tile}
        reader = Collator(processor).reader
        ids = reader.image_token_ids(reader.pixels(painted(640, 480), None))
        assert len(ids) == expected


def test_crops_have_the_tiles_of_the_whole_picture(processor):
    """A crop decides pixels alone: the same seed the same, and never another number of tokens."""
    reader = Collator(processor).reader
    for shape in shapes_for(processor):
        picture = painted(*shape)
        whole = reader.pixels(picture, None)
        crops = [reader.pixels(picture, seed) for seed in range(4)]
        assert {crop.shape for crop in crops} == {whole.shape}
        assert torch.equal(crops[1], reader.pixels(picture, 1))
    different = [reader.pixels(painted(160, 216), seed) for seed in range(2)]
    assert not torch.equal(*different)


def test_the_text_may_forge_no_image(processor):
    """What is typed stays text, and gets no tiles."""
    collator = Collator(processor)
    prompt = ["See <image> and <fake_token_around_image><global-img>", painted(64, 64), "?"]
    batch = collator([iq.Example(prompt, " <image> it is.")])
    assert int((batch.input_ids == collator.image_id).sum()) == 5 * 4
    assert batch.vision.grids == (((2, 2),),)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_no_target_on_images_or_padding(processor, loss_on):
    """Not even where rows and columns are ordinary words; nor on what nothing predicts."""
    collator = Collator(processor, loss_on)
    examples = [
        iq.Example(["A", painted(160, 216), "B"], " That."),
        iq.Example(["Text alone."], " Yes, and more than that."),
        iq.Example([painted(64, 64), painted(300, 100), "Both?"], " No."),
    ]
    batch = collator(examples)
    is_target = batch.labels != IGNORE
    assert not (is_target & ~batch.attention_mask.bool()).any()
    assert not is_target[:, 0].any()
    for b, example in enumerate(examples):
        texts = [item for item in example.prompt if isinstance(item, str)]
        said = collator.tokenizer.decode(batch.input_ids[b][is_target[b]])
        end = collator.reader.end_tokens[0]
        learnt = example.completion + end
        if loss_on == "all":
            learnt = "".join(texts) + learnt
            learnt = learnt if collator.reader.begin or b == 2 else learnt.partition(texts[0][0])[2]
        # Idefics2 has a space behind an image.
        said, learnt = said.replace(" ", ""), learnt.replace(" ", "")
        assert said == learnt[-len(said) :]
        assert len(said) >= len(learnt) - 5


def test_which_token_sees_which_image(processor):
    """A word sees every image before it, also where an image has many tiles."""
    collator = Collator(processor)
    batch = collator([iq.Example(["A", painted(160, 216), "B", painted(64, 64), "C"], " D")])
    sees = batch.vision.sees()[0]
    ids = batch.input_ids[0].tolist()
    places = [place for place, i in enumerate(ids) if i == collator.image_id]
    first, second = places[0], places[5 * 4]
    assert not sees[:first].any()
    assert sees[first:, 0].all()
    assert sees[:, 1].nonzero().flatten().tolist() == list(range(second, len(ids)))
    for number, shape in enumerate([(160, 216), (64, 64)]):
        pixels = collator.reader.pixels(painted(*shape), None)
        if is_idefics2(processor):  # tiles are not put together, for each has its own scale
            pixels = collator.reader.tiles(pixels)[-1]
        assert torch.equal(batch.vision.image(0, number), pixels)


def test_max_length_cuts_no_image(processor):
    """Whole images go with the turns behind them; a prompt that fills it is an error."""
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Two?"}]},
        {"role": "assistant", "content": "The second."},
    ]
    row = {"messages": turns, "images": [painted(160, 216), painted(300, 100)]}
    whole = Collator(processor)
    tokens, _ = RowReader([row], "rows", None, whole).read(0)
    (_, first_end), (second, second_end) = tokens.images
    for max_length in range(tokens.is_target.index(True) + 1, len(tokens.ids)):
        reader = RowReader([row], "rows", None, Collator(processor, max_length=max_length))
        cut, pixels = reader.read(0)
        assert len(cut.ids) <= max_length
        assert len(pixels) == len(cut.images) == (1 if len(cut.ids) < second_end else 2)
        assert cut.ids == tokens.ids[: len(cut.ids)]
        assert len(cut.ids) < second or len(cut.ids) > second_end
        batch = reader.collator.collate([cut], [pixels])
        assert int((batch.input_ids == whole.image_id).sum()) == 4 * int(batch.vision.is_tile.sum())
    reader = RowReader([row], "rows", None, Collator(processor, max_length=first_end))
    with pytest.raises(ValueError, match=r"rows\[0\].* image tokens included.*raise max_length"):
        reader.read(0)


def test_a_batch_without_pictures_has_no_pixels(processor):
    """The key is left out, of a part of a batch too, where others have pictures."""
    collator = Collator(processor)
    text, image = iq.Example(["Text."], " Yes."), iq.Example([painted(64, 64), "?"], " No.")
    assert set(collator([text, text]).inputs()) == {"input_ids", "attention_mask"}
    mixed = collator([image, text])
    assert mixed.inputs()["pixel_values"].shape == (2, 5, 3, 64, 64)
    assert not mixed.inputs()["pixel_values"][1].any()
    assert "pixel_values" not in mixed.part(slice(1, 2), 3, 1).inputs()


DIALOGUES = [
    [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A card."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And\nthis"},
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "?"},
            ],
        },
    ],
]


@pytest.mark.parametrize("messages", DIALOGUES)
def test_dialogues_equal_the_chat_template(processor, messages):
    """A prompt is what apply_chat_template gives; an answer follows as the template writes it."""
    pictures = iter([painted(160, 216), painted(64, 64), painted(50, 20)])
    filled = copy.deepcopy(messages)
    for message in filled:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = next(pictures)
    for answer in (None, "It is \u00e9 rare."):
        asked = [*filled]
        if answer:
            asked.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        theirs = processor.apply_chat_template(
            asked, add_generation_prompt=not answer, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        collator = Collator(processor)
        if answer:
            example = iq.Example(filled, answer)
            batch = collator([example])
            newline = len(collator.tokenizer("\n", add_special_tokens=False)["input_ids"])
            expected = theirs["input_ids"][:, :-newline]  # behind the last turn
            learnt = batch.input_ids[0][batch.labels[0] != IGNORE]
            said = f" {answer}<end_of_utterance>"
            earlier = " A card.<end_of_utterance>" * (len(messages) > 1)
            assert collator.tokenizer.decode(learnt) == earlier + said
        else:
            prompt = iq.Example(filled, " x").prompt
            (tokens,) = collator.prompt_tokens([prompt])
            pixels = collator.pixels(prompt)
            batch = collator.collate([collator.placed(tokens, pixels)], [pixels])
            expected = theirs["input_ids"]
        assert torch.equal(batch.input_ids, expected)
        if "pixel_values" in theirs:
            assert torch.equal(batch.inputs()["pixel_values"], theirs["pixel_values"])


def test_every_learnt_turn_ends(processor):
    """Turns that are targets are learnt with their ends and the space before them, others not."""
    collator = Collator(processor)
    turns = [
        iq.Turn("user", "One?"),
        iq.Turn("assistant", "First.", is_target=True),
        iq.Turn("user", "Two?"),
        iq.Turn("assistant", "Second."),
        iq.Turn("user", "Three?"),
    ]
    (tokens,) = collator.tokens([iq.Example(turns, "Third.")])
    learnt = [i for i, target in zip(tokens.ids, tokens.is_target, strict=True) if target]
    end = "<end_of_utterance>"
    assert collator.tokenizer.decode(learnt) == f" First.{end} Third.{end}"


def test_a_template_that_leaves_a_turn_out_is_refused(processor):
    """Nothing is trained that the template does not write; without one, plain lists remain."""
    turns = [iq.Turn("system", "Be brief."), iq.Turn("user", "What?")]
    template = processor.chat_template
    processor.chat_template = template.replace(
        "{% for message in messages %}", "{% for message in messages[1:] %}"
    )
    with pytest.raises(ValueError, match=r"does not write the turn 'system', 'Be brief.'"):
        Collator(processor).tokens([iq.Example(turns, "That.")])
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template: .* list of texts and images"):
        Collator(processor).tokens([iq.Example(turns, "That.")])


def test_the_preview_tells_tiles_and_tokens(processor, tmp_path):
    """What a picture costs is seen before it is trained on."""
    rows = [iq.Example([painted(160, 216), painted(64, 64), "Both?"], " Yes.")]
    shown = iq.preview_batch(processor, rows, image_dir=tmp_path)
    first, second = shown.examples[0].notes
    assert first.startswith("5 tiles (2 x 2 and the whole), ")
    assert second == first  # a small picture is made as large
    assert first in shown.text()
    assert first in shown._repr_html_()
    number = sum(token.text == "<image>" for token in shown.examples[0].tokens)
    assert number == 2 * 5 * 4
