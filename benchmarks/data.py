"""Loading pictures our way and the tutorial's way, in turn, in one process.

    python benchmarks/data.py
    python benchmarks/data.py --size 1600 1200 --kinds jpeg    # large enough for a draft
    python benchmarks/data.py --memory-examples 10000     # also: does the memory grow?

The tutorial transforms its rows with ``set_transform``: open the picture, crop it at random, call
the processor, all in the main process, two rows at a time. Ours reads windows of 16 rows, in the
main process or in workers; in the main process also with decoded pictures kept (``cache_images``;
all of them are there when the time begins) and with large JPEGs decoded small (``draft``), whose
difference in pixels is told. All get the same rows (a memory-mapped ``datasets.Dataset`` with
paths, or with the pictures themselves), the same side of 224 pixels, and one thread per process;
nothing else is computed, so what is printed is the most that training could get. The pictures are
drawn: 734 x 1024 pixels, about a megabyte as PNG, as scans of trading cards are.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from idefics_qlora.data.captions import first_sentence, pokemon_card_example
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.workers import Loading
from idefics_qlora.images.kept import kept_pictures
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


@dataclass(frozen=True)
class Way:
    """A way of loading."""

    num_workers: int | None = 0
    """``None``: the tutorial's."""
    cache_images: str | None = None
    draft: bool = False

    def __str__(self) -> str:
        """What the tables call it."""
        if self.num_workers is None:
            return "tutorial"
        kept = [f"kept: {self.cache_images}"] if self.cache_images else []
        if kept or self.draft:
            return ", ".join((["draft"] if self.draft else []) + kept)
        return f"{self.num_workers} worker{'' if self.num_workers == 1 else 's'}"

    def access(self, folder: Path) -> iq.images.ImageAccess:
        """What pictures are opened with; what is kept on disk lies in ``folder``."""
        return iq.images.ImageAccess(cache_dir=folder, draft=self.draft)

    def reader(self, dataset: datasets.Dataset, processor: Any, folder: Path) -> RowReader:
        """Reads the rows; what it keeps is there already."""
        access = self.access(folder)
        kept = kept_pictures(self.cache_images, access)
        collator = Collator(processor, access=access, kept=kept)
        reader = RowReader(dataset, "rows", pokemon_card_example, collator)
        if kept is not None:
            for row in range(len(dataset)):
                reader.read(row)
        return reader


def windows(reader: RowReader) -> Windows:
    """Our windows of these rows."""
    return Windows(reader, seed=0, global_batch_size=WINDOW, augment=True)


class Speed(NamedTuple):
    """How fast a way loads."""

    per_second: float
    """Examples per second, between the arrivals of two batches."""
    cpu_ms: float
    """CPU time of the main process per example, which other programs hardly change."""


def measured(batches: Iterator[int], examples: int, warm_up: int) -> Speed:
    """The speed of batches, of which each is the number of its examples."""
    for _ in range(warm_up):
        next(batches)
    loaded, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while loaded < examples:
        loaded += next(batches)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Speed(loaded / seconds, 1e3 * cpu_seconds / loaded)


def tutorial_speed(dataset: datasets.Dataset, processor: Any, examples: int) -> Speed:
    """How fast the tutorial's way is."""
    batches = tutorial_batches(dataset, processor)
    return measured((len(batch["labels"]) for batch in batches), examples, warm_up=2)


def speed(reader: RowReader, num_workers: int, examples: int) -> Speed:
    """How fast ours is with so many workers."""
    with Loading(windows(reader), num_workers=num_workers) as loading:
        arrivals = (len(window.rows) for window in loading)
        # Workers load ahead while nothing is timed: what they had ready then must be used up.
        return measured(arrivals, examples, warm_up=1 + 2 * num_workers)


def decoding_speed(dataset: datasets.Dataset, examples: int) -> Speed:
    """How fast pictures are decoded when nothing else is done."""
    column = "image" if "image" in dataset.column_names else "image_path"
    numbers = itertools.cycle(range(len(dataset)))
    paths = None if column == "image" else dataset[column][:]

    def decoded(number: int) -> int:
        if paths is None:
            dataset[number]  # `datasets` decodes when the row is asked for
        else:
            Image.open(paths[number]).load()
        return 1

    return measured(map(decoded, numbers), examples, warm_up=0)


def draft_difference(dataset: datasets.Dataset, processor: Any, folder: Path) -> dict[str, float]:
    """Levels of 255 between the squares of pictures decoded small and in full: mean and largest."""
    squares = []
    for way in (Way(), Way(draft=True)):
        reader = way.reader(dataset, processor, folder)
        pixels = [square for row in range(len(dataset)) for square in reader.read(row)[1]]
        squares.append(torch.stack(pixels).float())
    levels = (squares[0] - squares[1]).abs()
    return {"mean": float(levels.mean()), "max": float(levels.max())}


