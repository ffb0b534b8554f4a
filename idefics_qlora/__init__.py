"""Fine-tune IDEFICS vision-language models in 4 bits on one GPU.

import idefics_qlora as iq

model, processor = iq.load_model("HuggingFaceM4/idefics-9b")
model = iq.add_lora(model)
result = iq.train(model, processor, train_rows, eval_rows,
                  config=iq.TrainConfig(output_dir="runs/cards", max_steps=40))
"""

from idefics_qlora import images, tiny
from idefics_qlora.checkpoint import latest_checkpoint
from idefics_qlora.config import TrainConfig
from idefics_qlora.data.example import Example
from idefics_qlora.data.files import load_rows
from idefics_qlora.data.formats import Captions
from idefics_qlora.data.preview import Preview, preview_batch
from idefics_qlora.evaluation import metrics
from idefics_qlora.evaluation.generation import generate
from idefics_qlora.evaluation.held_out import evaluate
from idefics_qlora.evaluation.image_use import ImageUse, image_use
from idefics_qlora.images.access import BadImage
from idefics_qlora.machine import environment
from idefics_qlora.model import cpu as _cpu  # noqa: F401 - first, it imports bitsandbytes quietly
from idefics_qlora.model.adapters import add_lora
from idefics_qlora.model.loading import load_finetuned, load_model
from idefics_qlora.model.memory import MemoryEstimate, estimate_memory
from idefics_qlora.training.diagnostics import DeadAdapters
from idefics_qlora.training.loop import train
from idefics_qlora.training.result import TrainResult

__all__ = [
    "BadImage",
    "Captions",
    "DeadAdapters",
    "Example",
    "ImageUse",
    "MemoryEstimate",
    "Preview",
    "TrainConfig",
    "TrainResult",
    "add_lora",
    "environment",
    "estimate_memory",
    "evaluate",
    "generate",
    "image_use",
    "images",
    "latest_checkpoint",
    "load_finetuned",
    "load_model",
    "load_rows",
    "metrics",
    "preview_batch",
    "tiny",
    "train",
]
