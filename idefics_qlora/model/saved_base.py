"""A base in 4 bits on disk: what quantising 18 GB took minutes for loads in seconds from 5 GB.

The weights are written as ``transformers`` writes 4-bit models, so that it can read them; beside
them lie the processor's files and a manifest with size and SHA-256 of all others.
"""

from __future__ import annotations

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from idefics_qlora.checkpoint import SHARED
from idefics_qlora.durable import (
    CheckpointError,
    check_is_free,
    json_bytes,
    json_mapping,
    read_whole,
    sha256_of_file,
    whole_folder,
)
from idefics_qlora.families import check_model_and_processor, family_of
from idefics_qlora.families.family import Processor
from idefics_qlora.machine import library_versions
from idefics_qlora.model.base_weights import linear4bit_layers
from idefics_qlora.model.precision import compute_dtype

logger = logging.getLogger(__name__)

QUANTIZED_MANIFEST = "quantized_manifest.json"
FORMAT = "idefics_qlora-base-1"
SHARD_SIZE = "1GB"
"""Several files, so that several threads can hash them."""


class Origin(NamedTuple):
    """Where a base comes from."""

    name: str | None
    """Its Hub id, if it has one."""
    revision: str | None
    """Branch, tag or commit there, if one was asked for."""


def is_hub_id(name: str) -> bool:
    """Whether a base's name leads to the Hub and not to a folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def shared_templates(name: str, revision: str | None) -> Any:
    """The templates that a merged model was trained with, if its folder or repository has them."""
    lenient = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{what}": False for what in lenient}
    file = cached_file(name, SHARED, revision=revision, **options)
    if file is None:
        return None
    try:
        return json_mapping(Path(file), read_whole(Path(file))).get("templates")
    except CheckpointError as error:
        logger.warning("passed over: %s", error)
        return None


def is_packed(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a base whose weights are in 4 bits already."""
    quantization = getattr(config, "quantization_config", None) or {}
    return isinstance(quantization, dict) and bool(quantization.get("load_in_4bit"))


def save_quantized(
    model: PreTrainedModel, processor: Processor, folder: str | os.PathLike[str]
) -> None:
    """Write a base in 4 bits, so that ``load_model(folder)`` need not quantise it again.

    The files go to a hidden sibling folder, are flushed to the disk, and the folder gets its name
    only then: a process killed at any moment leaves a whole folder or none of this name. An adapter
    that is trained on the loaded folder records the base's Hub id, if it has one, as before.

    Args:
        model: The 4-bit base, as ``load_model`` gave it, without adapters. Its unquantised parts
            are written in the compute dtype: fp16 (or fp32, which takes more).
        processor: Its processor.
        folder: Where it shall stand; must not exist yet. About 0.6 GB per billion weights.

    Raises:
        FileExistsError: If there is something of this name.
        OSError: If it cannot be written; nothing is left behind.
        TypeError: If model and processor are swapped.
        ValueError: If the model is not in 4 bits, has adapters, or computes in bf16.
    """
    check_model_and_processor(model, processor)
    target = Path(os.path.abspath(os.path.expanduser(folder)))
    _check_base(model)
    check_is_free(target)
    origin = Origin(None, None)
    if is_hub_id(model.name_or_path):
        origin = Origin(model.name_or_path, getattr(model, "base_revision", None))
    try:
        with whole_folder(target) as temporary:
            # The names that a base once had cannot be restored for weights that came packed.
            model.save_pretrained(temporary, max_shard_size=SHARD_SIZE, save_original_format=False)
            processor.save_pretrained(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            with ThreadPoolExecutor() as pool:  # read back: what counts is what is in the files
                sums = list(pool.map(sha256_of_file, files))
            manifest = {
                "format": FORMAT,
                "base": origin._asdict(),
                "versions": library_versions(),
                "files": {
                    path.relative_to(temporary).as_posix(): {
                        "size": path.stat().st_size,
                        "sha256": digest,
                    }
                    for path, digest in zip(files, sums, strict=True)
                },
            }
            (temporary / QUANTIZED_MANIFEST).write_bytes(json_bytes(manifest))
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{target} cannot be written: {error}; nothing is left of it: free space on this "
            "disk, or choose a folder on another"
        ) from error


def _check_base(model: PreTrainedModel) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model has adapters, which checkpoints hold and a saved base does not: call "
            "save_quantized with what load_model gives, before add_lora, or take the adapters off "
            "with model.unload()"
        )
    if not linear4bit_layers(model) or not hasattr(model.config, "quantization_config"):
        raise ValueError(
            "the model is not in 4 bits as load_model leaves it: load it without quantize=False "
            "and base_weights='dequantized', and save that"
        )
    # What was trained in bf16 loses nothing by it.
    if compute_dtype(model) == torch.bfloat16 and family_of(model).precision != "bf16":
        raise ValueError(
            "the model's unquantised parts are rounded to bfloat16, which would pass for another "
            "base in fp16: load it with compute_dtype=torch.float16 and save that; it can be "
            "loaded with compute_dtype=torch.bfloat16 afterwards"
        )


def verify_base(folder: Path) -> Origin | None:
    """Compare every file of a saved base with its manifest.

    Returns:
        Where the base comes from; ``None`` if the folder has no manifest, as an ordinary base.

    Raises:
        CheckpointError: If a file is missing, truncated, altered or not known to the manifest, or
            another version wrote it.
        OSError: If a file cannot be read for a reason that may pass.
    """
    manifest = folder / QUANTIZED_MANIFEST
    if not os.path.lexists(manifest):
        return None
    try:
        values = json_mapping(manifest, read_whole(manifest))
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {_way_out({})}") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{manifest} has the format {values.get('format')!r}, this version reads {FORMAT!r}: "
            f"{_way_out(values)}, or install the version of idefics_qlora that wrote it"
        )
    try:
        origin = Origin(**values["base"])
        files = {folder / name: (f["size"], f["sha256"]) for name, f in values["files"].items()}
        if folder / "config.json" not in files:
            raise ValueError("it does not list config.json")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{manifest} cannot be read: {type(error).__name__}: {error}: {_way_out(values)}"
        ) from error

    def problem(file: Path) -> str | None:
        size, expected = files[file]
        try:
            found = sha256_of_file(file, size)
        except CheckpointError as error:
            return str(error)
        return None if found == expected else f"{file} was altered: its SHA-256 differs"

    with ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, files) if text]
    # transformers would prefer a single file to the shards.
    problems += [
        f"{file} is not known to {manifest.name}"
        for file in sorted(folder.glob("*.safetensors"))
        if file not in files
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}: {_way_out(values)}")
    return origin


def _way_out(manifest: dict[str, Any]) -> str:
    base = manifest.get("base")
    name = base.get("name") if isinstance(base, dict) else None
    source = f"load_model({name!r})" if name else "the original base"
    return f"copy the whole folder again, or write it anew with save_quantized from {source}"


def no_manifest(folder: Path) -> CheckpointError:
    """The error for a folder with 4-bit weights that nothing vouches for."""
    return CheckpointError(
        f"{folder / QUANTIZED_MANIFEST} is missing, but {folder / 'config.json'} speaks of 4-bit "
        f"weights: the copy is not whole, or another program wrote it: {_way_out({})}"
    )