def private_mib() -> float:
    """Memory of this process and its workers that nobody shares, in MiB."""
    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().uss for member in family) / 2**20


def memory(reader: RowReader, num_workers: int, examples: int) -> list[int]:
    """Private memory in MiB at the start and after every tenth of so many examples of ours."""
    marks = [round(examples * tenth / 10) for tenth in range(11)]
    taken: list[int] = []
    with Loading(windows(reader), num_workers=num_workers) as loading:
        for _ in range(1 + 2 * num_workers):
            next(loading)
        loaded = 0
        while len(taken) < len(marks):
            if loaded >= marks[len(taken)]:
                taken.append(round(private_mib()))
                continue
            loaded += len(next(loading).rows)
    return taken


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a Markdown table and JSON, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=64, help="distinct files, read in turn")
    parser.add_argument("--size", type=int, nargs=2, default=[734, 1024], help="width and height")
    parser.add_argument("--examples", type=int, default=128, help="per round and way")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all ways, in turn")
    parser.add_argument("--caches", choices=["disk", "memory"], nargs="*", default=["disk"])
    parser.add_argument("--json", type=Path, help="file for what is printed as JSON")
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
    ways = [Way(None), *map(Way, options.workers)]
    first_way = ways[1]  # by default in the main process
    for draft in (False, True):
        ways += [Way(0, None, draft)] if draft else []
        ways += [Way(0, cache, draft) for cache in options.caches]
    summary: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {**library_versions(), "pillow": PIL.__version__},
        "kinds": {},
    }
    columns = ["pictures", "kB each", *map(str, ways), "ratio", "decoding: ours", "tutorial"]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in options.kinds:
            dataset = make_rows(kind, folder, options.pictures, tuple(options.size))
            files = list(folder.glob("*.png" if kind == "png" else "*.jpg"))
            speeds = compare(dataset, processor, ways, options, folder / "kept")
            median = {
                way: statistics.median(speed.per_second for speed in rounds)
                for way, rounds in speeds.items()
            }
            first = median[str(first_way)]
            record = {
                "kilobytes": sum(path.stat().st_size for path in files) / len(files) / 1e3,
                "examples_per_second": median,
                "rounds": {
                    way: [speed.per_second for speed in rounds] for way, rounds in speeds.items()
                },
                "cpu_ms": {
                    way: statistics.median(speed.cpu_ms for speed in rounds)
                    for way, rounds in speeds.items()
                    if "worker" not in way or way == "0 workers"  # workers have their own
                },
                "ratio": first / median["tutorial"],
                "decoding_share": first / median["decoding"],
                "decoding_share_tutorial": median["tutorial"] / median["decoding"],
                "draft_difference": draft_difference(dataset, processor, folder / "kept"),
            }
            if options.memory_examples:
                reader = first_way.reader(dataset, processor, folder)
                record["private_mib"] = {
                    str(Way(n)): memory(reader, n, options.memory_examples) for n in options.workers
                }
            summary["kinds"][kind] = record
            shares = [record["decoding_share"], record["decoding_share_tutorial"]]
            cells = [kind, f"{record['kilobytes']:.0f}"]
            cells += [f"{median[str(way)]:.1f}" for way in ways]
            cells += [f"{record['ratio']:.2f}", *(f"{share:.0%}" for share in shares)]
            print("| " + " | ".join(cells) + " |", flush=True)
    told = json.dumps(summary, indent=2)
    print(told)
    if options.json is not None:
        options.json.write_text(told + "\n")
    return summary


def compare(
    dataset: datasets.Dataset,
    processor: Any,
    ways: list[Way],
    options: argparse.Namespace,
    folder: Path,
) -> dict[str, list[Speed]]:
    """The speed of each way and of decoding alone, round by round."""
    work: dict[str, Callable[[], Speed]] = {
        "decoding": lambda: decoding_speed(dataset, options.examples)
    }
    for way in ways:
        if way.num_workers is None:
            work[str(way)] = lambda: tutorial_speed(dataset, processor, options.examples)
            continue
        reader = way.reader(dataset, processor, folder)
        work[str(way)] = partial(speed, reader, way.num_workers, options.examples)
    speeds: dict[str, list[Speed]] = {way: [] for way in work}
    for _ in range(options.rounds):
        for way, measure in work.items():
            speeds[way].append(measure())
    return speeds


if __name__ == "__main__":
    main()
