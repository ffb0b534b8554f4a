"""The arms of ``train.py``: ours and Hugging Face's Trainer on the same rows.

Past 400 lines: what an arm is, what it trains on, and how both sides are run are read together.

All arms see the same rows in the same order and count the same targets; Trainer gets a correct loss
(its own raises for IDEFICS) and our collator.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import PUBLISHED
from random_model import configuration, random_4bit_model, random_model
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from train_meter import Meter, matmul_rate
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import epoch_order
from idefics_qlora.families import FAMILIES, family_of_config
from idefics_qlora.model.base_weights import dequantize, unnest_if_small
from idefics_qlora.model.execution import Eager
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.precision import DTYPES, set_compute_dtype
from idefics_qlora.model.shapes import shape_of
from idefics_qlora.training.incoming import Incoming


@dataclass(frozen=True)
class Successor:
    """A base whose images are tokens of the text, and on what it is measured."""

    published: str
    """Its Hub id."""
    longest_edge: int
    """Pixels to which its processor resizes a picture."""
    picture: tuple[int, int]
    """Width and height of the benchmark's pictures."""
    quantized: bool = False

    def configuration(self) -> Any:
        """A new one."""
        return PUBLISHED[self.published].configuration()


SUCCESSORS = {
    "SmolVLM-256M": Successor("HuggingFaceTB/SmolVLM-256M-Instruct", 2048, (640, 480)),
    "SmolVLM2-500M": Successor("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 2048, (640, 480)),
    "SmolVLM2-2.2B": Successor("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 1536, (640, 480)),
    # As large as it sees pictures, and not cut into quarters.
    "Idefics2-8B": Successor("HuggingFaceM4/idefics2-8b", 980, (980, 980), quantized=True),
    "Idefics3-8B": Successor("HuggingFaceM4/Idefics3-8B-Llama3", 1456, (640, 480), quantized=True),
}

SEED = 42
QUESTION = "Question: What's on the picture? Answer:"


@dataclass(frozen=True)
class Arm:
    """One side of the comparison."""

    what: str
    step_s: float
    """Seconds that a step takes on one H200, roughly: what ``--minutes`` goes by."""
    trainer: bool = False
    """Hugging Face's Trainer instead of our loop."""
    micro_batch: str = "large"
    """``small`` (2 of the recipe's 16), ``large`` (all 16) or ``auto``."""
    precision: str = "fp16"
    fast: bool = True
    rows: str = "fixed"
    """``fixed`` length and one picture; ``mixed`` lengths and sometimes two; ``jpeg``: the latter
    from JPEG files of 734 x 1024 pixels."""
    many: bool = False
    """64 examples a step instead of 16."""
    dequantized: bool = False
    memory_gb: float | None = None
    """As if the GPU had no more."""
    loader: bool = True
    warmup: int | None = None
    """Steps before the first that counts, at full size; of many shapes, each is to be recorded."""
    """Without: the same few windows again and again, on the device."""
    recipe: bool = False
    """The whole run with two evaluations and two checkpoints, timed from ``train()`` to its end."""
    model: str = ""
    """One of ``SUCCESSORS``, on pictures whose tiles are text, without a loader; else IDEFICS."""
    window: int | None = None
    """Examples of a step at full size."""

    @property
    def base(self) -> tuple[bool | str, ...]:
        """Arms with the same can be measured in one process, one after the other."""
        return (self.model,) if self.model else (self.trainer, self.dequantized, self.precision)


ARMS = {
    "a": Arm("Trainer 2 x 8", 4.2, trainer=True, micro_batch="small"),
    "a-recipe": Arm("Trainer 2 x 8", 4.2, trainer=True, micro_batch="small", recipe=True),
    "c": Arm("ours 2 x 8", 0.45, micro_batch="small"),
    "c-recipe": Arm("ours 2 x 8", 0.45, micro_batch="small", recipe=True),
    "d": Arm("ours 16 x 1", 0.16),
    "d-recipe": Arm("ours 16 x 1", 0.16, recipe=True),
    "b-fp16": Arm("Trainer 16 x 1", 0.65, trainer=True),
    "b-bf16": Arm("Trainer 16 x 1, bf16", 0.55, trainer=True, precision="bf16"),
    "f": Arm("ours 16 x 1 with fast=False", 0.5, fast=False),
    "h": Arm("ours 16 x 1, base in 16 bits", 0.15, dequantized=True),
    "e": Arm("ours, auto, 64 a step, 80 GB", 0.65, micro_batch="auto", many=True, memory_gb=80),
    "d-mixed": Arm("ours 16 x 1", 0.25, rows="mixed", warmup=80),
    "g": Arm("ours 16 x 1 without a loader", 0.16, loader=False),
    "i": Arm("ours, auto, 24 GB", 0.2, micro_batch="auto", memory_gb=24),
    "d-jpeg": Arm("ours 16 x 1, JPEG files", 0.25, rows="jpeg", warmup=80),
    "a-mixed": Arm("Trainer 2 x 8", 4.2, trainer=True, micro_batch="small", rows="mixed"),
}
for _name, _window, *_step_s in (
    ("SmolVLM-256M", 16, 0.4, 1.6),
    ("SmolVLM2-500M", 16, 0.4, 1.7),
    ("SmolVLM2-2.2B", 16, 0.8, 2.0),
    ("Idefics2-8B", 8, 0.5, 1.5),
    ("Idefics3-8B", 8, 1.5, 3.0),
):
    for _who, _seconds in zip(("ours", "Trainer"), _step_s, strict=True):
        ARMS[f"{_name.lower()}{'-trainer' * (_who == 'Trainer')}"] = Arm(
            f"{_name}: {_who} 2 x {_window // 2}", _seconds, trainer=_who == "Trainer",
            micro_batch="small", precision="bf16", loader=False, model=_name, window=_window,
        )  # fmt: skip
"""What tells most comes first."""


@dataclass(frozen=True)
class Size:
    """How much an arm has to do."""

    micro_batch: int
    window: int
    window_many: int
    num_tokens: int
    mixed_tokens: tuple[int, int]
    warmup: int
    counted: int
    """With the warm-up, the recipe's steps."""
    profiled: int
    eval_rows: int
    picture: tuple[int, int]
    """Pixels of the JPEG files, and of pictures that are cut into tiles."""
    matmul: int
    """Rows and columns of the matrices whose product tells the device's rate."""

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.warmup + self.counted


SIZES = {
    "9b": Size(2, 16, 64, 97, (40, 160), 10, 30, 2, 27, (734, 1024), 8192),
    "small": Size(2, 4, 8, 40, (30, 48), 1, 3, 1, 2, (60, 80), 256),
    "tiny": Size(2, 4, 8, 40, (30, 48), 1, 3, 1, 2, (60, 80), 256),
}
"""``tiny`` is the embedded model; the others are architectures of ``random_model.py``."""
WARM_AGAIN = 3
"""Steps before those that are profiled: a shape runs eagerly, is recorded, and is replayed."""


def missing(arm: Arm, device: torch.device) -> str | None:
    """What an arm needs and does not find."""
    if arm.precision == "bf16" and not arm.model and device.type != "cuda":
        return "needs a CUDA GPU"
    return None


@dataclass
class Bench:
    """What the arms of one process share: the base, and what has been measured."""

    size: str
    device: torch.device
    num_workers: int
    base: Any = None
    processor: Any = None
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def model(self, arm: Arm) -> tuple[Any, Any]:
        """The base with fresh adapters, and its processor."""
        if self.base is None and arm.model:
            self.base, self.processor = self._successor(arm)
        if self.base is None:
            base, self.processor = iq.tiny.load_model(
                device=self.device if self.size == "tiny" else "cpu"
            )
            if self.size != "tiny":
                config = configuration(self.size)
                base = random_4bit_model(config, self.device)
                side = config.vision_config.image_size
                self.processor.image_processor.size = {"height": side, "width": side}
            # As load_model leaves it.
            dequantize(base) if arm.dequantized else unnest_if_small(base, self.device)
            self.base = base
        return iq.add_lora(self.base), self.processor

    def _successor(self, arm: Arm) -> tuple[Any, Any]:
        about = SUCCESSORS[arm.model]
        config = about.configuration()
        full = self.size == "9b"
        base, processor = iq.tiny.load_model(
            family=config.model_type,
            device="cpu" if full else self.device,
            quantize=about.quantized,
        )
        if full:
            at_full_size(arm.model, config, processor)
            base = random_model(
                config, self.device, quantize=about.quantized, dtype=DTYPES[arm.precision]
            )
        if about.quantized:
            unnest_if_small(base, self.device)
        return base, processor

    def size_of(self, arm: Arm) -> Size:
        """How much an arm has to do."""
        size = SIZES[self.size]
        if arm.model and self.size == "9b":
            assert arm.window is not None
            shape = SUCCESSORS[arm.model].picture
            return replace(size, window=arm.window, warmup=8, counted=20, picture=shape)
        if arm.warmup is None or self.size != "9b":
            return size
        return replace(size, warmup=arm.warmup)

    def measure(self, key: str) -> dict[str, Any]:
        """Train, and take down all figures of an arm.

        After the whole recipe of the same arm, its steps are this arm's, and only the GPU's work
        in a step is measured.
        """
        arm = ARMS[key]
        size = self.size_of(arm)
        transformers_logging.disable_progress_bar()
        if self.device.type == "cuda":
            fraction = 1.0
            if arm.memory_gb is not None:  # the rest of such a card is the CUDA context
                available = arm.memory_gb * 1e9 - 700 * 2**20
                total = torch.cuda.get_device_properties(self.device).total_memory
                fraction = min(1.0, available / total)
            torch.cuda.set_per_process_memory_fraction(fraction)
        others = list(self.done)
        started = time.perf_counter()
        model, processor = self.model(arm)
        built = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            window = size.window_many if arm.many else size.window
            rows = Rows(arm, size, size.steps * window, processor, Path(folder))
            run = partial(self._run, arm, model, rows, window)
            twin = self.done.get(f"{key}-recipe")
            if twin is not None:
                alone = ("seconds", "evaluations", "process")
                record = {name: twin[name] for name in twin if name not in alone}
                record["steps_of"] = f"{key}-recipe"
            else:
                meter = Meter(self.device, size.warmup, size.counted)
                record = {"build_s": built, **run(Path(folder) / "run", meter)}
                record |= self._rates(arm, rows, window, meter, record)
                if arm.model and not arm.trainer:
                    record |= self._estimate(arm, rows, record)
            if self.device.type == "cuda" and not arm.recipe and not (arm.model and arm.trainer):
                profiled = 1 if arm.micro_batch == "small" else size.profiled
                meter = Meter(self.device, WARM_AGAIN, 0, profiled)
                run(Path(folder) / "profiled", meter)
                record |= meter.profile()
                record["busy_share"] = min(1.0, record["busy_ms"] / record["step_ms"]["median"])
        record["process"] = {"after": others}
        self._forget(model)
        del model
        self._collect()
        self.done[key] = record
        return record

    def _run(
        self, arm: Arm, model: Any, rows: Rows, window: int, folder: Path, meter: Meter
    ) -> dict[str, Any]:
        """One run of ``train()``, or of Trainer."""
        size = self.size_of(arm)
        micro_batch: int | str = {"small": size.micro_batch, "large": window, "auto": "auto"}[
            arm.micro_batch
        ]
        # Trainer has no fp16 on a CPU.
        precision = arm.precision if self.device.type == "cuda" else "fp32"
        steps = meter.warmup + meter.counted + meter.profiled
        half = max(1, steps // 2)
        config = iq.TrainConfig(
            output_dir=folder,
            max_steps=steps,
            global_batch_size=window,
            micro_batch_size=micro_batch,
            precision=precision,
            augment=False,
            num_workers=self.num_workers,
            logging_steps=half,
            eval_steps=half,
            save_steps=half if arm.recipe else steps,
            load_best_model_at_end=arm.recipe,
            seed=SEED,
            fast=arm.fast,
        )
        meter.begin()
        result = (trainer if arm.trainer else ours)(arm, model, rows, config, meter)
        seconds = meter.seconds()
        record = {
            "micro_batch_size": micro_batch,
            "global_batch_size": window,
            "precision": precision,
            **result,
            **meter.memory(),
        }
        if not arm.recipe:
            del record["evaluations"]
            return record
        return record | {"seconds": seconds, "num_steps": steps}

    def _rates(
        self, arm: Arm, rows: Rows, window: int, meter: Meter, record: dict[str, Any]
    ) -> dict[str, Any]:
        """Figures of the counted steps, and what they are to be compared with."""
        size = self.size_of(arm)
        tokens = [
            sum(rows.num_tokens[i : i + window]) for i in range(0, len(rows.in_order), window)
        ]
        counted = slice(size.warmup * window, size.steps * window)
        num_tokens, num_images = sum(rows.num_tokens[counted]), sum(rows.num_images[counted])
        flops = operations(self.size, self.base.config, num_tokens, num_images)
        rate = matmul_rate(size.matmul, DTYPES[record["precision"]], self.device) / 1e12
        figures = meter.figures(tokens)
        seconds = figures["step_ms"]["median"] / 1e3
        figures |= {
            "matmul_tflops": rate,
            "examples_per_second": window / seconds,
            "tokens_per_second": num_tokens / size.counted / seconds,
            "share_of_matmul_rate": flops / size.counted / seconds / 1e12 / rate,
        }
        if arm.loader:
            figures["padding_share"] = 1 - num_tokens / meter.num_slots
        return figures

    def _estimate(self, arm: Arm, rows: Rows, record: dict[str, Any]) -> dict[str, Any]:
        """What the library expects a run to take."""
        estimate = iq.estimate_memory(
            self.base.config,
            text_tokens=max(rows.num_tokens),
            images=max(rows.num_images),
            micro_batch=record["micro_batch_size"],
            precision=record["precision"],
            quantize=SUCCESSORS[arm.model].quantized,
        )
        expected = estimate.peak() / 2**30
        return {
            "estimated_peak_gib": expected,
            "estimate_of_peak": expected / record["peak_allocated_gib"],
            "text_tokens": max(rows.num_tokens),
            "tiles": max(rows.num_images),
        }

    def _forget(self, model: Any) -> None:
        """Leave the base as it was before the adapters."""
        self.base = model.unload()
        vars(self.base).pop("peft_config", None)

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def at_full_size(name: str, config: Any, processor: Any) -> None:
    """Let a small base's processor cut pictures as that of one of ``SUCCESSORS`` does.

    The tokenizer stays: it has words of one token each.
    """
    longest, images = SUCCESSORS[name].longest_edge, processor.image_processor
    if config.model_type == "idefics2":
        images.size = {"shortest_edge": 378, "longest_edge": longest}
        images.do_image_splitting = False
    else:
        images.max_image_size = {"longest_edge": config.vision_config.image_size}
        images.size = {"longest_edge": longest}
    family: Any = family_of_config(config)
    processor.image_seq_len = family.tokens_of_a_tile(config)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def operations(size: str, config: Any, num_tokens: int, num_images: int) -> float:
    """Floating-point operations of forward and backward passes, nothing recomputed."""
    if size == "9b" and config.model_type == "idefics":  # with attention's scores and the adapters
        return 0.76e12 * num_images + 0.0322e12 * num_tokens
    return FAMILIES[config.model_type].training_flops(config, num_tokens, num_images)


class Rows:
    """An arm's examples, whose numbers of tokens and images are known beforehand."""

    def __init__(self, arm: Arm, size: Size, number: int, processor: Any, folder: Path) -> None:
        self.processor = processor
        self.collator = Collator(processor)
        # Cards are few and used again; reading and cropping them is done anew each time.
        cards = iq.tiny.creature_cards(min(64, number), seed=0)
        words = self._single_tokens(cards)
        rng = np.random.default_rng(0)
        if arm.rows == "jpeg":
            from data import picture

            for i, card in enumerate(cards):
                card["image"] = folder / f"{i}.jpg"
                picture(*size.picture, seed=i).save(card["image"], quality=90)
        if arm.model:
            cards = [{**card, "image": card["image"].resize(size.picture)} for card in cards[:16]]
        # Of one picture: its tiles, and its tokens beside the one that stands for it.
        pixels = self.collator.pixels([cards[0]["image"]])[0]
        self.tiles = self.collator.reader.num_tiles(pixels)
        self.image_tokens = len(self.collator.reader.image_token_ids(pixels)) - 1

        def example(i: int) -> iq.Example:
            fixed = arm.rows == "fixed"
            num_tokens = size.num_tokens if fixed else int(rng.integers(*size.mixed_tokens))
            num_images = 1 if fixed or i % 4 else 2
            pictures = [cards[(i + k) % len(cards)]["image"] for k in range(num_images)]
            prompt = [*pictures, QUESTION]
            short = self._num_tokens(iq.Example(prompt, " " + words[0]))
            text = rng.choice(words, max(1, num_tokens - short + 1))
            return iq.Example(prompt, " " + " ".join(text))

        drawn = [example(i) for i in range(number)]
        self.held_out = [example(i) for i in range(size.eval_rows)]
        # Ours draws its rows from the first list; Trainer gets them in the order of that drawing.
        self.drawn = drawn
        self.in_order = [drawn[i] for i in epoch_order(SEED, 0, number)]
        self.num_images = [len(example.prompt) - 1 for example in self.in_order]
        self.num_tokens = [
            self._num_tokens(example) + number * self.image_tokens
            for example, number in zip(self.in_order, self.num_images, strict=True)
        ]
        self.num_images = [number * self.tiles for number in self.num_images]

    def _num_tokens(self, example: iq.Example) -> int:
        (tokens,) = self.collator.tokens([example])
        return len(tokens.ids)

    def _single_tokens(self, cards: list[dict[str, Any]]) -> list[str]:
        words = sorted({word for card in cards for word in re.findall("[a-z]+", card["caption"])})
        count = self.processor.tokenizer
        base = len(count("a picture")["input_ids"])
        return [w for w in words if len(count(f"a picture {w}")["input_ids"]) == base + 1]


@contextmanager
def watched(meter: Meter) -> Iterator[None]:
    """Tell the meter of every micro-batch of ours: its room, and whether it was a mere replay."""
    fast, eager = FastPath.micro_batch_backward, Eager.micro_batch_backward

    def noted_fast(path: Any, batch: Any, *args: Any, lengths: Any, **options: Any) -> Any:
        tokens, counts = sum(lengths), path.counts
        before = counts.graphs + counts.eager
        loss = fast(path, batch, *args, lengths=lengths, **options)
        rows = shape_of(len(lengths), tokens, max(lengths), tokens, 1, 1).rows
        meter.note_slots(rows if batch.labels.is_cuda else tokens)
        meter.counts = counts
        if path.why_eager is None and counts.graphs + counts.eager > before:
            meter.note_cold()
        return loss

    def noted_eager(path: Any, batch: Any, *args: Any, **options: Any) -> Any:
        meter.note_slots(batch.input_ids.numel())
        return eager(path, batch, *args, **options)

    FastPath.micro_batch_backward = noted_fast  # type: ignore[method-assign]
    Eager.micro_batch_backward = noted_eager  # type: ignore[method-assign]
    try:
        yield
    finally:
        FastPath.micro_batch_backward = fast  # type: ignore[method-assign]
        Eager.micro_batch_backward = eager  # type: ignore[method-assign]


def ours(arm: Arm, model: Any, rows: Rows, config: iq.TrainConfig, meter: Meter) -> dict[str, Any]:
    """Our loop, with marks around what it calls for each window."""
    loop: Any = importlib.import_module(iq.train.__module__)
    train_step, finish_step, windows = loop.train_step, loop.finish_step, Incoming.windows

    def marked_step(state: Any, window: Any) -> Any:
        if not hasattr(state.scaler, "marked"):
            state.scaler.marked = True
            state.scaler.unscale_ = before(state.scaler.unscale_, meter.optimizer_begins)
        output = train_step(state, window)
        meter.step_ends()
        return output

    def marked_finish(run: Any) -> None:
        finish_step(run)
        meter.pause_ends()

    loop.train_step = marked_step
    if arm.recipe:
        loop.finish_step = marked_finish
    if not arm.loader:
        number = 2 if arm.model else 4
        Incoming.windows = lambda incoming: Repeated(windows(incoming), number)  # type: ignore
    try:
        with watched(meter):
            result = iq.train(
                *(model, rows.processor, rows.drawn, rows.held_out if arm.recipe else None),
                config=config,
            )
    finally:
        loop.train_step, loop.finish_step, Incoming.windows = train_step, finish_step, windows
    log = [record for record in result.log_history if "loss" in record]
    counts = meter.counts
    return {
        "losses": [record["loss"] for record in log],
        "evaluations": [r["eval_loss"] for r in result.log_history if "eval_loss" in r],
        "data_wait_ms": log[-1]["data_wait_s"] * 1e3,  # of the second half
        "micro_batch_size": result.metrics["micro_batch_size"],
        "skipped_windows": result.metrics["skipped_windows"],
        "graph_captures": counts.graphs if counts else 0,
        "graph_capture_s": counts.seconds if counts else 0.0,
        "micro_batches": {"replayed": counts.replayed, "eager": counts.eager} if counts else None,
    }


def before(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    """The function, with ``note()`` called first."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return noted


class Repeated:
    """A few windows that are there already, again and again."""

    def __init__(self, loading: Any, number: int = 4) -> None:
        with loading as windows:
            self._windows = itertools.cycle(list(itertools.islice(windows, number)))

    def __enter__(self) -> Iterator[Any]:
        return self._windows

    def __exit__(self, *_: object) -> None:
        pass


class Collate:
    """Trainer's batches; loader processes that are not forked get it pickled."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, examples: list[iq.Example]) -> dict[str, torch.Tensor]:
        """Our batch, and the labels as Trainer wants them."""
        batch = self.collator(examples)
        return {**batch.inputs(), "labels": batch.labels}


class Kept:
    """Trainer's batches made beforehand: the same few again and again, by the numbers of rows."""

    def __init__(self, collate: Collate, examples: list[iq.Example], size: int, pin: bool) -> None:
        self.size, self.batches = size, []
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size])
            self.batches.append({k: t.pin_memory() if pin else t for k, t in batch.items()})

    def __call__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """The batch that begins with this row."""
        return dict(self.batches[numbers[0] // self.size % len(self.batches)])


def trainer(
    arm: Arm, model: Any, rows: Rows, config: iq.TrainConfig, meter: Meter
) -> dict[str, Any]:
    """Hugging Face's Trainer on the same rows, with the loss that it should have."""
    set_compute_dtype(model, DTYPES[config.precision])
    waits: list[float] = []
    on_gpu = meter.device.type == "cuda"

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows.in_order)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            samples = super().get_batch_samples(*args, **kwargs)
            waits.append(time.perf_counter() - started)
            return samples

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if arm.recipe:
                meter.pause_ends()

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step_ends()

    def loss_function(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            meter.note_slots(labels.numel())
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return summed / (
            (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        )

    micro_batch = config.micro_batch_size
    assert isinstance(micro_batch, int)
    collate: Any = Collate(rows.collator)
    if not arm.loader:
        collate = Kept(collate, rows.in_order[: 2 * config.global_batch_size], micro_batch, on_gpu)
    this = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(config.output_dir),
            max_steps=config.max_steps,
            per_device_train_batch_size=micro_batch,
            per_device_eval_batch_size=config.eval_batch_size,
            gradient_accumulation_steps=config.global_batch_size // micro_batch,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            fp16=config.precision == "fp16",
            bf16=config.precision == "bf16",
            optim="paged_adamw_8bit",
            logging_steps=config.logging_steps,
            eval_strategy="steps" if arm.recipe else "no",
            eval_steps=config.eval_steps,
            save_strategy="steps" if arm.recipe else "no",
            save_steps=config.save_steps,
            load_best_model_at_end=arm.recipe,
            prediction_loss_only=True,
            label_names=["labels"],
            report_to="none",
            use_cpu=not on_gpu,
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu and arm.loader,
            dataloader_num_workers=config.num_workers if arm.loader else 0,
            disable_tqdm=True,
        ),
        train_dataset=rows.in_order if arm.loader else range(len(rows.in_order)),
        eval_dataset=rows.held_out if arm.recipe else None,
        data_collator=collate,
        compute_loss_func=loss_function,
        callbacks=[Marks()],
    )
    for callback in list(this.callback_handler.callbacks):
        if "Printer" in type(callback).__name__:  # it would print every record
            this.remove_callback(callback)
    accelerator = this.accelerator
    accelerator.clip_grad_norm_ = before(accelerator.clip_grad_norm_, meter.optimizer_begins)
    this.train()
    log = this.state.log_history
    second_half = waits[len(waits) // 2 :]
    return {
        "losses": [record["loss"] for record in log if "loss" in record],
        "evaluations": [record["eval_loss"] for record in log if "eval_loss" in record],
        "data_wait_ms": statistics.mean(second_half) * 1e3,
    }
