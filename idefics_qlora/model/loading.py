"""Loading a base in 4 bits, and the adapters that were trained on it.

The dtype policy, kept by :func:`load_model` and :func:`set_compute_dtype`:

====================================================  =========================================
every ``Linear`` of the vision tower, perceiver,      NF4 with double quantisation (uint8
cross-attention and text layers                       storage), computing in the compute dtype;
                                                      on request dequantised to it once for all
``embed_tokens``, ``lm_head``, norms, biases, gates,  the compute dtype
patch and position embeddings, latents
LoRA matrices                                         fp32
====================================================  =========================================

More than 400 lines: what a base, an adapter and a merged model need to be loaded, in one place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.utils import logging as transformers_logging

from idefics_qlora.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    best_checkpoint,
    checkpoints,
    latest_checkpoint,
    load_adapter_files,
)
from idefics_qlora.config import check_choice
from idefics_qlora.data.templates import remember
from idefics_qlora.durable import CheckpointError
from idefics_qlora.families import family_of_config, read_as_trained, read_pictures
from idefics_qlora.families.family import Processor
from idefics_qlora.model.adapters import attach, load_adapter
from idefics_qlora.model.base import base_fingerprint, same_base, wrong_shape
from idefics_qlora.model.base_weights import (
    BaseWeights,
    check_base_weights,
    dequantize,
    linear4bit_layers,
    unnest_if_small,
)
from idefics_qlora.model.cpu import prepare_for_cpu
from idefics_qlora.model.precision import DTYPES, default_precision, set_compute_dtype
from idefics_qlora.model.saved_base import (
    Origin,
    is_hub_id,
    is_packed,
    no_manifest,
    shared_templates,
    verify_base,
)
from idefics_qlora.nearby import did_you_mean
from idefics_qlora.progress import waiting_for, way_of

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: str | os.PathLike[str],
    *,
    quantize: bool = True,
    base_weights: BaseWeights = "4bit",
    compute_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    longest_edge: int | None = None,
    image_splitting: bool | None = None,
) -> tuple[PreTrainedModel, Processor]:
    """Load an IDEFICS, Idefics2, Idefics3 or SmolVLM base, in 4 bits by default, and its processor.

    Args:
        checkpoint: Hub id (``HuggingFaceM4/idefics-9b``, ``-9b-instruct``, ``-80b``,
            ``HuggingFaceTB/SmolVLM2-500M-Video-Instruct``, ...) or a local folder; one that
            :func:`save_quantized` wrote is verified, and not quantised anew.
        quantize: NF4 with double quantisation for every linear layer except ``lm_head``;
            ``False`` keeps the weights in ``compute_dtype``.
        base_weights: ``"dequantized"`` keeps the same 4-bit values in ``compute_dtype``: the same
            outputs to rounding, for adapters of either kind, faster, and 2 bytes per weight instead
            of half a byte (17.3 GB for idefics-9b). Choose the ``compute_dtype`` of the training's
            ``precision`` with it: a later change rounds them once more, and fp32 takes twice as
            much. With ``"4bit"`` a GPU keeps the scales of the weights in fp32 if that takes at
            most a twentieth of its free memory (0.4 GB for idefics-9b; the weights are the same).
        compute_dtype: Arithmetic of the quantised layers and dtype of all that is not quantised.
            ``None``: what the makers trained in, fp16 for IDEFICS and bf16 for its successors
            (fp16 on a GPU before Ampere).
        device: Where the model lives; by default the first GPU if there is one, else the CPU.
        revision: Branch, tag or commit of a Hub id.
        longest_edge: Pixels of the longest side to which the processor resizes each picture, of
            Idefics3 and SmolVLM: it decides how many tiles and tokens a picture has, and so what
            an example costs; ``preview_batch`` shows them. The size of one tile for the fewest. Of
            Idefics2 only larger pictures are resized, and it decides the size of tiles alone.
            ``None``: the base's own. ``load_finetuned`` takes it from the checkpoint.
        image_splitting: ``False`` leaves pictures of these families whole: one tile each, on which
            nothing small can be read. Otherwise as ``longest_edge``.

    Returns:
        The frozen model in evaluation mode, and its processor.

    Raises:
        FileNotFoundError: If a local folder, or its ``config.json``, does not exist.
        ValueError: If it holds another architecture, or weights that do not fit its
            ``config.json``, or an argument cannot work.
        CheckpointError: If a file of a folder that ``save_quantized`` wrote is missing, truncated
            or altered (a ``ValueError``).
        RuntimeError: If the GPU's memory does not suffice.
    """
    check_choice("base_weights", base_weights, BaseWeights)
    check_base_weights(base_weights, quantize)
    name = _checked_source(checkpoint)
    origin = verify_base(Path(name))
    name, config = load_config(name, revision)
    family = family_of_config(config, name)
    packed = is_packed(config)
    if packed and origin is None and Path(name).is_dir():
        raise no_manifest(Path(name))
    if packed and not quantize:
        raise ValueError(
            f"quantize=False: {name} holds 4-bit weights only; for the same values in 16 bits "
            "base_weights='dequantized', for others the base that it was made of"
        )
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if compute_dtype is None:
        compute_dtype = DTYPES[default_precision(family, device)]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(family.not_quantized),
    )
    try:
        with _showing(f"loading {name}"), _reading_piece_by_piece():
            model, info = family.model_class().from_pretrained(
                name,
                revision=revision,
                dtype=(config.dtype or compute_dtype) if packed else compute_dtype,
                device_map={"": device},
                quantization_config=quantization if quantize and not packed else None,
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):  # transformers makes them up, and goes on
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            lacks = f"they lack {', '.join(missing[:3])}{more}"
            raise _other_weights(name, family.model_type, lacks)
        if wrong := wrong_shape(model):
            raise _other_weights(name, family.model_type, wrong)
        family.mend(model)
        model.requires_grad_(False)
        if packed:
            _compute_in(model, compute_dtype)
        if base_weights == "dequantized":
            dequantize(model)
        else:
            unnest_if_small(model, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            how = "they have other shapes, which the report of transformers above lists"
            raise _other_weights(name, family.model_type, how) from error
        # transformers collects what goes wrong while quantising, memory included, and tells that
        # something did.
        collected = "automatic conversion of the weights" in str(error) and device.type == "cuda"
        if not isinstance(error, torch.OutOfMemoryError) and not (
            collected and torch.cuda.mem_get_info(device)[0] < 2**30
        ):
            raise
        free, total = torch.cuda.mem_get_info(device)
        advice = "free it from other processes"
        if not quantize:
            advice = "load it with quantize=True, or free memory"
        elif base_weights == "dequantized":
            advice = "load it with base_weights='4bit', or free memory"
        raise RuntimeError(
            f"{name} does not fit on {device}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB were "
            f"free when it stopped; {advice}, or pass device='cpu'"
        ) from error
    if device.type == "cpu":
        prepare_for_cpu(model)
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    pictures = read_pictures(family, processor, longest_edge, image_splitting)
    # What adapters record: a saved base is a copy of that on the Hub.
    origin = origin or Origin(name, revision)
    model.name_or_path = model.config.name_or_path = origin.name or name
    model.base_revision = origin.revision if is_hub_id(model.name_or_path) else None
    remember(shared_templates(name, revision), model, processor)
    model.loaded_with = {"quantize": quantize, "base_weights": base_weights, **pictures}
    return model.eval(), processor


@contextlib.contextmanager
def _showing(what: str) -> Iterator[None]:
    """Show that a base is being loaded: by the bar of ``transformers``, where bars are shown."""
    has_bar = transformers_logging.is_progress_bar_enabled()
    if has_bar and way_of() != "lines":
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        with waiting_for(what):
            yield
    finally:
        if has_bar:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _reading_piece_by_piece() -> Iterator[None]:
    """Read a weight when its turn comes.

    ``transformers`` maps all files into memory, which in the end hold as much of it as the base has
    in 16 bits, and on a CPU, where the weights that stay in 16 bits go on lying there, for good.
    """
    opened = modeling_utils.safe_open

    def unmapped(file: Any, **options: Any) -> Any:
        return opened(file, **options | ({"backend": "pread"} if "backend" in options else {}))

    modeling_utils.safe_open = unmapped
    try:
        yield
    finally:
        modeling_utils.safe_open = opened


def _other_weights(name: str, model_type: str, how: str) -> ValueError:
    return ValueError(
        f"the weights of {name} are not those of the {model_type!r} model that its config.json "
        f"describes: {how}; get all files of one base, whole"
    )


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let packed weights, which remember the dtype in which they were saved, compute in another."""
    for layer in linear4bit_layers(model).values():
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    set_compute_dtype(model, dtype)


