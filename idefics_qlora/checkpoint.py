"""Checkpoints on disk: written whole or not at all, verified when read, rotated.

A ``checkpoint-N`` folder holds

- ``adapter_model.safetensors`` and ``adapter_config.json``: the adapter in ``peft``'s own format;
- ``optimizer.safetensors`` and ``rng.safetensors``: tensors the loop needs to go on;
- ``state.json``: everything else it needs, readable;
- ``manifest.json``: size and SHA-256 of every other file, written last.

This module sees only tensors and JSON values, never the loop or the model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "idefics_qlora-1"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or altered; the message names folder, file and reason."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint."""

    adapter: dict[str, Tensor]
    """The adapter's tensors under ``peft``'s file names."""
    adapter_config: dict[str, Any]
    """Content of ``adapter_config.json``."""
    optimizer: dict[str, Tensor]
    """The optimizer's tensors, keyed by adapter parameter."""
    rng: dict[str, Tensor]
    """States of the random generators."""
    state: dict[str, Any]
    """JSON values: step, position, scaler, best, log history, configuration, versions."""


def save_checkpoint(output_dir: Path, step: int, snapshot: Snapshot) -> Path:
    """Write ``checkpoint-<step>``.

    The files go to a temporary sibling folder, are flushed to the disk, and the folder gets its
    name only then: a process killed at any moment leaves a whole checkpoint or none.

    Returns:
        The checkpoint's folder.
    """
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".{target.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)  # left behind by a killed process
    temporary.mkdir(parents=True)
    contents = {
        "adapter_model.safetensors": _tensor_bytes(snapshot.adapter, {"format": "pt"}),
        "adapter_config.json": _json_bytes(snapshot.adapter_config),
        "optimizer.safetensors": _tensor_bytes(snapshot.optimizer),
        "rng.safetensors": _tensor_bytes(snapshot.rng),
        "state.json": _json_bytes(snapshot.state),
    }
    files = {}
    for name, content in contents.items():
        _write(temporary / name, content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(temporary / MANIFEST, _json_bytes({"format": FORMAT, "files": files}))
    _sync_folder(temporary)
    if target.exists():  # only after a resume from before a checkpoint that was found damaged
        replaced = output_dir / f".{target.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    temporary.rename(target)
    _sync_folder(output_dir)
    return target


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint of the training loop back, verifying every byte.

    Raises:
        CheckpointError: If a file is missing, truncated or altered.
    """
    contents = _verified(folder)
    return Snapshot(
        adapter=load(contents["adapter_model.safetensors"]),
        adapter_config=json.loads(contents["adapter_config.json"]),
        optimizer=load(contents["optimizer.safetensors"]),
        rng=load(contents["rng.safetensors"]),
        state=json.loads(contents["state.json"]),
    )


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """All ``checkpoint-N`` folders, complete or not, lowest step first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name)]


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or ``None``.

    A damaged one is reported through ``logging`` and passed over.

    Args:
        output_dir: The run's ``output_dir``.
    """
    for folder in reversed(checkpoints(output_dir)):
        try:
            _verified(folder)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
        else:
            return folder
    return None


def rotate(output_dir: Path, keep: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints of this library until ``keep`` are left.

    The newest and the best are never deleted, and neither is a folder without a manifest of ours.
    """
    if keep is None:
        return
    ours = [folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()]
    protected = {ours[-1], best} if ours else set()
    surplus = len(ours) - keep
    for folder in [folder for folder in ours if folder not in protected][: max(0, surplus)]:
        shutil.rmtree(folder)


def _verified(folder: Path) -> dict[str, bytes]:
    """Content of every file of a checkpoint, each compared with the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    contents = {}
    for name, expected in files.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        if len(content) != expected["size"]:
            raise CheckpointError(
                f"{folder / name} has {len(content)} bytes, its manifest says {expected['size']}"
            )
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{folder / name} was altered: its SHA-256 differs")
        contents[name] = content
    return contents


def _tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    # A copy of each, because safetensors refuses tensors that share memory.
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    data: bytes = save(copies, metadata)
    return data


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
