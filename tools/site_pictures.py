"""Draw the pictures of the documentation from a real run of the embedded model.

    python tools/site_pictures.py          # trains for some minutes, writes docs/pictures

``terminal.svg`` is what a terminal of 100 columns showed at the end of the run, ``loss.svg`` its
``log.jsonl``, ``samples.svg`` its ``samples.jsonl``, and ``preview.svg`` what ``preview_batch``
prints of a row. ``report.webp`` and ``report_phone.webp`` are its ``report.html`` in a browser, on
a desktop and, in the dark, on a phone, ``demo.webp`` is the page of ``idefics-qlora demo``; without
a browser they stay as they are. Nothing in them is written by hand. Not on Windows, which has no
pseudo-terminal.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from html import escape
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import browser
import transformers

import idefics_qlora as iq

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 100, 200
CHARACTER, LINE = 7.83, 18  # pixels of a monospaced font of 13 pixels, which SVG viewers have
FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:g} {1:g}" width="{0:g}">'


def main(arguments: list[str] | None = None) -> None:
    """Train in a terminal of its own, then draw what was seen and what is left in the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--max-steps", type=int, default=160)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shown = in_terminal(folder, options.max_steps)
        records = lines_of(Path(folder) / "runs/cards/log.jsonl")
        samples = samples_over_steps(Path(folder) / "runs/cards")
        if browser.find() is None:
            print("no browser: its pictures stay as they are", file=sys.stderr)
        else:
            report(Path(folder) / "runs/cards/report.html", options.output)
            demo(Path(folder) / "runs/cards", options.output)
    pictures = {
        "terminal": terminal(shown),
        "preview": terminal(preview().splitlines()),
        "loss": loss_curve(records),
        "samples": samples,
    }
    for name, picture in pictures.items():
        (options.output / f"{name}.svg").write_text(picture, encoding="utf-8")


def run(max_steps: int) -> None:
    """The run that is shown."""
    transformers.utils.logging.disable_progress_bar()  # of loading the weights
    model, processor = iq.tiny.load_model()
    iq.train(
        iq.add_lora(model),
        processor,
        iq.tiny.creature_cards(1000, seed=0),
        iq.tiny.creature_cards(32, seed=1, split="held_out"),
        config=iq.TrainConfig(
            output_dir="runs/cards",
            max_steps=max_steps,
            learning_rate=8e-3,
            micro_batch_size=8,
            eval_batch_size=16,
            logging_steps=5,
            eval_steps=40,
            eval_samples=2,
            eval_generate_rows=32,
        ),
        to_example=iq.pokemon_card_example,
        metrics={"right": iq.metrics.exact_match},
    )


def in_terminal(folder: str, max_steps: int) -> list[str]:
    """The lines that a terminal shows when the run, in ``folder``, is over."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        code = f"import site_pictures; site_pictures.run({max_steps})"
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tools")))
        os.execve(sys.executable, [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path})
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    written = b""
    while True:
        try:
            part = os.read(terminal, 2**16)
        except OSError:  # it has ended
            break
        if not part:
            break
        written += part
    _, status = os.waitpid(child, 0)
    text = written.decode()
    if status:
        raise RuntimeError(f"the run failed:\n{text}")
    return on_screen(text)


def on_screen(written: str) -> list[str]:
    """What is seen of the characters that were written to a terminal."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif part.endswith("A") and part[0] == "\x1b":
            row = max(0, row - int(part[2:-1] or 1))
        elif part.endswith("K") and part[0] == "\x1b":
            lines[row] = lines[row][:column]
        elif part[0] != "\x1b":
            kept = lines[row].ljust(column)
            lines[row] = kept[:column] + part + kept[column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in lines).strip("\n").split("\n")


