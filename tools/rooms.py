"""Draw the package's rooms from its imports: ``python tools/rooms.py`` writes ``docs/rooms.svg``.

Rooms lie on floors. A file imports only from the floors above its own, and inside a room the files
have an order, too; ``tests/test_rooms.py`` holds both with the functions of this file.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

NAME = "idefics_qlora"
HERE = Path(__file__).resolve().parent.parent
PICTURE = HERE / "docs" / "rooms.svg"

FLOORS = (
    (
        "config",
        "machine",
        "environment",
        "notices",
        "process",
        "durable",
        "nearby",
        "checkpoint",
        "progress",
    ),
    ("images",),
    ("families",),
    ("data",),
    ("model",),
    ("evaluation",),
    ("reporting",),
    ("sharing",),
    ("training",),
    ("tiny",),
    ("__init__", "advice", "told", "fields", "settings", "cli", "__main__"),
)
"""Rooms, and files at the root, from the top to the bottom."""

TITLES = ("root", *(room[0] for room in FLOORS[1:-1]), "face")
ROOT = "Settings; versions, signals and locks; folders on disk, verified."


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own."""
    files = sorted(package.rglob("*.py"))
    return {".".join(file.relative_to(package).with_suffix("").parts): file for file in files}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a file imports from the package, wherever in the file.

    Raises:
        ValueError: If it imports relatively, or a whole module by its dotted name.
    """
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}, line {node.lineno}: a relative import")
            module = node.module or ""
            if module == NAME or module.startswith(f"{NAME}."):
                for alias in node.names:
                    yield module.removeprefix(NAME).removeprefix("."), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(NAME):
                    raise ValueError(f"{file}, line {node.lineno}: expected `from ... import ...`")


def arrows(package: Path) -> dict[str, set[str]]:
    """For each module those that it imports."""
    known = modules(package)

    def target(module: str, name: str) -> str:
        inner = f"{module}.{name}".removeprefix(".")
        for candidate in (inner, f"{inner}.__init__", module, f"{module}.__init__"):
            if candidate.removeprefix(".") in known:
                return candidate.removeprefix(".")
        raise ValueError(f"{NAME}.{inner} is no module")

    return {
        module: {target(other, name) for other, name in imports(file)}
        for module, file in known.items()
    }


def floor(module: str) -> int:
    """Number of the floor on which a module lies, 0 being the top.

    Raises:
        ValueError: If its room has none yet.
    """
    room = module.partition(".")[0]
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise ValueError(f"{module} lies on no floor: name its room in FLOORS, in tools/rooms.py")


def draw(package: Path) -> str:
    """The rooms as an SVG: what each holds, and with dots from which floors it imports."""
    known, between = modules(package), Counter[tuple[int, int]]()
    for module, others in arrows(package).items():
        between.update((floor(module), floor(other)) for other in others)
    width, left, top, pitch = 1010, 12, 40, 58
    columns = [width - left - pitch * (len(FLOORS) - 1 - n) + 22 for n in range(len(FLOORS) - 1)]
    boxes, dots, y = [], [], top
    for number, rooms in enumerate(FLOORS):
        files = [m for m in known if m.partition(".")[0] in rooms and _is_shown(m)]
        about = ROOT if number == 0 else _first_line(known, rooms[0])
        names = [f"{_short(m)} {_about_lines(known[m])}" for m in files]
        lines = _wrapped(names, 72)
        height = 36 + 17 * len(lines)
        boxes.append(
            f'<rect x="{left}" y="{y}" width="{width - 2 * left}" height="{height}" rx="6" '
            f'class="room"/><text x="{left + 12}" y="{y + 21}" class="title">{TITLES[number]}'
            f'</text><text x="{left + 108}" y="{y + 21}">{escape(about)}</text>'
        )
        boxes += [
            f'<text x="{left + 12}" y="{y + 42 + 17 * i}" class="files">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
        for other in range(number):
            if count := between[number, other]:
                dots.append(
                    f'<circle cx="{columns[other]}" cy="{y + height // 2}" '
                    f'r="{3 + count**0.5:.1f}"><title>{TITLES[number]} imports from '
                    f"{TITLES[other]}: {count} times</title></circle>"
                )
        y += height + 8
    heads = [
        f'<text x="{x}" y="28" class="head">{title}</text><path d="M{x} {top}V{y - 8}"/>'
        for x, title in zip(columns, TITLES, strict=False)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img" '
        'aria-label="The rooms of the package from the top to the bottom; dots show from which '
        'rooms each imports, all of them above it"><style>\n'
        "text {font: 13px system-ui, sans-serif; fill: #1f2937}\n"
        ".room {fill: #f3f6fa; stroke: #c4cedb}\n.title {font-weight: 600; font-size: 15px}\n"
        ".files {font: 12px ui-monospace, monospace; fill: #475569}\n"
        ".head {font-size: 10.5px; text-anchor: middle; fill: #475569}\n"
        "path {stroke: #dbe2ea}\ncircle {fill: #2563eb}\n"
        f'</style><rect width="{width}" height="{y}" fill="#fff"/>\n'
        f'<text x="{left + 12}" y="28" class="head" style="text-anchor: start">file and its '
        "lines, in tens; the larger the dot, the more is imported from</text>\n"
        + "\n".join([*boxes, *heads, *dots])
        + "\n</svg>\n"
    )


def _is_shown(module: str) -> bool:
    return module == "__init__" or not module.endswith(".__init__")


def _short(module: str) -> str:
    return module.rpartition(".")[2]


def _about_lines(file: Path) -> int:
    """Lines of a file to the next ten, so that not every change draws the picture anew."""
    return -(-len(file.read_text().splitlines()) // 10) * 10


def _first_line(known: dict[str, Path], room: str) -> str:
    file = known.get(f"{room}.__init__") or known[room]
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return docstring.splitlines()[0]


def _wrapped(names: list[str], width: int) -> list[str]:
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 3 > width:
            lines.append("")
        lines[-1] += (" · " if lines[-1] else "") + name
    return lines


if __name__ == "__main__":
    PICTURE.write_text(draw(HERE / NAME))
    print(f"{PICTURE.relative_to(HERE)} is drawn anew")
