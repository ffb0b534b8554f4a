"""What the library advises, such as ``private=False``, in the words of the command line.

Errors and warnings speak Python, for whoever calls the library. Only here do they become what a
command takes, such as ``--private false``.
"""

from __future__ import annotations

import ast
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_COLUMNS = {"image", "question", "answer"}
"""Options that are called as columns of rows are, of which errors speak more often."""

_ARGUMENT = re.compile(
    r"(?P<before>^|[\s(])(?P<verb>(?:pass|set|use|as|or|with) )?(?P<name>[a-z]\w*)="
    r"(?P<value>\.\.\.|'[^']*'|\"[^\"]*\"|[\w./-]*\w)"
)
_PLAIN = {"True": "true", "False": "false", "None": "null"}

_CALLS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # "Pass it to whichever function you call": a command is one.
    (r" to train, evaluate, generate or open_image\b", ""),
    (r", as an argument of load_model or load_finetuned\b", ""),
    (r"\bload_model\(compute_dtype=torch\.\w+\) and ", ""),
    (r"\bload_model\((?:\.\.\., )?(\w+=[^()]*)\)", r"\1"),
    (r"\b(?:access=)?ImageAccess\(([^()]*)\)", r"\1"),
    (r"\bImageAccess\.(\w+)", r"data.access.\1"),
    (
        r"\bto_example=idefics_qlora\.Captions\(([^()]*)\)(?: or a function of your own)?",
        lambda found: re.sub(r"(\w+)=(\"[^\"]*\"),?", r"--data.\1 \2", found[1]),
    ),
    (r"\bpass metrics=\{'(\w+)': [^{}]*\}", r"pass --metrics \1"),
    (
        r"for a score of your own pass metrics=\{name: function\}",
        "scores are asked for by --metrics, such as --metrics cider for eval_cider",
    ),
    (r"\bthe to_example function\b", "data.answer, the template of what is learnt"),
    (r"^indices=", "--rows "),
    (r"\bpass eval_rows\b", "pass --data.eval"),
    (r"\b(train|eval)_rows\b", r"data.\1"),
)
"""Arguments inside calls, and those that are called otherwise, where there are rows."""


def in_options(text: str, options: Iterable[str]) -> str:
    """The text with its Python arguments as options.

    Args:
        text: What an error or a warning says.
        options: Names of the command's options, such as ``model.base`` or ``text-tokens``.
    """
    known: dict[str, list[str]] = {}
    for each in options:
        known.setdefault(each.rpartition(".")[2].replace("-", "_"), []).append(each)
    has_sections = "data.train" in {name for names in known.values() for name in names}
    if has_sections:
        for pattern, words in _CALLS:
            text = re.sub(pattern, words, text)
    if "adapter" in known:
        text = text.replace("load both with load_finetuned", "pass it as --adapter")

    def option(found: re.Match[str]) -> str:
        before, verb, name, value = found.group("before", "verb", "name", "value")
        if len(names := known.get(name, [])) != 1:
            return found[0]
        if has_sections and verb != "pass " and (name in _COLUMNS or "." not in names[0]):
            return found[0]  # a row's, or as the command was told it
        if has_sections and verb is None:  # no advice: what is so, as a file of settings has it
            return f"{before}{names[0]}={value}"
        if value[0] in "'\"":
            with suppress(ValueError, SyntaxError):
                value = shlex.quote(ast.literal_eval(value))
        return f"{before}{verb or ''}--{names[0]} {_PLAIN.get(value, value)}"

    return re.sub(r"^(\w+): (?=\1\.)", "", _ARGUMENT.sub(option, text))


@contextmanager
def telling_in_options(options: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Tell the library's warnings and errors, in this block, in the command's options.

    Args:
        options: Gives their names when there is something to tell.
    """
    made = logging.getLogRecordFactory()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        if record.name.startswith("idefics_qlora") and record.levelno >= logging.WARNING:
            record.msg, record.args = in_options(record.getMessage(), options()), ()
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    except Exception as error:
        if error.args == (str(error),):  # a message alone
            error.args = (in_options(str(error), options()),)
        raise
    finally:
        logging.setLogRecordFactory(made)
