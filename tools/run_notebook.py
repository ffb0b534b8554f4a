"""Run the notebook of the examples anew, and keep what it shows.

    python tools/run_notebook.py   # two minutes; writes examples/finetune_pokemon_cards.ipynb

It runs offline, in a kernel and a folder of its own. What is kept is what the kernel showed but for
bars, times of execution and the kernel's version. Errors, warnings and paths of this machine are no
outputs to be kept: they are told, and nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "finetune_pokemon_cards.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
RAN = "ran_sources"
"""Where a notebook says of which sources its outputs are."""
MOST_BYTES = 1_000_000
_PATH = re.compile(r"(?<![\w.:</])(?:/[\w.-]+/|[A-Z]:\\)[^\s\"'<]*")
_BAR = re.compile(r"^.*\d+%\|.*\|.*$\n?", re.MULTILINE)
_EMBEDDED = re.compile(r"data:image/png;base64,[\w+/=]+")


def main(arguments: list[str] | None = None) -> int:
    """Run it and write it; the exit code is 1 if something should not be kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK)
    path = parser.parse_args(arguments).notebook
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    clean(notebook)
    if wrong := problems(notebook):
        print(f"{path} stays as it was:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    nbformat.write(notebook, path)
    return 0


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in a new kernel, offline, with ``folder`` as its working directory.

    Raises:
        CellExecutionError: If a cell raises.
    """
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / ".ipython"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where there is no ipywidgets
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=env)


def clean(notebook: Any) -> None:
    """Leave what belongs to the sources, and note which these are."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    output.text = _BAR.sub("", output.text)
            cell.outputs = [output for output in cell.outputs if not _is_empty(output)]
    notebook.metadata = nbformat.from_dict({**METADATA, RAN: fingerprint(notebook)})


def fingerprint(notebook: Any) -> str:
    """SHA-256 of the code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def problems(notebook: Any) -> list[str]:
    """What should not be kept; each line names its cell."""
    found = []
    for cell in notebook.cells:
        for output in getattr(cell, "outputs", ()):
            text = shown(output)
            if output.output_type == "error":
                found.append(f"{cell.id}: an error, {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"{cell.id}: a warning or a message, {text.strip()[:200]!r}")
            found += [f"{cell.id}: a path of a machine, {path}" for path in _PATH.findall(text)]
    if (size := len(nbformat.writes(notebook).encode())) > MOST_BYTES:
        found.append(f"{size:,} bytes, more than {MOST_BYTES:,}")
    return found


def shown(output: Any) -> str:
    """All texts of an output, without the pixels of pictures."""
    data = output.get("data", {})
    texts = [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
    return _EMBEDDED.sub("", "\n".join(texts))


def _is_empty(output: Any) -> bool:
    """Whether it is a view that was taken away, or a bar."""
    page = output.get("data", {}).get("text/html")
    return page == "" or (output.output_type == "stream" and not output.text.strip())


if __name__ == "__main__":
    sys.exit(main())
