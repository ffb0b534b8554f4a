"""Batches: interleaving, labels, lengths.

Shapes: B examples, T tokens, N images per example.
"""

import copy
import io
import json
from itertools import groupby

import pytest
import torch
from helpers import equal_batches
from tokenizers import Tokenizer

import idefics_qlora as iq
from idefics_qlora.data.batches import IGNORE, Collator
from idefics_qlora.data.formats import as_example
from idefics_qlora.data.rows import RowReader

IMAGE = {"type": "image"}
QUESTION = "Question: What's on the picture? Answer:"


@pytest.fixture
def collator(processor):
    return Collator(processor)


def prompts_of_every_kind(picture):
    return [
        [picture, QUESTION],
        ["User:", picture, "Describe it.\nAssistant:"],
        [picture, picture, "Which is larger?"],
        ["One ", picture, " and ", picture, picture, " of them. "],
        ["Only text, no picture."],
    ]


def test_prompts_equal_the_processors(collator, processor, picture):
    """Ids, masks and pixels are, to the bit, those of IdeficsProcessor(text=...)."""
    prompts = prompts_of_every_kind(picture)
    theirs = processor(text=prompts, padding="longest", return_tensors="pt")
    pixels = [collator.pixels(prompt) for prompt in prompts]
    tokens = collator.prompt_tokens(prompts)
    ours = collator.collate(tokens, pixels, processor.tokenizer.padding_side).inputs()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), name


def test_every_text_token_after_an_image_sees_it(collator, picture):
    """No example is blind: each token attends to the latest image before it, and to no other."""
    examples = [iq.Example(prompt, " An answer.") for prompt in prompts_of_every_kind(picture)]
    batch = collator(examples)
    for b in range(len(examples)):
        seen = -1
        for t in range(int(batch.attention_mask[b].sum())):
            seen += int(batch.input_ids[b, t] == collator.image_id)
            expected = torch.zeros(batch.vision.image_attention_mask.shape[2], dtype=torch.bool)
            if seen >= 0:
                expected[seen] = True
            assert torch.equal(batch.vision.image_attention_mask[b, t], expected)
    assert not batch.vision.image_attention_mask[4].any()  # the example without an image


def test_flat_and_nested_images_agree(collator, picture):
    """Pictures among the texts, in a column beside them or within messages: the same tensors."""
    rows = [
        {"prompt": [picture, picture, "Which is larger?"], "completion": " Both."},
        {"prompt": "Which is larger?", "images": [picture, picture], "completion": " Both."},
        {"prompt": [*([{"path": None, "bytes": png(picture)}] * 2), "Which is larger?"],
         "completion": " Both."},
    ]  # fmt: skip
    batches = [collator([as_example(row)]) for row in rows]
    assert batches[0].vision.image_attention_mask.any(1).tolist() == [[True, True]]
    assert all(equal_batches(batches[0], batch) for batch in batches[1:])
    ask = [{"type": "text", "text": "Which is larger?"}]
    answer = {"role": "assistant", "content": "Both."}
    inside = {"type": "image", "image": picture}
    nested = [{"role": "user", "content": [inside, inside, *ask]}, answer]
    flat = [{"role": "user", "content": [IMAGE, IMAGE, *ask]}, answer]
    chats = [{"messages": nested}, {"messages": flat, "images": [picture, picture]}]
    assert equal_batches(*(collator([as_example(chat)]) for chat in chats))


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_processors_nested_call_is_blind(processor, picture):
    """The trap that the collator exists for: images=, text= puts the image behind its question."""
    theirs = processor(images=[[picture]], text=[QUESTION], return_tensors="pt")
    image_at = (theirs["input_ids"][0] == processor.image_token_id).nonzero().item()
    assert theirs["image_attention_mask"][0, :image_at].sum() == 0


def test_the_processor_does_not_know_its_end_of_utterance(instruct_processor):
    """The trap that makes turns end in our hands: it would add the token, but looks in vain."""
    assert not instruct_processor.tokenizer_was_trained_with_end_of_utterance_token


