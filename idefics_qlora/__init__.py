"""Fine-tune IDEFICS vision-language models in 4 bits on one GPU.

import idefics_qlora as iq

model, processor = iq.load_model("HuggingFaceM4/idefics-9b")
model = iq.add_lora(model)
result = iq.train(model, processor, train_rows, eval_rows,
                  config=iq.TrainConfig(output_dir="runs/cards", max_steps=40))
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idefics_qlora import images, tiny
    from idefics_qlora.checkpoint import latest_checkpoint
    from idefics_qlora.config import TrainConfig
    from idefics_qlora.data.captions import Captions, pokemon_card_example
    from idefics_qlora.data.example import Example, Turn
    from idefics_qlora.data.files import load_rows
    from idefics_qlora.data.preview import Preview, preview_batch
    from idefics_qlora.data.workers import LoaderError
    from idefics_qlora.durable import CheckpointError
    from idefics_qlora.evaluation import metrics
    from idefics_qlora.evaluation.generation import generate, generate_iter
    from idefics_qlora.evaluation.held_out import evaluate
    from idefics_qlora.evaluation.image_use import ImageUse, image_use
    from idefics_qlora.images.access import BadImage, ImageAccess
    from idefics_qlora.machine import environment
    from idefics_qlora.model.adapters import add_lora
    from idefics_qlora.model.loading import load_finetuned, load_model
    from idefics_qlora.model.memory import MemoryEstimate, estimate_memory
    from idefics_qlora.model.saved_base import save_quantized
    from idefics_qlora.reporting.page import report
    from idefics_qlora.sharing.merge import merge
    from idefics_qlora.sharing.push import push
    from idefics_qlora.training.diagnostics import DeadAdapters
    from idefics_qlora.training.history import STOP
    from idefics_qlora.training.loop import train
    from idefics_qlora.training.result import TrainResult
    from idefics_qlora.training.window_pass import WindowTooLarge

_HOMES = {
    "checkpoint": ("latest_checkpoint",),
    "config": ("TrainConfig",),
    "data.captions": ("Captions", "pokemon_card_example"),
    "data.example": ("Example", "Turn"),
    "data.files": ("load_rows",),
    "data.preview": ("Preview", "preview_batch"),
    "data.workers": ("LoaderError",),
    "durable": ("CheckpointError",),
    "evaluation.generation": ("generate", "generate_iter"),
    "evaluation.held_out": ("evaluate",),
    "evaluation.image_use": ("ImageUse", "image_use"),
    "images.access": ("BadImage", "ImageAccess"),
    "machine": ("environment",),
    "model.adapters": ("add_lora",),
    "model.loading": ("load_finetuned", "load_model"),
    "model.memory": ("MemoryEstimate", "estimate_memory"),
    "model.saved_base": ("save_quantized",),
    "reporting.page": ("report",),
    "sharing.merge": ("merge",),
    "sharing.push": ("push",),
    "training.diagnostics": ("DeadAdapters",),
    "training.history": ("STOP",),
    "training.loop": ("train",),
    "training.result": ("TrainResult",),
    "training.window_pass": ("WindowTooLarge",),
}
"""Where each public name lives: a module is imported when one of its names is first used."""

_MODULES = {"images": "images", "metrics": "evaluation.metrics", "tiny": "tiny"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "STOP",
    "BadImage",
    "Captions",
    "CheckpointError",
    "DeadAdapters",
    "Example",
    "ImageAccess",
    "ImageUse",
    "LoaderError",
    "MemoryEstimate",
    "Preview",
    "TrainConfig",
    "TrainResult",
    "Turn",
    "WindowTooLarge",
    "__version__",
    "add_lora",
    "environment",
    "estimate_memory",
    "evaluate",
    "generate",
    "generate_iter",
    "image_use",
    "images",
    "latest_checkpoint",
    "load_finetuned",
    "load_model",
    "load_rows",
    "merge",
    "metrics",
    "pokemon_card_example",
    "preview_batch",
    "push",
    "report",
    "save_quantized",
    "tiny",
    "train",
]

__version__ = version("idefics_qlora")

# On a CPU with AVX512-BF16, bitsandbytes advises everybody who imports it to install a kernel for
# inference, of which training has no use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
