"""Checkpoints on disk: written whole or not at all, verified when read, rotated.

A ``checkpoint-N`` folder holds

- ``adapter_model.safetensors`` and ``adapter_config.json``: the adapter in ``peft``'s own format;
- ``optimizer.safetensors`` and ``rng.safetensors``: tensors the loop needs to go on;
- ``state.json``: everything else it needs, readable;
- ``manifest.json``: size and SHA-256 of every file above, written last;
- ``README.md``: the model card, for people: nothing reads it, and it may be edited.

More than 400 lines: what is written, how it is read, and what must not be deleted belong together.

This module sees only tensors and JSON values, never the loop or the model.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from idefics_qlora.durable import (
    CheckpointError,
    Part,
    json_bytes,
    json_mapping,
    read_whole,
    sha256_of,
    sync_folder,
    tensor_parts,
    tensors_in,
    write_synced,
    write_whole,
)
from idefics_qlora.nearby import did_you_mean

logger = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
CARD = "README.md"
SHARED = "idefics_qlora.json"
"""In a folder that is given away: what is known of the model."""
FORMAT = "idefics_qlora-1"
BEST = "best"
LAST = "last"
"""Files that name a checkpoint."""
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"\.((?:checkpoint|failed-window)-[0-9]+)\.(incomplete|replaced|deleted)")

_NUMBER = (int, float)
_STATE: dict[str, Any] = {
    **dict.fromkeys(("global_step", "total_steps", "window", "skipped_windows"), int),
    **dict.fromkeys(("skips_in_a_row", "micro_batch_size", "num_examples", "num_images"), int),
    **dict.fromkeys(("num_tokens", "num_bad_rows", "unlogged_steps"), int),
    **dict.fromkeys(("seconds", "loss_sum", "unlogged_loss"), _NUMBER),
    **dict.fromkeys(("scaler", "optimizer", "config", "environment", "base", "train_rows"), dict),
    **dict.fromkeys(("position", "eval_rows"), (dict, NoneType)),
    **dict.fromkeys(("best_checkpoint", "first_nonfinite_module"), (str, NoneType)),
    "best_metric": (*_NUMBER, NoneType),
    "log_history": list,
    "growing": bool,
}
"""What a state of any version has. Whoever reads it looks closer."""
_INSIDE = {
    "base": {"architecture", "weights", "rounding"},
    "config": {"precision", "micro_batch_size", "seed", "global_batch_size"},
    "environment": {"versions"},
    "train_rows": {"number", "first"},
}
"""Keys of some of its objects."""
_MAY_HAVE = {
    **{"run": str, "finished_step": int, "num_told": int, "judged_from": int},
    **{"diverged": (str, NoneType), "draft": bool, "image_side": int},
    "templates": (dict, NoneType),
    **{"image_splitting": bool, "quantize": bool},
    "too_large": list,
}
"""What that of 0.1 does not have."""
_COUNTS = (
    *("global_step", "window", "skipped_windows", "skips_in_a_row", "unlogged_steps"),
    *("num_examples", "num_images", "num_tokens", "num_bad_rows", "finished_step", "num_told"),
    "judged_from",
)
"""What cannot be negative."""


def resolved(folder: str | os.PathLike[str]) -> Path:
    """A folder's one absolute path: ``~`` expanded, without symbolic links."""
    return Path(os.path.realpath(os.path.expanduser(folder)))


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is: inside a run the step is all that names it."""
    return output_dir / f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; ``None`` if it is none."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


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
    card: str = ""
    """The model card; not read again."""


def save_checkpoint(
    folder: Path, snapshot: Snapshot, extra: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint.

    The files go to a hidden sibling folder, are flushed to the disk, and the folder gets its name
    only then: a process killed at any moment leaves a whole checkpoint or none.

    Args:
        folder: Where it shall stand, ``<output_dir>/checkpoint-<step>``.
        snapshot: Its content.
        extra: Further tensors, for ``extra.safetensors``.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    contents: dict[str, list[Part]] = {
        ADAPTER: tensor_parts(snapshot.adapter, {"format": "pt"}),
        ADAPTER_CONFIG: [json_bytes(snapshot.adapter_config)],
        OPTIMIZER: tensor_parts(snapshot.optimizer),
        RNG: tensor_parts(snapshot.rng),
        STATE: [json_bytes(snapshot.state)],
    }
    if extra is not None:
        contents["extra.safetensors"] = tensor_parts(extra)
    temporary = folder.with_name(f".{folder.name}.incomplete")
    try:
        _remove(temporary)  # left behind by a killed process
        temporary.mkdir(parents=True)
        with ThreadPoolExecutor(max_workers=1) as pool:  # hashing and writing at the same time
            sums = {name: pool.submit(sha256_of, *parts) for name, parts in contents.items()}
            for name, parts in contents.items():
                write_synced(temporary / name, parts)
            files = {
                name: {"size": sum(map(len, parts)), "sha256": sums[name].result()}
                for name, parts in contents.items()
            }
        if snapshot.card:
            write_synced(temporary / CARD, [snapshot.card.encode()])
        write_synced(temporary / MANIFEST, [json_bytes({"format": FORMAT, "files": files})])
        sync_folder(temporary)
        replaced = folder.with_name(f".{folder.name}.replaced")
        if is_of_run(folder, snapshot.state.get("run")):
            # A kill between the two renames leaves `.replaced`, which the next start puts back.
            _remove(replaced)
            folder.rename(replaced)
        elif os.path.lexists(folder):  # not written by this run, or not whole
            logger.warning("%s was in the way and is %s now", folder, _set_aside(folder).name)
        temporary.rename(folder)
        sync_folder(folder.parent)
        _remove(replaced)
    except BaseException:
        # A full disk needs the space. Nothing here may hide the error.
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint of the training loop back, verifying every byte.

    Raises:
        CheckpointError: If a file is missing, truncated or altered, or does not hold what it must.
        OSError: If a file cannot be read for a reason that may pass.
    """
    contents = _verified(folder)
    state = json_mapping(folder / STATE, contents[STATE])
    for name, kind in {**_STATE, **{n: k for n, k in _MAY_HAVE.items() if n in state}}.items():
        if name not in state or not isinstance(state[name], kind):
            what = f"a {type(state[name]).__name__} as" if name in state else "no"
            raise CheckpointError(f"{folder / STATE} cannot be used: it has {what} {name!r}")
    _check_counts(folder / STATE, state)
    for name, keys in _INSIDE.items():
        if missing := sorted(keys - state[name].keys()):
            raise CheckpointError(f"{folder / STATE} cannot be used: {name!r} lacks {missing}")
    return Snapshot(
        adapter=tensors_in(folder / ADAPTER, contents[ADAPTER]),
        adapter_config=json_mapping(folder / ADAPTER_CONFIG, contents[ADAPTER_CONFIG]),
        optimizer=tensors_in(folder / OPTIMIZER, contents[OPTIMIZER]),
        rng=tensors_in(folder / RNG, contents[RNG]),
        state=state,
    )


