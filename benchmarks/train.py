"""Training at full size, ours and Hugging Face's Trainer's, each arm in a process of its own.

    python benchmarks/train.py --json benchmarks/results/h200.json       # a CUDA GPU of 80 GB
    python benchmarks/train.py --json ... --arms a d --rounds 1          # goes on in the same file
    python benchmarks/train.py --size tiny --device cpu --json tiny.json # the same code in seconds
    python benchmarks/train.py --tables benchmarks/results/*.json        # into docs/measurements.md

The architecture of idefics-9b with random weights in 4 bits and the recipe's LoRA. All arms see the
same rows in the same order and count the same targets; Trainer gets a correct loss (its own raises
for IDEFICS) and our collator. Arms take turns, so that a machine that slows down slows all of them.
What an arm needs and the installed library lacks is reported as not available. Figures are of the
counted steps; the profiler runs in a few steps after them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import itertools
import json
import multiprocessing
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import configuration, random_4bit_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import epoch_order
from idefics_qlora.families import FAMILIES
from idefics_qlora.machine import environment, library_versions
from idefics_qlora.model.precision import DTYPES, set_compute_dtype

SEED = 42
QUESTION = "Question: What's on the picture? Answer:"
DOCS = Path(__file__).parent.parent / "docs" / "measurements.md"
BEGIN, END = "<!-- written by benchmarks/train.py -->\n", "<!-- end of what it wrote -->\n"


@dataclass(frozen=True)
class Arm:
    """One side of the comparison."""

    what: str
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
    """Without: the same few windows again and again, on the device."""
    recipe: bool = False
    """The whole run with two evaluations and two checkpoints, timed from ``train()`` to its end."""


ARMS = {
    "a": Arm("Trainer 2 x 8", trainer=True, micro_batch="small"),
    "b-fp16": Arm("Trainer 16 x 1", trainer=True),
    "b-bf16": Arm("Trainer 16 x 1, bf16", trainer=True, precision="bf16"),
    "c": Arm("ours 2 x 8", micro_batch="small"),
    "d": Arm("ours 16 x 1"),
    "e": Arm("ours, auto, 64 a step, 80 GB", micro_batch="auto", many=True, memory_gb=80),
    "f": Arm("ours 16 x 1 with fast=False", fast=False),
    "g": Arm("ours 16 x 1 without a loader", loader=False),
    "h": Arm("ours 16 x 1, base in 16 bits", dequantized=True),
    "i": Arm("ours, auto, 24 GB", micro_batch="auto", memory_gb=24),
    "a-mixed": Arm("Trainer 2 x 8", trainer=True, micro_batch="small", rows="mixed"),
    "d-mixed": Arm("ours 16 x 1", rows="mixed"),
    "d-jpeg": Arm("ours 16 x 1, JPEG files", rows="jpeg"),
    "a-recipe": Arm("Trainer 2 x 8", trainer=True, micro_batch="small", recipe=True),
    "c-recipe": Arm("ours 2 x 8", micro_batch="small", recipe=True),
    "d-recipe": Arm("ours 16 x 1", recipe=True),
}


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
    profiled: int
    recipe_steps: int
    eval_rows: int
    picture: tuple[int, int]
    """Pixels of the JPEG files."""
    matmul: int
    """Rows and columns of the matrices whose product tells the device's rate."""


SIZES = {
    "9b": Size(2, 16, 64, 97, (40, 160), 10, 30, 2, 40, 27, (734, 1024), 8192),
    "small": Size(2, 4, 8, 40, (30, 48), 1, 3, 1, 2, 2, (60, 80), 256),
    "tiny": Size(2, 4, 8, 40, (30, 48), 1, 2, 1, 2, 2, (60, 80), 256),
}
"""``tiny`` is the embedded model; the others are architectures of ``full_size.py``."""


def missing(arm: Arm, device: torch.device) -> str | None:
    """What an arm needs and does not find."""
    fields = {field.name for field in dataclasses.fields(iq.TrainConfig)}
    if not arm.trainer and arm.fast and "fast" not in fields:
        return "TrainConfig has no field 'fast'"
    if arm.dequantized and "base_weights" not in inspect.signature(iq.load_model).parameters:
        return "load_model has no argument 'base_weights'"
    if arm.precision == "bf16" and device.type != "cuda":
        return "needs a CUDA GPU"
    return None


# --- one arm, in its own process -----------------------------------------------------------------


