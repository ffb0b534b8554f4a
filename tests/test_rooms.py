"""The house has floors: what a file imports lies above it, and private names stay at home."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import rooms

import idefics_qlora as iq
from idefics_qlora.families import FAMILIES

PACKAGE = Path(iq.__file__).parent
HERE = Path(__file__).parent


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
    strangers += [
        f"{module} takes {name}"
        for module, file in rooms.modules(PACKAGE).items()
        for name in taken(file)
    ]
    assert strangers == []


def taken(file):
    """The private names that a file takes from what it imports of the package."""
    names = {name for _, name in rooms.imports(file)}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in names and re.match("_[^_]", node.attr):
            yield f"{node.value.id}.{node.attr}"


KNOW_IDEFICS = {
    *("families.__init__", "families.idefics", "families.idefics2", "families.idefics3"),
    "families.successor",
    # The fast way.
    *("model.architectures", "model.fused", "model.fused_idefics", "model.fused_successors"),
    "tiny.successors",  # small bases
}
PARTS = r"vision_model|perceiver_resampler|gated_cross_attn|image_attention_mask|<fake_token"


def test_only_its_family_knows_idefics():
    """What is peculiar to a kind of model stands in its family, not in the code around it."""
    know = {module for module, file in rooms.modules(PACKAGE).items() if knows_idefics(file)}
    assert know == KNOW_IDEFICS


def knows_idefics(file):
    """Whether a file imports something of IDEFICS, or names a part of its models."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            if any(re.match(r"Idefics|.*\.idefics\b", name) for name in names):
                return True
        if isinstance(node, ast.Attribute) and re.search(PARTS, node.attr):
            return True
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and "\n" not in node.value and re.search(PARTS, node.value):
            return True
    return False


def test_nobody_else_asks_for_the_family():
    """What depends on the kind of model is a fact or a function of its ``Family``."""
    askers = [
        f"{module}: {ast.unparse(node)}"
        for module, file in rooms.modules(PACKAGE).items()
        if not module.startswith("families.")
        for node in ast.walk(ast.parse(file.read_text()))
        if asks_for_family(node)
    ]
    assert askers == []


def asks_for_family(node):
    """Whether a comparison or a case has the name of a family in it, or is about a model's type."""
    if not isinstance(node, ast.Compare | ast.match_case):
        return False
    inside = list(ast.walk(node.pattern if isinstance(node, ast.match_case) else node))
    values = {n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    names = {n.attr for n in inside if isinstance(n, ast.Attribute)}
    return bool(values & FAMILIES.keys()) or bool(values and "model_type" in names)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if family == 'smolvlm': pass", True),
        ("x = 1 if config.model_type in ('idefics2', 'x') else 2", True),
        ("while config.model_type != kind.model_type + 'x': pass", True),
        ("match name:\n    case 'idefics': pass", True),
        ("if family not in [*BUILDERS]: pass", False),
        ("if column == 'image': pass", False),
    ],
)
def test_a_question_for_the_family_is_seen(source, found):
    """The control of the test above."""
    assert any(map(asks_for_family, ast.walk(ast.parse(source)))) is found


def test_no_file_is_a_drawer():
    """A file past 400 lines says in its first lines why it is that long."""
    files = [*PACKAGE.rglob("*.py"), *HERE.rglob("*.py"), *Path(rooms.__file__).parent.glob("*.py")]
    long = [
        file.name
        for file in files
        if len(lines := file.read_text().splitlines()) > 400
        and "400 lines" not in " ".join(lines[:14])
    ]
    assert long == []


def test_no_room_bears_a_public_functions_name():
    """``iq.train()`` stays callable whatever was imported before."""
    at_the_root = {path.stem for path in PACKAGE.iterdir()} - {"environment"}
    functions = {name for name in iq.__all__ if name.islower() and callable(getattr(iq, name))}
    assert at_the_root & functions == set()


def test_a_private_name_is_seen_at_its_module(tmp_path):
    """Taken as an attribute it is as private as imported."""
    file = tmp_path / "module.py"
    file.write_text("from idefics_qlora.model import kernels\nkernels._pad(kernels.drop)")
    assert list(taken(file)) == ["kernels._pad"]


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