def _check_counts(file: Path, state: dict[str, Any]) -> None:
    faults = [f"{name}={state[name]}" for name in _COUNTS if state.get(name, 0) < 0]
    if state["micro_batch_size"] < 1:
        faults.append(f"micro_batch_size={state['micro_batch_size']}")
    records = len(state["log_history"])
    most = {"finished_step": state["global_step"], "num_told": records, "judged_from": records}
    faults += [f"{name}={state[name]}" for name in most if state.get(name, 0) > most[name]]
    if faults:
        raise CheckpointError(f"{file} cannot be used: it has {', '.join(faults)}")


def check_step(folder: Path, state: dict[str, Any]) -> None:
    """See that a folder called ``checkpoint-N`` holds step N.

    Raises:
        CheckpointError: If it is a copy of another one, or a link to it.
    """
    promised, step = step_of(folder.name), state["global_step"]
    if promised is not None and promised != step:
        raise CheckpointError(
            f"{folder} holds step {step}: a copy of another checkpoint, or a link to it; delete or "
            "rename it"
        )


def check_run(folder: Path, state: dict[str, Any], run: str | None) -> None:
    """See that a checkpoint is of a run; those of 0.1 know none and are taken for any.

    Raises:
        CheckpointError: If it is of another run.
    """
    if state.get("run") not in (None, run):
        raise CheckpointError(f"{folder} is of another run ({state['run']}, not {run})")


