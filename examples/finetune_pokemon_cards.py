"""The IDEFICS fine-tuning tutorial on today's libraries: a model learns to describe cards.

    python examples/finetune_pokemon_cards.py                      # as the tutorial: one GPU, Hub
    python examples/finetune_pokemon_cards.py --max-steps 400 --micro-batch-size 8
    python examples/finetune_pokemon_cards.py --model HuggingFaceM4/idefics2-8b
    python examples/finetune_pokemon_cards.py --model FOLDER --dataset FOLDER         # offline

Every number of the tutorial is a flag with the tutorial's value as its default. Start it again
after an interruption and it goes on from the newest checkpoint. ``finetune_pokemon_cards.ipynb``
is the same as a notebook, chapter by chapter.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import LoraConfig

import idefics_qlora as iq
from idefics_qlora.data.captions import QUESTION, pokemon_card_example
from idefics_qlora.images.access import ImageAccess
from idefics_qlora.images.prefetch import prefetch_images


def main(arguments: list[str] | None = None) -> iq.TrainResult:
    """Caption a held-out card, train, caption it again."""
    options = parse(arguments)
    model, processor = iq.load_model(options.model)
    model = iq.add_lora(
        model,
        LoraConfig(
            r=options.lora_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj"],
        ),
        seed=options.seed,
    )
    model.print_trainable_parameters()

    rows = read(options.dataset, options.split).train_test_split(
        options.test_size, seed=options.seed
    )
    train_rows, eval_rows = rows["train"], rows["test"]
    print(f"{len(train_rows)} cards to learn from, {len(eval_rows)} held out")

    access = ImageAccess(allow_private_hosts=options.allow_private_hosts)
    to_example = partial(pokemon_card_example, question=options.question, access=access)
    if options.prefetch:
        for part in (train_rows, eval_rows):
            print(prefetch_images(part, access=access))

    def caption() -> str:
        prompt = to_example(eval_rows[0]).prompt
        return iq.generate(model, processor, [prompt], max_new_tokens=options.max_new_tokens)[0]

    print(f"card:   {eval_rows[0]['name']}. {eval_rows[0]['caption']}")
    print(f"before: {caption().strip()}")
    size = options.micro_batch_size
    micro_batch_size = "auto" if size == "auto" else int(size)
    result = iq.train(
        model,
        processor,
        train_rows,
        eval_rows,
        config=iq.TrainConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            global_batch_size=options.global_batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.lr_scheduler_type,
            warmup_steps=options.warmup_steps,
            precision=options.precision,
            gradient_checkpointing=options.gradient_checkpointing,
            logging_steps=options.logging_steps,
            eval_steps=options.eval_steps,
            save_steps=options.save_steps,
            save_total_limit=options.save_total_limit,
            eval_batch_size=options.eval_batch_size,
            loss_on=options.loss_on,
            seed=options.seed,
            num_workers="auto" if options.num_workers == "auto" else int(options.num_workers),
        ),
        to_example=to_example,
        on_log=lambda record: print({name: round(value, 6) for name, value in record.items()}),
    )
    if result.stopped_by:
        print(f"stopped by {result.stopped_by} after step {result.global_step}; start it again")
        return result
    print(f"after:  {caption().strip()}")
    print(f"{result.global_step} steps; the best adapter is in {result.best_checkpoint}")
    return result


def read(source: str, split: str) -> Dataset:
    """A dataset of the Hub, one saved with ``save_to_disk``, or a folder of data files."""
    folder = Path(source)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(source)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(source, split=split)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the tutorial's numbers."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)

    def flag(name: str, default: Any, text: str, **more: Any) -> None:
        kind = {} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=text, **kind, **more)

    base = "base model of any family: Hub id or folder"
    parser.add_argument("--model", "--checkpoint", default="HuggingFaceM4/idefics-9b", help=base)
    flag("dataset", "TheFusion21/PokemonCards", "dataset: Hub id or folder")
    flag("split", "train", "split of the dataset")
    flag("test-size", 0.002, "share of the cards held out")
    flag("output-dir", "runs/pokemon-cards", "folder for the checkpoints")
    flag("question", QUESTION, "prompt behind the picture")
    flag("lora-r", 16, "rank of the adapters")
    flag("lora-alpha", 32, "their scale is alpha / r")
    flag("lora-dropout", 0.05, "dropout in front of the adapters")
    flag("max-steps", 40, "optimizer steps")
    flag("global-batch-size", 16, "examples per optimizer step")
    flag("micro-batch-size", "auto", "examples per forward pass: a number, or what fits")
    flag("eval-batch-size", 2, "examples per evaluation forward pass")
    flag("learning-rate", 2e-4, "peak learning rate")
    flag("lr-scheduler-type", "linear", "decay", choices=["linear", "cosine", "constant"])
    flag("warmup-steps", 0, "optimizer steps of warm-up")
    flag("precision", "auto", "arithmetic", choices=["auto", "fp16", "bf16", "fp32"])
    flag("gradient-checkpointing", False, "save memory, cost time", action="store_true")
    flag("logging-steps", 20, "optimizer steps between log records")
    flag("eval-steps", 20, "optimizer steps between evaluations")
    flag("save-steps", 40, "optimizer steps between checkpoints")
    flag("save-total-limit", 3, "checkpoints to keep")
    flag("loss-on", "completion", "tokens to learn", choices=["completion", "all"])
    flag("max-new-tokens", 50, "length of the captions printed before and after")
    flag("seed", 42, "seed of split, adapters, order, crops and dropout")
    flag("allow-private-hosts", False, "open URLs of your own network", action="store_true")
    flag("prefetch", False, "download all pictures before training", action="store_true")
    flag("num-workers", "auto", "processes that fetch and prepare pictures; auto: as needed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    stopped_by = main().stopped_by
    sys.exit(128 + signal.Signals[stopped_by] if stopped_by else 0)
