"""Questions about documents of several pages: a small model learns to answer them from the pages.

    python examples/answer_documents.py                                # SmolVLM2-500M, from the Hub
    python examples/answer_documents.py --model HuggingFaceM4/idefics2-8b --max-steps 200
    python examples/answer_documents.py --model FOLDER --max-steps 4   # offline

The documents are drawn on the fly: a delivery, of two or three pages, each with a number, a town, a
weight and a stamp. A question is about one of the pages, so that the others must be told from it.
With documents of your own, `documents` gives rows with their `pages` (paths, URLs or pictures),
`question` and `answer`; the rest stays as it is.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import idefics_qlora as iq

TOWNS = ("Arles", "Basel", "Delft", "Evora", "Ghent", "Jena", "Lucca", "Porto")
STAMPS = {"paid": (40, 130, 60), "open": (190, 120, 20), "late": (180, 40, 40)}
QUESTIONS = {
    "town": "Where does the delivery on page {page} go?",
    "weight": "How many kilograms are on page {page}?",
    "stamp": "What does the stamp on page {page} say?",
}


def main(arguments: list[str] | None = None) -> iq.TrainResult:
    """Train, answering held-out questions before and after."""
    options = parse(arguments)
    model, processor = iq.load_model(options.model, longest_edge=options.longest_edge)
    model = iq.add_lora(model)
    train_rows = documents(options.documents, seed=0)
    eval_rows = documents(options.held_out, seed=1)
    print(iq.preview_batch(processor, train_rows[:2], to_example).text())  # tokens of the pages

    def answers() -> None:
        asked = eval_rows[:4]
        said = iq.generate(model, processor, asked, to_example=to_example, max_new_tokens=10)
        for row, text in zip(asked, said, strict=True):
            print(f"  {row['question']} {row['answer']}; it says: {text.strip()}")

    print("before:")
    answers()
    result = iq.train(
        model,
        processor,
        train_rows,
        eval_rows,
        config=iq.TrainConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            global_batch_size=options.global_batch_size,
            micro_batch_size="auto",
            learning_rate=options.learning_rate,
            augment=False,  # a crop could cut a page's margin with what is asked for
            eval_steps=options.eval_steps,
            save_steps=options.eval_steps,
            logging_steps=options.eval_steps,
            eval_generate_rows=options.held_out,
            eval_max_new_tokens=10,
            metric_for_best_model="eval_anls",
        ),
        to_example=to_example,
        metrics={"anls": iq.metrics.anls},
    )
    if not result.stopped_by:
        print("after:")
        answers()
        print(f"ANLS {result.metrics['eval_anls']:.2f}; the adapter is {result.best_checkpoint}")
    return result


def to_example(row: dict[str, Any]) -> iq.Example:
    """The pages in their order, each behind its number, then the question."""
    pages: list[Any] = []
    for number, page in enumerate(row["pages"], start=1):
        pages += [f"Page {number}:", page]
    return iq.Example([*pages, f"Question: {row['question']} Answer:"], f" {row['answer']}")


def documents(number: int, seed: int) -> list[dict[str, Any]]:
    """Rows with two or three drawn pages each, a question about one of them, and its answer."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        contents = [
            {
                "town": rng.choice(TOWNS),
                "weight": str(rng.randint(10, 99)),
                "stamp": rng.choice(list(STAMPS)),
            }
            for _ in range(rng.choice((2, 3)))
        ]
        asked, page = rng.choice(list(QUESTIONS)), rng.randrange(len(contents))
        rows.append(
            {
                "pages": [draw_page(content, rng) for content in contents],
                "question": QUESTIONS[asked].format(page=page + 1),
                "answer": contents[page][asked],
            }
        )
    return rows


def draw_page(content: dict[str, str], rng: random.Random) -> Image.Image:
    """A page of 420 x 594 pixels, as a scanner might see it."""
    page = Image.new("RGB", (420, 594), (250, 249, 244))
    draw = ImageDraw.Draw(page)
    title, text = (ImageFont.load_default(size=size) for size in (34, 24))
    draw.text((40, 40), f"Delivery {rng.randint(1000, 9999)}", fill=(30, 30, 40), font=title)
    draw.line((40, 90, 380, 90), fill=(120, 120, 130), width=2)
    draw.text((40, 130), f"To: {content['town']}", fill=(30, 30, 40), font=text)
    draw.text((40, 180), f"Weight: {content['weight']} kg", fill=(30, 30, 40), font=text)
    for y in range(260, 400, 28):  # lines of small print
        draw.line((40, y, rng.randint(200, 380), y), fill=(190, 190, 195), width=8)
    left, top = rng.randint(60, 200), rng.randint(430, 500)
    colour = STAMPS[content["stamp"]]
    draw.rectangle((left, top, left + 150, top + 60), outline=colour, width=5)
    draw.text((left + 34, top + 10), content["stamp"].upper(), fill=colour, font=title)
    return page.rotate(rng.uniform(-2, 2), resample=Image.Resampling.BICUBIC, fillcolor="white")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)

    def flag(name: str, default: Any, text: str) -> None:
        parser.add_argument(f"--{name}", default=default, type=type(default), help=text)

    flag("model", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "base: Hub id or folder")
    parser.add_argument("--longest-edge", type=int, help="pixels of a page's longest side")
    flag("output-dir", "runs/documents", "folder for the checkpoints")
    flag("documents", 400, "documents to learn from")
    flag("held-out", 40, "documents held out")
    flag("max-steps", 100, "optimizer steps")
    flag("global-batch-size", 16, "documents per optimizer step")
    flag("learning-rate", 2e-4, "peak learning rate")
    flag("eval-steps", 25, "optimizer steps between evaluations and checkpoints")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    stopped_by = main().stopped_by
    sys.exit(128 + signal.Signals[stopped_by] if stopped_by else 0)
