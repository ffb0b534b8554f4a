"""Classification: a model learns six kinds of cards; a matrix shows what it takes for what.

    python examples/classify_cards.py            # the embedded base, two minutes on two CPU cores
    python examples/classify_cards.py --train kinds/train --test kinds/val \\
        --model HuggingFaceM4/idefics-9b --learning-rate 2e-4     # folders of your own

The cards are drawn on the fly into folders that are named after their classes. A class is a
colour, and every third card has hung in the sun: the more it is bleached, the harder it is to tell
from grey "stone" and from others.

What to look at: the accuracy beside the one that the same answers would have if the pictures were
exchanged; the matrix, also in `confusion.svg`; the recall of each class over the steps, and the
held-out cards with the highest loss, in `report.html`.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from PIL import ImageEnhance

import idefics_qlora as iq

QUESTION = "Question: Which kind of creature is it? Answer:"
NUM_TRAIN, NUM_HELD_OUT = 600, 168
BLEACHED = (0.0, 0.4)
"""How much of its colour a card in the sun has kept."""


def main(arguments: list[str] | None = None) -> tuple[iq.TrainResult, dict[str, float]]:
    """Train, classify the test pictures, draw the matrix; the scores are the second value."""
    options = parse(arguments)
    train, test = options.train, options.test
    if train is None or test is None:
        train, test = (options.output_dir / "pictures" / name for name in ("train", "test"))
        write_cards(train, NUM_TRAIN, seed=0, split="train")
        write_cards(test, NUM_HELD_OUT, seed=1, split="held_out")
    train_rows, held_out = iq.load_rows(train), iq.load_rows(test)
    random.Random(0).shuffle(held_out)  # they come class after class
    eval_rows, test_rows = held_out[: len(held_out) // 3], held_out[len(held_out) // 3 :]
    names = sorted({row["label"] for row in train_rows})
    print(f"{len(train_rows)} pictures of {', '.join(names)}; {len(held_out)} are held out")

    model, processor = load(options.model)
    model = iq.add_lora(model)
    to_example = iq.Captions(question=QUESTION, answer=" {label}")
    result = iq.train(
        model,
        processor,
        train_rows,
        eval_rows,
        config=iq.TrainConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            eval_steps=options.eval_steps,
            save_steps=options.eval_steps,
            logging_steps=options.eval_steps // 4 or 1,
            eval_batch_size=16,
            eval_samples=6,
            eval_max_new_tokens=8,
            metric_for_best_model="eval_right",
        ),
        to_example=to_example,
        metrics={
            "right": iq.metrics.exact_match,
            "recall": partial(iq.metrics.field_match, fields=as_field),
        },
    )
    if result.stopped_by:
        return result, {}

    said = iq.generate(
        model, processor, test_rows, to_example=to_example, max_new_tokens=8, batch_size=32
    )
    pairs = Counter((row["label"], text.strip()) for row, text in zip(test_rows, said, strict=True))
    scores = {"right": accuracy(pairs), "exchanged": accuracy_by_chance(pairs)}
    drawing = options.output_dir / "confusion.svg"
    drawing.write_text(matrix_svg(pairs, names), encoding="utf-8")
    print(f"\nWhat it said of {len(test_rows)} pictures that it has never seen:\n")
    print(matrix_text(pairs, names))
    print(f"\nright: {scores['right']:.0%}; with the pictures exchanged: {scores['exchanged']:.0%}")
    print(f"The matrix is {drawing}, the report {iq.report(options.output_dir)}")
    return result, scores


def load(base: str) -> tuple[Any, Any]:
    """The model and its processor; `tiny` is the embedded base."""
    return iq.tiny.load_model() if base == "tiny" else iq.load_model(base)


def write_cards(folder: Path, number: int, seed: int, split: str) -> None:
    """Draw cards as `folder/CLASS/NAME.png`, every third one bleached."""
    rng = random.Random(seed)
    for n, card in enumerate(iq.tiny.creature_cards(number, seed=seed, split=split)):
        image = card["image"]
        if n % 3 == 0:
            image = ImageEnhance.Color(image).enhance(rng.uniform(*BLEACHED))
        path = folder / iq.tiny.card_fields(card["caption"])["type"] / f"{card['id']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def as_field(text: str) -> dict[str, bool]:
    """A text as the only field of itself, so that `field_match` gives the recall of each class."""
    return {text.strip(): True}


# --- the matrix: how often (the right class, what was said) came up -------------------------------


def accuracy(pairs: Counter[tuple[str, str]]) -> float:
    """Share of the pictures on the diagonal."""
    return sum(n for (right, said), n in pairs.items() if right == said) / pairs.total()


def accuracy_by_chance(pairs: Counter[tuple[str, str]]) -> float:
    """The mean accuracy of the same answers when each is given to any of the pictures.

    All pictures are asked the same, so this is what the model scores with the pictures exchanged.
    """
    rights, saids = (Counter[str](), Counter[str]())
    for (right, said), n in pairs.items():
        rights[right] += n
        saids[said] += n
    return sum(n * saids[name] for name, n in rights.items()) / pairs.total() ** 2


def columns_of(pairs: Counter[tuple[str, str]], names: Sequence[str]) -> list[str]:
    """The classes, and what else was said."""
    return [*names, *sorted({said for _, said in pairs} - set(names))]


def matrix_text(pairs: Counter[tuple[str, str]], names: Sequence[str]) -> str:
    """A line for each class, a column for each answer."""
    columns = [name or "nothing" for name in columns_of(pairs, names)]
    width = max(map(len, (*columns, *names))) + 2
    lines = [" " * width + "".join(f"{name:>{width}}" for name in columns)]
    for right in names:
        counts = [pairs[right, said] for said in columns_of(pairs, names)]
        lines.append(f"{right:{width}}" + "".join(f"{n or '.':>{width}}" for n in counts))
    return "\n".join(lines)


def matrix_svg(pairs: Counter[tuple[str, str]], names: Sequence[str]) -> str:
    """The same as a picture; a field is the darker, the larger its share of the line."""
    columns, cell, left, top = columns_of(pairs, names), 56, 84, 64
    width, height = left + cell * len(columns) + 8, top + cell * len(names) + 8

    def text(x: float, y: float, content: object, more: str = "") -> str:
        return f'<text x="{x:g}" y="{y:g}" {more}>{escape(str(content))}</text>'

    middle = 'text-anchor="middle"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="sans-serif" font-size="13" role="img">',
        "<title>Confusion matrix</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(left + cell * len(columns) / 2, 20, "what the model says", middle),
    ]
    for x, said in enumerate(columns):
        parts.append(text(left + cell * (x + 0.5), 48, said[:7] or "nothing", middle))
    for y, right in enumerate(names):
        of_class = sum(n for (name, _), n in pairs.items() if name == right)
        parts.append(text(left - 8, top + cell * (y + 0.5) + 5, right[:10], 'text-anchor="end"'))
        for x, said in enumerate(columns):
            share = pairs[right, said] / (of_class or 1)
            hue = 145 if said == right else 10
            parts.append(
                f'<rect x="{left + cell * x}" y="{top + cell * y}" width="{cell - 2}" '
                f'height="{cell - 2}" fill="hsl({hue} 45% {96 - 50 * share:.0f}%)"/>'
            )
            place = left + cell * (x + 0.5) - 1, top + cell * (y + 0.5) + 4
            if pairs[right, said]:
                parts.append(text(*place, pairs[right, said], middle))
    return "\n".join([*parts, "</svg>", ""])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add = parser.add_argument
    add("--model", default="tiny", help="base: tiny, a Hub id or a folder")
    add("--train", type=Path, help="folder of class folders to learn from; left out: drawn cards")
    add("--test", type=Path, help="the same, held out")
    add("--output-dir", type=Path, default=Path("runs/kinds"), help="folder of the run")
    add("--max-steps", type=int, default=80, help="optimizer steps")
    add("--learning-rate", type=float, default=8e-3, help="peak; 2e-4 for a large base")
    add("--eval-steps", type=int, default=20, help="optimizer steps between evaluations")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    stopped_by = main()[0].stopped_by
    sys.exit(128 + signal.Signals[stopped_by] if stopped_by else 0)
