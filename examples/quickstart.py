"""Fine-tune the embedded 4-bit IDEFICS on drawn cards, and prove that it learnt to look.

    python examples/quickstart.py

It loads the tiny base, lets it caption cards it has never seen, trains LoRA adapters with the same
loop and settings as for idefics-9b (only the learning rate is a small model's), and captions the
cards again: with their own pictures, and with the pictures shuffled. A model that had only learnt
how captions are worded would do as well on shuffled pictures; one that looks falls to chance.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import transformers

import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.machine import library_versions

MAX_STEPS = 160
LEARNING_RATE = 8e-3
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 1000, 32, 96


def main(arguments: list[str] | None = None) -> int:
    """Run the whole thing; the exit code is 0 if every field was learnt from the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()

    model, processor = iq.tiny.load_model()
    model = iq.add_lora(model)
    trainable, total = model.get_nb_trainable_parameters()
    device = model.get_base_model().device
    print(f"A tiny IDEFICS in 4 bits on {device}: {trainable:,} of {total:,} parameters to train.")

    train_rows = iq.tiny.creature_cards(NUM_TRAIN, seed=0)
    held_out = iq.tiny.creature_cards(NUM_VALIDATION + NUM_TEST, seed=1, split="held_out")
    validation, test = held_out[:NUM_VALIDATION], held_out[NUM_VALIDATION:]
    print(f"{NUM_TRAIN} cards to learn from; {len(held_out)} others are held out.\n", flush=True)

    before = captions(model, processor, test)
    show("What it says about cards it has never seen, before", test[:4], before[:4])

    for earlier in options.output_dir.glob("checkpoint-*"):  # of an earlier quickstart
        shutil.rmtree(earlier)
    result = iq.train(
        model,
        processor,
        train_rows,
        validation,
        config=iq.TrainConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            micro_batch_size=8,
            eval_batch_size=16,
            seed=options.seed,
        ),
        to_example=pokemon_card_example,
    )
    if result.stopped_by:  # a signal
        print(f"\nStopped by {result.stopped_by} after step {result.global_step}.")
        return 128 + signal.Signals[result.stopped_by]
    print()
    after = captions(model, processor, test)
    show("and after", test[:4], after[:4])
    # The cards' values are dealt evenly, so near neighbours differ more often than chance. Moved by
    # 40 places, as many values agree as between cards drawn independently.
    others = test[40:] + test[:40]
    swapped = [{**card, "image": other["image"]} for card, other in zip(test, others, strict=True)]
    scores = {
        "before": accuracy(test, before),
        "after": accuracy(test, after),
        "shuffled": accuracy(test, captions(model, processor, swapped)),
    }
    chance = {field: 1 / len(values) for field, values in iq.tiny.FIELDS.items()}
    print(f"Right answers on {len(test)} held-out cards:\n")
    print(f"{'':10}{'chance':>10}{'before':>10}{'after':>10}{'shuffled pictures':>20}")
    for field in iq.tiny.FIELDS:
        row = [chance[field], *(score[field] for score in scores.values())]
        widths = (10, 10, 10, 20)
        print(f"{field:10}" + "".join(f"{v:{w}.0%}" for v, w in zip(row, widths, strict=True)))

    metrics = {
        **scores,
        "chance": chance,
        "log_history": result.log_history,
        "seconds": time.perf_counter() - started,
        "versions": library_versions(),
    }
    path = options.output_dir / "metrics.json"
    path.write_text(json.dumps(metrics, indent=2))
    problems = [
        field
        for field in chance
        if scores["after"][field] < 0.9 or abs(scores["shuffled"][field] - chance[field]) > 0.1
    ]
    if problems:
        print(f"\nNot learnt from the pictures: {', '.join(problems)} (see {path})")
        return 1
    print(f"\nIt looks: every field is read from the picture. All numbers are in {path}.")
    return 0


def captions(model: Any, processor: Any, cards: list[dict[str, Any]]) -> list[str]:
    """What the model says about each card's picture."""
    prompts = [pokemon_card_example(card).prompt for card in cards]
    return iq.generate(model, processor, prompts, max_new_tokens=45, batch_size=32)


def show(title: str, cards: list[dict[str, Any]], texts: list[str]) -> None:
    """Print the card's caption above the model's."""
    print(f"{title}:")
    for card, text in zip(cards, texts, strict=True):
        print(f"  card:  {pokemon_card_example(card).completion.strip()}")
        print(f"  model: {text.strip()}")
    print(flush=True)


def accuracy(cards: list[dict[str, Any]], texts: list[str]) -> dict[str, float]:
    """For each field, the share of cards of which the text states the right value."""
    right = dict.fromkeys(iq.tiny.FIELDS, 0)
    for card, text in zip(cards, texts, strict=True):
        said = iq.tiny.card_fields(text)
        for field, value in iq.tiny.card_fields(pokemon_card_example(card).completion).items():
            right[field] += said.get(field) == value
    return {field: count / len(cards) for field, count in right.items()}


if __name__ == "__main__":
    sys.exit(main())
