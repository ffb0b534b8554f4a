"""Decoded pictures that are kept, and JPEGs decoded small, from rows to tensors and restarts."""

import copy
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import config_of, same
from PIL import Image
from runs_0_1 import write

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.images.kept import KeptInMemory, KeptOnDisk
from idefics_qlora.images.opening import open_image
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.training.inputs import check_inputs

DRAFT = ImageAccess(draft=True)


def scan(path, seed, width=500, height=400):
    """A JPEG with soft areas and grain, more than 4.5 times the side of the tiny model's square."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height))
    pixels = np.asarray(soft) + rng.normal(0, 8, (height, width, 1))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return path


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "scans").mkdir()
    files = [scan(tmp_path / "scans" / f"{i}.jpg", i) for i in range(12)]
    return [{"image": str(f), "text": f"scan {i}"} for i, f in enumerate(files)]


CAPTIONS = iq.Captions(answer=" {text}")


def opened_here(row):
    return iq.Example([open_image(row["image"]), "What is it?"], f" {row['text']}.")


def opened_later(row):
    return iq.Example([Path(row["image"]), "What is it?"], f" {row['text']}.")


@pytest.mark.parametrize(("where", "num_workers"), [("disk", 1), ("memory", 0), ("memory", 2)])
def test_a_run_with_kept_pictures_is_the_same(base, processor, rows, tmp_path, where, num_workers):
    """Over three epochs, with crops and evaluations: losses and weights equal to the bit."""
    ends = []
    for cache_images in (None, where):
        torch.manual_seed(0)
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(
            tmp_path / str(cache_images), max_steps=6, global_batch_size=6, eval_steps=3,
            cache_images=cache_images, num_workers=num_workers,
        )  # fmt: skip
        done = iq.train(model, processor, rows, rows[:3], config=config, to_example=opened_here)
        losses = [r[k] for r in done.log_history for k in ("loss", "eval_loss") if k in r]
        ends.append((losses, adapter_tensors(model)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])
    num_kept = len(list(KeptOnDisk(DEFAULT_ACCESS).folder.glob("*/*")))
    assert num_kept == (12 if where == "disk" else 0)


def table(rows, column="image"):
    return datasets.Dataset.from_list(rows).cast_column(column, datasets.Image())


@pytest.mark.parametrize("kind", ["files", "table", "opened here", "opened later"])
def test_every_kind_of_row_is_kept(processor, rows, kind, monkeypatch):
    """Known formats, tables of datasets and functions of the user's find what was kept."""
    to_example = {"opened here": opened_here, "opened later": opened_later}.get(kind, CAPTIONS)
    given = table(rows) if kind == "table" else rows
    plain = RowReader(given, "rows", to_example, Collator(processor))
    kept = KeptInMemory(2**24)
    reader = RowReader(given, "rows", to_example, Collator(processor, kept=kept))
    options = {"seed": 1, "global_batch_size": 6, "augment": True}
    first = [Windows(reader, **options)[w].batch.vision.pixel_values for w in range(4)]
    again = [Windows(plain, **options)[w].batch.vision.pixel_values for w in range(4)]
    assert all(map(torch.equal, first, again))
    found = []
    get = kept.get
    monkeypatch.setattr(kept, "get", lambda key: found.append(get(key)) or found[-1])
    reader.window([(i, ..., None) for i in range(12)])
    assert len(found) == 12
    assert all(image is not None for image in found)


@pytest.mark.parametrize("kind", ["files", "table", "opened here", "opened later"])
def test_a_draft_reaches_every_kind_of_row(processor, rows, kind):
    """Whoever opens the picture, the model's square decides how small it may be decoded."""
    to_example = {"opened here": opened_here, "opened later": opened_later}.get(kind, CAPTIONS)
    given = table(rows) if kind == "table" else rows
    reader = RowReader(given, "rows", to_example, Collator(processor, access=DRAFT))
    side = reader.collator.reader.side
    for index in range(3):
        _, (pixels,) = reader.read(index)
        small = open_image(rows[index]["image"], min_side=side)
        assert small.size == (250, 200)
        assert torch.equal(pixels, reader.collator.reader.pixels(small, None))
        _, (whole,) = RowReader(given, "rows", to_example, Collator(processor)).read(index)
        assert not torch.equal(pixels, whole)
        assert (pixels.float() - whole.float()).abs().mean() < 1


