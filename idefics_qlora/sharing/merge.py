"""A model without an adapter that does what the adapter on its base does, and the proof of it.

Shapes: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from idefics_qlora.checkpoint import ADAPTER_CONFIG, CARD, SHARED
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.example import Example
from idefics_qlora.data.templates import question_of
from idefics_qlora.durable import (
    check_is_free,
    json_bytes,
    json_mapping,
    read_whole,
    whole_folder,
)
from idefics_qlora.evaluation.generation import generate
from idefics_qlora.families import family_of
from idefics_qlora.families.family import Model, Processor
from idefics_qlora.model.adapters import without_adapter
from idefics_qlora.model.base_files import base_files
from idefics_qlora.model.loading import Adapter, load_finetuned, load_model, read_adapter
from idefics_qlora.model.merged_weights import MergedWeights
from idefics_qlora.model.precision import evaluation_mode
from idefics_qlora.sharing.card import PICTURES, facts_of, hub_name, model_card

ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much, of their size, logits may differ because weights are rounded after the merge."""
MOST_PICTURES, MAX_NEW_TOKENS = 4, 32
COMPARED = 32
"""The last tokens of each prompt: of all, Idefics3's logits would take gigabytes."""


@dataclass(frozen=True)
class Proof:
    """How merged weights compare with the adapter; differences are shares of the logits' norm."""

    pictures: list[str]
    """What the models were shown."""
    effect: float
    """How far the adapter takes the logits from the base's."""
    rounding: float
    """How far those of the merged weights are from those of the adapter on the same base."""
    drift: float | None
    """How far they are from those of the adapter on the base in 4 bits, where it was trained."""
    same_choice: float | None
    """Share of tokens for which both of the latter choose the same next one."""
    merged_texts: list[str]
    """What the merged model says of each picture."""
    texts_in_4_bits: list[str]
    """What the adapter on the base in 4 bits says; empty if there is none."""
    why_not_in_4_bits: str
    """Why there is none."""

    def __str__(self) -> str:
        sound = "the merge is sound: equal to the adapter on the 16-bit base to rounding"
        if self.same_choice is not None:
            sound += f"; on the 4-bit base {self.same_choice:.1%} of next tokens are the same"
        lines = [
            sound,
            f"logits, on {len(self.pictures)} picture{'s' * (len(self.pictures) > 1)}:",
            f"  adapter against base: {self.effect:.2%} apart",
            f"  merged against adapter on the 16-bit base: {self.rounding:.3%} (rounding)",
        ]
        if self.drift is None:
            lines.append(f"  the adapter cannot be on a 4-bit base: {self.why_not_in_4_bits}")
        else:
            lines.append(
                f"  merged against adapter on the 4-bit base: {self.drift:.2%}, the same next "
                f"token for {self.same_choice:.1%}"
            )
        for number, picture in enumerate(self.pictures):
            lines += [f"{picture}:", f"  merged: {self.merged_texts[number].strip()}"]
            if self.texts_in_4_bits:
                lines.append(f"  4 bits: {self.texts_in_4_bits[number].strip()}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Merged:
    """What ``merge`` wrote; as text what the command line prints."""

    folder: Path
    dtype: torch.dtype
    num_changed: int
    """Tensors that differ from the base's."""
    num_adapted: int
    """Tensors in which the adapter has part."""
    kept: float
    """Share of what the adapter adds to the weights that is in them after rounding."""
    proof: Proof | None
    """``None`` without ``verify``."""

    def __str__(self) -> str:
        told = (
            f"{self.folder}: {self.dtype}, {self.num_changed} of {self.num_adapted} adapted "
            f"tensors differ from the base, by {self.kept:.1%} of what the adapter adds"
        )
        return told if self.proof is None else f"{told}\n{self.proof}"


def merge(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    base: str | os.PathLike[str] | None = None,
    verify: bool = True,
    device: str | torch.device | None = None,
) -> Merged:
    """Write a model that needs no adapter: the base in 16 bits with the adapter in its weights.

    ``from_pretrained`` of ``transformers`` loads it, and so do ``pipeline`` and ``load_model``.
    Weights are merged one after the other, in fp32 and by ``peft``, and rounded once; that takes a
    few times the memory of the largest of them, whatever the base's size. The folder gets its name
    when all is written and verified: a process killed at any moment leaves none of this name.

    Args:
        checkpoint: As in ``load_finetuned``.
        output: Folder to be made.
        dtype: Of the weights; by default that of the base's files. bf16 keeps 8 bits of each number
            and may lose what an adapter has learnt little of: ``kept`` tells.
        base: Hub id or folder of the base in 16 (or 32) bits, if it is no longer where the adapter
            says, or that is in 4 bits.
        verify: Compare logits and texts with those of the adapter on the same base and on the base
            in 4 bits, on the run's samples (``eval_samples``) or on a drawn picture. This loads one
            model after the other, which takes the memory of the base in ``dtype``.
        device: Where those are; by default the first GPU if there is one, else the CPU.

    Returns:
        What was written and how it compares; ``print`` it.

    Raises:
        FileExistsError: If there is something of the output's name.
        FileNotFoundError: If the checkpoint or the base is not there, or has no safetensors.
        OSError: If the folder cannot be written; nothing is left behind.
        CheckpointError: If a file is truncated or altered (a ``ValueError``).
        ValueError: If the base is in 4 bits, or another than that of the adapter; if something
            cannot be merged (the message names it); if the merged weights are the base's own, or
            rounding takes most of what the adapter adds to them; if the merged model does not do
            what the adapter does.
    """
    target = Path(os.path.abspath(os.path.expanduser(output)))
    check_is_free(target)
    adapter = read_adapter(checkpoint, base)
    files = base_files(adapter)
    weights = MergedWeights(adapter, files)
    if dtype is None:
        dtype = next(kind for kind, _ in files.kinds.values() if kind.is_floating_point)
    if dtype not in ROUNDING:
        raise ValueError(f"dtype={dtype}: expected {', '.join(map(str, ROUNDING))}")
    with whole_folder(target) as temporary:
        weights.write(temporary, dtype)
        _describe(adapter, temporary, dtype, target.name)
        changed = weights.num_changed, len(weights.adapted), weights.kept
        proof = None
        if verify:
            del weights
            question = question_of((adapter.state or {}).get("templates"))
            proof = _proof(adapter.folder, base, temporary, dtype, device, question)
            if proof.rounding > ROUNDING[dtype]:
                raise ValueError(
                    f"the merged model is not what the adapter on {adapter.base} is: their logits "
                    f"are {proof.rounding:.1%} apart, where rounding to {dtype} explains "
                    f"{ROUNDING[dtype]:.1%}; nothing was written"
                )
    return Merged(target, dtype, *changed, proof)


def _describe(adapter: Adapter, folder: Path, dtype: torch.dtype, name: str) -> None:
    """Write the model card, the facts that it was made of, and the samples' pictures."""
    config = json_mapping(file := adapter.folder / ADAPTER_CONFIG, read_whole(file))
    for given, revision in (
        (adapter.base, adapter.base_revision),
        (adapter.recorded_base, adapter.recorded_revision),
    ):
        if (known := hub_name(os.fspath(given), revision))[0] is not None:
            break
    facts = facts_of(
        config,
        adapter.state,
        is_merged=True,
        base=known[0],
        base_revision=known[1],
        dtype=str(dtype).removeprefix("torch."),
    )
    there = {path.name: path for path in (adapter.folder.parent / "eval_samples").glob("*.png")}
    facts = facts.with_pictures(there)
    for image in (image for sample in facts.samples for image in sample["images"]):
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(there[image], folder / PICTURES / image)
    source = "folder-of-this-file"
    card = model_card(facts, source, is_on_hub=False, pictures=PICTURES, name=name)
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / SHARED).write_bytes(json_bytes(vars(facts)))


