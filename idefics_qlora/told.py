"""Reading a configuration file and a command line, and all that is wrong with them.

Both name the same fields, as ``section.field``. jsonargparse, which reads them in the end, stops at
the first mistake; here keys and types are checked before, each with its line.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader

from idefics_qlora.config import OTHER_NAMES
from idefics_qlora.nearby import did_you_mean

COMMAND_LINE = "command line"


class SettingsError(Exception):
    """Settings or data that cannot work; ``problems`` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Field:
    """One setting of a command."""

    type: Any
    default: Any
    """``None`` where it must be given."""
    text: str


@dataclass(frozen=True)
class Given:
    """A value that a user wrote, and where."""

    value: Any
    where: str


def read(
    arguments: list[str],
    fields: Mapping[str, Field],
    needed: tuple[str, ...] = (),
    takes_more: bool = False,
) -> tuple[dict[str, Given], list[str]]:
    """What a command line and its configuration files set, and all that is wrong with it.

    Args:
        arguments: Those behind the command.
        fields: The command's settings.
        needed: Names of those that must be set.
        takes_more: Whether there may be other arguments than settings.

    Returns:
        The values by name, those left out that are of a wrong type; and the problems, a line each.

    Raises:
        SettingsError: If a file cannot be read: what is missing, and wrong with it, is not known.
    """
    given: dict[str, Given] = {}
    problems: list[str] = []
    unread: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            break
        if not argument.startswith("--"):
            if not takes_more:
                problems.append(
                    f"{COMMAND_LINE}: {argument!r} is no setting: a file of settings is given as "
                    "--config FILE, a setting as --section.name VALUE"
                )
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.removesuffix("+")
        if name in ("help", "version") or name.startswith("print_"):
            continue
        if name != "config" and name not in fields:
            if not _inside_a_dictionary(name, fields):
                problems.append(f"{COMMAND_LINE}: {_unknown(name, fields)}")
            if not equals:
                next(rest, None)
            continue
        text = text if equals else next(rest, "")
        if name == "config":
            try:
                for file_name, value, where in _file(Path(text), fields, problems):
                    _take(file_name, value, where, fields, given, problems)
            except SettingsError as error:
                unread += error.problems
        elif not argument.partition("=")[0].endswith("+"):
            value = text if _is_text(fields[name].type) else _parsed(text)
            _take(name, value, COMMAND_LINE, fields, given, problems)
    if unread:
        raise SettingsError([*problems, *unread])
    wrong = {problem.partition("=")[0].rpartition(" ")[2] for problem in problems}
    for name in needed:
        if (name not in given or given[name].value is None) and name not in wrong:
            expected = _words(fields[name].type)
            problems.append(
                f"{name} is missing: expected {expected}, in the file of --config or as --{name}"
            )
    return given, problems


def located(section: str, error: Exception, given: Mapping[str, Given]) -> Iterator[str]:
    """The problems that a dataclass's own check lists, each with the place of its field."""
    lines = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
    for line in lines or [str(error)]:
        name = f"{section}.{line.partition('=')[0].partition(':')[0].partition(' ')[0]}"
        where = f"{given[name].where}: " if name in given else ""
        yield f"{where}{section}.{line}" if lines or name in given else f"{section}: {line}"


def _take(
    name: str,
    value: Any,
    where: str,
    fields: Mapping[str, Field],
    given: dict[str, Given],
    problems: list[str],
) -> None:
    """Note a value that is of the field's type, or the problem."""
    hint = fields[name].type
    probe = ArgumentParser(exit_on_error=False)
    probe.add_argument("--value", type=hint)
    try:
        if value is None and NoneType not in get_args(hint) and hint is not Any:
            raise argparse.ArgumentError(None, "null")
        given[name] = Given(probe.parse_object({"value": value}).value, where)
    except argparse.ArgumentError:
        shown = "null" if value is None else repr(value)
        problems.append(f"{where}: {name}={shown}: expected {_words(hint)}")


def _file(
    path: Path, fields: Mapping[str, Field], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Name, value and place of each setting of a configuration file; problems are noted.

    Raises:
        SettingsError: If it cannot be read at all.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        root, values = yaml.compose(text, yaml.SafeLoader), get_loader("yaml")(text)
    except OSError as error:
        meant = did_you_mean(path) if isinstance(error, FileNotFoundError) else ""
        problem = f"--config {path}: {error.strerror}{meant}: expected a YAML file"
        raise SettingsError([problem]) from error
    except UnicodeError as error:
        raise SettingsError([f"{path}: no text in UTF-8: {error}"]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or error
        raise SettingsError(
            [f"{path}{line}: no YAML: {what}: check the indentation there and in the line above"]
        ) from error
    if root is None:
        return
    todo: list[tuple[str, Any, Any, str]] = [("", root, values, f"{path}, line 1")]
    while todo:
        section, node, inside, where = todo.pop(0)
        if not isinstance(node, yaml.MappingNode):
            if inside is not None:  # an empty section is one that sets nothing
                problems.append(
                    f"{where}: {section or 'the file'} is {inside!r:.60}: expected settings, "
                    "`name: value`"
                )
            continue
        seen = set()
        for key, value in node.value:
            name = f"{section}.{key.value}".removeprefix(".")
            where = f"{path}, line {key.start_mark.line + 1}"
            if name in seen:
                problems.append(f"{where}: {name} stands here a second time: keep one")
            elif name in fields:
                yield name, inside[key.value], where
            elif any(known.startswith(f"{name}.") for known in fields):
                todo.append((name, value, inside[key.value], where))
            else:
                problems.append(f"{where}: {_unknown(name, fields)}")
            seen.add(name)


def _unknown(name: str, fields: Mapping[str, Field]) -> str:
    """What to say of a name that is no setting: ours, a similar one, or all there are."""
    section, _, leaf = name.rpartition(".")
    if leaf in OTHER_NAMES and section in ("", "train"):
        return f"{name} is called otherwise here: {OTHER_NAMES[leaf]}"
    prefix = f"{section}." if section else ""
    here = {
        prefix + known.removeprefix(prefix).partition(".")[0]: 0
        for known in fields
        if known.startswith(prefix)
    }
    elsewhere = [known for known in fields if known.rpartition(".")[2] == leaf]
    similar = difflib.get_close_matches(name, here, n=1, cutoff=0.7)
    similar = similar or elsewhere or difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
    if similar:
        return f"{name}: did you mean {similar[0]}?"
    return f"{name}: there is no such setting; there are {', '.join(here or fields)}"


def _inside_a_dictionary(name: str, fields: Mapping[str, Field]) -> bool:
    """Whether ``--train.lr_scheduler_kwargs.num_decay_steps`` sets a key of a dictionary."""
    parent = name.rpartition(".")[0]
    return parent in fields and any(
        get_origin(hint) is dict or hint is dict
        for hint in (fields[parent].type, *get_args(fields[parent].type))
    )


def _parsed(text: str) -> Any:
    """A value of the command line as the configuration file would have it."""
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return text


def _is_text(hint: Any) -> bool:
    return hint is str or set(get_args(hint)) == {str, NoneType}


def _words(hint: Any) -> str:
    """A type as an error message names it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {NoneType: "null", dict: "`name: value` pairs", list: "a list", tuple: "a list"}
    if hint in words:
        return words[hint]
    if "PathLike" in str(get_origin(hint)):
        return "a path"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in words:
        return words[get_origin(hint)]
    if get_origin(hint) is not None and get_origin(hint) is not type and get_args(hint):
        return " or ".join(dict.fromkeys(_words(argument) for argument in get_args(hint)))
    return str(hint)
