"""LoRA adapters: attached, loaded all or nothing, taken out for a checkpoint."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import (
    PreTrainedModel,
)

from idefics_qlora.config import RECIPE
from idefics_qlora.families import family_of
from idefics_qlora.families.family import Model
from idefics_qlora.model.base_weights import linear4bit_layers
from idefics_qlora.model.cpu import prepare_for_cpu
from idefics_qlora.process import seeded


def add_lora(
    model: PreTrainedModel,
    config: LoraConfig | Literal["makers"] | None = None,
    *,
    train_parts: Sequence[str] = (),
    seed: int = 42,
) -> PeftModel:
    """Attach trainable LoRA matrices (fp32) to a frozen base.

    Args:
        model: As :func:`load_model` gave it.
        config: Your own ``peft.LoraConfig``. Default: the recipe's r=16, alpha=32, dropout 0.05 on
            ``q_proj``, ``k_proj`` and ``v_proj`` of all parts of the model that have them (the
            vision tower, the perceiver, the cross-attention and the text layers), no biases. One
            that names no modules gets these. ``"makers"``: what the makers of the base published
            for fine-tuning (Idefics3 and SmolVLM: r=8, alpha=8, dropout 0.1, also on ``o_proj``
            and the MLPs of the text layers; Idefics2: there, in the projection and the perceiver,
            but not in the vision tower).
        train_parts: Parts of the model that are trained whole, all their weights in fp32, instead
            of by LoRA matrices: of Idefics3 and SmolVLM ``vision tower``, ``connector``, ``text
            layers`` (embeddings and head aside); an error lists those of the others. For a small
            base, loaded with ``load_model(..., quantize=False)``: a weight takes 4 bytes, its
            gradient 4 and its moments 2 (``paged_adamw_8bit``) or 8 (``adamw_torch``), beside the
            base's own; ``estimate_memory(..., train_parts=...)`` tells before. They are
            ``modules_to_save`` of ``peft``, in its files and in ours.
        seed: Decides the initial values; the global generators are left as they were.

    Returns:
        The ``peft`` model around the base.

    Raises:
        ValueError: If the model has adapters already, or the makers published no recipe, or
            ``init_lora_weights`` cannot work on this base; the message says why. If a part is
            unknown, or its weights are in 4 bits.
    """
    # peft.prepare_model_for_kbit_training is left out on purpose: its reentrant checkpointing cuts
    # the vision tower's adapters off from the gradient, because pixels require none.
    lora = lora_configuration(model, config)
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model has adapters already: expected the base as load_model gives it; to go on "
            "with an adapter, load_finetuned(..., trainable=True)"
        )
    if lora.target_modules is None and not lora.target_parameters:
        # A set, as peft makes one of a list.
        lora.target_modules = set(family_of(model).lora_targets)
    if train_parts:
        whole = modules_of_parts(model, train_parts)
        lora.modules_to_save = [*(lora.modules_to_save or []), *whole]
        if not _has_targets(model, lora):
            lora.target_modules = DUMMY_TARGET_MODULES  # no module is left for LoRA
    model.requires_grad_(False)
    with seeded(seed, model.device):
        return attach(model, lora)


def lora_configuration(model: PreTrainedModel, config: LoraConfig | str | None) -> LoraConfig:
    """What ``config`` of :func:`add_lora` stands for; a copy.

    Raises:
        ValueError: If it stands for nothing, or the makers published no recipe.
    """
    if config is None:
        return LoraConfig(**RECIPE)
    if not isinstance(config, str):
        return copy.copy(config)
    family = family_of(model)
    if config != "makers":
        raise ValueError(f"config={config!r}: expected 'makers' or a peft.LoraConfig")
    if family.makers_lora is None:
        raise ValueError(
            f"'makers': those of the {family.model_type!r} models published no recipe; leave "
            "config out for the tutorial's, or pass a peft.LoraConfig"
        )
    return LoraConfig(**family.makers_lora)


def modules_of_parts(model: PreTrainedModel, parts: Sequence[str]) -> list[str]:
    """Names of the largest modules that lie in one of these parts, embeddings and head aside.

    Raises:
        ValueError: If a part is unknown; the message lists those that are known.
    """
    family = family_of(model)
    unknown = [part for part in parts if part not in family.parts]
    if unknown or isinstance(parts, str):
        raise ValueError(
            f"train_parts={parts!r}: expected a list of parts of {family.model_type}, "
            f"{', '.join(map(repr, family.parts))}"
        )
    aside = {model.get_input_embeddings(), model.get_output_embeddings()}
    done: list[str] = []
    found: list[str] = []
    for name, module in model.named_modules():  # from the root on
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))  # which peft cannot take
        if is_list or any(name.startswith(f"{larger}.") for larger in done):
            continue
        owners = {family.part_of(f"{name}.{own}") for own, _ in module.named_parameters()}
        if module in aside:
            done.append(name)
        elif len(owners) == 1 and owners <= set(parts) and aside.isdisjoint(module.modules()):
            done.append(name)
            found.append(name)
    return found


def _has_targets(model: PreTrainedModel, lora: LoraConfig) -> bool:
    """Whether there are modules for LoRA beside those that are trained whole."""
    every = copy.copy(lora)
    modules = model.named_modules()
    if lora.target_modules == "all-linear":
        every.target_modules = ".*"
        head = model.get_output_embeddings()
        modules = ((n, m) for n, m in modules if isinstance(m, nn.Linear) and m is not head)
    return any(check_target_module_exists(every, name) for name, _ in modules)


def _check_whole(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ``ValueError`` if weights in 4 bits would be trained whole."""
    targets = tuple(config.modules_to_save or ())
    for name in linear4bit_layers(model) if targets else ():
        steps = name.split(".")
        if any(".".join(steps[:n]).endswith(targets) for n in range(1, len(steps) + 1)):
            raise ValueError(
                f"{name} would be trained whole (train_parts or modules_to_save), but its weights "
                "are in 4 bits: load the base with quantize=False, as an argument of load_model or "
                "load_finetuned"
            )


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names of ``peft``'s own file format."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return tensors


