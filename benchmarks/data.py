"""Loading pictures our way and the tutorial's way, in turn, in one process.

    python benchmarks/data.py
    python benchmarks/data.py --memory-examples 10000     # also: does the memory grow?

The tutorial transforms its rows with ``set_transform``: open the picture, crop it at random, call
the processor, all in the main process, two rows at a time. Ours reads windows of 16 rows, in the
main process or in workers. Both get the same rows (a memory-mapped ``datasets.Dataset`` with paths,
or with the pictures themselves), the same side of 224 pixels, and one thread per process; nothing
else is computed, so what is printed is the most that training could get. The pictures are drawn:
734 x 1024 pixels, about a megabyte as PNG, as scans of trading cards are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import psutil
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision import transforms

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.formats import first_sentence, pokemon_card_example
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.workers import Loading
from idefics_qlora.machine import library_versions

SIDE = 224
WINDOW = 16
KINDS = ("png", "jpeg", "datasets")
"""PNG files, JPEG files, and JPEG pictures inside a memory-mapped dataset."""


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Something like a scanned card: a photograph's texture, shapes, and the scanner's grain."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for size, level in ((128, 50), (32, 25), (8, 10), (2, 6), (1, 2)):
        coarse = rng.normal(0, level, (height // size + 2, width // size + 2, 3))
        layer = [
            Image.fromarray(np.float32(channel)).resize((width, height), Image.Resampling.BICUBIC)
            for channel in np.moveaxis(coarse, -1, 0)
        ]
        pixels += np.stack([np.asarray(channel) for channel in layer], -1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    border = width // 24
    draw.rectangle((0, 0, width - 1, height - 1), outline=(240, 210, 60), width=border)
    for _ in range(12):
        x, y = rng.integers(0, width), rng.integers(0, height // 2)
        colour = tuple(int(level) for level in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + width // 6, y + width // 6), fill=colour, outline="black")
    for line in range(height * 3 // 5, height - 2 * border, max(8, height // 40)):
        draw.text((2 * border, line), "draw two cards, then flip a coin " * 2, fill="black")
    return image


def make_rows(kind: str, folder: Path, number: int, size: tuple[int, int]) -> datasets.Dataset:
    """Draw pictures into files and return their rows, memory-mapped."""
    ending = "png" if kind == "png" else "jpg"
    rows = []
    for card in iq.tiny.creature_cards(number, seed=0):
        path = folder / f"{card['id']}.{ending}"
        if not path.exists():
            picture(*size, seed=len(rows)).save(path, quality=90)
        rows.append({"name": card["name"], "caption": card["caption"], "image_path": str(path)})
    dataset = datasets.Dataset.from_list(rows)
    if kind == "datasets":
        dataset = dataset.rename_column("image_path", "image")
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk(folder / kind)  # the pictures' bytes go with it
    return datasets.load_from_disk(folder / kind)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """The tutorial's: transparency on white."""
    if image.mode == "RGB":
        return image
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def tutorial_batches(dataset: datasets.Dataset, processor: Any) -> Iterator[dict[str, Any]]:
    """The tutorial's batches, without end."""
    images = processor.image_processor
    crop = transforms.RandomResizedCrop(
        (SIDE, SIDE), scale=(0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
    )
    normalise = transforms.Normalize(mean=images.image_mean, std=images.image_std)
    transform = transforms.Compose([convert_to_rgb, crop, transforms.ToTensor(), normalise])

    def prepare(rows: dict[str, list[Any]]) -> Any:
        pictures = rows["image"] if "image" in rows else map(Image.open, rows["image_path"])
        prompts = [
            [
                image,
                "Question: What's on the picture? Answer: This is "
                f"{name}. {first_sentence(caption)}</s>",
            ]
            for image, name, caption in zip(pictures, rows["name"], rows["caption"], strict=True)
        ]
        inputs = processor(
            text=prompts, transform=transform, padding="longest", return_tensors="pt"
        )
        inputs["labels"] = inputs["input_ids"]
        return inputs

    rows = dataset.with_transform(prepare)
    while True:
        yield from DataLoader(rows, batch_size=2, shuffle=True, drop_last=True)


def windows(dataset: datasets.Dataset, processor: Any) -> Windows:
    """Our windows of these rows."""
    reader = RowReader(dataset, "rows", pokemon_card_example, Collator(processor))
    return Windows(reader, seed=0, global_batch_size=WINDOW, augment=True)


def per_second(batches: Iterator[int], examples: int, warm_up: int) -> float:
    """Examples per second, between the arrivals of two batches."""
    for _ in range(warm_up):
        next(batches)
    loaded, start = 0, time.perf_counter()
    while loaded < examples:
        loaded += next(batches)
    return loaded / (time.perf_counter() - start)


def speed(
    dataset: datasets.Dataset, processor: Any, num_workers: int | None, examples: int
) -> float:
    """Examples per second of ours with so many workers, or of the tutorial's way (``None``)."""
    if num_workers is None:
        batches = tutorial_batches(dataset, processor)
        return per_second((len(batch["labels"]) for batch in batches), examples, warm_up=2)
    with Loading(windows(dataset, processor), num_workers=num_workers) as loading:
        arrivals = (len(window.rows) for window in loading)
        # Workers load ahead while nothing is timed: what they had ready then must be used up.
        return per_second(arrivals, examples, warm_up=1 + 2 * num_workers)


def decoding_speed(dataset: datasets.Dataset, examples: int) -> float:
    """Pictures per second when they are decoded and nothing else."""
    column = "image" if "image" in dataset.column_names else "image_path"
    numbers = list(itertools.islice(itertools.cycle(range(len(dataset))), examples))
    paths = None if column == "image" else dataset[column][:]
    start = time.perf_counter()
    for number in numbers:
        if paths is None:
            dataset[number]  # `datasets` decodes when the row is asked for
        else:
            Image.open(paths[number]).load()
    return examples / (time.perf_counter() - start)


def private_mib() -> float:
    """Memory of this process and its workers that nobody shares, in MiB."""
    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().uss for member in family) / 2**20


