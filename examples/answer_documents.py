"""Questions about documents of several pages: a small model learns to answer them from the pages.

    python examples/answer_documents.py        # the embedded base, two minutes on two CPU cores
    python examples/answer_documents.py --model HuggingFaceTB/SmolVLM2-500M-Video-Instruct \\
        --learning-rate 2e-4 --max-steps 100
    python examples/answer_documents.py --model HuggingFaceM4/idefics2-8b \\
        --learning-rate 2e-4 --max-steps 200

The documents are drawn on the fly: deliveries, of two or three pages, each with a number, a town,
a coloured seal and a dot for each parcel. A question is about each of the pages, or about one, so
that the others must be told from it. The embedded base, which sees 64 x 64 pixels and cannot read,
is asked about seals and parcels; any other about the towns as well. With documents of your own,
`documents` gives rows with their `pages` (paths, URLs or pictures), `question` and `answer`; the
rest stays as it is.

What to look at: the share of right answers beside that with the pages of other documents; and, in
`report.html`, which questions are answered with what stands on another page.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import idefics_qlora as iq
from idefics_qlora.tiny.shapes import draw_mark, outline

TOWNS = ("Arles", "Basel", "Delft", "Evora", "Ghent", "Jena", "Lucca", "Porto")
SEALS = ("star", "ball", "tent", "bow", "box")
COLOURS = {"red": (200, 40, 40), "green": (40, 130, 60), "blue": (40, 80, 200)}
QUESTIONS = {
    "parcels": "How many parcels are {where}?",
    "seal": "Which seal is {where}?",
    "colour": "What colour is the seal {where}?",
    "town": "Where does the delivery {where} go?",  # it must be read
}


def main(arguments: list[str] | None = None) -> tuple[iq.TrainResult, dict[str, dict[str, float]]]:
    """Train, answering held-out questions before and after; the scores are the second value."""
    options = parse(arguments)
    can_read = options.model != "tiny"
    if can_read:
        model, processor = iq.load_model(options.model, longest_edge=options.longest_edge)
    else:
        model, processor = iq.tiny.load_model()
    model = iq.add_lora(model)
    train_rows = documents(options.documents, seed=0, can_read=can_read)
    eval_rows = documents(options.held_out, seed=1, can_read=can_read)
    test_rows = documents(2 * options.held_out, seed=2, can_read=can_read)
    print(iq.preview_batch(processor, train_rows[:2], to_example).text())  # tokens of the pages

    def answers(rows: list[dict[str, Any]]) -> list[str]:
        return iq.generate(
            model, processor, rows, to_example=to_example, max_new_tokens=12, batch_size="auto"
        )

    def show() -> None:
        for row, text in zip(test_rows[:4], answers(test_rows[:4]), strict=True):
            print(f"  {row['question']} {row['answer']}; it says: {text.strip()}")

    print("before:")
    show()
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
            logging_steps=options.eval_steps // 5 or 1,
            eval_batch_size=16,
            eval_samples=6,
            eval_max_new_tokens=12,
            metric_for_best_model="eval_anls",
        ),
        to_example=to_example,
        metrics={"anls": iq.metrics.anls},
    )
    if result.stopped_by:
        return result, {}
    print("after:")
    show()

    def score(rows: list[dict[str, Any]]) -> dict[str, float]:
        said = answers(rows)
        shares = {}
        for kind, is_of_kind in (("each page", True), ("one page", False)):
            chosen = [
                n for n, row in enumerate(rows) if ("each page" in row["question"]) == is_of_kind
            ]
            right = [rows[n]["answer"] for n in chosen]
            shares[kind] = iq.metrics.exact_match([said[n] for n in chosen], right)
        return shares

    scores = {"own pages": score(test_rows), "other pages": score(exchanged(test_rows))}
    print(f"\nRight of {len(test_rows)} questions about documents that it has never seen:\n")
    print(f"{'':14}{'with the own pages':>20}{'with other pages':>20}")
    for kind in scores["own pages"]:
        print(f"{'of ' + kind:14}" + "".join(f"{of[kind]:20.0%}" for of in scores.values()))
    print(f"\nThe adapter is {result.best_checkpoint}, the report {iq.report(options.output_dir)}")
    return result, scores


def to_example(row: dict[str, Any]) -> iq.Example:
    """The question, so that it is known what to look for; then each page behind its number."""
    prompt: list[Any] = [f"Question: {row['question']}"]
    for number, page in enumerate(row["pages"], start=1):
        prompt += [f"Page {number}:", page]
    return iq.Example([*prompt, "Answer:"], f" {row['answer']}")


def documents(number: int, seed: int, can_read: bool = True) -> list[dict[str, Any]]:
    """Rows with two or three drawn pages each, a question about one or each, and its answer."""
    questions = [name for name in QUESTIONS if can_read or name != "town"]
    rng = random.Random(seed)
    rows = []
    for n in range(number):
        contents = [
            {
                "parcels": str(rng.randint(1, 5)),
                "seal": rng.choice(SEALS),
                "colour": rng.choice(list(COLOURS)),
                "town": rng.choice(TOWNS),
            }
            for _ in range(rng.choice((2, 2, 3)))
        ]
        asked, page = rng.choice(questions), rng.randrange(len(contents))
        is_about_one = n % 2 == 0
        where = f"on page {page + 1}" if is_about_one else "on each page"
        of_all = [content[asked] for content in contents]
        rows.append(
            {
                "pages": [draw_page(content, rng) for content in contents],
                "question": QUESTIONS[asked].format(where=where),
                "answer": of_all[page] if is_about_one else ", ".join(of_all),
            }
        )
    return rows


def exchanged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with the pages of the next that has as many."""
    others = []
    for n, row in enumerate(rows):
        following = rows[n + 1 :] + rows[: n + 1]
        other = next(o for o in following if len(o["pages"]) == len(row["pages"]))
        others.append({**row, "pages": other["pages"]})
    return others