def load_adapter(
    model: PeftModel, tensors: dict[str, Tensor], source: str, assign: bool = False
) -> None:
    """Load an adapter's tensors, all of them or none.

    Args:
        model: The base with such an adapter.
        tensors: By the names of ``peft``'s file format.
        source: What to call them in an error.
        assign: Let them take the place of the model's, which have no data.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape; the message names it.
    """
    expected = adapter_tensors(model)
    problems = [f"{key} is missing" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"{key} is unknown" for key in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the model {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if expected[key].shape != tensors[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"the adapter {source} does not fit this model: {'; '.join(problems[:3])}{more}; "
            "it was trained on another base, or with another LoRA configuration"
        )
    set_peft_model_state_dict(
        model, tensors, adapter_name=model.active_adapter, low_cpu_mem_usage=assign
    )


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """The content of ``peft``'s ``adapter_config.json``, ready for inference."""
    config = model.peft_config[model.active_adapter].to_dict()
    config["inference_mode"] = True
    # Sets have no order; sorted, the same adapter always gives the same file.
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    result: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return result


def trainable_parameters(model: Model) -> dict[str, Parameter]:
    """The parameters that training changes, by name.

    Raises:
        ValueError: If there are none, or one is not fp32 (its gradient could not be unscaled).
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: call add_lora(model) first")
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"trainable parameter {name} is {parameter.dtype}: expected float32, the dtype "
                "add_lora gives; fp16 gradients of fp16 weights cannot be unscaled"
            )
    return trainable


def check_trainable(model: PeftModel) -> None:
    """See that what would be trained is part of the adapter, so that a checkpoint holds it.

    Raises:
        ValueError: If nothing would be trained, or something that the adapter's files leave out,
            or the model was made under ``torch.inference_mode()``, which no gradient survives.
    """
    if made := [name for name, p in model.named_parameters() if p.is_inference()]:
        raise ValueError(
            f"{made[0]} ({len(made)} parameters in all) was made under torch.inference_mode(), "
            "whose tensors can never be trained: call load_model and add_lora (or load_finetuned) "
            "outside of it"
        )
    trainable = trainable_parameters(model)
    if not isinstance(model, PeftModel):
        raise ValueError("the model has no adapter: call add_lora(model) first")
    saved = {tensor.data_ptr() for tensor in adapter_tensors(model).values()}
    outside = [name for name, p in trainable.items() if p.data_ptr() not in saved]
    if outside:
        raise ValueError(
            f"{outside[0]} ({len(outside)} in all) would be trained but is no part of the adapter, "
            "so no checkpoint would hold it: name its module in LoraConfig(modules_to_save=[...]), "
            "or freeze it"
        )


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """The base alone; afterwards the adapter works, and learns, as before."""
    learns = {p: p.requires_grad for p in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in learns.items():  # peft lets the whole adapter learn
            parameter.requires_grad_(requires_grad)


_NEED_ROWS = "it starts from what the model does with your rows, and adapters are attached before"
_NEED_NUMBERS = "it takes a part out of each weight, which 4 bits cannot give away exactly"
_CANNOT_START = {
    "eva": _NEED_ROWS,
    "corda": _NEED_ROWS,
    "lora_ga": _NEED_ROWS,
    "loftq": "it wants the weights before they are quantised, and the base is loaded in 4 bits",
    "pissa_niter": "it draws at random what it takes out of the base, so that an adapter would "
    "be loaded onto another rest than it was trained with; 'pissa' computes it",
}
_CANNOT_START_IN_4_BITS = {
    "pissa": f"{_NEED_NUMBERS}; it works with load_model(..., quantize=False)",
    "orthogonal": f"{_NEED_NUMBERS}; it works with load_model(..., quantize=False)",
    "mica": f"{_NEED_NUMBERS}; it works with load_model(..., quantize=False)",
}


def check_start(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ``ValueError`` if the adapters' initial values cannot be had on this base."""
    start = config.init_lora_weights
    if not isinstance(start, str):
        return
    kind = "pissa_niter" if start.startswith("pissa_niter") else start
    why = _CANNOT_START.get(kind)
    if why is None and linear4bit_layers(model):
        why = _CANNOT_START_IN_4_BITS.get(kind)
    if why is not None:
        raise ValueError(
            f"init_lora_weights={start!r} cannot work here: {why}; 'olora' and 'gaussian' can, "
            "and True is peft's default"
        )


def attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """A ``peft`` model around a base, its trainable parameters in fp32.

    Raises:
        ValueError: If the configuration's ``init_lora_weights`` cannot work on this base, or
            weights in 4 bits would be trained whole.
    """
    check_start(model, config)
    _check_whole(model, config)
    with warnings.catch_warnings():
        # peft asks the model for a property that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        # The revision is recorded with the base's name, unless the configuration has one.
        revision = None if config.revision else getattr(model, "base_revision", None)
        peft_model = get_peft_model(model, config, revision=revision)
    for parameter in peft_model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()  # biases and peft's modules_to_save as well
    for module in peft_model.modules():
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.weight.data = module.weight.data.to(module.bias.dtype)  # one dtype, for a CPU
    if model.device.type == "cpu":
        prepare_for_cpu(peft_model)
    return peft_model
