"""What differs between the kinds of model, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from idefics_qlora.families.family import Family, Model, Processor, check_processor
from idefics_qlora.families.idefics import Idefics
from idefics_qlora.families.idefics2 import Idefics2
from idefics_qlora.families.idefics3 import Idefics3, SmolVLM

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Idefics(), Idefics2(), Idefics3(), SmolVLM())
}
"""By the ``model_type`` of a base's ``config.json``."""


def family_of(model: Model) -> Family:
    """The family of a model, with an adapter or without.

    Raises:
        ValueError: If it is of none; the message lists those that are known.
    """
    return family_of_config(model.config)


def family_of_config(config: Any, name: str = "") -> Family:
    """The family of a base's configuration.

    Args:
        config: A ``transformers`` configuration.
        name: What to call the base in an error.

    Raises:
        ValueError: If it is of none; the message lists those that are known.
    """
    if config.model_type not in FAMILIES:
        known = " or ".join(
            f"the {f.model_type!r} architecture ({f.known_bases})" for f in FAMILIES.values()
        )
        raise ValueError(
            f"{name or 'the model'} is a {config.model_type!r} model: expected {known}"
        )
    return FAMILIES[config.model_type]


def family_of_processor(processor: Processor) -> Family:
    """The family whose bases have such a processor.

    Raises:
        ValueError: If it is of none; the message lists those that are known.
    """
    kind = type(processor).__name__
    for family in FAMILIES.values():
        if family.processor_type == kind:
            return family
    known = ", ".join(family.processor_type for family in FAMILIES.values())
    raise ValueError(f"{kind} is the processor of no known architecture: expected {known}")


def read_pictures(
    family: Family, processor: Processor, longest_edge: int | None, image_splitting: bool | None
) -> dict[str, Any]:
    """Let a processor read pictures as ``load_model`` was told.

    Returns:
        What was told, by its name.

    Raises:
        ValueError: If the family does not know of such a thing.
    """
    told: dict[str, Any] = {}
    if longest_edge is not None:
        family.set_longest_edge(processor, longest_edge)
        told["longest_edge"] = longest_edge
    if image_splitting is not None:
        family.set_image_splitting(processor, image_splitting)
        told["image_splitting"] = image_splitting
    return told


def read_as_trained(
    family: Family,
    processor: Processor,
    state: Mapping[str, Any] | None,
    told: Collection[str] = (),
) -> dict[str, Any]:
    """Let a processor read pictures as that of a run did.

    Args:
        family: The base's.
        processor: The base's own.
        state: The run's; ``None`` if it is not known.
        told: Arguments of ``load_model`` that were given, and stay.

    Returns:
        What ``load_model`` would have to be told for that.
    """
    known, done = state or {}, dict[str, Any]()
    splits = known.get("image_splitting")
    if "image_splitting" not in told and splits not in (None, family.reader(processor).splits):
        done |= read_pictures(family, processor, None, splits)
    side = known.get("image_side")
    if "longest_edge" not in told and side not in (None, family.reader(processor).longest_edge):
        done |= read_pictures(family, processor, side, None)
    return done


def check_model_and_processor(model: Any, processor: Any) -> None:
    """See that these are a model and a processor, in this order, and of one base.

    Raises:
        TypeError: If one of them is something else.
        ValueError: If they are of different families, or known not to go together.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}: expected the model first and then the "
            "processor, the two that load_model returns"
        )
    check_processor(processor)
    family, own = family_of(model), family_of_processor(processor)
    reason = "" if own is not family else family.why_not(model.config, processor)
    if own is not family:
        reason = (
            f"it is a {own.processor_type}, that of a {family.model_type!r} model a "
            f"{family.processor_type}"
        )
    if reason:
        raise ValueError(
            f"the processor does not go with the model: {reason}; expected both of one base, as "
            "load_model returns them"
        )
