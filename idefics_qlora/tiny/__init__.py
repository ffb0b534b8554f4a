"""The embedded default: a small pre-trained base, and drawn cards.

    model, processor = idefics_qlora.tiny.load_model()
    rows = idefics_qlora.tiny.creature_cards(512, seed=0)

The model has every part of the large ones (vision tower, perceiver, gated cross-attention,
decoupled head) in 2.3 million parameters. It was pre-trained on drawn scenes with plain captions
(`tools/pretrain_tiny.py`) and has never seen a card: a fine-tuning that works is visible within
minutes on two CPU cores. `load_model(family="smolvlm")`, `"idefics3"` and `"idefics2"` give
untrained bases of the families that followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_qlora.tiny.cards import FIELDS, card_fields, creature_cards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BASE", "FIELDS", "card_fields", "creature_cards", "load_model"]

BASE: Path = Path(__file__).parent / "base"
"""The folder with the base's config, fp16 weights, tokenizer and processor files."""


def load_model(*, family: str = "idefics", **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """Load a small base in 4 bits, with its processor.

    Args:
        family: `idefics`, or one of its successors, `idefics2`, `idefics3` or `smolvlm`: bases
            that are untrained, and written into the cache folder when they are first asked for.
        **kwargs: Passed on to `idefics_qlora.load_model`.

    Returns:
        The model, its linear layers in NF4 but for the head, and the processor (images, or tiles,
        of 64 pixels).

    Raises:
        ValueError: There is no such family.
        OSError: The installation lacks the base's files, or the cache folder cannot be written.
    """
    # Imported late: drawing cards needs neither torch nor transformers.
    from idefics_qlora.model.loading import load_model as load
    from idefics_qlora.tiny.successors import BUILDERS, built

    known = ["idefics", *BUILDERS]
    if family not in known:
        raise ValueError(f"family={family!r}: expected one of {', '.join(known)}")
    return load(built(family) if family in BUILDERS else BASE, **kwargs)
