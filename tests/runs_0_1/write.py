"""Wrote the runs in this folder, with version 0.1.0 as of commit c850d24; kept to show how.

Each run has a checkpoint to go on from, and the one that the undisturbed run ended with. What
later versions write is of another format, so running this again would not give the same files.

    python tests/runs_0_1/write.py FOLDER    # into FOLDER/runs_0_1
"""

import json
import os
import shutil
import sys
from pathlib import Path

import datasets
from peft import LoraConfig

import idefics_qlora as iq

QUESTION = "Question: What's on the picture? Answer:"
COMMON = {
    "max_steps": 4,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 2,
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": None,
    "num_workers": 0,
}
RUNS = {
    # The learning rate is too high, so that the best checkpoint is the second.
    "fp32": {"precision": "fp32", "optim": "adamw_torch", "learning_rate": 0.05},
    "fp16": {"precision": "fp16"},
    "stream": {"precision": "fp32", "load_best_model_at_end": False},
}


def write_rows(folder: Path) -> None:
    """Ten cards as files, so that no other version draws them differently."""
    folder.mkdir(parents=True)
    texts = []
    for i, card in enumerate(iq.tiny.creature_cards(10, seed=0)):
        card["image"].save(folder / f"{i}.png")
        texts.append(f" This is {card['name']}." + " It is." * (i % 7))
    (folder / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")


def example_of(row: dict) -> iq.Example:
    """The example of a row of :func:`rows_of`."""
    return iq.Example([Path(row["file"]), QUESTION], row["text"])


def rows_of(folder: Path) -> list[dict]:
    """The rows that were written."""
    texts = json.loads((folder / "texts.json").read_text())
    return [{"file": str(folder / f"{i}.png"), "text": text} for i, text in enumerate(texts)]


def model_and_processor(base: str | Path) -> tuple:
    """The embedded base with adapters on q alone, so that the files are small."""
    model, processor = iq.load_model(base, device="cpu")
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj"])
    return iq.add_lora(model, lora), processor


def train(
    name: str, output_dir: Path, rows: list[dict], base: str | Path = iq.tiny.BASE, **later
) -> iq.TrainResult:
    """Train the run of this name, or go on with it; ``later`` are settings that 0.1 had not."""
    model, processor = model_and_processor(base)
    config = iq.TrainConfig(output_dir=output_dir, **{**COMMON, **RUNS[name]}, **later)
    if name == "stream":
        stream = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1)
        train_rows, eval_rows = stream, None
    else:
        train_rows, eval_rows = rows[2:], rows[:2]
    return iq.train(model, processor, train_rows, eval_rows, config=config, to_example=example_of)


def main() -> None:
    """Write rows and runs, with the checkpoints that the tests need."""
    os.chdir(sys.argv[1])  # checkpoints hold names of folders: relative ones
    shutil.copytree(iq.tiny.BASE, "base")
    folder = Path("runs_0_1")
    write_rows(folder / "rows")
    rows = rows_of(folder / "rows")
    for name in RUNS:
        result = train(name, folder / name, rows, base="base")
        best = result.best_checkpoint and result.best_checkpoint.name
        print(name, best, [record.get("eval_loss") for record in result.log_history])
        shutil.rmtree(folder / name / "checkpoint-1")
        if name != "fp32":  # there the best is older than the checkpoint to go on from
            shutil.rmtree(folder / name / "checkpoint-3")


if __name__ == "__main__":
    main()