def _proof(
    checkpoint: Path,
    base: str | os.PathLike[str] | None,
    merged: Path,
    dtype: torch.dtype,
    device: str | torch.device | None,
    question: str,
) -> Proof:
    """Compare a merged model with the adapter, one model in memory at a time."""
    pictures = dict(_pictures(checkpoint.parent))
    prompts = [[image, question] for image in pictures.values()]
    how: dict[str, Any] = {"compute_dtype": dtype, "device": device}
    whole, processor = load_finetuned(checkpoint, base=base, quantize=False, **how)
    by_adapter = _logits(whole, processor, prompts)
    with without_adapter(whole):
        by_base = _logits(whole, processor, prompts)
    del whole
    _free()
    model, processor = load_model(merged, quantize=False, **how)
    by_merged, merged_texts = (
        _logits(model, processor, prompts),
        _texts(model, processor, prompts),
    )
    del model
    _free()
    texts, why, by_4_bits = [], "", None
    try:
        quantised, processor = load_finetuned(checkpoint, base=base, **how)
    except ValueError as error:  # some kinds of adapters need a base that is not quantised
        why = str(error)
    else:
        by_4_bits = _logits(quantised, processor, prompts)
        texts = _texts(quantised, processor, prompts)
    return Proof(
        pictures=list(pictures),
        effect=_apart(by_adapter, by_base),
        rounding=_apart(by_merged, by_adapter),
        drift=None if by_4_bits is None else _apart(by_merged, by_4_bits),
        same_choice=None if by_4_bits is None else _same_choice(by_merged, by_4_bits),
        merged_texts=merged_texts,
        texts_in_4_bits=texts,
        why_not_in_4_bits=why,
    )


