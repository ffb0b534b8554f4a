"""What tells rows from others: what the user gave, not what a decoder made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from idefics_qlora.data.batches import Batch
from idefics_qlora.data.example import Example, PromptItem, Turn
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.opening import mark_origin, origin


@dataclass(frozen=True)
class Fingerprint:
    """What tells rows from others: how many there are, and what the first ones are made of."""

    number: int | None
    """Rows; ``None`` for a stream."""
    given: tuple[str | None, ...]
    """Hashes of the first rows as the user gave them (``None``: bad), in the order of their use:
    texts and encoded pictures, which no version of a decoder changes."""
    tensors: tuple[str | None, ...]
    """Hashes of what is made of them, tokens and pixels, as runs of 0.1 kept them."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"version": 2, "number": self.number, "first": list(self.given)}

    def fits(self, kept: dict[str, Any]) -> bool:
        """Whether a checkpoint's rows can be these; a row that is bad now and then may be.

        Raises:
            ValueError: If a later version of this library has made the checkpoint's.
        """
        version = kept.get("version", 1)  # 0.1 had none
        if version not in (1, 2):
            raise ValueError(
                f"rows known by fingerprints of version {version!r}, expected 1 or 2: a later "
                "idefics_qlora has made them; update it"
            )
        first = self.given if version == 2 else self.tensors
        pairs = zip(kept["first"], first, strict=False)
        return kept["number"] == self.number and all(
            x == y or x is None or y is None for x, y in pairs
        )


def hash_given(example: Example, access: ImageAccess) -> str:
    """A hash of an example as the user gave it: texts, and where its pictures came from."""

    def given(item: PromptItem) -> Any:
        if isinstance(item, Turn):
            return [item.role, item.is_target, [given(part) for part in item.content]]
        return item if isinstance(item, str) else {"image": origin(item, access)}

    values = [[given(item) for item in example.prompt], example.completion]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def hash_tensors(batch: Batch) -> str:
    """A hash of a batch of one row as version 0.1 took it: tokens, labels and pixels."""
    digest = hashlib.sha256()
    for tensor in (batch.input_ids, batch.labels, batch.vision.tensors()["pixel_values"]):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def mark_origins(decoded: Any, encoded: Any) -> None:
    """Let the pictures that ``datasets`` has decoded tell what from, wherever in a row they are."""
    if isinstance(decoded, Image.Image) and isinstance(encoded, Mapping):
        mark_origin(decoded, encoded)
    elif isinstance(decoded, Mapping) and isinstance(encoded, Mapping):
        for key, value in decoded.items():
            mark_origins(value, encoded.get(key))
    elif isinstance(decoded, list) and isinstance(encoded, list):
        for value, part in zip(decoded, encoded, strict=False):
            mark_origins(value, part)
