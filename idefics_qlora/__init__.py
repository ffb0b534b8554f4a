"""Fine-tune IDEFICS vision-language models in 4 bits on one GPU.

import idefics_qlora as iq

model, processor = iq.load_model("HuggingFaceM4/idefics-9b")
model = iq.add_lora(model)
result = iq.train(model, processor, train_rows, eval_rows,
                  config=iq.TrainConfig(output_dir="runs/cards", max_steps=40))
"""

from idefics_qlora import cpu as _cpu  # noqa: F401 - first, it imports bitsandbytes quietly
from idefics_qlora import images, tiny
from idefics_qlora.checkpoint import latest_checkpoint
from idefics_qlora.config import TrainConfig
from idefics_qlora.diagnostics import Preview, preview_batch
from idefics_qlora.examples import Captions, Example
from idefics_qlora.generation import generate
from idefics_qlora.images import BadImage
from idefics_qlora.model import add_lora, load_finetuned, load_model
from idefics_qlora.sources import load_rows
from idefics_qlora.training import TrainResult, evaluate, train

__all__ = [
    "BadImage",
    "Captions",
    "Example",
    "Preview",
    "TrainConfig",
    "TrainResult",
    "add_lora",
    "evaluate",
    "generate",
    "images",
    "latest_checkpoint",
    "load_finetuned",
    "load_model",
    "load_rows",
    "preview_batch",
    "tiny",
    "train",
]
