"""What several test files need besides fixtures."""

import dataclasses
import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

import idefics_qlora as iq
from idefics_qlora.checkpoint import load_checkpoint
from idefics_qlora.tiny.successors import BUILDERS

SUCCESSORS = sorted(BUILDERS)
every_family = pytest.mark.parametrize("family", ["idefics", *SUCCESSORS], indirect=True)
"""A test with this mark gets ``base``, ``processor`` and ``lora`` of each family in turn."""


def config_of(folder, **changes):
    """Settings of a short fp32 run without evaluation, computed as version 0.1 did."""
    settings = {
        "output_dir": folder,
        "max_steps": 4,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "fast": False,
        "precision": "fp32",
        "logging_steps": 1,
        "load_best_model_at_end": False,
        "num_workers": 0,
    }
    return iq.TrainConfig(**{**settings, **changes})


RUN_FILES = {
    *("config.yaml", "environment.json", "log.jsonl", "last", "result.json"),
    "report.html",
}
"""What each run that has come to its end writes beside its checkpoints."""
EVALUATED = {*RUN_FILES, "best", "gallery"}
"""The same, of a run with held-out rows."""
CLOCKS = ("seconds", "data_wait_s", "generate_s", "runtime", "per_second")
"""Ends of the names of what is measured, and differs between two equal runs."""
PLACES = ("output_dir", "resume", "num_workers")
"""Settings of a process, not of a run."""


def same(a, b):
    """Whether two dictionaries of tensors are equal to the bit, wherever each tensor lies."""
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def same_examples(a, b):
    """Whether two examples are equal, their pictures by pixels, however they were opened."""

    def plain(item):
        if isinstance(item, Image.Image):
            return item.size, item.tobytes()
        if isinstance(item, iq.Turn):
            return item.role, item.is_target, [plain(part) for part in item.content]
        return item

    assert [plain(item) for item in a.prompt] == [plain(item) for item in b.prompt]
    assert (a.completion, a.references) == (b.completion, b.references)
    return True


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def textured(side: int, seed: int) -> Image.Image:
    """Something like a photograph: soft areas, edges, and fine noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    image = Image.fromarray(noise).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for i in range(0, side, 37):
        draw.ellipse((i, i // 2, i + 90, i // 2 + 60), outline=(i % 256, 40, 200), width=1 + i % 5)
    grain = np.random.default_rng(seed).normal(0, 12, (*image.size[::-1], 1))
    pixels = np.asarray(image.filter(ImageFilter.SHARPEN)) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensors_of(checkpoint):
    """All tensors of a checkpoint: adapter, optimizer and random states."""
    snapshot = load_checkpoint(checkpoint)
    return {**snapshot.adapter, **snapshot.optimizer, **snapshot.rng}


def without_clocks(records):
    """Log records without what was measured."""
    return [{k: v for k, v in r.items() if not k.endswith(CLOCKS)} for r in records]


def content(checkpoint):
    """Everything a checkpoint holds, clocks and places aside."""
    snapshot = load_checkpoint(checkpoint)
    (state,) = without_clocks([json.loads(json.dumps(snapshot.state))])
    state["config"] = {k: v for k, v in state["config"].items() if k not in PLACES}
    state["log_history"] = without_clocks(state["log_history"])
    state.pop("run")
    return dataclasses.replace(snapshot, state=state)


def differences(a, b):
    """Names of what differs between two checkpoints: of a run, and of one that was interrupted."""
    a, b = content(a), content(b)
    found = [f"state {k}" for k in a.state if a.state[k] != b.state.get(k)]
    for name in ("adapter", "optimizer", "rng"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.keys() == y.keys()
        found += [f"{name} {key}" for key in x if not torch.equal(x[key], y[key])]
    if a.adapter_config != b.adapter_config:
        found.append("adapter_config")
    return found


def equal_batches(a, b):
    """Whether two batches hold the same tensors to the bit."""
    return same(a.tensors(), b.tensors())


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