def run_arm(key: str, options: argparse.Namespace, file: Path) -> None:
    """Write an arm's record, whatever happens short of a crash."""
    try:
        record = measure(ARMS[key], options)
    except Exception as error:
        traceback.print_exc()
        record = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    file.write_text(json.dumps(record))


def measure(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and take down all figures."""
    device, size = torch.device(options.device), SIZES[options.size]
    transformers_logging.disable_progress_bar()
    if device.type == "cuda":
        device = torch.device("cuda:0")
        torch.cuda.set_device(device)
        if arm.memory_gb is not None:  # the rest of such a card is the CUDA context
            available = arm.memory_gb * 1e9 - 700 * 2**20
            fraction = available / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
    started = time.perf_counter()
    model, processor = load(arm, options.size, device)
    built = time.perf_counter() - started

    window = size.window_many if arm.many else size.window
    micro_batch: int | str = {"small": size.micro_batch, "large": window, "auto": "auto"}[
        arm.micro_batch
    ]
    precision = arm.precision if device.type == "cuda" else "fp32"  # Trainer has no fp16 on a CPU
    steps = size.recipe_steps if arm.recipe else size.warmup + size.counted + size.profiled
    meter = Meter(size, device)
    meter.watch_captures()
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(arm, size, steps * window, processor, Path(folder))
        config = iq.TrainConfig(
            output_dir=Path(folder) / "run",
            max_steps=steps,
            global_batch_size=window,
            micro_batch_size=micro_batch,
            precision=precision,
            augment=False,
            num_workers=options.workers,
            logging_steps=max(1, steps // 2),
            eval_steps=max(1, steps // 2),
            save_steps=max(1, steps // 2) if arm.recipe else steps,
            load_best_model_at_end=arm.recipe,
            seed=SEED,
            **({} if arm.trainer or arm.fast else slow()),
        )
        embedding = model.get_input_embeddings().register_forward_hook(meter.note_batch)
        train = trainer if arm.trainer else ours
        meter.begin()
        result = train(arm, model, processor, rows, config, meter)
        seconds = meter.seconds_since_begin()
        embedding.remove()

    record: dict[str, Any] = {
        "micro_batch_size": result.get("micro_batch_size", micro_batch),
        "global_batch_size": window,
        "precision": precision,
        "build_s": built,
        "losses": result["losses"],
        "skipped_windows": result.get("skipped_windows"),
        "warmup_s": meter.first_step_s,
        "data_wait_ms": result["data_wait_ms"],
        **meter.memory(),
        **meter.captures(),
        "matmul_tflops": matmul_rate(size.matmul, DTYPES[precision], device) / 1e12,
    }
    if arm.recipe:
        return record | {"seconds": seconds, "steps": steps, "evaluations": result["evaluations"]}
    counted = slice(size.warmup * window, (size.warmup + size.counted) * window)
    tokens, images = sum(rows.num_tokens[counted]), sum(rows.num_images[counted])
    flops = operations(options.size, model.get_base_model().config, tokens, images)
    record |= meter.figures()
    median = record["step_ms"]["median"] / 1e3
    per_step = {name: value / size.counted for name, value in (("t", tokens), ("f", flops))}
    record["examples_per_second"] = window / median
    record["tokens_per_second"] = per_step["t"] / median
    record["share_of_matmul_rate"] = per_step["f"] / median / 1e12 / record["matmul_tflops"]
    if arm.loader:
        record["padding_share"] = 1 - tokens / meter.num_slots
    if record["busy_ms"] is not None:
        record["busy_share"] = min(1.0, record["busy_ms"] / record["step_ms"]["median"])
    return record


def operations(size: str, config: Any, num_tokens: int, num_images: int) -> float:
    """Floating-point operations of forward and backward passes, nothing recomputed."""
    if size == "9b":  # with attention's scores and the adapters
        return 0.76e12 * num_images + 0.0322e12 * num_tokens
    return FAMILIES["idefics"].training_flops(config, num_tokens, num_images)


def slow() -> dict[str, bool]:
    """The setting of 0.1's way; a library without it has no other."""
    fields = {field.name for field in dataclasses.fields(iq.TrainConfig)}
    return {"fast": False} if "fast" in fields else {}


def load(arm: Arm, size: str, device: torch.device) -> tuple[Any, Any]:
    """The model with fresh adapters, and its processor."""
    base, processor = iq.tiny.load_model(device=device if size == "tiny" else "cpu")
    if size != "tiny":
        config = configuration(size)
        base = random_4bit_model(config, device)
        side = config.vision_config.image_size
        processor.image_processor.size = {"height": side, "width": side}
    if size != "tiny" or arm.dequantized:  # as load_model leaves it
        from idefics_qlora.model.base_weights import dequantize, unnest_if_small

        dequantize(base) if arm.dequantized else unnest_if_small(base, device)
    return iq.add_lora(base), processor


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
        self.num_tokens = [self._num_tokens(example) for example in self.in_order]
        self.num_images = [len(example.prompt) - 1 for example in self.in_order]

    def _num_tokens(self, example: iq.Example) -> int:
        (tokens,) = self.collator.tokens([example])
        return len(tokens.ids)

    def _single_tokens(self, cards: list[dict[str, Any]]) -> list[str]:
        words = sorted({word for card in cards for word in re.findall("[a-z]+", card["caption"])})
        count = self.processor.tokenizer
        base = len(count("a picture")["input_ids"])
        return [w for w in words if len(count(f"a picture {w}")["input_ids"]) == base + 1]


class Meter:
    """Marks the ends of steps and what is between them, without a wait that was not there."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self.device = device
        self.first_step_s: float | None = None
        self.num_slots = 0
        """Text positions of the counted steps' batches, the padding included."""
        self._step = 0
        self._ends: list[Any] = []
        self._optimizer: list[tuple[Any, Any]] = []
        self._optimizer_began: Any = None
        self._profile: Any = None
        self._trace: list[dict[str, Any]] = []
        self._capture_seconds: list[float] = []

    def begin(self) -> None:
        """What came before is no part of the measurement."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def seconds_since_begin(self) -> float:
        """With all that the device has been given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self._began

    def optimizer_begins(self) -> None:
        """Gradients are complete; unscaling and clipping come next."""
        self._optimizer_began = self._mark()

    def step_ends(self) -> None:
        """The weights are updated and the gradients cleared."""
        mark = self._mark()
        self._ends.append(mark)
        if self._optimizer_began is not None:
            self._optimizer.append((self._optimizer_began, mark))
        self._optimizer_began = None
        self._step += 1
        if self._step == 1:
            self.first_step_s = self.seconds_since_begin()
        profile_from = self.size.warmup + self.size.counted
        if self._step == profile_from and self.device.type == "cuda":
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.__enter__()
        if self._step == profile_from + self.size.profiled and self._profile is not None:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(file))
                self._trace = json.loads(file.read_text())["traceEvents"]
            self._profile = None

    def note_batch(self, _: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        """A hook of the embedding, which runs outside of captured graphs."""
        if self.size.warmup <= self._step < self.size.warmup + self.size.counted:
            self.num_slots += args[0].numel()

    def figures(self) -> dict[str, Any]:
        """Times of the counted steps, and what the profiler saw."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        last = self.size.warmup + self.size.counted
        ends = self._ends[self.size.warmup - 1 : last]
        steps = sorted(itertools.starmap(self._ms, itertools.pairwise(ends)))
        optimizer = [self._ms(*pair) for pair in self._optimizer[self.size.warmup : last]]
        figures: dict[str, Any] = {
            "steps": len(steps),
            "step_ms": {
                "p10": float(np.quantile(steps, 0.1)),
                "median": statistics.median(steps),
                "p90": float(np.quantile(steps, 0.9)),
            },
            "optimizer_ms": statistics.median(optimizer) if optimizer else None,
        }
        return figures | self._profiled()

    def memory(self) -> dict[str, float]:
        """The most that was in use: of the GPU, or of the process."""
        if self.device.type == "cuda":
            return {
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            }
        import resource

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_allocated_gib": resident / 2**30, "peak_reserved_gib": resident / 2**30}

    def captures(self) -> dict[str, float]:
        """CUDA graphs captured so far, and the seconds they took."""
        return {
            "graph_captures": len(self._capture_seconds),
            "graph_capture_s": sum(self._capture_seconds),
        }

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, a: Any, b: Any) -> float:
        return float((b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b))

    def watch_captures(self) -> None:
        """Time every capture of a CUDA graph in this process from now on."""
        graph, seconds = torch.cuda.graph, self._capture_seconds
        enter, leave = graph.__enter__, graph.__exit__

        def timed_enter(context: Any) -> Any:
            context.began = time.perf_counter()
            return enter(context)

        def timed_leave(context: Any, *error: Any) -> Any:
            result = leave(context, *error)
            seconds.append(time.perf_counter() - context.began)
            return result

        graph.__enter__, graph.__exit__ = timed_enter, timed_leave

    def _profiled(self) -> dict[str, Any]:
        events = [e for e in self._trace if e.get("ph") == "X"]
        on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        if not on_gpu:
            names = ("busy_ms", "kernels_per_step", "syncs_per_step", "gpu_ms")
            return dict.fromkeys(names)
        busy, until = 0.0, -1.0
        for event in sorted(on_gpu, key=lambda e: float(e["ts"])):
            start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        by_kind: dict[str, float] = {}
        for event in on_gpu:
            kind = kind_of(event["name"], event["cat"])
            by_kind[kind] = by_kind.get(kind, 0.0) + float(event["dur"])
        syncs = [e for e in events if re.fullmatch(SYNC, str(e.get("name")))]
        steps = self.size.profiled
        return {
            "busy_ms": busy / 1e3 / steps,
            "kernels_per_step": sum(e["cat"] == "kernel" for e in on_gpu) / steps,
            # The profiler's end is one of them.
            "syncs_per_step": max(0, len(syncs) - 1) / steps,
            "gpu_ms": {kind: us / 1e3 / steps for kind, us in sorted(by_kind.items())},
        }


SYNC = r"cuda(Stream|Device|Event)Synchronize"
KINDS = {
    "dequantisation": r"kDequantize",
    "optimizer": r"kOptimizer|multi_tensor_apply|amp_update|FusedAdam",
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitK|gemv",
    "copies": r"direct_copy|CatArray|copy_kernel",
}


def kind_of(name: str, category: str) -> str:
    """What a kernel does, by its name; what is in no list is elementwise or a reduction."""
    if category != "kernel":
        return "copies"
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "elementwise")


def ours(
    arm: Arm, model: Any, _: Any, rows: Rows, config: iq.TrainConfig, meter: Meter
) -> dict[str, Any]:
    """Our loop, with marks around what it calls for each window."""
    loop: Any = importlib.import_module(iq.train.__module__)
    train_step, windows = loop.train_step, loop.Run.windows

    def marked_step(state: Any, window: Any) -> Any:
        if not hasattr(state.scaler, "marked"):
            state.scaler.marked = True
            state.scaler.unscale_ = before(state.scaler.unscale_, meter.optimizer_begins)
        output = train_step(state, window)
        meter.step_ends()
        return output

    loop.train_step = marked_step
    if not arm.loader:
        loop.Run.windows = lambda run: Repeated(windows(run), run.state.device)
    try:
        result = iq.train(
            model, rows.processor, rows.drawn, rows.held_out if arm.recipe else None, config=config
        )
    finally:
        loop.train_step, loop.Run.windows = train_step, windows
    log = [record for record in result.log_history if "loss" in record]
    return {
        "losses": [record["loss"] for record in log],
        "evaluations": [r["eval_loss"] for r in result.log_history if "eval_loss" in r],
        "data_wait_ms": log[-1]["data_wait_s"] * 1e3,  # of the second half
        "micro_batch_size": result.metrics["micro_batch_size"],
        "skipped_windows": result.metrics["skipped_windows"],
    }


def before(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    """The function, with ``note()`` called first."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return noted


class Repeated:
    """A few windows on the device, again and again."""

    def __init__(self, loading: Any, device: torch.device, number: int = 4) -> None:
        with loading as windows:
            taken = [window.to(device) for window in itertools.islice(windows, number)]
        self._windows = itertools.cycle(taken)

    def __enter__(self) -> Iterator[Any]:
        return self._windows

    def __exit__(self, *_: object) -> None:
        pass


def trainer(
    arm: Arm, model: Any, _: Any, rows: Rows, config: iq.TrainConfig, meter: Meter
) -> dict[str, Any]:
    """Hugging Face's Trainer on the same rows, with the loss that it should have."""
    set_compute_dtype(model, DTYPES[config.precision])
    collator, waits = rows.collator, []
    on_gpu = meter.device.type == "cuda"

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows.in_order)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            samples = super().get_batch_samples(*args, **kwargs)
            waits.append(time.perf_counter() - started)
            return samples

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step_ends()

    def collate(examples: list[iq.Example]) -> dict[str, torch.Tensor]:
        batch = collator(examples)
        return {**batch.inputs(), "labels": batch.labels}

    def loss_function(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return summed / (
            (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        )

    micro_batch = config.micro_batch_size
    assert isinstance(micro_batch, int)
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
            dataloader_pin_memory=on_gpu,
            dataloader_num_workers=config.num_workers,
            disable_tqdm=True,
        ),
        train_dataset=rows.in_order,
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


def matmul_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large product, in the minute of the measurement."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    for _ in range(5):
        a @ b
    meter_start = time.perf_counter()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    for _ in range(20):
        a @ b
    if device.type == "cuda":
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    else:
        seconds = time.perf_counter() - meter_start
    return 20 * 2 * side**3 / seconds


# --- all arms, in turn ---------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run the arms in turn and add each record to the file as soon as it is there."""
    device = torch.device(options.device)
    # Forking spares a CPU the imports; CUDA does not survive it.
    processes = multiprocessing.get_context("spawn" if device.type == "cuda" else "fork")
    content: dict[str, Any] = {"size": options.size, "records": []}
    if options.json.exists():
        content = json.loads(options.json.read_text())
        if content["size"] != options.size:
            raise SystemExit(f"{options.json} has figures of size {content['size']}")
    for round_ in range(options.rounds):
        for key in options.arms:
            arm = ARMS[key]
            record: dict[str, Any] = {"arm": key, "what": arm.what, "round": round_}
            why = missing(arm, device)
            if why is not None:
                record["not_available"] = why
            else:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "record.json"
                    process = processes.Process(target=run_arm, args=(key, options, file))
                    process.start()
                    process.join()
                    record |= (
                        json.loads(file.read_text())
                        if file.exists()
                        else {"error": f"the process ended with {process.exitcode}"}
                    )
                record |= {"at": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())}
            content["records"].append(record)
            content["versions"] = library_versions()
            content["environment"] = environment()
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1))
            print(line_of(record), flush=True)
    for problem in disagreements(content["records"]):
        print(f"LOSSES DIFFER: {problem}")
    return content


