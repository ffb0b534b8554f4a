"""What differs between the kinds of model, and nothing else."""

from __future__ import annotations

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
