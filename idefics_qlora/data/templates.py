"""The templates that a model was trained with: its checkpoints keep them, the model knows them.

``model.trained_templates`` has the ``question``, and where the rows became examples by ``Captions``
also the ``answer`` and the ``image`` column; it is ``None`` where nothing is known, as of a
``to_example`` of the user's own. ``train``, ``load_finetuned`` and ``load_model`` set it (the
latter two also on the processor).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from idefics_qlora.data.captions import QUESTION, Captions, columns_of, has_picture, has_value
from idefics_qlora.data.checks import Finding
from idefics_qlora.data.example import PromptItem, ToExample

_NAMES = ("question", "answer", "image")
_OWN = ("messages", "prompt", "conversations", "texts", "question")
"""Columns in which a row itself says what is asked."""


def templates_of(to_example: ToExample | None) -> dict[str, str] | None:
    """What is known of a conversion of rows; ``None`` if it is no ``Captions``."""
    if not isinstance(to_example, Captions):
        return None
    return known({name: getattr(to_example, name) for name in _NAMES})


def known(kept: Any) -> dict[str, str] | None:
    """Templates as a file has them, without what are none; ``None`` if nothing is left."""
    if not isinstance(kept, Mapping):
        return None
    return {name: kept[name] for name in _NAMES if isinstance(kept.get(name), str)} or None


def remember(templates: Any, *owners: Any) -> None:
    """Let a model, or a processor, know what it was trained with."""
    for owner in owners:
        owner.trained_templates = known(templates)


def captions_of(templates: Any) -> Captions | None:
    """The conversion that these templates are of, if they are all there and sound."""
    try:
        return Captions(**(known(templates) or {}))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def trained_captions(owner: Any) -> Captions | None:
    """The conversion with which a model was trained, of the model or its processor."""
    return captions_of(getattr(owner, "trained_templates", None))


def question_of(templates: Any) -> str:
    """The text to put behind a picture that is no row: the default unless these tell.

    A question that asks for columns cannot be asked of a picture alone.
    """
    captions = captions_of(templates)
    if captions is None or columns_of("question", captions.question):
        return QUESTION
    return captions.text({})


def trained_question(owner: Any) -> str:
    """The same for a model, or its processor, as ``load_finetuned`` gives them."""
    return question_of(getattr(owner, "trained_templates", None))


def for_row(row: Mapping[str, Any], trained: Captions | None) -> Captions | None:
    """How a row becomes an example as in training; ``None`` if it asks something itself.

    Args:
        row: A row of columns, given without a ``to_example``.
        trained: With what the model was trained.
    """
    if trained is None:
        return None
    used = columns_of("question", trained.question)
    if any(has_value(row, column) and column not in used for column in _OWN):
        return None
    for image in (trained.image, None):  # a new picture may be called as all are
        if has_picture(row, image):
            return Captions(answer=trained.answer, question=trained.question, image=image)
    return None


def question_findings(prompt: Sequence[PromptItem], trained: Captions | None) -> Iterator[Finding]:
    """Whether a prompt asks the default question of a model that was trained with another.

    Args:
        prompt: Items of a prompt.
        trained: With what the model was trained.
    """
    if trained is None or trained.question.strip() == QUESTION:
        return
    if isinstance(last := prompt[-1], str) and last.strip() == QUESTION:
        yield Finding(
            "another question than the model was trained with",
            f"asks {QUESTION!r}, the default, but the model was trained with {trained.question!r}: "
            f"pass to_example=idefics_qlora.Captions(question={trained.question!r}, ...), or, to "
            "generate and evaluate, rows without to_example",
        )
