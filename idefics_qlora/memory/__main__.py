"""``python -m idefics_qlora.memory CHECKPOINT``: the table of :func:`estimate_memory`.

A module of its own, because the package imports :mod:`idefics_qlora.memory` itself.
"""

from __future__ import annotations

import argparse
from typing import get_args

from idefics_qlora import memory
from idefics_qlora.config import Precision


def main(arguments: list[str] | None = None) -> memory.MemoryEstimate:
    """Print the table of a checkpoint; returns the estimate."""
    parser = argparse.ArgumentParser(
        prog="python -m idefics_qlora.memory", description=(memory.__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint", help="Hub id or local folder")
    parser.add_argument("--text-tokens", type=int, default=100, help="per example")
    parser.add_argument("--images", type=int, default=1, help="per example")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--precision", choices=get_args(Precision), default="fp16")
    parser.add_argument("--revision", help="of a Hub checkpoint")
    estimate = memory.estimate_memory(**vars(parser.parse_args(arguments)))
    print(estimate)
    return estimate


if __name__ == "__main__":
    main()
