"""The weights of a base as its files have them, read one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from idefics_qlora.durable import CheckpointError, json_mapping, read_whole
from idefics_qlora.model.loading import Adapter, load_config
from idefics_qlora.model.saved_base import is_packed, verify_base

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NEEDED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Files of a base on the Hub."""


@dataclass(frozen=True)
class BaseFiles:
    """The weights of a base on disk, read a tensor at a time."""

    folder: Path
    config: PretrainedConfig
    file_of: dict[str, str]
    """The file of each tensor."""
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Dtype and shape of each."""

    def tensor(self, name: str) -> Tensor:
        """A tensor; only what is looked at is read, and forgotten with it."""
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
            return found


def base_files(adapter: Adapter) -> BaseFiles:
    """The files of an adapter's base in 16 or 32 bits; got from the Hub if need be.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the base is in 4 bits.
        CheckpointError: If a file cannot be read.
    """
    name, config = load_config(adapter.base, adapter.base_revision)
    if is_packed(config):
        origin = verify_base(Path(name)) if Path(name).is_dir() else None
        known = f", base={origin.name!r}" if origin and origin.name else ""
        raise ValueError(
            f"{name} holds 4-bit weights, into which nothing can be merged without rounding it "
            f"away: pass the base that it was made of{known or ' as base=...'}"
        )
    folder = Path(name)
    if not folder.is_dir():
        revision = adapter.base_revision
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED))
    index = folder / INDEX
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    file_of: dict[str, str] = {}
    if index.is_file():
        files = sorted(set(json_mapping(index, read_whole(index)).get("weight_map", {}).values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}: expected a base in safetensors, as "
            "save_pretrained of transformers writes it"
        )
    for file_name in files:
        try:
            with safe_open(folder / file_name, "pt") as file:
                for each in sorted(file.keys()):
                    tensor = file.get_tensor(each)
                    kinds[each], file_of[each] = (tensor.dtype, tuple(tensor.shape)), file_name
        except (FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / file_name} cannot be read: {error}: get the base whole"
            ) from error
    return BaseFiles(folder, config, file_of, kinds)