def line_of(record: dict[str, Any]) -> str:
    """One record, for somebody who watches."""
    start = f"{record['arm']:9s} {record['what']:32s}"
    for name in ("not_available", "error"):
        if name in record:
            return f"{start} {name.replace('_', ' ')}: {record[name]}"
    if "seconds" in record:
        return f"{start} {record['seconds']:8.1f} s for {record['steps']} steps"
    return f"{start} {record['examples_per_second']:8.2f} examples/s, losses {record['losses']}"


def disagreements(records: Iterable[dict[str, Any]], tolerance: float = 0.05) -> list[str]:
    """Arms that saw the same rows and whose loss over the first half of the steps differs."""
    groups: dict[Any, dict[str, float]] = {}
    for record in records:
        if record.get("losses"):
            arm = ARMS[record["arm"]]
            same_work = arm.rows, arm.many, arm.recipe, arm.loader
            groups.setdefault(same_work, {})[record["arm"]] = record["losses"][0]
    return [
        f"{losses}"
        for losses in groups.values()
        if max(losses.values()) - min(losses.values()) > tolerance * min(losses.values())
    ]


# --- tables --------------------------------------------------------------------------------------


def tables(content: dict[str, Any]) -> str:
    """A file's figures, the median of the rounds, as Markdown."""
    steps: dict[str, list[dict[str, Any]]] = {}
    recipes: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    for record in content["records"]:
        if why := record.get("not_available") or record.get("error"):
            absent[record["arm"]] = why
        else:
            kind = recipes if "seconds" in record else steps
            kind.setdefault(record["arm"], []).append(record)
    gpus = content["environment"]["gpus"]
    device = gpus[0]["name"] if gpus else f"{content['environment']['cpu']['architecture']} CPU"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [f"{device}, {versions}; medians of the rounds:", ""]

    def middle(records: list[dict[str, Any]], *path: str) -> float | None:
        values = []
        for record in records:
            value: Any = record
            for name in path:
                value = None if value is None else value.get(name)
            if value is not None:
                values.append(value)
        return statistics.median(values) if values else None

    def cell(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "examples/s": lambda r: cell(middle(r, "examples_per_second"), ".1f"),
        "tokens/s": lambda r: cell(middle(r, "tokens_per_second"), ".0f"),
        "of the matmul rate": lambda r: cell(middle(r, "share_of_matmul_rate"), ".0%"),
        "step, ms (p10 to p90)": lambda r: (
            f"{cell(middle(r, 'step_ms', 'median'), '.0f')} "
            f"({cell(middle(r, 'step_ms', 'p10'), '.0f')} to "
            f"{cell(middle(r, 'step_ms', 'p90'), '.0f')})"
        ),
        "GPU busy": lambda r: cell(middle(r, "busy_share"), ".0%"),
        "kernels": lambda r: cell(middle(r, "kernels_per_step"), ".0f"),
        "syncs": lambda r: cell(middle(r, "syncs_per_step"), ".1f"),
        "optimizer, ms": lambda r: cell(middle(r, "optimizer_ms"), ".1f"),
        "data wait, ms": lambda r: cell(middle(r, "data_wait_ms"), ".1f"),
        "padding": lambda r: cell(middle(r, "padding_share"), ".0%"),
        "peak GiB": lambda r: cell(middle(r, "peak_allocated_gib"), ".1f"),
        "reserved": lambda r: cell(middle(r, "peak_reserved_gib"), ".1f"),
        "graphs (s)": lambda r: (
            f"{cell(middle(r, 'graph_captures'), '.0f')} "
            f"({cell(middle(r, 'graph_capture_s'), '.1f')})"
        ),
        "to step 1, s": lambda r: cell(middle(r, "warmup_s"), ".1f"),
        "loss": lambda r: cell(statistics.median(record["losses"][0] for record in r), ".3f"),
    }
    lines += ["| arm | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for key, records in steps.items():
        arm = ARMS[key]
        name = f"({key.partition('-')[0]}) {arm.what}" + (", mixed" if arm.rows == "mixed" else "")
        cells = " | ".join(form(records) for form in columns.values())
        lines.append(f"| {name} | {cells} |")
    kinds = sorted({k for records in steps.values() for r in records for k in r["gpu_ms"] or {}})
    if kinds:
        lines += ["", "Where a step's time goes, in ms:", ""]
        lines += [f"| arm | {' | '.join(kinds)} | idle |", "| --- |" + " --- |" * (len(kinds) + 1)]
        for key, records in steps.items():
            cells = " | ".join(cell(middle(records, "gpu_ms", kind), ".1f") for kind in kinds)
            step, busy = middle(records, "step_ms", "median"), middle(records, "busy_ms")
            idle = None if step is None or busy is None else max(0.0, step - busy)
            lines.append(f"| {key} | {cells} | {cell(idle, '.1f')} |")
    if recipes:
        lines += ["", "| whole recipe | seconds | evaluations |", "| --- | --- | --- |"]
        for key, records in recipes.items():
            losses = ", ".join(f"{loss:.3f}" for loss in records[0]["evaluations"])
            seconds = cell(middle(records, "seconds"), ".1f")
            lines.append(f"| ({key[0]}) {ARMS[key].what} | {seconds} | {losses} |")
    ratios = []
    for a, b in (("d", "a"), ("c", "a"), ("d", "b-fp16"), ("d", "b-bf16"), ("d", "f"), ("h", "d")):
        if a in steps and b in steps:
            over = [middle(steps[key], "examples_per_second") for key in (a, b)]
            ratios.append(f"({a}) ÷ ({b}) = {over[0] / over[1]:.1f}")  # type: ignore[operator]
    if "d" in steps and "d-mixed" in steps:
        over = [middle(steps[key], "tokens_per_second") for key in ("d-mixed", "d")]
        ratios.append(f"mixed lengths ÷ fixed, per token: {over[0] / over[1]:.0%}")  # type: ignore[operator]
    if ratios:
        lines += ["", "; ".join(ratios) + "."]
    if absent:
        missing_arms = "; ".join(f"({key}) {why}" for key, why in absent.items())
        lines += ["", f"Not measured: {missing_arms}."]
    return "\n".join(lines) + "\n"


def write_tables(files: Iterable[Path], docs: Path) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        ValueError: If the page has no marks.
    """
    page = docs.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{docs}: expected the lines {BEGIN!r} and {END!r}")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    parts = [tables(json.loads(file.read_text())) for file in files]
    docs.write_text(head + BEGIN + "\n" + "\n".join(parts) + "\n" + END + tail)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the arms or write the tables; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="receives the records; what it has stays")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, help="loader processes; 6, or 0 on a CPU")
    parser.add_argument("--tables", type=Path, nargs="+", help="write these files' tables instead")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where to")
    options = parser.parse_args(arguments)
    if options.tables:
        write_tables(options.tables, options.docs)
        return {}
    if options.json is None:
        parser.error("--json FILE is needed")
    if options.workers is None:
        options.workers = 6 if options.device == "cuda" else 0
    return run_all(options)


if __name__ == "__main__":
    main()
