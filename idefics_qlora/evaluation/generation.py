"""Captions and answers from a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from idefics_qlora.config import check_whole
from idefics_qlora.data.batches import Collator, Tokens
from idefics_qlora.data.checks import text_findings
from idefics_qlora.data.example import PromptItem, as_prompt, naming_row
from idefics_qlora.families import family_of
from idefics_qlora.families.family import Model, Processor, check_model_and_processor
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess, opening_with
from idefics_qlora.model.precision import evaluation_mode
from idefics_qlora.notices import Notices, advising

ONE_TEXT = {"num_return_sequences": 1, "return_dict_in_generate": False}
"""Options of transformers that hold in any case, whatever the model's own settings are."""


def generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Sequence[PromptItem | Mapping[str, Any]]],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 8,
    return_full_text: bool = False,
    access: ImageAccess = DEFAULT_ACCESS,
    **generate_options: Any,
) -> list[str]:
    """Continue prompts of interleaved images and texts.

    Greedy unless ``generate_options`` say otherwise. Image tokens are never produced, and a text
    ends at the end-of-sequence token, or at ``<end_of_utterance>`` where the base has it.
    For several texts of a prompt, pass it as often, with ``do_sample=True``.

    Args:
        model: The base, or the base with an adapter.
        processor: The base's processor.
        prompts: Lists of images and texts, or of chat messages, as in
            :class:`~idefics_qlora.Example`.
        max_new_tokens: Tokens at most per text.
        batch_size: Prompts in one batch.
        return_full_text: Return the prompt's text as well (images are left out of it).
        access: As in ``train``.
        **generate_options: For ``transformers``' ``generate``, such as ``do_sample=True``.

    Returns:
        One text per prompt.

    Raises:
        TypeError: If model and processor are swapped.
        ValueError: If a prompt is not valid; the message names it (``BadImage`` for an image). If
            an option asks for something else than one text per prompt.
        torch.OutOfMemoryError: If the GPU's memory does not suffice; the message says what to
            lower.
    """
    check_model_and_processor(model, processor)
    check_whole(max_new_tokens=max_new_tokens, batch_size=batch_size)
    for name, only in ONE_TEXT.items():
        if generate_options.get(name, only) not in (only, None):
            raise ValueError(
                f"{name}={generate_options[name]!r}: generate returns one text per prompt; for "
                "several, pass the prompt as often, with do_sample=True; for more than texts, call "
                "model.generate"
            )
    collator = Collator(
        processor, num_embeddings=family_of(model).num_embeddings(model), access=access
    )
    notices = Notices()
    tokens, pixels = [], []
    for i, prompt in enumerate(prompts):
        with naming_row(f"prompts[{i}]"), opening_with(access), collator.opening():
            prompt = as_prompt(prompt)
            for kind, line in text_findings(prompt, collator.forged):
                notices.warn(kind, f"prompts[{i}]: {line}")
            tokens += collator.prompt_tokens([prompt])
            pixels.append(collator.pixels(prompt))
    return generate_from_tokens(
        model,
        collator,
        tokens,
        pixels,
        batch_size,
        max_new_tokens,
        return_full_text=return_full_text,
        **generate_options,
    )


def generate_from_tokens(
    model: Model,
    collator: Collator,
    tokens: Sequence[Tokens],
    pixels: Sequence[Sequence[Tensor]],
    batch_size: int,
    max_new_tokens: int,
    *,
    return_full_text: bool = False,
    **generate_options: Any,
) -> list[str]:
    """Continue prompts that are tokens and pixels already; otherwise as :func:`generate`.

    Args:
        model: The base, or the base with an adapter.
        collator: Made the tokens.
        tokens: One per prompt.
        pixels: For each, its images (3, S, S) uint8.
        batch_size: Prompts in one batch.
        max_new_tokens: Tokens at most per text.
        return_full_text: Return the prompt's text as well.
        **generate_options: For ``transformers``' ``generate``.
    """
    tokenizer = collator.tokenizer
    device = next(model.parameters()).device
    options = {
        "do_sample": False,
        "eos_token_id": collator.end_ids,
        "pad_token_id": tokenizer.pad_token_id,
        **generate_options,
        **ONE_TEXT,
        "suppress_tokens": [
            *(generate_options.get("suppress_tokens") or ()),
            *collator.image_ids,
        ],
    }
    texts: list[str] = []
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        batch = collator.collate(tokens[part], pixels[part], padding_side="left")
        with (
            advising("generating", batch_size=batch_size, max_new_tokens=max_new_tokens),
            evaluation_mode(model),
        ):
            inputs = batch.to(device).inputs()
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        if not return_full_text:
            ids = ids[:, batch.input_ids.shape[1] :]
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts
