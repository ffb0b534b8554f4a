"""The public names, as users' scripts write them."""

import re
import subprocess
import sys
from pathlib import Path

import idefics_qlora as iq


def test_public_names():
    """A name is only added or removed on purpose."""
    assert sorted(iq.__all__) == [
        "BadImage",
        "Captions",
        "DeadAdapters",
        "Example",
        "ImageUse",
        "MemoryEstimate",
        "Preview",
        "TrainConfig",
        "TrainResult",
        "add_lora",
        "environment",
        "estimate_memory",
        "evaluate",
        "generate",
        "image_use",
        "images",
        "latest_checkpoint",
        "load_finetuned",
        "load_model",
        "load_rows",
        "metrics",
        "preview_batch",
        "tiny",
        "train",
    ]
    assert all(hasattr(iq, name) for name in iq.__all__)


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
    done = subprocess.run(
        [sys.executable, "-c", "import idefics_qlora"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