def load_finetuned(
    checkpoint: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    trainable: bool = False,
    **load_options: Any,
) -> tuple[PeftModel, Processor]:
    """Load a base model together with an adapter that was trained on it.

    Args:
        checkpoint: A run's ``output_dir``, of which the best checkpoint is taken, or, with a
            warning, the newest if none is known to be the best; a ``checkpoint-N`` folder; or any
            folder with ``peft``'s two adapter files.
        base: Hub id or folder of the base, if it is no longer where the adapter says.
        trainable: Whether the adapter shall be trained further.
        **load_options: Passed on to :func:`load_model`.

    Returns:
        The model in evaluation mode, ready for ``generate``, and its processor. Both know as
        ``trained_templates`` what the model was asked in training, if that is known: rows that do
        not say it are asked the same.

    Raises:
        FileNotFoundError: If the folder or one of its adapter files is missing.
        CheckpointError: If a file is truncated or altered (a ``ValueError``).
        ValueError: If the adapter's tensors do not fit the base, or it was trained on another one.
    """
    # Read on the CPU, before the base takes the GPU's memory.
    adapter = read_adapter(checkpoint, base)
    config, state = adapter.config, adapter.state
    config.inference_mode = not trainable
    if adapter.base_revision is not None:
        load_options.setdefault("revision", adapter.base_revision)
    model, processor = load_model(adapter.base, **load_options)
    if state is not None:
        adapter.check_base(base_fingerprint(model))
    family = family_of_config(model.config)
    model.loaded_with |= read_as_trained(family, processor, state, load_options)
    # peft would warn that it is called otherwise now.
    config.base_model_name_or_path = config.revision = None
    peft_model = attach(model, config)
    if state is not None and is_hub_id(adapter.recorded_base):
        # A copy of the base: whoever gets the adapter, trained further, finds it by its Hub id.
        peft_model.active_peft_config.base_model_name_or_path = adapter.recorded_base
        peft_model.active_peft_config.revision = adapter.recorded_revision
    remember(None if state is None else state.get("templates"), peft_model, processor)
    load_adapter(peft_model, adapter.tensors, str(adapter.folder / ADAPTER))
    return peft_model.eval(), processor


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, and where its base is."""

    folder: Path
    """The checkpoint's."""
    tensors: dict[str, Tensor]
    config: LoraConfig
    state: dict[str, Any] | None
    """Of the run that made it; ``None`` if another program did."""
    base: str | os.PathLike[str]
    """Hub id or folder."""
    base_revision: str | None
    """Of the base there; ``None`` for the newest, or in a folder."""
    recorded_base: str
    """What its configuration says; may be empty."""
    recorded_revision: str | None
    """Of a base on the Hub."""

    def check_base(self, *found: dict[str, str]) -> None:
        """See that one of these fingerprints is that of the base that it was trained on.

        Raises:
            ValueError: If not; of an adapter of another program nothing is known.
        """
        if self.state is None or any(same_base(self.state["base"], each) for each in found):
            return
        raise ValueError(
            f"the adapter {self.folder} was trained on another base model than {self.base} "
            f"(fingerprint {self.state['base']}, here {found[0]}): pass the right one as base=..."
        )


