"""Draw the pictures of the page of examples, each of a real run of the example.

    python tools/example_pictures.py                  # trains for minutes, writes docs/pictures
    python tools/example_pictures.py --runs FOLDER    # of runs that are there, or go on there

``confusion.svg`` is what `examples/classify_cards.py` wrote. Of the others, three rows of the
report are seen in a browser; without one their pictures stay as they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import browser

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"


def main(arguments: list[str] | None = None) -> None:
    """Run the examples, unless their runs are done, and look at what they left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs; by default a new one")
    parser.add_argument("--output", type=Path, default=PICTURES)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        run("classify_cards", runs / "kinds")
        shutil.copy(runs / "kinds" / "confusion.svg", options.output)
        shown = {"counting": "count_in_pictures", "documents": "answer_documents"}
        for name, example in shown.items():
            run(example, runs / name)
            rows(runs / name / "report.html", options.output / f"{name}.webp")


def run(example: str, folder: Path) -> None:
    """Run an example as a user does."""
    subprocess.run(
        [sys.executable, ROOT / "examples" / f"{example}.py", "--output-dir", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def rows(page: Path, file: Path) -> None:
    """The second line of a report's gallery, three rows."""
    if browser.find() is None:
        print(f"no browser: {file} stays as it is", file=sys.stderr)
        return
    with browser.Browser() as opened:
        opened.open(page)
        top, bottom = opened.evaluate(
            "(boxes => [boxes[0].top + scrollY, Math.max(...boxes.map(b => b.bottom)) + scrollY])"
            "([...document.querySelectorAll('#gallery .card')].slice(3, 6)"
            ".map(card => card.getBoundingClientRect()))"
        )
        opened.picture(file, top=top - 8, height=bottom - top + 16)


if __name__ == "__main__":
    main()
