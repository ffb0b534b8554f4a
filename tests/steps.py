"""Models, windows and states for single steps."""

import torch
from peft import LoraConfig

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.model.adapters import adapter_tensors, trainable_parameters
from idefics_qlora.model.execution import execution_of
from idefics_qlora.model.precision import DTYPES, set_compute_dtype
from idefics_qlora.training.flat import FlatAdamW
from idefics_qlora.training.state import TrainState


def without_dropout(base):
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
    return iq.add_lora(base, config)


def state_of(model, config):
    """A state as train() makes it, for single steps."""
    set_compute_dtype(model, DTYPES[config.precision])
    return TrainState(
        model=model.train(),
        optimizer=FlatAdamW(trainable_parameters(model), config),
        execution=execution_of(model, DTYPES[config.precision], fast=config.fast),
        scaler=torch.amp.GradScaler("cpu", enabled=config.precision == "fp16"),
        config=config,
        total_steps=config.max_steps,
        device=torch.device("cpu"),
    )


def windows_of(processor, examples, config):
    return Windows(
        RowReader(examples, "train_rows", None, Collator(processor, config.loss_on)),
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        augment=config.augment,
    )


def snapshot(model):
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
