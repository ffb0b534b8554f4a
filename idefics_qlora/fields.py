"""What a command can be told: a configuration file's sections, their fields, and a parser."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from peft import LoraConfig

from idefics_qlora.config import RECIPE, TrainConfig, explanations
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.model.base_weights import BaseWeights
from idefics_qlora.told import Field


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base, as ``load_model`` takes it."""

    base: str
    """Hub id, local folder, or ``tiny``, the embedded base."""

    revision: str | None = None
    """Branch, tag or commit of a Hub id."""

    quantize: bool = True
    """Whether linear layers are quantised to 4 bits (NF4)."""

    base_weights: BaseWeights = "4bit"
    """``dequantized``: the same values in 16 bits, faster and four times as large."""

    device: str | None = None
    """``cuda:0``, ``cpu``, ...; left out: the first GPU if there is one."""

    longest_edge: int | None = None
    """Pixels of a picture's longest side (not of IDEFICS); left out: the base's own."""

    image_splitting: bool | None = None
    """Whether pictures are cut into tiles (not of IDEFICS); left out: as the base has it."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters, beside the fields of ``peft.LoraConfig``; as ``add_lora`` takes them."""

    recipe: Literal["makers"] | None = None
    """``makers``: what the makers of the base published for fine-tuning, instead of the fields of
    ``peft.LoraConfig``."""

    train_parts: list[str] = field(default_factory=list)
    """Parts that are trained whole, such as [vision tower, connector]; with quantize: false."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Rows, and how they become examples."""

    train: str
    """Rows to learn from: a folder or file that ``load_rows`` reads, ``hf:NAME:SPLIT`` of
    ``datasets``, or ``tiny``, the drawn cards."""

    eval: str | None = None
    """Held-out rows, likewise."""

    answer: str | None = None
    """Template of what is learnt, such as `` {text}``; left out: the rows have a known format."""

    question: str | None = None
    """Template of the text behind the picture, beside ``answer``; left out: the tutorial's."""

    image: str | None = None
    """The picture's column, beside ``answer``; left out: ``image`` and the like."""

    access: ImageAccess = field(default_factory=ImageAccess)


MetricName: TypeAlias = Literal["anls", "bleu", "chrf", "cider", "exact_match", "vqa_accuracy"]

METRICS = Field(
    MetricName | list[MetricName] | None,
    None,
    "Scores of what the model says of held-out rows, such as cider, or [cider,bleu]",
)

_NOT_ASKED = {
    *("peft_type", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("base_model_name_or_path", "revision", "megatron_config", "megatron_core"),
}
"""Fields of ``LoraConfig`` that peft fills in itself, or that belong to another library."""


def _plain(hint: Any) -> bool:
    """Whether a file can hold the type: no class of a library is part of it."""
    if get_origin(hint) is Literal:
        return True
    if arguments := get_args(hint):
        return all(_plain(argument) for argument in arguments if argument is not ...)
    return hint in (str, int, float, bool, list, dict, tuple, NoneType, Any)


def fields_of(section: str, kind: type, **defaults: Any) -> dict[str, Field]:
    """The fields of a dataclass as ``section.name``; of those inside it as well."""
    hints, texts = get_type_hints(kind), explanations(kind)
    found: dict[str, Field] = {}
    for each in dataclasses.fields(kind):
        name, hint = f"{section}.{each.name}", hints[each.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= fields_of(name, hint)
            continue
        default = defaults.get(each.name, None if each.default is MISSING else each.default)
        if each.default_factory is not MISSING and each.name not in defaults:
            default = each.default_factory()
        text = texts.get(each.name) or str(each.metadata.get("help", ""))
        found[name] = Field(hint, default, " ".join(text.replace("``", "").split()))
    return found


def sections() -> dict[str, Field]:
    """The four sections of a run: ``model``, ``lora``, ``data`` and ``train``; and ``metrics``."""
    lora = {
        name: each
        for name, each in fields_of("lora", LoraConfig, **RECIPE).items()
        if name.partition(".")[2] not in _NOT_ASKED and name.count(".") == 1 and _plain(each.type)
    }
    return {
        **fields_of("model", ModelSettings),
        **fields_of("lora", LoraSettings),
        **lora,
        **fields_of("data", DataSettings),
        **fields_of("train", TrainConfig),
        "metrics": METRICS,
    }


def parser_of(
    prog: str,
    about: str,
    fields: Mapping[str, Field],
    hidden: tuple[str, ...],
    needed: tuple[str, ...],
) -> ArgumentParser:
    """The parser of a command with these fields; its help leaves the hidden ones out."""
    parser = ArgumentParser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with these settings")
    groups: dict[str, Any] = {}
    for name, each in fields.items():
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section) if section else parser
        text = each.text + (" (required)" if name in needed else "")
        groups[section].add_argument(
            f"--{name}",
            type=each.type,
            default=each.default,
            help=argparse.SUPPRESS if name.partition(".")[0] in hidden else text,
        )
    return parser