def test_evaluation_and_generation_see_what_training_sees(base, processor, rows, monkeypatch):
    """One access for all: the pixels are those of training without its crop."""
    seen = []
    forward = type(base).forward

    def watch(self, *args, **inputs):
        seen.append(inputs["pixel_values"])
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(base), "forward", watch)
    reader = RowReader(rows, "rows", CAPTIONS, Collator(processor, access=DRAFT))
    expected = reader.window([(0, ..., None)]).batch.inputs()["pixel_values"]
    iq.evaluate(base, processor, rows[:1], to_example=CAPTIONS, access=DRAFT)
    prompt = [Path(rows[0]["image"]), "What is it?"]
    iq.generate(base, processor, [prompt], access=DRAFT, max_new_tokens=1)
    assert [torch.equal(pixels, expected) for pixels in seen] == [True, True]
    assert not torch.equal(iq.evaluate(base, processor, rows[:1], to_example=CAPTIONS) and seen[-1],
                           expected)  # fmt: skip


@pytest.mark.parametrize("before", [False, True])
def test_a_run_keeps_to_its_way_of_decoding(base, processor, rows, tmp_path, before):
    """Pixels of two kinds in one run would be two runs; the error names the setting."""
    config = config_of(tmp_path, max_steps=1, save_steps=1, lr_scheduler_type="constant")
    options = {"to_example": CAPTIONS, "config": config}
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, access=ImageAccess(draft=before), **options)
    more = {**options, "config": config_of(tmp_path, max_steps=2, lr_scheduler_type="constant")}
    message = rf"ImageAccess.draft: was {before}, now {not before}"
    with pytest.raises(ValueError, match=message):
        iq.train(model, processor, rows, access=ImageAccess(draft=not before), **more)
    done = iq.train(model, processor, rows, access=ImageAccess(draft=before), **more)
    assert done.global_step == 2


def test_a_run_of_0_1_goes_on_without_draft_only(tmp_path):
    """Its checkpoints say nothing of it, and it decoded in full."""
    here = Path(write.__file__).parent
    shutil.copytree(here / "fp32", tmp_path / "run")
    model, processor = write.model_and_processor(iq.tiny.BASE)
    config = iq.TrainConfig(output_dir=tmp_path / "run", **write.COMMON, **write.RUNS["fp32"])
    cards = write.rows_of(here / "rows")
    with pytest.raises(ValueError, match="ImageAccess.draft: was False, now True"):
        iq.train(
            model, processor, cards[2:], cards[:2], config=config, access=DRAFT,
            to_example=write.example_of,
        )  # fmt: skip


def test_settings_without_effect_are_told(base, processor, rows, tmp_path, caplog):
    """Pictures that come decoded have nothing to keep; the line says how to give them."""

    def decoded(row):
        return iq.Example([Image.open(row["image"]).copy(), "What?"], f" {row['text']}.")

    for to_example, number in ((decoded, 1), (opened_here, 0)):
        caplog.clear()
        config = config_of(tmp_path / to_example.__name__, max_steps=1, cache_images="memory")
        model = iq.add_lora(copy.deepcopy(base))
        iq.train(model, processor, rows, config=config, to_example=to_example)
        told = [r.getMessage() for r in caplog.records if "without effect" in r.getMessage()]
        assert len(told) == number
        assert all(line.startswith("cache_images: without effect on train_rows") for line in told)


def test_the_first_rows_are_decoded_whatever_is_kept(base, processor, rows, tmp_path):
    """A second run finds all pictures kept; the time of its first rows is that of decoding."""
    for run in range(2):
        config = config_of(tmp_path / str(run), max_steps=2, cache_images="disk")
        model = iq.add_lora(copy.deepcopy(base))
        inputs = check_inputs(model, processor, rows, None, config, CAPTIONS, DEFAULT_ACCESS, {})
        files = list(KeptOnDisk(DEFAULT_ACCESS).folder.glob("*/*"))
        assert len(files) == 12 * run
        assert inputs.reading.seconds > 0
        assert inputs.reader.collator.kept is not None
        assert all(file.stat().st_mtime == 1000 for file in files)  # not used
        iq.train(model, processor, rows, config=config, to_example=CAPTIONS)
        for file in KeptOnDisk(DEFAULT_ACCESS).folder.glob("*/*"):
            os.utime(file, (1000, 1000))
