"""The public names, as users' scripts write them."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import idefics_qlora as iq


def test_public_names():
    """A name is only added or removed on purpose."""
    assert sorted(iq.__all__) == [
        "BadImage",
        "Captions",
        "CheckpointError",
        "DeadAdapters",
        "Example",
        "ImageAccess",
        "ImageUse",
        "LoaderError",
        "MemoryEstimate",
        "Preview",
        "STOP",
        "TrainConfig",
        "TrainResult",
        "Turn",
        "WindowTooLarge",
        "__version__",
        "add_lora",
        "environment",
        "estimate_memory",
        "evaluate",
        "generate",
        "generate_iter",
        "image_use",
        "images",
        "latest_checkpoint",
        "load_finetuned",
        "load_model",
        "load_rows",
        "merge",
        "metrics",
        "pokemon_card_example",
        "preview_batch",
        "push",
        "report",
        "save_quantized",
        "tiny",
        "train",
    ]
    assert all(hasattr(iq, name) for name in iq.__all__)


def test_type_checkers_and_users_see_the_same():
    """The names that are imported when they are first used are those that a type checker reads."""
    tree = ast.parse(Path(iq.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen.keys() | {"__version__"} == set(iq.__all__)
    for name, module in seen.items():
        home = importlib.import_module(module)
        assert getattr(iq, name) is getattr(home, name), name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = iq.trian


def test_the_import_loads_neither_torch_nor_transformers():
    """What is heavy is imported when it is first used."""
    code = "import sys, idefics_qlora as iq; assert 'torch' not in sys.modules, 'torch'; dir(iq)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_documented():
    """help() answers for each of them."""
    for name in iq.__all__:
        assert (getattr(iq, name).__doc__ or "").strip(), name


def test_the_loop_is_our_own():
    """No Trainer and no accelerate API anywhere in the package."""
    package = Path(iq.__file__).parent
    for path in package.rglob("*.py"):
        code = path.read_text()
        assert not re.search(r"import .*\bTrainer\b|TrainingArguments\(|import accelerate", code), (
            path
        )
        assert "from accelerate" not in code, path


def test_types_are_shipped():
    """Type checkers of users see the annotations."""
    assert (Path(iq.__file__).parent / "py.typed").is_file()


def test_importing_says_nothing():
    """No advice, warning or progress of a dependency greets whoever imports the library."""
    code = "import idefics_qlora as iq; [getattr(iq, name) for name in iq.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