def test_targets_of_the_completion(collator, processor, picture):
    """By default the completion and the end token are learnt, and nothing else."""
    batch = collator([iq.Example([picture, QUESTION], " This is it."), iq.Example(["Q"], " A")])
    learnt = batch.labels[0][batch.labels[0] != IGNORE]
    assert processor.tokenizer.decode(learnt).strip() == "This is it.</s>"
    assert (batch.labels == IGNORE).logical_or(batch.labels == batch.input_ids).all()
    assert (batch.labels[batch.attention_mask == 0] == IGNORE).all()


def test_targets_of_all_text(processor, picture):
    """With loss_on="all" the prompt is learnt too; padding, image and begin tokens never are."""
    collator = Collator(processor, loss_on="all")
    batch = collator([iq.Example([picture, QUESTION], " This is it."), iq.Example(["Q"], " A")])
    never = torch.isin(batch.input_ids, collator.never_target) | (batch.attention_mask == 0)
    assert torch.equal(batch.labels == IGNORE, never)


def test_the_end_token_is_a_target(collator, processor, picture):
    """Appended as an id, so a model learns to stop."""
    (tokens,) = collator.tokens([iq.Example([picture, QUESTION], " This.")])
    assert tokens.ids[-1] == processor.tokenizer.eos_token_id
    assert tokens.ids[0] == processor.tokenizer.bos_token_id
    assert tokens.ids.count(processor.tokenizer.bos_token_id) == 1


def test_generation_sees_the_prompt_that_was_trained(collator, picture):
    """The training tokens begin with the prompt's own tokens, trailing spaces or not."""
    for question in (QUESTION, QUESTION + " "):
        completion = " This is it." if question == QUESTION else "This is it."
        (tokens,) = collator.tokens([iq.Example([picture, question], completion)])
        (prompt,) = collator.prompt_tokens([[picture, question]])
        assert tokens.ids[: tokens.is_target.index(True)] == prompt.ids
        (reference,) = collator.tokens([iq.Example([picture, QUESTION], " This is it.")])
        assert tokens == reference


def test_data_cannot_forge_control_tokens(collator, picture):
    """A literal <image> or </s> in a text is text."""
    text = "a <image> and </s> and <fake_token_around_image>"
    (tokens,) = collator.tokens([iq.Example([picture, text], f" {text}")])
    assert tokens.ids.count(collator.image_id) == 1
    assert tokens.ids.count(collator.tokenizer.eos_token_id) == 1
    assert "< image>" in collator.tokenizer.decode(tokens.ids)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (["<ima<image>ge> <</s>/s> <s><unk>"], "<end_of_utterance>"),
        (["meets <im", "age> here"], "and </s"),
        (["at the border <im"], "age></s>"),
        (["<fake_token_around_", "image>"], "<<<image>"),
    ],
)
def test_no_text_becomes_a_control_token(instruct_processor, picture, prompt, completion):
    """Neither nested, nor where two texts meet, nor the tokens of another checkpoint alone."""
    collator = Collator(instruct_processor)
    example = iq.Example([picture, *prompt], completion)
    (tokens,) = collator.tokens([example])
    found = collator.tokenizer.convert_ids_to_tokens(
        [i for i in tokens.ids if i in collator.control_ids | {collator.tokenizer.unk_token_id}]
    )
    around = "<fake_token_around_image>"
    assert found == ["<s>", around, "<image>", around, "</s>"]
    dialogue = iq.Example([{"role": "user", "content": "".join(prompt)}], completion)
    (tokens,) = collator.tokens([dialogue])
    assert sum(i in collator.control_ids for i in tokens.ids) == 3  # <s> and the ends of two turns
    plain = collator.tokenizer.decode(tokens.ids).replace(" ", "")
    assert "".join(prompt).replace(" ", "") in plain  # nothing is lost but for the spaces


