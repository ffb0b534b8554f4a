"""Dialogues as a base's chat template writes them, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from idefics_qlora.families.family import Piece, Processor, Said


class ChatTemplate:
    """The chat template of a processor, or of its tokenizer.

    The template writes the dialogue with marks for its texts, which are put in afterwards: so it is
    known what of it is data, what is a control token, and what is learnt.

    Args:
        processor: Has the template.
        image_token: What it writes for an image.
        control_tokens: Tokens with a meaning of their own.
        end_tokens: Those of them that end a turn.
    """

    def __init__(
        self,
        processor: Processor,
        image_token: str,
        control_tokens: Collection[str],
        end_tokens: Collection[str],
    ) -> None:
        self._processor = processor
        self._image_token, self._end_tokens = image_token, end_tokens
        self._items = re.compile(rf"(\ue000\d+\ue001|{re.escape(image_token)})")
        self._specials = {*control_tokens, *processor.tokenizer.all_special_tokens}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def pieces(self, turns: Sequence[Said], completion: str) -> list[Piece]:
        """A dialogue up to the completion; an empty one stands for the prompt.

        Raises:
            ValueError: If there is no template, or it leaves something out.
        """
        if completion:
            turns = [*turns, Said("assistant", (completion.strip(),), True)]
        items = [(turn, item) for turn in turns for item in turn.content]
        pieces: list[Piece] = []
        turn, number = Said("system", ()), 0
        for part in self._items.split(self._written(turns, not completion)):
            is_item = self._items.fullmatch(part) is not None
            following = items[number] if number < len(items) else None
            if not is_item:
                pieces += self._between(part, turn, following and following[0])
                continue
            if following is None or part != self._mark(following[1], number):
                break
            turn, item = following
            number += 1
            is_text = isinstance(item, str)
            pieces.append(Piece(item if is_text else part, turn.is_target and is_text, not is_text))
            if completion and number == len(items):
                break
        if number != len(items):
            raise ValueError(
                f"the chat template of {type(self._processor).__name__} does not write the turn "
                f"{items[number][0].role!r}, {items[number][1]!r:.60}, where it is: write the "
                "dialogue as a list of texts and images, or set processor.chat_template"
            )
        return pieces

    def _mark(self, item: Any, number: int) -> str:
        """What stands for an item of a dialogue in what the template writes."""
        return f"\ue000{number}\ue001" if isinstance(item, str) else self._image_token

    def _written(self, turns: Sequence[Said], is_prompt: bool) -> str:
        """A dialogue through the chat template, with marks for its texts."""
        own = getattr(self._processor, "chat_template", None)
        template = own or self._processor.tokenizer.chat_template
        if not template:
            raise ValueError(
                "the base has no chat template: write the dialogue as a list of texts and images, "
                "or set processor.chat_template"
            )
        messages, number = [], 0
        for turn in turns:
            content: list[dict[str, str]] = []
            for item in turn.content:
                # The texts themselves stay out of it: what is typed in them is no template.
                text = {"type": "text", "text": self._mark(item, number)}
                content.append(text if isinstance(item, str) else {"type": "image"})
                number += 1
            messages.append({"role": turn.role, "content": content})
        written: str = self._processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=is_prompt, tokenize=False
        )
        return written

    def _between(self, text: str, turn: Said, follows: Said | None) -> list[Piece]:
        """What the template writes behind an item of a turn and before the next.

        The end of a turn is learnt with it, and so is the space before its first word.
        """
        pieces: list[Piece] = []
        for part in self._controls.split(text):
            if part in self._specials:
                ends = turn.is_target and follows is not turn and part in self._end_tokens
                is_first = not any(piece.is_control for piece in pieces)
                pieces.append(Piece(part, ends and is_first, is_control=True))
            elif part:
                pieces.append(Piece(part))
        if follows is not None and follows.is_target and pieces and not pieces[-1].is_control:
            words = pieces.pop().text
            bare = words.rstrip(" ")
            pieces += [Piece(bare)] * bool(bare)
            pieces += [Piece(words[len(bare) :], True)] * (words != bare)
        return pieces
