"""Examples from rows: one function for each of the formats in ``formats.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from PIL import Image

from idefics_qlora.data.captions import IMAGE_COLUMNS, QUESTION, first_picture, has_value
from idefics_qlora.data.example import (
    Example,
    Turn,
    are_messages,
    named_messages,
    open_value,
    open_values,
    turns_of,
)


def _images(row: Mapping[str, Any]) -> Sequence[Any]:
    """What the row has in ``images``, or in an image column, not opened; empty without either."""
    # `datasets` gives every row all columns, so None and an absent column mean the same.
    if row.get("images") is not None:
        images = row["images"]
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes, bytearray)):
            raise TypeError(
                f"images={images!r:.80}: expected a list; an empty one for a row without pictures"
            )
        return images
    columns = [column for column in IMAGE_COLUMNS if has_value(row, column)]
    if not columns:
        return []
    image, _ = first_picture(row, columns)
    return image if isinstance(image, (list, tuple)) else [image]


def _pictures(row: Mapping[str, Any]) -> list[Image.Image]:
    """The row's pictures, opened; at least one."""
    images = _images(row)
    if len(images) == 1 and row.get("images") is None:
        return [open_value(images[0], first_picture(row, IMAGE_COLUMNS)[1])]
    if not images:
        first_picture(row, IMAGE_COLUMNS)  # says what is missing
        raise ValueError("images=[]: expected a picture")
    return open_values(images)


def _answer(row: Mapping[str, Any], *columns: str) -> tuple[str, tuple[str, ...]]:
    """The text to learn, of several right ones the most common; and all of these."""
    given = {column: list(_texts(column, row.get(column))) for column in columns}
    texts = [told for told in given.values() if told]
    if not texts:
        names = " and ".join(f"{column}={row.get(column)!r:.80}" for column in columns)
        raise ValueError(f"{names}: expected text, or a list of right answers")
    several = next((told for told in texts if len(told) > 1), ())
    return Counter(texts[0]).most_common(1)[0][0], tuple(several)


def _texts(column: str, value: Any) -> Iterator[str]:
    """The texts in a column: one, a number, or a list of them; blank ones are left out."""
    if isinstance(value, Mapping) and "answer" in value:  # as VQAv2 has them
        value = value["answer"]
    if value is None or value != value:  # NaN, as pandas marks a gap
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(column, item)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield str(value)
    else:
        raise TypeError(f"{column}={value!r:.80}: expected text, a number, or a list of them")


def chat(row: Mapping[str, Any]) -> Example:
    """``messages``, the pictures in their parts or in ``images``."""
    return _dialogue(named_messages("messages", row["messages"]), _images(row))


def prompt_and_completion(row: Mapping[str, Any]) -> Example:
    """``prompt`` and ``completion``: texts, messages, or a prompt of items."""
    prompt, completion = row["prompt"], row["completion"]
    if are_messages(prompt):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        messages = [*named_messages("prompt", prompt), *named_messages("completion", completion)]
        return _dialogue(messages, _images(row), len(prompt))
    if isinstance(prompt, str):
        return Example([*open_values(_images(row)), prompt], completion)
    if _images(row):
        raise ValueError(
            "the row has images beside a `prompt` that is a list of items: put them into the list"
        )
    return Example(prompt, completion)


def _dialogue(
    messages: list[tuple[str, Any]], images: Sequence[Any], learnt_from: int = 0
) -> Example:
    """The last turn as completion; of the others, those before ``learnt_from`` are context."""
    *context, last = turns_of(messages, images)
    if last.role != "assistant":
        raise ValueError(
            f"{messages[-1][0]} is the last message and has role={last.role!r}: expected an "
            "assistant turn, which the model learns; remove what follows it, or the row"
        )
    context = [Turn(t.role, t.content) if i < learnt_from else t for i, t in enumerate(context)]
    return Example(context, str(last.content[0]))


_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPEAKERS |= {"system": "system"}


def conversations(row: Mapping[str, Any]) -> Example:
    """LLaVA's ``conversations``: ``from`` and ``value``, pictures where ``<image>`` is."""
    turns, images = row["conversations"], _images(row)
    if are_messages(turns):
        return _dialogue(named_messages("conversations", turns), images)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise TypeError(
            f'conversations={turns!r:.80}: expected a list of {{"from": "human", "value": text}}'
        )
    messages, places = [], 0
    for i, turn in enumerate(turns):
        name = f"conversations[{i}]"
        speaker, text = (turn.get(k) if isinstance(turn, Mapping) else None for k in _SAID)
        if speaker not in _SPEAKERS or not isinstance(text, str):
            raise TypeError(
                f"{name}={turn!r:.80}: expected {{'from': one of {', '.join(_SPEAKERS)}, 'value': "
                "text}"
            )
        role = _SPEAKERS[speaker]
        parts: list[dict[str, str]] = []
        for n, piece in enumerate(text.split("<image>") if role == "user" else [text]):
            parts += [{"type": "image"}] if n else []
            parts += [{"type": "text", "text": piece}]
            places += n > 0
        messages.append((name, {"role": role, "content": parts}))
    if places not in (0, len(images)):  # without any, the pictures come first
        raise ValueError(
            f"the conversations have {places} times `<image>` but the row has {len(images)} "
            "images: expected as many, or none of the former"
        )
    return _dialogue(messages, images)


_SAID = ("from", "value")


def question_pairs(row: Mapping[str, Any]) -> Example:
    """the_cauldron's ``texts``: pairs of ``user`` and ``assistant`` about ``images``."""
    pairs = row["texts"]
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise TypeError(
            f'texts={pairs!r:.80}: expected a list of {{"user": ..., "assistant": ...}}'
        )
    messages = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, Mapping) or not {"user", "assistant"} <= pair.keys():
            raise TypeError(
                f'texts[{i}]={pair!r:.80}: expected {{"user": question, "assistant": answer}}'
            )
        for role in ("user", "assistant"):
            messages.append((f"texts[{i}]", {"role": role, "content": pair[role]}))
    return _dialogue(messages, _images(row))


def question_and_answer(row: Mapping[str, Any]) -> Example:
    """A picture, a ``question`` and its ``answer``, or several right ``answers``."""
    question = row["question"]
    if not isinstance(question, str) or not question.strip():
        raise TypeError(f"question={question!r:.80}: expected text")
    answer, references = _answer(row, "answer", "answers")
    return Example([Turn("user", [*_pictures(row), question])], answer, references)


def caption(row: Mapping[str, Any]) -> Example:
    """A picture with its ``text`` or ``caption``, or several of them."""
    text, references = _answer(row, "text", "caption")
    return Example([*_pictures(row), QUESTION], f" {text}", references)


def class_name(row: Mapping[str, Any]) -> Example:
    """A picture with the name of its class as ``label``."""
    label = row["label"]
    if not isinstance(label, str) or not label.strip():
        raise TypeError(
            f"label={label!r:.80}: expected the name of a class, as a ClassLabel column of "
            '`datasets` gives it; or pass to_example=idefics_qlora.Captions(answer=" {label}")'
        )
    return Example([*_pictures(row), QUESTION], f" {label.strip()}")
