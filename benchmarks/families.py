"""What each published base takes on a GPU, as a table for docs/families.md.

    python benchmarks/families.py

Estimated from the configurations of ``published.py``; neither weights nor a GPU are needed. One
example has one picture of 640 x 480 pixels and 100 tokens of text beside it; the makers' precision,
the default adapter, a micro-batch of 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from published import PUBLISHED

import idefics_qlora as iq
from idefics_qlora.families import FAMILIES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- written by benchmarks/families.py -->", "<!-- end of what it wrote -->"
TEXT_TOKENS = 100


class Picture(NamedTuple):
    """What one of 640 x 480 pixels is for a base as its makers published it.

    Idefics3-8B and SmolVLM-Instruct have no tokens for rows and columns: they are words there, of
    eight and nine tokens for each tile.
    """

    tiles: int
    tokens: int


PICTURES = {
    "HuggingFaceM4/idefics-9b": Picture(1, 3),
    "HuggingFaceM4/idefics-80b": Picture(1, 3),
    "HuggingFaceM4/idefics2-8b": Picture(5, 326),
    "HuggingFaceM4/Idefics3-8B-Llama3": Picture(13, 2314),
    "HuggingFaceTB/SmolVLM-Instruct": Picture(13, 1183),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": Picture(13, 1083),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": Picture(13, 862),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Picture(13, 862),
}


def main() -> None:
    """Write the table into the page."""
    lines = [
        "| base | parameters | a picture: tiles, tokens | 4 bits, GiB | 16 bits, GiB | licence "
        "| precision |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(cells(name))} |" for name in PUBLISHED]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def cells(name: str) -> list[str]:
    """The row of a base."""
    base, picture = PUBLISHED[name], PICTURES[name]
    return [
        f"`{name}`",
        f"{base.parameters:,}",
        f"{picture.tiles}, {picture.tokens:,}",
        *(peaks(name, quantize) for quantize in (True, False)),
        "LLaMA's" if base.config_class.model_type == "idefics" else "Apache 2.0",
        FAMILIES[base.config_class.model_type].precision,
    ]


def peaks(name: str, quantize: bool) -> str:
    """GiB at the highest point of a step: activations kept, and recomputed."""
    tiles, tokens = PICTURES[name]
    estimate = iq.estimate_memory(
        PUBLISHED[name].configuration(),
        images=tiles,
        text_tokens=tokens + TEXT_TOKENS,
        micro_batch=1,
        quantize=quantize,
    )
    kept, recomputed = (estimate.peak(1, again) / 2**30 for again in (False, True))
    return f"{kept:.1f} / {recomputed:.1f}"


if __name__ == "__main__":
    main()