def memory(dataset: datasets.Dataset, processor: Any, num_workers: int, examples: int) -> list[int]:
    """Private memory in MiB at the start and after every tenth of so many examples of ours."""
    marks = [round(examples * tenth / 10) for tenth in range(11)]
    taken: list[int] = []
    with Loading(windows(dataset, processor), num_workers=num_workers) as loading:
        for _ in range(1 + 2 * num_workers):
            next(loading)
        loaded = 0
        while len(taken) < len(marks):
            if loaded >= marks[len(taken)]:
                taken.append(round(private_mib()))
                continue
            loaded += len(next(loading).rows)
    return taken


def name_of(num_workers: int | None) -> str:
    """What the tables call a way of loading."""
    if num_workers is None:
        return "tutorial"
    return f"{num_workers} worker{'' if num_workers == 1 else 's'}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a Markdown table and JSON, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=64, help="distinct files, read in turn")
    parser.add_argument("--size", type=int, nargs=2, default=[734, 1024], help="width and height")
    parser.add_argument("--examples", type=int, default=128, help="per round and way")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all ways, in turn")
    parser.add_argument("--memory-examples", type=int, default=0, help="0: memory is not watched")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(options)
    finally:
        torch.set_num_threads(threads)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All kinds of rows, all ways."""
    _, processor = iq.tiny.load_model(device="cpu")
    processor.image_processor.size = {"height": SIDE, "width": SIDE}
    ways = [None, *options.workers]
    summary: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {**library_versions(), "pillow": PIL.__version__},
        "kinds": {},
    }
    columns = ["pictures", "kB each", *map(name_of, ways), "ratio", "decoding: ours", "tutorial"]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in options.kinds:
            dataset = make_rows(kind, folder, options.pictures, tuple(options.size))
            files = list(folder.glob("*.png" if kind == "png" else "*.jpg"))
            speeds = compare(dataset, processor, ways, options)
            median = {way: statistics.median(values) for way, values in speeds.items()}
            first = median[name_of(options.workers[0])]  # ours, by default in the main process
            record = {
                "kilobytes": sum(path.stat().st_size for path in files) / len(files) / 1e3,
                "examples_per_second": median,
                "rounds": speeds,
                "ratio": first / median["tutorial"],
                "decoding_share": first / median["decoding"],
                "decoding_share_tutorial": median["tutorial"] / median["decoding"],
            }
            if options.memory_examples:
                record["private_mib"] = {
                    name_of(n): memory(dataset, processor, n, options.memory_examples)
                    for n in options.workers
                }
            summary["kinds"][kind] = record
            shares = [record["decoding_share"], record["decoding_share_tutorial"]]
            cells = [kind, f"{record['kilobytes']:.0f}"]
            cells += [f"{median[name_of(way)]:.1f}" for way in ways]
            cells += [f"{record['ratio']:.2f}", *(f"{share:.0%}" for share in shares)]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(json.dumps(summary, indent=2))
    return summary


def compare(
    dataset: datasets.Dataset, processor: Any, ways: list[int | None], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Examples per second of each way and of decoding alone, round by round."""
    work: dict[str, Callable[[], float]] = {
        "decoding": lambda: decoding_speed(dataset, options.examples)
    }
    for way in ways:
        work[name_of(way)] = lambda way=way: speed(dataset, processor, way, options.examples)
    speeds: dict[str, list[float]] = {way: [] for way in work}
    for _ in range(options.rounds):
        for way, measure in work.items():
            speeds[way].append(measure())
    return speeds


if __name__ == "__main__":
    main()