def draw_page(content: dict[str, str], rng: random.Random) -> Image.Image:
    """A page of 420 x 594 pixels, as a scanner might see it."""
    page = Image.new("RGB", (420, 594), (250, 249, 244))
    draw = ImageDraw.Draw(page)
    title, text = (ImageFont.load_default(size=size) for size in (34, 24))
    ink = (30, 30, 40)
    draw.text((40, 30), f"Delivery {rng.randint(1000, 9999)}", fill=ink, font=title)
    draw.line((40, 76, 380, 76), fill=(120, 120, 130), width=2)
    draw.text((40, 90), f"To: {content['town']}", fill=ink, font=text)
    x, y, size = rng.uniform(190, 230), rng.uniform(260, 300), rng.uniform(90, 110)
    draw.polygon(outline(content["seal"], x, y, size, 1.3 * size), fill=COLOURS[content["colour"]])
    draw.text((40, 430), "Parcels:", fill=ink, font=text)
    number = int(content["parcels"])
    for n in range(number):
        draw_mark(draw, "dot", 210 + 66 * (n - (number - 1) / 2), 516, 26, ink)
    return page.rotate(rng.uniform(-2, 2), resample=Image.Resampling.BICUBIC, fillcolor="white")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)

    def flag(name: str, default: Any, text: str) -> None:
        parser.add_argument(f"--{name}", default=default, type=type(default), help=text)

    flag("model", "tiny", "base: tiny, a Hub id or a folder")
    parser.add_argument("--longest-edge", type=int, help="pixels of a page's longest side")
    flag("output-dir", "runs/documents", "folder for the checkpoints")
    flag("documents", 500, "documents to learn from")
    flag("held-out", 36, "documents held out for evaluations; twice as many for the end")
    flag("max-steps", 160, "optimizer steps")
    flag("global-batch-size", 16, "documents per optimizer step")
    flag("learning-rate", 8e-3, "peak learning rate; 2e-4 for a large base")
    flag("eval-steps", 80, "optimizer steps between evaluations and checkpoints")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    stopped_by = main()[0].stopped_by
    sys.exit(128 + signal.Signals[stopped_by] if stopped_by else 0)
