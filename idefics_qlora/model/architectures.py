"""Which models can go the fast way."""

from __future__ import annotations

from transformers import (
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    IdeficsForVisionText2Text,
    SmolVLMForConditionalGeneration,
)

from idefics_qlora.model.fused import Architecture
from idefics_qlora.model.fused_idefics import Idefics
from idefics_qlora.model.fused_successors import Idefics2, Idefics3

ARCHITECTURES: dict[type, Architecture] = {
    IdeficsForVisionText2Text: Idefics(),
    Idefics2ForConditionalGeneration: Idefics2(),
    Idefics3ForConditionalGeneration: Idefics3(),
    SmolVLMForConditionalGeneration: Idefics3(),
}
"""By the class of the base."""
