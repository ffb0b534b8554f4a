"""Compare estimate_memory with what training takes on this GPU, and print Markdown tables.

    python benchmarks/memory.py                        # idefics-9b with random weights, measured
    python benchmarks/memory.py --estimate-only --architectures 9b 80b      # no GPU needed
    python benchmarks/memory.py --architectures small --micro-batches 1     # the same code, small

The model is built once. Each case trains two steps of two micro-batches, so that gradients and
optimizer states exist when the peak is reached. Every row is printed when it is measured, and one
that does not fit is recorded as such.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from typing import Any

import torch
from peft import PeftModel
from random_model import ARCHITECTURES, configuration, random_4bit_model

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.machine import library_versions
from idefics_qlora.model.memory import CARDS, MemoryEstimate, estimate_memory

COLUMNS = (
    *("text tokens", "images", "micro-batch", "activations"),
    *("estimated GiB", "measured GiB", "error", "reserved GiB", "in use on the GPU, GiB"),
)


def example(processor: Any, text_tokens: int, images: int) -> iq.Example:
    """An example of about so many text tokens, image tokens included."""
    collator = Collator(processor)
    pictures = [card["image"] for card in iq.tiny.creature_cards(images, seed=0)]

    def of_words(number: int) -> iq.Example:
        return iq.Example([*pictures, "Question: What's on the picture? Answer:"], " It" * number)

    def length(number: int) -> int:
        return len(collator.tokens([of_words(number)])[0].ids)

    per_word = length(2) - length(1)
    return of_words(max(1, (text_tokens - length(1)) // per_word + 1))


def train(
    model: PeftModel, processor: Any, row: iq.Example, micro_batch: int, **settings: Any
) -> bool:
    """Train two steps of two micro-batches; False if the memory does not suffice."""
    with tempfile.TemporaryDirectory() as folder:
        config = iq.TrainConfig(
            output_dir=folder,
            max_steps=2,
            global_batch_size=2 * micro_batch,
            micro_batch_size=micro_batch,
            load_best_model_at_end=False,
            num_workers=0,
            **settings,
        )
        try:
            result = iq.train(model, processor, [row] * config.global_batch_size, config=config)
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
    return result.metrics["micro_batch_size"] == micro_batch  # else it went on with a smaller one


def measured(device: torch.device) -> dict[str, float]:
    """Peaks of the run before in GiB: in use, reserved, and in use on the GPU by anyone now."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "measured": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved": torch.cuda.max_memory_reserved(device) / 2**30,
        "in_use": (total - free) / 2**30,
    }


def row_of(*cells: Any) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def compare(architecture: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Estimate and measure every case, printing each; on a CPU there is nothing to measure."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = configuration(architecture)
    model = iq.add_lora(random_4bit_model(config, device))
    _, processor = iq.tiny.load_model(device="cpu")
    side = config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"\n{architecture} in {options.precision} on {name}, {library_versions()}\n")
    print(row_of(*COLUMNS), row_of(*["---"] * len(COLUMNS)), sep="\n", flush=True)
    records = []
    for text_tokens, images in itertools.product(options.text_tokens, options.images):
        row = example(processor, text_tokens, images)
        text_tokens = len(Collator(processor).tokens([row])[0].ids)
        estimate = estimate_memory(
            config,
            text_tokens=text_tokens,
            images=images,
            precision=options.precision,
            nested_constants=True,  # as the random model's are
        )
        for checkpointing, micro_batch in itertools.product(
            (False, True), sorted(options.micro_batches)
        ):
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            settings = {"precision": options.precision, "gradient_checkpointing": checkpointing}
            fits = train(model, processor, row, micro_batch, **settings)
            estimated = estimate.peak(micro_batch, checkpointing) / 2**30
            record: dict[str, Any] = {
                "architecture": architecture,
                "text_tokens": text_tokens,
                "images": images,
                "micro_batch": micro_batch,
                "gradient_checkpointing": checkpointing,
                "estimated": estimated,
                "fits": fits,
            }
            if device.type == "cuda" and fits:
                record |= measured(device)
                record["error"] = estimated / record["measured"] - 1
            records.append(record)
            activations = "recomputed" if checkpointing else "kept"
            cells = [text_tokens, images, micro_batch, activations, f"{estimated:.2f}"]
            if "error" in record:
                cells += [f"{record['measured']:.2f}", f"{record['error']:+.1%}"]
                cells += [f"{record['reserved']:.2f}", f"{record['in_use']:.2f}"]
            else:
                cells += ["-" if fits else "out of memory", "-", "-", "-"]
            print(row_of(*cells), flush=True)
    errors = [abs(record["error"]) for record in records if "error" in record]
    if errors:
        print(f"\nlargest error {max(errors):.1%} over {len(errors)} cases", flush=True)
    return records


def estimates(architecture: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print what fits on which card, from the configuration alone."""
    columns = ("text tokens", "images", "weights and optimizer, GiB", "GiB per example")
    cards = [f"{card} GB" for card in CARDS]
    print(f"\n{architecture} in {options.precision}, kept / recomputed\n")
    print(row_of(*columns, *cards), row_of(*["---"] * (len(columns) + len(cards))), sep="\n")
    records = []
    for text_tokens, images in itertools.product(options.text_tokens, options.images):
        estimate = estimate_memory(
            configuration(architecture),
            text_tokens=text_tokens,
            images=images,
            precision=options.precision,
        )
        fitting = {card: both(estimate, card) for card in CARDS}
        per_example = [estimate.activations(c).per_example / 2**30 for c in (False, True)]
        print(
            row_of(
                text_tokens,
                images,
                f"{estimate.static / 2**30:.2f}",
                " / ".join(f"{number:.2f}" for number in per_example),
                *(" / ".join(map(str, pair)) for pair in fitting.values()),
            ),
            flush=True,
        )
        records.append({"architecture": architecture, "estimate": estimate, "fitting": fitting})
    return records


def both(estimate: MemoryEstimate, card: int) -> tuple[int, int]:
    """Largest micro-batch with activations kept, and recomputed."""
    return estimate.largest_micro_batch(card, False), estimate.largest_micro_batch(card, True)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the tables; returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", choices=ARCHITECTURES, nargs="+", default=["9b"])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 8, 16])
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[97, 300])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default="fp16")
    parser.add_argument("--estimate-only", action="store_true")
    options = parser.parse_args(arguments)
    work = estimates if options.estimate_only else compare
    return [record for name in options.architectures for record in work(name, options)]


if __name__ == "__main__":
    main()