def _pictures(run: Path) -> Iterator[tuple[str, Image.Image]]:
    """The first sample pictures of a run, or a drawn one; by what to call them."""
    files = sorted(run.glob("eval_samples/*.png"))[:MOST_PICTURES]
    for file in files:
        with Image.open(file) as opened:
            yield file.name, opened.convert("RGB")
    if not files:
        image = Image.new("RGB", (224, 224), (210, 225, 240))
        draw = ImageDraw.Draw(image)
        draw.rectangle((20, 130, 200, 205), fill=(60, 140, 70))
        draw.ellipse((70, 40, 155, 125), fill=(220, 60, 40), outline=(40, 20, 20), width=4)
        yield "a drawn picture", image


def _logits(model: Model, processor: Processor, prompts: list[list[Any]]) -> Tensor:
    """(tokens, V) fp32 on the CPU, of each prompt and a short answer."""
    collator = Collator(processor, num_embeddings=family_of(model).num_embeddings(model))
    device, rows = next(model.parameters()).device, []
    for prompt in prompts:
        batch = collator([Example(prompt, " This is a picture.")]).to(device)
        with evaluation_mode(model):
            logits = model(**batch.inputs(), use_cache=False).logits
        rows.append(logits[0, -COMPARED:].float().cpu())  # sync
    return torch.cat(rows)


def _texts(model: Model, processor: Processor, prompts: list[list[Any]]) -> list[str]:
    return generate(model, processor, prompts, max_new_tokens=MAX_NEW_TOKENS)


def _apart(a: Tensor, b: Tensor) -> float:
    """Norm of the difference of logits, which a constant per token does not change."""
    a, b = (logits - logits.mean(dim=1, keepdim=True) for logits in (a, b))
    return float((a - b).norm() / b.norm())


def _same_choice(a: Tensor, b: Tensor) -> float:
    return float((a.argmax(dim=1) == b.argmax(dim=1)).float().mean())


def _free() -> None:
    """Give the memory of a model that is no longer used back, before the next is loaded."""
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
