"""What a row asks, for generation: its answer is not looked at."""

import pytest
from helpers import encoded, same_examples

import idefics_qlora as iq
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.data.example import Turn
from idefics_qlora.data.formats import prompt_of


@pytest.mark.parametrize("with_answer", [True, False])
def test_a_row_asks_without_its_answer(picture, with_answer):
    """The prompt is that of training, whether the answer is there, odd, or missing."""

    def rows():
        end = with_answer
        chat = [{"role": "user", "content": "Which?"}]
        said = [{"from": "human", "value": "Which?"}]
        question = [Turn("user", [picture, "Which?"])]
        more = [{"role": "assistant", "content": "Red."}] if end else []
        yield {"messages": chat + more, "images": [picture]}, question
        yield {"conversations": chat + more, "images": [picture]}, question
        more = [{"from": "gpt", "value": "Red."}] if end else []
        yield {"conversations": said + more, "image": picture}, question
        answer = {"answer": {"odd": 1}} if end else {}
        yield {"image": picture, "question": "Which?", **answer}, question
        yield (
            {"prompt": "Which?", "image": picture} | ({"completion": 3} if end else {}),
            [picture, "Which?"],
        )
        yield {"image": picture} | ({"label": 7} if end else {}), [picture, QUESTION]
        yield {"image": picture} | ({"text": None} if end else {}), [picture, QUESTION]
        sample = {"__key__": "0", "png": encoded(picture)}
        yield sample | ({"txt": ""} if end else {}), [picture, QUESTION]
        yield sample | {"json": '{"question": "Which?"}'}, question

    for row, prompt in rows():
        assert same_examples(iq.Example(prompt_of(row), "-"), iq.Example(prompt, "-")), row


def test_prompts_of_functions_and_templates(picture):
    """A `to_example` may give a prompt; a template's answer needs no column."""
    prompt = [picture, "Which?"]
    for made in (prompt, iq.Example(prompt, "x")):
        assert prompt_of({}, lambda row, made=made: made) == prompt
        assert prompt_of(made) == prompt
    captions = iq.Captions(answer=" {title}", question="{kind}?")
    assert prompt_of({"image": picture, "kind": "Fox"}, captions) == [picture, "Fox?"]
