"""Our loop and Hugging Face's Trainer on the same work, in turn, in one process.

    python benchmarks/loop.py
    python benchmarks/loop.py --steps 20 --rounds 5 --precision fp16     # on a CUDA GPU

Both train the same 4-bit model on the same rows with the same batch sizes, optimizer and schedule;
both load rows in the main process. Trainer gets a correct loss (its own raises for IDEFICS), and
our collator. Then it prints where our step's time goes, and what our collator saves over
``IdeficsProcessor``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.machine import library_versions
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.model.precision import DTYPES, autocast, set_compute_dtype
from idefics_qlora.training.flat import FlatAdamW


def ours(model: Any, processor: Any, rows: list[Any], config: iq.TrainConfig) -> float:
    """Optimizer steps per second of our loop, its start and its save included."""
    result = iq.train(model, processor, rows, config=config, to_example=pokemon_card_example)
    return result.metrics["train_steps_per_second"]


def theirs(model: Any, processor: Any, rows: list[Any], config: iq.TrainConfig) -> float:
    """Optimizer steps per second of Trainer on the same work."""
    collator = Collator(processor)
    set_compute_dtype(model, DTYPES[config.precision])

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collator([pokemon_card_example(item) for item in items])
        return {**batch.inputs(), "labels": batch.labels}

    def loss_function(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return summed / num_items_in_batch

    on_gpu = torch.cuda.is_available()
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(config.output_dir),
            max_steps=config.max_steps,
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            fp16=config.precision == "fp16",
            bf16=config.precision == "bf16",
            optim="paged_adamw_8bit",
            logging_steps=config.logging_steps,
            save_steps=config.save_steps,
            report_to="none",
            use_cpu=not on_gpu,
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=collate,
        compute_loss_func=loss_function,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if "Printer" in type(callback).__name__:  # it would print every record
            trainer.remove_callback(callback)
    return float(trainer.train().metrics["train_steps_per_second"])


def where_time_goes(
    model: Any, processor: Any, rows: list[Any], config: iq.TrainConfig
) -> dict[str, float]:
    """Share of a step's time in its parts, each timed with the device idle at its ends."""
    device = next(model.parameters()).device
    set_compute_dtype(model, DTYPES[config.precision])
    model.train()
    parameters = trainable_parameters(model)
    optimizer = FlatAdamW(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    reader = RowReader(rows, "rows", pokemon_card_example, Collator(processor))
    windows = Windows(
        reader,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        augment=config.augment,
    )
    seconds: dict[str, float] = dict.fromkeys(("load", "forward", "backward", "optimizer"), 0.0)

    def timed(part: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[part] += time.perf_counter() - start
        return result

    def forward(batch: Any) -> torch.Tensor:
        with autocast(device, DTYPES[config.precision]):
            logits = model(**batch.inputs(), use_cache=False).logits
        return summed_cross_entropy(logits, batch.labels) / 100

    def update() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    for step in range(4):
        if step == 1:  # the first one warms up
            seconds.update(dict.fromkeys(seconds, 0.0))
        window = timed("load", lambda step=step: windows[step])
        for batch in window.to(device).micro_batches(config.micro_batch_size):
            loss = timed("forward", lambda batch=batch: forward(batch))
            timed("backward", lambda loss=loss: scaler.scale(loss).backward())
        timed("optimizer", update)
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def collator_speedup(processor: Any) -> dict[str, float]:
    """Milliseconds for ids and masks of 16 examples of about 100 tokens, ours and theirs."""
    collator = Collator(processor)
    tokenizer = processor.tokenizer
    cards = iq.tiny.creature_cards(16, seed=0)
    prompts = []
    for card in cards:
        ids = tokenizer(card["caption"] * 6, add_special_tokens=False)["input_ids"][:90]
        prompts.append([card["image"], tokenizer.decode(ids)])
    blank = torch.zeros(3, collator.reader.side, collator.reader.side)
    pixels = [[blank.byte()]] * 16

    def median_ms(work: Callable[[], Any]) -> float:
        work()
        times = []
        for _ in range(30):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    our_way = median_ms(lambda: collator.collate(collator.prompt_tokens(prompts), pixels))
    # Its own `transform` option takes the image work out of the comparison.
    their_way = median_ms(
        lambda: processor(
            text=prompts, padding="longest", return_tensors="pt", transform=lambda image: blank
        )
    )
    return {"ours_ms": our_way, "processor_ms": their_way, "ratio": their_way / our_way}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each loop, in turn")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    precision = "fp16" if torch.cuda.is_available() else "fp32"  # Trainer has no fp16 on a CPU
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default=precision)
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()

    base, processor = iq.tiny.load_model()
    rows = iq.tiny.creature_cards(options.steps * 16, seed=0)
    iq.evaluate(base, processor, rows[:2], to_example=pokemon_card_example)  # warms up

    speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:

        def config(name: str) -> iq.TrainConfig:
            return iq.TrainConfig(
                output_dir=f"{folder}/{name}",
                max_steps=options.steps,
                micro_batch_size=options.micro_batch_size,
                precision=options.precision,
                fast=False,
                load_best_model_at_end=False,
                augment=False,
                num_workers=0,
            )

        for round_ in range(options.rounds):
            for name, loop in (("ours", ours), ("theirs", theirs)):
                model = iq.add_lora(copy.deepcopy(base))
                speeds[name].append(loop(model, processor, rows, config(f"{name}-{round_}")))
        parts = where_time_goes(iq.add_lora(copy.deepcopy(base)), processor, rows, config("parts"))

    medians = {name: statistics.median(values) for name, values in speeds.items()}
    summary = {
        "device": torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "precision": options.precision,
        "micro_batch_size": options.micro_batch_size,
        "steps_per_second": speeds,
        "ratio": medians["ours"] / medians["theirs"],
        "where_time_goes": parts,
        "collator": collator_speedup(processor),
        "versions": library_versions(),
    }
    print(json.dumps(summary, indent=2))
    return summary


if __name__ == "__main__":
    main()