def read_adapter(
    checkpoint: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> Adapter:
    """Read a checkpoint's adapter; arguments and errors as in :func:`load_finetuned`."""
    folder = _adapter_folder(Path(checkpoint).expanduser())
    tensors, values, state = load_adapter_files(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} is no configuration of peft: {error}"
        ) from error
    recorded: str = values.get("base_model_name_or_path") or ""
    revision = values.get("revision") if is_hub_id(recorded) else None
    found = base or recorded
    if not found:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base model: pass base=...")
    own = None if base else revision
    return Adapter(folder, tensors, config, state, found, own, recorded, revision)


def _adapter_folder(folder: Path) -> Path:
    """The folder itself, or of a run's the best checkpoint, or the newest."""
    if (folder / ADAPTER).is_file() or (newest := latest_checkpoint(folder)) is None:
        if not (folder / ADAPTER).is_file() and (runs := _runs_in(folder)):
            raise FileNotFoundError(
                f"{folder} is no run, but holds {len(runs)}: name one of them, such as "
                f"{', '.join(str(run) for run in runs[:5])}"
            )
        return folder
    if (best := best_checkpoint(folder, newest)) is not None:
        logger.info("%s: the best checkpoint is %s", folder, best.name)
        return best
    logger.warning(
        "%s has no checkpoint that is known to be the best: this is the newest, %s",
        *(folder, newest.name),
    )
    return newest


def _runs_in(folder: Path) -> list[Path]:
    """The runs in a folder that is none itself."""
    runs: list[Path] = []
    with contextlib.suppress(OSError):  # no folder, or one in it that must not be read
        if not checkpoints(folder):
            runs += (path for path in sorted(folder.iterdir()) if checkpoints(path))
    return runs


def load_config(
    base: str | os.PathLike[str], revision: str | None = None
) -> tuple[str, PretrainedConfig]:
    """The Hub id or folder of a base, and its configuration.

    Raises:
        FileNotFoundError: If a local folder, or its ``config.json``, does not exist.
        ValueError: If it holds another architecture.
    """
    name = _checked_source(base)
    config = AutoConfig.from_pretrained(name, revision=revision)
    family_of_config(config, name)
    return name, config


def _checked_source(base: str | os.PathLike[str]) -> str:
    name = os.fspath(base)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds an adapter, not a base model: load both with load_finetuned"
        )
    if not folder.exists():
        if name == "tiny":  # as the command line has it; no base of the Hub has such a name
            raise FileNotFoundError(
                "'tiny' is the embedded base, which idefics_qlora.tiny.load_model() loads; its "
                "folder is idefics_qlora.tiny.BASE"
            )
        if isinstance(base, str) and is_hub_id:
            return name
        raise FileNotFoundError(
            f"there is no folder {name!r}{did_you_mean(name)}: expected a base's folder or a Hub id"
        )
    if not (folder / "config.json").is_file():
        if checkpoints(folder):
            raise FileNotFoundError(
                f"{str(folder)!r} is a run, adapters and no base model: load both with "
                "load_finetuned"
            )
        raise FileNotFoundError(
            f"{str(folder)!r} has no config.json: expected a folder as save_pretrained writes it "
            "(config.json, weights, tokenizer and image processor files)"
        )
    return str(folder.absolute())  # what an adapter records must lead there from anywhere