def is_of_run(folder: Path, run: str | None) -> bool:
    """Whether a checkpoint, as far as its state tells, was written by a run; if in doubt, not."""
    try:
        state = json_mapping(folder / STATE, read_whole(folder / STATE))
        check_step(folder, state)
        check_run(folder, state, run)
        return (folder / MANIFEST).is_file()
    except (OSError, CheckpointError, KeyError):
        return False


_AN_ADAPTER = "a run's output_dir, a checkpoint-N folder of it, or a folder with an adapter of peft"


def load_adapter_files(
    folder: Path,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """Read the adapter of a checkpoint, or of any folder with ``peft``'s two files.

    What a manifest speaks of is verified by it.

    Returns:
        The adapter's tensors (on the CPU), its configuration, and the state of the run that made
        it (of an adapter that was shared ``base``, ``image_side``, ``image_splitting`` and
        ``templates`` alone; ``None`` for a folder of another origin).

    Raises:
        FileNotFoundError: If one of the two files is missing.
        CheckpointError: If a file is truncated or altered, or cannot be parsed.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}{did_you_mean(folder)}: expected {_AN_ADAPTER}"
        )
    for name in (ADAPTER, ADAPTER_CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: expected {_AN_ADAPTER}")
    if (folder / MANIFEST).is_file():
        snapshot = load_checkpoint(folder)
        return snapshot.adapter, snapshot.adapter_config, snapshot.state
    if (folder / STATE).is_file():
        raise CheckpointError(f"{folder / MANIFEST} is missing: the checkpoint is not whole")
    adapter, config, state = folder / ADAPTER, folder / ADAPTER_CONFIG, None
    if (folder / SHARED).is_file():
        shared = json_mapping(folder / SHARED, read_whole(folder / SHARED))
        if shared.get("fingerprint") is not None:
            state = {"base": shared["fingerprint"]}
            names = ("image_side", "image_splitting", "templates")
            state |= {name: shared.get(name) for name in names}
    return tensors_in(adapter, read_whole(adapter)), json_mapping(config, read_whole(config)), state


def templates_in(folder: Path) -> Any:
    """The templates that a folder says its model was trained with; ``None`` if it does not tell.

    Args:
        folder: A run's, a checkpoint's or one that was shared; not verified.
    """
    for place in (folder, *reversed(checkpoints(folder))):
        for name in (SHARED, STATE):
            try:
                return json_mapping(place / name, read_whole(place / name)).get("templates")
            except (OSError, CheckpointError):
                continue
    return None


def clear_leftovers(output_dir: Path) -> None:
    """Remove what writers that died have left behind; call it only as the folder's one owner."""
    for path in output_dir.iterdir():
        if (name := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        whole = path.with_name(name[1])
        if name[2] == "replaced" and path.is_dir() and not os.path.lexists(whole):
            path.rename(whole)
        else:
            _remove(path)


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """All ``checkpoint-N`` folders, complete or not, lowest step first."""
    folder = Path(os.path.expanduser(output_dir))
    if not folder.is_dir():
        return []
    found = [(step_of(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def is_ours(folder: Path) -> bool:
    """Whether this library wrote a ``checkpoint-N`` folder, whole or damaged."""
    return any(os.path.lexists(folder / name) for name in (MANIFEST, STATE, RNG))


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or ``None``.

    A damaged one, and one that holds another step than its name says, is reported through
    ``logging`` and passed over.

    Args:
        output_dir: The run's ``output_dir``.
    """
    for folder in reversed(checkpoints(output_dir)):
        try:
            check_step(folder, load_checkpoint(folder).state)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
        else:
            return folder
    return None


def point_to(output_dir: Path, best: int | None, last: int) -> None:
    """Write ``best`` and ``last``, files of one line that name checkpoints.

    A link would do the same, but not every file system and no object store has links.

    Args:
        output_dir: The run's folder.
        best: Step of the best checkpoint.
        last: Step of the newest. Of a checkpoint that is not there (any more) there is no file.
    """
    for name, step in ((BEST, best), (LAST, last)):
        checkpoint = None if step is None else checkpoint_path(output_dir, step)
        if checkpoint is not None and checkpoint.is_dir():
            write_whole(output_dir / name, f"{checkpoint.name}\n".encode())
        else:
            (output_dir / name).unlink(missing_ok=True)


def best_checkpoint(output_dir: Path, newest: Path) -> Path | None:
    """The checkpoint that a run's ``best`` names, or without it its newest one; if it is whole."""
    name: Any = None
    try:
        if (output_dir / BEST).exists():
            name = read_whole(output_dir / BEST).decode().strip()
        else:  # 0.1 had no such file
            name = json_mapping(newest / STATE, read_whole(newest / STATE))["best_checkpoint"]
        if not isinstance(name, str) or step_of(name) is None:
            return None
        check_step(output_dir / name, load_checkpoint(output_dir / name).state)
    except (CheckpointError, UnicodeDecodeError, KeyError) as error:
        logger.warning("passed over: %s", error)
        return None
    return output_dir / name


def rotate(
    output_dir: Path,
    keep: int | None,
    protected: set[int | None],
    run: str | None,
    background: Executor,
) -> None:
    """Delete the oldest checkpoints of a run until ``keep`` are left.

    What another run or another program wrote is never touched. A
    checkpoint loses its name at once and its files in the background; a deletion that fails is
    reported, and the files stay until the next start.

    Args:
        output_dir: The run's folder.
        keep: Checkpoints to keep; ``None`` for all.
        protected: Steps whose checkpoints stay in any case: that just written, and the best.
        run: The run's id.
        background: Runs the deletions.
    """
    if keep is None:
        return
    ours = [folder for folder in checkpoints(output_dir) if is_of_run(folder, run)]
    surplus = len(ours) - keep
    old = [folder for folder in ours if step_of(folder.name) not in protected]
    for folder in old[: max(0, surplus)]:
        hidden = folder.with_name(f".{folder.name}.deleted")
        try:
            _remove(hidden)
            folder.rename(hidden)
        except OSError as error:
            logger.warning("the old checkpoint %s cannot be deleted: %s", folder, error)
        else:
            background.submit(_remove, hidden)


def set_aside(output_dir: Path, step: int) -> None:
    """Rename the checkpoints of later steps than the one from which the run goes on."""
    for folder in reversed(checkpoints(output_dir)):  # the newest first, should this be cut short
        there = step_of(folder.name)
        if there is not None and there > step and is_ours(folder):
            aside = _set_aside(folder)
            logger.warning("%s is now %s: the run goes on from step %d", folder, aside.name, step)


def _set_aside(path: Path) -> Path:
    """Give what is in the way another name, one that is free."""
    aside = path.with_name(f"abandoned-{path.name}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"abandoned-{path.name}-{number}")
    path.rename(aside)
    return aside


def _remove(path: Path) -> None:
    """Delete a folder, file or link if it is there; a failure is reported and otherwise ignored."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, error)


def _verified(folder: Path) -> dict[str, bytes]:
    """Content of every file of a checkpoint, each compared with the manifest."""
    manifest = json_mapping(folder / MANIFEST, read_whole(folder / MANIFEST))
    try:
        files = {str(name): (f["size"], f["sha256"]) for name, f in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, expected {FORMAT!r}")
        if missing := {ADAPTER, ADAPTER_CONFIG, OPTIMIZER, RNG, STATE} - files.keys():
            raise ValueError(f"it does not list {sorted(missing)}")
        if not all(isinstance(size, int) for size, _ in files.values()):
            raise ValueError("a size is no number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read: {type(error).__name__}: {error}"
        ) from error
    contents = {}
    for name, (size, _) in files.items():
        contents[name] = read_whole(folder / name, size)
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(contents, pool.map(sha256_of, contents.values()), strict=True))
    for name, (_, expected) in files.items():
        if sums[name] != expected:
            raise CheckpointError(f"{folder / name} was altered: its SHA-256 differs")
    return contents