def test_overlapping_and_added_tokens(processor, picture):
    """Special tokens that overlap are broken all the same; added words are words."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<a>", ">b<"]})
    processor.tokenizer.add_tokens(["Pikachu"])
    collator = Collator(processor)
    (tokens,) = collator.tokens([iq.Example([picture, "<a>b<a>b<"], " Pikachu")])
    text = processor.tokenizer.decode(tokens.ids)
    assert "<a>" not in text
    assert ">b<" not in text
    assert processor.tokenizer.convert_tokens_to_ids("Pikachu") in tokens.ids
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["§"]})
    with pytest.raises(ValueError, match="control tokens .*'§'.* are meant: remove them"):
        Collator(processor).tokens([iq.Example([picture, "§ 1"], " x")])  # a space cannot break it


def dialogue(picture):
    """Two questions with three pictures, as chat messages."""
    return [
        {"role": "user", "content": [{"type": "text", "text": "What is in this image?"}, IMAGE]},
        {"role": "assistant", "content": "A card."},
        {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "And these?"}]},
        {"role": "assistant", "content": "Two more."},
    ], [picture] * 3


def test_a_dialogue_equals_the_processors(collator, instruct_processor, processor, picture):
    """Ids, masks and pixels of a dialogue are those of the documented format of each family."""
    messages, images = dialogue(picture)
    prompt = as_example({"messages": messages, "images": images}).prompt
    end = "<end_of_utterance>"
    written = {
        instruct_processor: [
            *("User: What is in this image?", picture, end),
            *(f"\nAssistant: A card.{end}", "\nUser:", picture, picture),
            *(f"And these?{end}", "\nAssistant:"),
        ],
        processor: [
            *("Question: What is in this image?", picture, "Answer: A card.\n"),
            *(picture, picture, "Question: And these? Answer:"),
        ],
    }
    for family, items in written.items():
        options = {"add_end_of_utterance_token": False, "return_tensors": "pt"}
        theirs = family(text=[items], **options)
        ours = Collator(family)
        tokens = ours.prompt_tokens([prompt])
        inputs = ours.collate(tokens, [ours.pixels(prompt)]).inputs()
        for name, tensor in inputs.items():
            assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), name


def learnt(processor, tokens):
    """The texts of the tokens that are targets, one per run of them."""
    runs = groupby(zip(tokens.ids, tokens.is_target, strict=True), lambda pair: pair[1])
    return [processor.tokenizer.decode([i for i, _ in run]) for target, run in runs if target]


def test_every_assistant_turn_is_learnt(processor, instruct_processor, picture):
    """Each answer with the token that ends it, and no question; context turns are not learnt."""
    messages, images = dialogue(picture)
    example = as_example({"messages": messages, "images": images})
    context = as_example({"prompt": messages[:3], "completion": messages[3:], "images": images})
    end = "<end_of_utterance>"
    for family, answers in (
        (instruct_processor, [f"A card.{end}", f"Two more.{end}"]),
        (processor, ["A card.", "Two more.</s>"]),
    ):
        collator = Collator(family)
        (tokens,) = collator.tokens([example])
        assert learnt(family, tokens) == answers
        batch = collator([example])
        assert torch.equal(batch.labels[0] != IGNORE, torch.tensor(tokens.is_target))
        (prompt,) = collator.prompt_tokens([example.prompt])
        assert tokens.ids[: len(prompt.ids)] == prompt.ids
        (only_last,) = collator.tokens([context])
        assert only_last.ids == tokens.ids
        assert learnt(family, only_last) == answers[1:]
        everything = Collator(family, loss_on="all")([example])
        special = torch.isin(everything.input_ids, collator.never_target)
        assert torch.equal(everything.labels == IGNORE, special)


def test_turns_of_every_role_and_shape(processor, instruct_processor, picture):
    """System turns, turns without text and white space at the ends read as the families write."""
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [IMAGE]},
        {"role": "assistant", "content": " \nA cat. "},
        {"role": "user", "content": "Sure? "},
        {"role": "assistant", "content": "Yes."},
    ]
    example = as_example({"messages": messages, "image": picture})
    end, around = "<end_of_utterance>", "<fake_token_around_image>"
    for family, expected in (
        (
            instruct_processor,
            f"<s>System: Be short.{end}\nUser:{around}<image>{around}{end}\nAssistant: A cat.{end}"
            f"\nUser: Sure?{end}\nAssistant: Yes.{end}",
        ),
        (
            processor,
            f"<s>Be short.\n{around}<image>{around}Answer: A cat."
            "\nQuestion: Sure? Answer: Yes.</s>",
        ),
    ):
        (tokens,) = Collator(family).tokens([example])
        assert family.tokenizer.decode(tokens.ids) == expected


def test_targets_with_a_prefix_space_from_the_normaliser(processor, picture):
    """Tokenizers like Llama's put a space before every piece of text; targets stay in place."""
    processor = copy.deepcopy(processor)
    state = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [prepend, space]}
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    collator = Collator(processor)
    messages, images = dialogue(picture)
    (tokens,) = collator.tokens([as_example({"messages": messages, "images": images})])
    assert learnt(processor, tokens) == ["A card.", "Two more.</s>"]
    (tokens,) = collator.tokens([iq.Example([picture, QUESTION], " This is é.")])
    (prompt,) = collator.prompt_tokens([[picture, QUESTION]])
    assert tokens.ids[: tokens.is_target.index(True)] == prompt.ids
    assert learnt(processor, tokens) == ["This is é.</s>"]


def test_max_length_shortens_the_completion(processor, picture):
    """The end goes, with the end token; the prompt and its image stay whole."""
    example = iq.Example([picture, QUESTION], " This is a very long answer of many words.")
    (whole,) = Collator(processor).tokens([example])
    prompt = whole.is_target.index(True)
    for max_length in (len(whole.ids) + 1, len(whole.ids), len(whole.ids) - 1, prompt + 1):
        collator = Collator(processor, max_length=max_length)
        (tokens,) = collator.tokens([example])
        assert tokens.ids == whole.ids[:max_length]
        has_end = collator.tokenizer.eos_token_id in tokens.ids
        assert has_end == (max_length >= len(whole.ids))
        assert collator([example]).num_targets == len(tokens.ids) - prompt
    reader = RowReader([example], "rows", None, Collator(processor, max_length=prompt))
    with pytest.raises(
        ValueError,
        match=rf"rows\[0\]: the prompt has {prompt} tokens.*max_length={prompt} nothing.*remove",
    ):
        reader.read(0)


def test_max_length_never_cuts_an_image(instruct_processor, picture):
    """Of a dialogue, later turns go whole, with their images, wherever the limit falls."""
    messages, images = dialogue(picture)
    example = as_example({"messages": messages, "images": images})
    (whole,) = Collator(instruct_processor).tokens([example])
    first = whole.is_target.index(True)
    kept = set()
    for max_length in range(first + 1, len(whole.ids)):
        collator = Collator(instruct_processor, max_length=max_length)
        tokens, pixels = RowReader([example], "rows", None, collator).read(0)
        assert len(tokens.ids) <= max_length
        assert tokens.ids == whole.ids[: len(tokens.ids)]
        assert tokens.is_target[-1]
        assert len(pixels) == tokens.ids.count(collator.image_id)
        kept.add(len(pixels))
        batch = collator([example])
        assert batch.vision.pixel_values.shape[1] == len(pixels)
    assert kept == {1, 3}


def test_ids_beyond_the_embedding_are_named(processor, picture):
    """A processor of another checkpoint is an error here, not a device assert later."""
    collator = Collator(processor, num_embeddings=100)
    reader = RowReader([iq.Example([picture, QUESTION], " x")], "train_rows", None, collator)
    with pytest.raises(ValueError, match=r"train_rows\[0\]: token '<image>' has id .* below 100"):
        reader.read(0)


def test_left_padding_moves_nothing_else(collator, picture):
    """Generation's left-padded batch holds the same tokens, labels and masks."""
    prompts = prompts_of_every_kind(picture)
    tokens = collator.tokens([iq.Example(prompt, " A.") for prompt in prompts])
    pixels = [collator.pixels(prompt) for prompt in prompts]
    right, left = (collator.collate(tokens, pixels, side) for side in ("right", "left"))
    for b, row in enumerate(tokens):
        n = len(row.ids)
        for name in ("input_ids", "labels", "image_attention_mask"):
            assert torch.equal(right.tensors()[name][b, :n], left.tensors()[name][b, -n:]), name
