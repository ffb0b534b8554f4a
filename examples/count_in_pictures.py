"""Counting in several pictures: how many hearts are on both cards, and which card has the most.

    python examples/count_in_pictures.py        # the embedded base, two minutes on two CPU cores
    python examples/count_in_pictures.py --model HuggingFaceM4/idefics2-8b --learning-rate 2e-4

A row has two cards, or three to compare, drawn on the fly with one to five hearts each, and one
question. The answer is spelt out, each card's number before the result: "3 and 2: 5". For a word
of an IDEFICS sees only the latest picture before it; what was on the earlier ones must come
through the words between them. So the question stands before the pictures, and the answer goes on
from what it has said.

What to look at: the shares of right results beside those that it has when each row is given the
cards of another. The embedded base, which has never seen two pictures at once, learns to count the
hearts of every card and to compare them; adding is new to it and comes later: it has learnt some
sums when the steps end, and goes on with more. In `report.html` are rows with all their cards, and
where an answer goes wrong.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import idefics_qlora as iq

CARDS = ("A", "B", "C")
QUESTIONS = {
    "sum": "How many hearts are on both cards?",
    "most": "Which card has the most hearts?",
}
STATED = re.compile(r"\s*(?P<hearts>\d(?: and \d)*): (?:(?P<sum>\d+)|(?P<most>[ABC]))\s*")
"""How an answer is written."""


def main(arguments: list[str] | None = None) -> tuple[iq.TrainResult, dict[str, dict[str, float]]]:
    """Train, answer held-out questions with the right cards and with others; the scores last."""
    options = parse(arguments)
    is_tiny = options.model == "tiny"
    model, processor = iq.tiny.load_model() if is_tiny else iq.load_model(options.model)
    model = iq.add_lora(model)
    train_rows = questions(options.rows, seed=0)
    held_out = questions(options.held_out, seed=1, split="held_out")
    eval_rows, test_rows = held_out[: len(held_out) // 4], held_out[len(held_out) // 4 :]
    print(iq.preview_batch(processor, train_rows[:1], to_example).text())  # what each word sees
    right = partial(iq.metrics.field_match, fields=stated)
    result = iq.train(
        model,
        processor,
        train_rows,
        eval_rows,
        config=iq.TrainConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            micro_batch_size="auto",
            eval_batch_size=16,
            eval_steps=options.eval_steps,
            save_steps=options.eval_steps,
            logging_steps=options.eval_steps // 5 or 1,
            eval_samples=6,
            eval_max_new_tokens=12,
            metric_for_best_model="eval_right_sum",
        ),
        to_example=to_example,
        metrics={"right": right},
    )
    if result.stopped_by:
        return result, {}

    def score(rows: list[dict[str, Any]]) -> dict[str, float]:
        said = iq.generate(
            model, processor, rows, to_example=to_example, max_new_tokens=12, batch_size=32
        )
        return right(said, [row["answer"] for row in rows])

    scores = {"own cards": score(test_rows), "other cards": score(exchanged(test_rows))}
    print(f"\nRight of {len(test_rows)} questions about cards that it has never seen:\n")
    print(f"{'':14}{'with the own cards':>20}{'with other cards':>20}")
    for name in scores["own cards"]:
        print(f"{name:14}" + "".join(f"{of[name]:20.0%}" for of in scores.values()))
    print(f"\nThe report is {iq.report(options.output_dir)}")
    return result, scores


def to_example(row: dict[str, Any]) -> iq.Example:
    """The question, then the cards in their order, each behind its name."""
    prompt: list[Any] = [f"Question: {row['question']}"]
    for name, picture in zip(CARDS, row["pictures"], strict=False):
        prompt += [f"Card {name}:", picture]
    return iq.Example([*prompt, "Answer:"], f" {row['answer']}")


def stated(text: str) -> dict[str, str]:
    """What an answer says: the hearts of each card, and the sum or the card with the most."""
    found = STATED.fullmatch(text)
    return {name: value for name, value in (found.groupdict() if found else {}).items() if value}


def questions(number: int, seed: int, split: str = "train") -> list[dict[str, Any]]:
    """Rows with two cards, or three to compare, a question about their hearts, and its answer."""
    rng = random.Random(seed)
    num_cards = min(2 * number, 1000 if split == "train" else 250)
    cards = iq.tiny.creature_cards(num_cards, seed=seed, split=split)
    rows = []
    for n in range(number):
        asked = ("sum", "most")[n % 2]
        while True:
            chosen = rng.sample(cards, 2 if asked == "sum" else rng.choice((2, 3)))
            hearts = [card["hp"] // 10 for card in chosen]  # as many are drawn
            if asked == "sum" or hearts.count(max(hearts)) == 1:
                break
        result = {"sum": sum(hearts), "most": CARDS[hearts.index(max(hearts))]}
        rows.append(
            {
                "pictures": [card["image"] for card in chosen],
                "question": QUESTIONS[asked],
                "answer": f"{' and '.join(map(str, hearts))}: {result[asked]}",
            }
        )
    return rows


def exchanged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with the cards of the next that has as many."""
    others = []
    for n, row in enumerate(rows):
        following = rows[n + 1 :] + rows[: n + 1]
        other = next(o for o in following if len(o["pictures"]) == len(row["pictures"]))
        others.append({**row, "pictures": other["pictures"]})
    return others


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add = parser.add_argument
    add("--model", default="tiny", help="base: tiny, a Hub id or a folder")
    add("--output-dir", type=Path, default=Path("runs/hearts"), help="folder of the run")
    add("--rows", type=int, default=1000, help="questions to learn from")
    add("--held-out", type=int, default=128, help="questions held out, a quarter for evaluations")
    add("--max-steps", type=int, default=300, help="optimizer steps")
    add("--learning-rate", type=float, default=8e-3, help="peak; 2e-4 for a large base")
    add("--eval-steps", type=int, default=100, help="optimizer steps between evaluations")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    stopped_by = main()[0].stopped_by
    sys.exit(128 + signal.Signals[stopped_by] if stopped_by else 0)
