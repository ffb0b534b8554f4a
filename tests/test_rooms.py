"""The house has floors: what a file imports lies above it, and private names stay at home."""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import rooms

import idefics_qlora as iq

PACKAGE = Path(iq.__file__).parent


def test_imports_go_up_only():
    """No room knows the one that uses it."""
    down = [
        f"{module} imports {other}"
        for module, others in rooms.arrows(PACKAGE).items()
        for other in others
        if rooms.floor(other) > rooms.floor(module)
    ]
    assert down == []


def test_there_are_no_circles():
    """Inside a room the files have an order, too."""
    try:
        TopologicalSorter(rooms.arrows(PACKAGE)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_private_names_stay_at_home():
    """What another file needs has a name without an underscore."""
    strangers = [
        f"{module} imports {other}.{name}"
        for module, file in rooms.modules(PACKAGE).items()
        for other, name in rooms.imports(file)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert strangers == []


def test_no_file_is_a_drawer():
    """A file past 400 lines says in its first lines why it is that long."""
    long = [
        module
        for module, file in rooms.modules(PACKAGE).items()
        if len(lines := file.read_text().splitlines()) > 400
        and "400 lines" not in " ".join(lines[:12])
    ]
    assert long == []


def test_no_room_bears_a_public_functions_name():
    """``iq.train()`` stays callable whatever was imported before."""
    at_the_root = {path.stem for path in PACKAGE.iterdir()} - {"environment"}
    functions = {name for name in iq.__all__ if name.islower() and callable(getattr(iq, name))}
    assert at_the_root & functions == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from idefics_qlora.training import loop", ("training", "loop")),
        ("def f():\n    from idefics_qlora.data.rows import Rows", ("data.rows", "Rows")),
    ],
)
def test_an_import_is_seen_wherever_it_stands(source, found, tmp_path):
    """The control of the tests above."""
    (tmp_path / "module.py").write_text(source)
    assert list(rooms.imports(tmp_path / "module.py")) == [found]


def test_the_picture_is_of_this_house():
    """``python tools/rooms.py`` was run since the imports changed."""
    assert rooms.PICTURE.read_text() == rooms.draw(PACKAGE)
