"""The seam between the kinds of model."""

from __future__ import annotations

from typing import Any, TypeAlias

from peft import (
    PeftModel,
)
from torch import nn
from transformers import (
    IdeficsForVisionText2Text,
)

Model: TypeAlias = IdeficsForVisionText2Text | PeftModel
"""The base, or the base with an adapter."""


Processor: TypeAlias = Any
"""``transformers.IdeficsProcessor``; its call signature is not used here."""


def check_model_and_processor(model: Any, processor: Any) -> None:
    """See that these are a model and a processor, in this order.

    Raises:
        TypeError: If one of them is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}: expected the model first and then the "
            "processor, the two that load_model returns"
        )
    check_processor(processor)


def check_processor(processor: Any) -> None:
    """See that this is a processor of images and texts.

    Raises:
        TypeError: If it is something else.
    """
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise TypeError(
            f"processor is of type {type(processor).__name__}: expected the processor, the second "
            "of the two that load_model returns"
        )
