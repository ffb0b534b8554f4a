"""Loading the 4-bit base, attaching and loading adapters: all that knows IDEFICS' insides.

The dtype policy, kept by :func:`load_model` and :func:`set_compute_dtype`:

====================================================  =========================================
every ``Linear`` of the vision tower, perceiver,      NF4 with double quantisation (uint8
cross-attention and text layers                       storage), computing in the compute dtype
``embed_tokens``, ``lm_head``, norms, biases, gates,  the compute dtype (fp16 by default)
patch and position embeddings, latents
LoRA matrices                                         fp32
====================================================  =========================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)

from idefics_qlora.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    CheckpointError,
    load_adapter_files,
)
from idefics_qlora.model.cpu import prepare_for_cpu

Model: TypeAlias = IdeficsForVisionText2Text | PeftModel
"""The base, or the base with an adapter."""

Processor: TypeAlias = Any
"""``transformers.IdeficsProcessor``; its call signature is not used here."""

NOT_QUANTIZED = ["lm_head", "embed_tokens"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(
    checkpoint: str | os.PathLike[str],
    *,
    quantize: bool = True,
    compute_dtype: torch.dtype = torch.float16,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[IdeficsForVisionText2Text, Processor]:
    """Load an IDEFICS checkpoint, in 4 bits by default, and its processor.

    Args:
        checkpoint: Hub id (``HuggingFaceM4/idefics-9b``, ``-9b-instruct``, ``-80b``, ...) or a
            local folder.
        quantize: NF4 with double quantisation for every linear layer except ``lm_head``;
            ``False`` keeps the weights in ``compute_dtype``.
        compute_dtype: Arithmetic of the quantised layers and dtype of all that is not quantised.
        device: Where the model lives; by default the first GPU if there is one, else the CPU.
        revision: Branch, tag or commit of a Hub checkpoint.

    Returns:
        The frozen model in evaluation mode, and its ``IdeficsProcessor``.

    Raises:
        FileNotFoundError: If a local folder, or its ``config.json``, does not exist.
        ValueError: If the checkpoint holds another architecture.
        RuntimeError: If the GPU's memory does not suffice.
    """
    name, _ = load_config(checkpoint, revision)
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
    try:
        model = IdeficsForVisionText2Text.from_pretrained(
            name,
            revision=revision,
            dtype=compute_dtype,
            device_map={"": device},
            quantization_config=quantization if quantize else None,
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # transformers collects what goes wrong while quantising, memory included, and tells that
        # something did.
        collected = "automatic conversion of the weights" in str(error) and device.type == "cuda"
        if not isinstance(error, torch.OutOfMemoryError) and not (
            collected and torch.cuda.mem_get_info(device)[0] < 2**30
        ):
            raise
        free, total = torch.cuda.mem_get_info(device)
        advice = (
            "free it from other processes"
            if quantize
            else "load it with quantize=True, or free memory"
        )
        raise RuntimeError(
            f"{name} does not fit on {device}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB were "
            f"free when it stopped; {advice}, or pass device='cpu'"
        ) from error
    model.requires_grad_(False)
    if device.type == "cpu":
        prepare_for_cpu(model)
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    return model.eval(), processor


def add_lora(
    model: IdeficsForVisionText2Text, config: LoraConfig | None = None, *, seed: int = 42
) -> PeftModel:
    """Attach trainable LoRA matrices (fp32) to a frozen base.

    Args:
        model: As :func:`load_model` gave it.
        config: Your own ``peft.LoraConfig``. Default: the recipe's r=16, alpha=32, dropout 0.05 on
            ``q_proj``, ``k_proj`` and ``v_proj`` of the vision tower, the perceiver, the
            cross-attention and the text layers, no biases.
        seed: Decides the initial values; the global generators are left as they were.

    Returns:
        The ``peft`` model around the base.
    """
    # peft.prepare_model_for_kbit_training is left out on purpose: its reentrant checkpointing cuts
    # the vision tower's adapters off from the gradient, because pixels require none.
    if config is None:
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj"],
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model has adapters already: expected the base as load_model gives it; to go on "
            "with an adapter, load_finetuned(..., trainable=True)"
        )
    model.requires_grad_(False)
    with seeded(seed, model.device):
        return attach(model, config)


def load_finetuned(
    checkpoint: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    trainable: bool = False,
    **load_options: Any,
) -> tuple[PeftModel, Processor]:
    """Load a base model together with an adapter that was trained on it.

    Args:
        checkpoint: A ``checkpoint-N`` folder (or any folder with ``peft``'s two adapter files).
        base: Hub id or folder of the base, if it is no longer where the adapter says.
        trainable: Whether the adapter shall be trained further.
        **load_options: Passed on to :func:`load_model`.

    Returns:
        The model in evaluation mode, ready for ``generate``, and its processor.

    Raises:
        FileNotFoundError: If the folder or one of its adapter files is missing.
        CheckpointError: If a file is truncated or altered (a ``ValueError``).
        ValueError: If the adapter's tensors do not fit the base, or it was trained on another one.
    """
    folder = Path(checkpoint).expanduser()
    # Read on the CPU, before the base takes the GPU's memory.
    tensors, values, state = load_adapter_files(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} is no configuration of peft: {error}"
        ) from error
    config.inference_mode = not trainable
    recorded: str = values.get("base_model_name_or_path") or ""
    base = base or recorded
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base model: pass base=...")
    model, processor = load_model(base, **load_options)
    verified = state is not None and same_base(state["base"], found := base_fingerprint(model))
    if state is not None and not verified:
        raise ValueError(
            f"the adapter {folder} was trained on another base model than {base} (fingerprint "
            f"{state['base']}, here {found}): pass the right one as base=..."
        )
    config.base_model_name_or_path = None  # peft would warn that it is called otherwise now
    peft_model = attach(model, config)
    # A copy of the base: whoever gets the adapter, trained further, finds the base by its Hub id.
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", recorded) and not Path(recorded).exists()
    if verified and is_hub_id:
        peft_model.active_peft_config.base_model_name_or_path = recorded
    load_adapter(peft_model, tensors, str(folder / ADAPTER))
    return peft_model.eval(), processor


def base_fingerprint(model: Model) -> dict[str, str]:
    """What tells one base model from another, whether in 4 bits or not, on whatever device.

    Returns:
        ``architecture``: a hash of the names and shapes of norms and embeddings.
        ``weights``: a hash of the first 256 values of each, as fp32; equal for fp16 and fp32 copies
        of a model. ``rounding``: ``bf16`` values are another rounding and are not compared.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    shapes, samples = [], []
    for name, parameter in base.named_parameters():
        # Linear weights are left out: they may be packed, and a GPU packs a little differently.
        # So is what an adapter may train: biases, and peft's copies of whole modules.
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        kept = name.endswith("weight") and ".lora_" not in name and ".modules_to_save." not in name
        if kept and (parameter.dim() == 1 or name.endswith("embed_tokens.weight")):
            shapes.append((name, list(parameter.shape)))
            samples.append(parameter.detach().flatten()[:256].float())
    weights = torch.cat(samples).cpu().numpy().tobytes()  # sync
    return {
        "architecture": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "weights": hashlib.sha256(weights).hexdigest()[:16],
        "rounding": "bf16" if compute_dtype(model) == torch.bfloat16 else "none",
    }


def same_base(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two fingerprints can be of one base."""
    if a["rounding"] != b["rounding"]:
        return a["architecture"] == b["architecture"]
    return a == b


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names of ``peft``'s own file format."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return tensors


def load_adapter(model: PeftModel, tensors: dict[str, Tensor], source: str) -> None:
    """Load an adapter's tensors, all of them or none.

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
    set_peft_model_state_dict(model, tensors, adapter_name=model.active_adapter)


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """The content of ``peft``'s ``adapter_config.json``, ready for inference."""
    config = model.peft_config[model.active_adapter].to_dict()
    config["inference_mode"] = True
    # Sets have no order; sorted, the same adapter always gives the same file.
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    result: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return result


def check_model_and_processor(model: Any, processor: Any) -> None:
    """See that these are a model and a processor, in this order.

    Raises:
        TypeError: If one of them is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}: expected the model first and then the "
            "processor, the two that load_model returns"
        )
    check_processor(processor)


def check_processor(processor: Any) -> None:
    """See that this is a processor of images and texts.

    Raises:
        TypeError: If it is something else.
    """
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise TypeError(
            f"processor is of type {type(processor).__name__}: expected the processor, the second "
            "of the two that load_model returns"
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and of ``device`` for this block.

    Afterwards they are as they were; those of other devices are not touched, as
    ``torch.manual_seed`` would.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


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


def check_finite(parameters: Mapping[str, Parameter], way_out: str) -> None:
    """See that no weight is NaN or infinite already: no arithmetic could mend it.

    A quantised weight is judged by the numbers it is put together from.

    Args:
        parameters: By name, all on one device.
        way_out: What to do about one that is.

    Raises:
        ValueError: Naming the modules.
    """
    names, extremes = [], []
    for name, parameter in parameters.items():
        numbers = [parameter.detach()]
        if (quantised := getattr(parameter, "quant_state", None)) is not None:
            numbers = [quantised.absmax, quantised.code]
            if quantised.nested:
                numbers = [quantised.offset, quantised.state2.absmax, quantised.code]
        for tensor in numbers:
            if tensor.is_floating_point() and tensor.numel():
                names.append(name)
                extremes.append(torch.stack(tensor.aminmax()).float())  # NaN if one is
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist() if extremes else []  # sync
    bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
    modules = [name.removeprefix("base_model.model.").rpartition(".")[0] for name in bad]
    if modules := list(dict.fromkeys(modules)):
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        raise ValueError(
            f"weights that are NaN or infinite before training: {', '.join(modules[:3])}{more}; "
            f"every loss would be NaN: {way_out}"
        )


def part_of(name: str) -> str:
    """The part of the model that a module or parameter of this name belongs to."""
    if "vision_model" in name:
        return "vision tower"
    if "perceiver_resampler" in name:
        return "perceiver"
    return "cross-attention" if "gated_cross_attn_layers" in name else "text layers"


def num_embeddings(model: Model) -> int:
    """Token ids the model can embed: the vocabulary and the additional tokens."""
    embedding = model.get_input_embeddings()
    return int(embedding.num_embeddings + embedding.num_additional_embeddings)


def compute_dtype(model: Model) -> torch.dtype:
    """The dtype of the unquantised frozen parts, in which the quantised layers compute as well."""
    # Norms are never quantised; trainable copies (peft's modules_to_save) are fp32 in any case.
    norms = (p for name, p in model.named_parameters() if p.dim() == 1 and not p.requires_grad)
    return next(norms).dtype


def set_compute_dtype(model: Model, dtype: torch.dtype) -> None:
    """Let the whole frozen base compute in ``dtype``; the adapter stays fp32.

    From fp16 to fp32 nothing is lost; between fp16 and bf16 the unquantised weights are rounded.
    """
    if compute_dtype(model) == dtype:
        return
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in _linear4bit_modules(model):
        module.compute_dtype = dtype
        module.weight.quant_state.dtype = dtype  # dequantise straight to it, without a cast


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Automatic mixed precision in ``dtype``; fp32 switches it off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """No gradients, no dropout; afterwards every module is back in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), autocast(next(model.parameters()).device, compute_dtype(model)):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


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


def set_activation_checkpointing(model: PeftModel, enabled: bool) -> None:
    """Recompute layers in the backward pass instead of keeping their activations, or stop that."""
    base = model.get_base_model()
    # transformers renames gradient_checkpointing_* to activation_checkpointing_*.
    prefix = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if enabled:
        # Reentrant checkpointing gives no gradient to layers whose input requires none, which is
        # the whole vision tower.
        getattr(base, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(base, f"{prefix}_checkpointing_disable")()


def training_flops(config: IdeficsConfig, num_tokens: int, num_images: int) -> float:
    """Floating-point operations of forward and backward over a frozen base.

    Each weight costs a multiplication and an addition per token in the forward pass, and the same
    again for the activations' gradient; attention scores and the adapter's few operations are left
    out, and nothing is recomputed.

    Args:
        config: The base model's configuration.
        num_tokens: Text tokens.
        num_images: Images.
    """
    hidden, mlp = config.hidden_size, 3 * config.hidden_size * config.intermediate_size
    vision, width = config.vision_config, config.vision_config.embed_dim
    cross_layers = config.num_hidden_layers // config.cross_layer_interval
    per_token = (
        config.num_hidden_layers * (4 * hidden**2 + mlp)
        + cross_layers * (2 * hidden**2 + mlp)
        + hidden * (config.vocab_size + config.additional_vocab_size)
    )
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    per_image = patches * (
        vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
    )
    latents = patches  # without a resampler the text attends to the patches
    if config.use_resampler:
        perceiver = config.perceiver_config
        latents = perceiver.resampler_n_latents
        inner = perceiver.resampler_n_heads * perceiver.resampler_head_dim
        queries = latents * 2 * width * inner  # query and output projections
        keys_values = (patches + latents) * 2 * width * inner
        per_image += perceiver.resampler_depth * (queries + keys_values + latents * 8 * width**2)
    per_image += cross_layers * latents * 2 * width * hidden
    return 4.0 * (per_token * num_tokens + per_image * num_images)


def load_config(
    checkpoint: str | os.PathLike[str], revision: str | None = None
) -> tuple[str, IdeficsConfig]:
    """The Hub id or folder of a checkpoint, and its configuration.

    Raises:
        FileNotFoundError: If a local folder, or its ``config.json``, does not exist.
        ValueError: If the checkpoint holds another architecture.
    """
    name = _checked_source(checkpoint)
    config = AutoConfig.from_pretrained(name, revision=revision)
    if not isinstance(config, IdeficsConfig):
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint: expected the 'idefics' architecture "
            "(idefics-9b, idefics-9b-instruct, idefics-80b, ...)"
        )
    return name, config


def attach(model: IdeficsForVisionText2Text, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # peft asks the model for a property that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        peft_model = get_peft_model(model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()  # biases and peft's modules_to_save as well
    for module in peft_model.modules():
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.weight.data = module.weight.data.to(module.bias.dtype)  # one dtype, for a CPU
    if model.device.type == "cpu":
        prepare_for_cpu(peft_model)
    return peft_model


def _checked_source(checkpoint: str | os.PathLike[str]) -> str:
    name = os.fspath(checkpoint)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds an adapter, not a base model: load both with load_finetuned"
        )
    if not folder.exists():
        if isinstance(checkpoint, str) and is_hub_id:
            return name
        raise FileNotFoundError(
            f"there is no folder {name!r}: expected a checkpoint's folder or a Hub id"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no config.json: expected a folder as save_pretrained writes it "
            "(config.json, weights, tokenizer and image processor files)"
        )
    return str(folder.absolute())  # what an adapter records must lead there from anywhere


def _linear4bit_modules(model: Model) -> list[Any]:
    import bitsandbytes as bnb  # loads its native library

    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