def preview() -> str:
    """What ``preview_batch`` prints of a card."""
    _, processor = iq.tiny.load_model()
    rows = iq.tiny.creature_cards(1, seed=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        shown = iq.preview_batch(processor, rows, iq.pokemon_card_example, image_dir=folder)
        return shown.text(COLUMNS, False).replace(folder, "preview")


def report(page: Path, output: Path) -> None:
    """The page of the run as a browser shows it."""
    with browser.Browser() as opened:
        opened.open(page)
        opened.evaluate("document.querySelector('.plot').focus()")
        for _ in range(12):  # to a step in the middle of the first chart
            opened.press("ArrowLeft")
        opened.picture(output / "report.webp", height=1400)
        opened.open(page, browser.PHONE, dark=True)
        top = opened.evaluate(
            "document.querySelector('#gallery').getBoundingClientRect().top + scrollY"
        )
        opened.picture(output / "report_phone.webp", top=top, height=1000)


def demo(folder: Path, output: Path) -> None:
    """A held-out row of the run, asked on the page that serves it."""
    command = [sys.executable, "-m", "idefics_qlora", "demo", str(folder), "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split()[0]
            with browser.Browser() as opened:
                opened.open(address)
                opened.wait_for("document.querySelector('#rows img')")
                opened.click("#rows td")
                opened.wait_for("document.querySelector('#pictures img')?.naturalWidth")
                opened.click("#ask")
                opened.wait_for("document.querySelector('#adapter textarea').value")
                opened.picture(output / "demo.webp")
        finally:
            server.terminate()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def terminal(lines: list[str]) -> str:
    """Lines as text on a dark ground."""
    width = max(map(len, lines)) * CHARACTER + 32
    height = len(lines) * LINE + 28
    parts = [
        HEAD.format(width, height),
        f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#1e2127"/>',
        f'<g font-family="{FONT}" font-size="13" fill="#d7dae0" xml:space="preserve">',
    ]
    for number, line in enumerate(lines):
        if line:
            parts.append(
                f'<text x="16" y="{26 + number * LINE}" textLength="{len(line) * CHARACTER:.1f}" '
                f'lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(line)}</text>'
            )
    return "\n".join([*parts, "</g>", "</svg>", ""])


def loss_curve(records: list[dict[str, Any]]) -> str:
    """Training and held-out loss over the steps, on a logarithmic scale."""
    curves = {
        ("training", "#4c78a8"): [(r["step"], r["loss"]) for r in records if "loss" in r],
        ("held out", "#e45756"): [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r],
    }
    points = [point for curve in curves.values() for point in curve]
    last = max(step for step, _ in points)
    top = math.ceil(math.log10(max(loss for _, loss in points)))
    low = math.floor(math.log10(min(loss for _, loss in points)))
    width, height, left, bottom = 620, 300, 52, 262

    def at(step: float, loss: float) -> tuple[float, float]:
        share = (math.log10(loss) - low) / (top - low)
        return left + step / last * (width - left - 20), bottom - share * (bottom - 22)

    parts = [
        HEAD.format(width, height),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<g font-family="sans-serif" font-size="12" fill="#444444">',
    ]
    for power in range(low, top + 1):
        _, y = at(0, 10.0**power)
        parts += [
            f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>',
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>',
        ]
    for step in range(0, last + 1, max(1, last // 4)):
        x, _ = at(step, 1.0)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">step</text>')
    for number, ((name, colour), curve) in enumerate(curves.items()):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in curve))
        y = 34 + 18 * number
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<line x1="470" x2="490" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" '
            'stroke-width="2"/>',
            f'<text x="496" y="{y}">{name} loss</text>',
        ]
    return "\n".join([*parts, "</g>", "</svg>", ""])


def samples_over_steps(folder: Path) -> str:
    """For each sample its picture, and what the model said of it at each evaluation."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for sample in lines_of(folder / "samples.jsonl"):
        rows.setdefault(sample["row"], []).append(sample)
    width, top, parts = 860, 20, []
    for said in rows.values():
        picture = base64.b64encode((folder / said[0]["images"][0]).read_bytes()).decode()
        parts.append(
            f'<image x="16" y="{top}" width="128" height="128" '
            f'href="data:image/png;base64,{picture}"/>'
        )
        lines = [(f"step {s['step']}", s["text"]) for s in said] + [("right", said[0]["target"])]
        for number, (when, text) in enumerate(lines):
            y = top + 14 + LINE * number
            short = " ".join(text.split())
            short = short if len(short) <= 88 else f"{short[:85]}..."
            parts += [
                f'<text x="216" y="{y}" text-anchor="end" fill="#888888">{when}</text>',
                f'<text x="226" y="{y}">{escape(short)}</text>',
            ]
        top += max(144, LINE * len(lines) + 16)
    ground = f'<rect width="{width}" height="{top}" fill="#ffffff"/>'
    letters = '<g font-family="sans-serif" font-size="13" fill="#222222">'
    return "\n".join([HEAD.format(width, top), ground, letters, *parts, "</g>", "</svg>", ""])


if __name__ == "__main__":
    main()
