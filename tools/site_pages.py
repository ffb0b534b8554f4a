"""What MkDocs adds to the pages of ``docs/``, as a hook of ``mkdocs.yml``.

The settings are written from :class:`idefics_qlora.TrainConfig` each time the site is built, so
they are never out of date; what only concerns the tests of the pages is taken out.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args

from idefics_qlora import config as config_module
from idefics_qlora.config import GROUPS, TrainConfig, explanations

ABOUT = {
    "run": "Where the run is, and what is seen of it.",
    "schedule": "How long, and how fast it learns.",
    "batch": "What one optimizer step sees, and how it is computed.",
    "precision": "Arithmetic and optimizer.",
    "evaluation": "What is measured while it trains.",
    "checkpoints": "What is saved, kept, and gone on from.",
    "data": "What is learnt of a row, and how rows are read.",
    "faults": "What happens when something goes wrong.",
}


def settings_page() -> str:
    """The page of all fields of ``TrainConfig``, by group."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    texts = explanations(TrainConfig)
    lines = [
        "# Settings",
        "",
        "`iq.TrainConfig(...)` has these fields; in a [configuration file](command_line.md) they "
        "are the section `train`. Names are those of `TrainingArguments` where the meaning is the "
        "same ([From HF Trainer](from_trainer.md)). `help(iq.TrainConfig)` prints the same.",
    ]
    for group, names in GROUPS.items():
        lines += ["", f"## {group.capitalize()}", "", ABOUT.get(group, "")]
        for name in names:
            default = fields[name].default
            given = "must be given" if default is dataclasses.MISSING else f"default `{default!r}`"
            text = " ".join(texts.get(name, "").replace("``", "`").split())
            lines += ["", f"### {name}", "", f"`{choices(str(fields[name].type))}`, {given}", ""]
            lines += [plain(text)]
    return "\n".join(lines) + "\n"


def choices(annotation: str) -> str:
    """A type with the values in place of the name that the source gives to their ``Literal``."""

    def written_out(match: re.Match[str]) -> str:
        values = get_args(getattr(config_module, match[0], None))
        return " | ".join(map(repr, values)) if values else match[0]

    return re.sub(r"\b[A-Z]\w+\b", written_out, annotation)


def plain(text: str) -> str:
    """Text of a docstring without the roles of Sphinx."""
    return re.sub(r":\w+:`~?(?:idefics_qlora\.)?([^`]+)`", r"`\1`", text)


def on_files(files: Any, config: Any) -> Any:
    """Add the page that is not written by hand."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "settings.md", content=settings_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A block's fence names its language; what the tests must lend it is their affair alone."""
    markdown = re.sub(r"^```text message$", "``` { .text .message }", markdown, flags=re.MULTILINE)
    return re.sub(r"^```python .*$", "```python", markdown, flags=re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    """Names in docstrings without the roles of Sphinx, which Markdown does not know."""
    return re.sub(r":\w+:<code>~?([^<]+)</code>", r"<code>\1</code>", content)
