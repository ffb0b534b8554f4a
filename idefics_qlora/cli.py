"""The command line: ``idefics-qlora COMMAND``, also ``python -m idefics_qlora COMMAND``.

Parses, calls the library, prints. What a command needs is imported when it is called, so that the
list of commands is there at once.

More than 400 lines: one command after the other, each of them short.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import io
import itertools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from idefics_qlora.settings import Told
    from idefics_qlora.told import Field

PROG = "idefics-qlora"
DONE, FAILED, WRONG = 0, 1, 2
"""Exit codes; a signal's is 128 and its number."""

COMPLETION = (
    f"Shell completion: write what {PROG} --print_completion=shtab-bash prints to "
    f"~/.local/share/bash-completion/completions/{PROG}, or, with shtab-zsh, to a file _{PROG} in "
    "a folder of fpath."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its options; those of the process by default.

    Returns:
        0 done, 1 failed, 2 settings or data wrong before training, 128 + n stopped by a signal.
    """
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    if not arguments or arguments[0] not in COMMANDS:
        return _overview(arguments)
    name, *rest = arguments
    from idefics_qlora.advice import in_options, telling_in_options
    from idefics_qlora.told import SettingsError

    try:
        with telling_in_options(lambda: _options(name)):
            return COMMANDS[name].run(rest)
    except SettingsError as error:
        number = len(error.problems)
        print(f"{PROG} {name}: {number} problem{'s' * (number > 1)}", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {in_options(problem, _options(name))}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read has left: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, of which Windows has no name


@functools.cache
def _options(command: str) -> list[str]:
    """Names of a command's options, without dashes."""
    strings = COMMANDS[command].parser()._option_string_actions
    return [option.removeprefix("--") for option in strings if option.startswith("--")]


def _overview(arguments: list[str]) -> int:
    """``--help``, ``--version`` and completion; anything else is a command that there is not."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from idefics_qlora import __version__

    set_parsing_settings(add_print_completion_argument=True)
    about = "Fine-tune IDEFICS vision-language models in 4 bits on one GPU."
    parser = ArgumentParser(prog=PROG, version=__version__, description=about, epilog=COMPLETION)
    commands = parser.add_subcommands(title="commands")
    whole = any(argument.startswith("--print_completion") for argument in arguments)
    for name, command in COMMANDS.items():
        inner = command.parser() if whole else ArgumentParser()
        commands.add_subcommand(name, inner, help=command.about)
    if not arguments:
        parser.print_help(sys.stderr)
        return WRONG
    if not arguments[0].startswith("-"):
        from idefics_qlora.nearby import nearest

        meant = nearest(arguments[0], COMMANDS)
        way = f"did you mean {meant}?" if meant else f"there are {', '.join(COMMANDS)}"
        print(f"{PROG}: {arguments[0]!r} is no command: {way}", file=sys.stderr)
        return WRONG
    parser.parse_args(arguments)  # prints and exits
    return WRONG


# --- train ----------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    told = _told("train", arguments)
    config, adapters, to_example = told.config(), told.adapters(), told.to_example()
    metrics = told.metrics()
    train_rows, eval_rows = told.rows("train"), told.rows("eval")
    told.check_base()
    told.check_adapters()
    told.check_run(config, train_rows, metrics)
    told.check_rows(to_example, train=train_rows, eval=eval_rows)
    told.raise_problems()
    if eval_rows is None and config.progress != "none":
        print(
            "no data.eval: nothing is held out, so there is no held-out loss, no best checkpoint "
            "and no sample in the report; the last checkpoint is what the run gives",
            file=sys.stderr,
        )

    from idefics_qlora.model.adapters import add_lora
    from idefics_qlora.settings import wrong
    from idefics_qlora.training.loop import train

    with wrong():
        model, processor = told.base()
        model = add_lora(model, **adapters, seed=config.seed)
    try:
        result = train(
            model,
            processor,
            train_rows,
            eval_rows,
            config=config,
            to_example=to_example,
            metrics=metrics,
            access=told.access,
        )
    except Exception as error:
        if _before_training(error):
            with wrong():
                raise
        raise
    if config.progress != "none":
        folder = shlex.quote(os.fspath(config.output_dir))
        print(f"on the command line: {PROG} generate --adapter {folder} photo.jpg", file=sys.stderr)
    if result.stopped_by not in (None, "early_stopping"):
        return 128 + signal.Signals[result.stopped_by]
    return DONE


def _before_training(error: Exception) -> bool:
    """Whether ``train`` raised it while it looked at what it was given, or at what to resume."""
    from idefics_qlora.process import RunLock
    from idefics_qlora.training.inputs import check_inputs
    from idefics_qlora.training.run import Run

    before = {check_inputs.__code__, RunLock.__enter__.__code__, Run.__init__.__code__}
    return any(f.f_code in before for f, _ in traceback.walk_tb(error.__traceback__))


# --- evaluate, preview, memory, report ------------------------------------------------------------


def _evaluate(arguments: list[str]) -> int:
    told = _told("evaluate", arguments)
    to_example, rows, metrics = told.to_example(), told.rows("eval"), told.metrics()
    told.check_source()
    told.check_rows(to_example, eval=rows)
    told.check_whole("max_new_tokens")
    for name in ("output", "predictions_file"):
        told.check_output(name, overwrite=True)
    told.raise_problems()

    from idefics_qlora.evaluation.held_out import evaluate
    from idefics_qlora.settings import wrong

    with wrong():
        model, processor = told.model()
        values = told.section("train")
        record = evaluate(
            model,
            processor,
            rows,
            to_example=to_example,
            batch_size=values["eval_batch_size"],
            loss_on=values["loss_on"],
            max_length=values["max_length"],
            metrics=metrics,
            max_new_tokens=told.values["max_new_tokens"],
            predictions_file=told.values["predictions_file"],
            on_bad_row=values["on_bad_row"],
            access=told.access,
        )
    text = json.dumps(record, indent=2)
    print(text)
    if output := told.values["output"]:
        Path(output).write_text(text + "\n", encoding="utf-8")
    return DONE


def _preview(arguments: list[str]) -> int:
    told = _told("preview", arguments)
    to_example, rows = told.to_example(), told.rows("train")
    told.check_base()
    told.raise_problems()

    from idefics_qlora.data.preview import preview_batch
    from idefics_qlora.settings import wrong

    values = told.section("train")
    with wrong():
        preview = preview_batch(
            told.processor(),
            rows,
            to_example,
            indices=told.values["rows"],
            loss_on=values["loss_on"],
            max_length=values["max_length"],
            access=told.access,
        )
        page = Path(told.values["output"])
        head = '<!doctype html><meta charset="utf-8"><title>Preview</title>'
        page.write_text(head + preview._repr_html_(), encoding="utf-8")
    print(f"the same with the pictures is in {page.absolute()}")
    return DONE


def _memory(arguments: list[str]) -> int:
    from idefics_qlora.model.memory import estimate_memory
    from idefics_qlora.settings import base_of, wrong

    values = _parsed("memory", arguments).as_dict()
    with wrong():
        print(estimate_memory(base_of(values.pop("checkpoint")), **values))
    return DONE


def _report(arguments: list[str]) -> int:
    values = _parsed("report", arguments)

    from idefics_qlora.reporting.page import report
    from idefics_qlora.settings import wrong

    with wrong():
        print(report(*values.runs, output=values.output))
    return DONE


# --- generate -------------------------------------------------------------------------------------


def _generate(arguments: list[str]) -> int:
    told = _told("generate", arguments)
    output, question = told.values["output"], told.question()
    told.check_source()
    told.check_whole("batch_size", "max_new_tokens")
    told.check_output("output")
    sources = list(_sources(told.pictures))
    told.raise_problems()

    from idefics_qlora.evaluation.generation import generate_iter
    from idefics_qlora.images.opening import open_image
    from idefics_qlora.notices import warnings_on_stderr
    from idefics_qlora.settings import wrong

    def asked(source: str) -> Any:
        return [open_image(source, told.access), question]

    with wrong():
        model, processor = told.model()
    texts = generate_iter(
        model,
        processor,
        sources,
        to_example=asked,
        max_new_tokens=told.values["max_new_tokens"],
        batch_size=told.values["batch_size"],
        on_bad_row="skip",
        access=told.access,
    )
    written = 0
    as_csv = (told.values["format"] or Path(output or "").suffix.removeprefix(".")) == "csv"
    with contextlib.ExitStack() as stack:
        file: Any = sys.stdout
        if output:
            file = stack.enter_context(open(output, "x", encoding="utf-8", newline=""))
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")  # a file's name may be no text
        stack.enter_context(warnings_on_stderr())  # such as why a picture was left out
        table = csv.writer(file, lineterminator="\n") if as_csv else None
        if table:
            table.writerow(["image", "text"])
        for source, text in zip(sources, texts, strict=True):
            if text is None:
                continue
            if table:
                table.writerow([source, text.strip()])
            else:
                record = {"image": source, "text": text.strip()}
                file.write(_json_line(record, file.encoding or "utf-8"))
            file.flush()  # an interruption keeps what is there
            written += 1
    if written < len(sources):
        skipped = len(sources) - written
        print(f"{written} pictures described, {skipped} left out", file=sys.stderr)
    return DONE if written else FAILED


def _json_line(record: dict[str, str], encoding: str) -> str:
    """A line of JSON, in ASCII where the encoding does not have all of its characters."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


def _sources(named: Sequence[str]) -> Iterator[str]:
    """The pictures that are meant by files, URLs, folders and globs."""
    from PIL import Image

    from idefics_qlora.images.access import is_url
    from idefics_qlora.nearby import did_you_mean

    endings = Image.registered_extensions()
    for name in named:
        if is_url(name) or os.path.isfile(name):
            yield name
        elif os.path.isdir(name):
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            yield from (str(path) for path in files if path.suffix.lower() in endings)
        else:
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found and (meant := did_you_mean(name)):
                print(f"{name}: there is no such file or folder{meant}", file=sys.stderr)
            yield from found or [name]  # what is not there is told when it is opened


# --- merge, push, demo ----------------------------------------------------------------------------


def _merge(arguments: list[str]) -> int:
    values = _parsed("merge", arguments).as_dict()

    from idefics_qlora.model.precision import DTYPES
    from idefics_qlora.settings import base_of, wrong
    from idefics_qlora.sharing.merge import merge

    dtype, base = values.pop("dtype"), values.pop("base")
    with wrong():
        print(
            merge(
                **values,
                dtype=None if dtype is None else DTYPES[dtype],
                base=None if base is None else base_of(base),
            )
        )
    return DONE


def _push(arguments: list[str]) -> int:
    values = _parsed("push", arguments).as_dict()

    from idefics_qlora.settings import wrong
    from idefics_qlora.sharing.push import planned

    dry_run = values.pop("dry_run")
    with wrong():
        upload = planned(**values)
        print(upload, flush=True)
        if not dry_run:
            upload.send()
        print("nothing was sent" if dry_run else f"uploaded: {upload.url}")
    return DONE


def _demo(arguments: list[str]) -> int:
    values = _parsed("demo", arguments).as_dict()

    from idefics_qlora.settings import base_of, wrong
    from idefics_qlora.sharing.demo import demo

    base, open_browser = values.pop("base"), values.pop("open")
    with wrong():
        demo(**values, base=None if base is None else base_of(base), open_browser=open_browser)
    return DONE


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Command:
    run: Callable[[list[str]], int]
    about: str
    parser: Callable[[], ArgumentParser]


def _told(command: str, arguments: list[str]) -> Told:
    from idefics_qlora.settings import Told

    return Told(
        _fields(command),
        COMMANDS[command].parser(),
        arguments,
        NEEDED[command],
        command == "generate",
    )


def _parsed(command: str, arguments: list[str]) -> Any:
    """The values of a command without sections; an option that there is not is told by a like."""
    from idefics_qlora.nearby import nearest
    from idefics_qlora.told import COMMAND_LINE, SettingsError

    parser = COMMANDS[command].parser()
    known = parser._option_string_actions
    for argument in itertools.takewhile(lambda each: each != "--", arguments):
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            meant = nearest(name, known)
            way = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
            raise SettingsError([f"{COMMAND_LINE}: {name} is no option: {way}"])
    return parser.parse_args(arguments)


def _fields(command: str) -> dict[str, Field]:
    """The command's own options, and the four sections of a run."""
    from idefics_qlora.fields import sections
    from idefics_qlora.told import Field

    adapter = Field(str | None, None, "A run's folder, or a checkpoint-N of it; left out: the base")
    max_new_tokens = Field(int, 50, "Tokens of a text at most")
    own = {
        "train": {},
        "evaluate": {
            "adapter": adapter,
            "max_new_tokens": max_new_tokens,
            "predictions_file": Field(
                str | None, None, "File for a line of JSON for each row: what the model says of it"
            ),
            "output": Field(str | None, None, "File for the numbers as JSON, beside printing them"),
        },
        "preview": {
            "rows": Field(list[int] | None, None, "Row numbers, such as [0,7]; left out: two"),
            "output": Field(
                str, "preview.html", "The page with the pictures, in the working directory"
            ),
        },
        "generate": {
            "adapter": adapter,
            "question": Field(str | None, None, "Text behind each picture; else data.question"),
            "max_new_tokens": max_new_tokens,
            "batch_size": Field(
                int | Literal["auto"], 8, "Pictures in one batch; auto: as many as fit"
            ),
            "output": Field(str | None, None, "A new file; left out: printed"),
            "format": Field(
                Literal["jsonl", "csv"] | None, None, "Left out: by output's ending, else jsonl"
            ),
        },
    }
    return {**own[command], **sections()}


HIDDEN = {
    "train": (),
    "evaluate": ("lora",),
    "preview": ("lora", "metrics"),
    "generate": ("lora", "data", "train", "metrics"),
}
"""What a command's help does not show; it may stand in its configuration file all the same."""


NEEDED = {
    "train": ("model.base", "data.train", "train.output_dir"),
    "evaluate": ("data.eval",),
    "preview": ("model.base", "data.train"),
    "generate": (),
}
"""Settings without a default, by command."""


def _parser(command: str) -> Callable[[], ArgumentParser]:
    def make() -> ArgumentParser:
        from idefics_qlora.fields import parser_of

        about = COMMANDS[command].about
        fields, hidden, needed = _fields(command), HIDDEN[command], NEEDED[command]
        parser = parser_of(f"{PROG} {command}", about, fields, hidden, needed)
        if command == "generate":
            parser.add_argument("pictures", nargs="+", type=str, help="files, folders, globs, URLs")
        return parser

    return make


def _memory_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from idefics_qlora.model.memory import add_arguments

    parser = ArgumentParser(prog=f"{PROG} memory", allow_abbrev=False)
    add_arguments(parser)
    return parser


def _merge_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    about = "Write a model that needs no adapter: the base in 16 bits with the adapter in it."
    parser = ArgumentParser(prog=f"{PROG} merge", description=about, allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="a run's folder, or a checkpoint-N of it")
    parser.add_argument("output", type=str, help="the folder to be made")
    dtypes = Literal["fp16", "bf16", "fp32"] | None
    parser.add_argument("--dtype", type=dtypes, help="of the weights; left out: the base's")
    help_of_base = "Hub id or folder of the base in 16 bits; left out: the adapter's"
    parser.add_argument("--base", type=str | None, help=help_of_base)
    help_of_verify = "compare it with the adapter on the base in 16 and in 4 bits"
    parser.add_argument("--verify", type=bool, default=True, help=help_of_verify)
    help_of_device = "where that is done; left out: the first GPU if there is one"
    parser.add_argument("--device", type=str | None, help=help_of_device)
    return parser


def _report_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"{PROG} report", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=str, help="folders of runs")
    parser.add_argument(
        "--output", type=str | None, help="the page; left out: report.html in the run's folder"
    )
    return parser


def _push_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    about = "Upload an adapter, or what merge wrote, to the Hub, with a model card."
    parser = ArgumentParser(prog=f"{PROG} push", description=about, allow_abbrev=False)
    help_of_checkpoint = "a run's folder, a checkpoint-N of it, or a merged model's"
    parser.add_argument("checkpoint", type=str, help=help_of_checkpoint)
    parser.add_argument("repo_id", type=str, help="where to, such as me/name")
    help_of_private = "whether only you shall see it"
    parser.add_argument("--private", type=bool, default=True, help=help_of_private)
    help_of_dry_run = "show what would be uploaded, and end"
    parser.add_argument(
        "--dry_run", type=bool, nargs="?", const=True, default=False, help=help_of_dry_run
    )
    help_of_base = "Hub id of the base, if the adapter was trained on a local folder"
    parser.add_argument("--base", type=str | None, help=help_of_base)
    return parser


def _demo_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    about = "Serve a page on this machine: pictures and a question, base and adapter side by side."
    parser = ArgumentParser(prog=f"{PROG} demo", description=about, allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="a run's folder, or a checkpoint-N of it")
    help_of_base = "Hub id or folder of the base; left out: the adapter's"
    parser.add_argument("--base", type=str | None, help=help_of_base)
    help_of_device = "where the model lives; left out: the first GPU if there is one"
    parser.add_argument("--device", type=str | None, help=help_of_device)
    help_of_port = "of 127.0.0.1; left out: the first that is free from 7860 on"
    parser.add_argument("--port", type=int | None, help=help_of_port)
    help_of_tokens = "tokens of an answer at most, as the page has it at first"
    parser.add_argument("--max_new_tokens", type=int, default=50, help=help_of_tokens)
    help_of_open = "open the page in a browser"
    parser.add_argument("--open", type=bool, default=False, help=help_of_open)
    return parser


COMMANDS = {
    "train": _Command(_train, "fine-tune a base on rows", _parser("train")),
    "evaluate": _Command(
        _evaluate, "loss and metrics on held-out rows, as JSON", _parser("evaluate")
    ),
    "generate": _Command(
        _generate, "describe pictures: a line of JSON or CSV for each", _parser("generate")
    ),
    "preview": _Command(
        _preview, "show what the model gets of some rows, as text and as a page", _parser("preview")
    ),
    "memory": _Command(_memory, "estimate the GPU memory of a training", _memory_parser),
    "merge": _Command(_merge, "put an adapter into the weights of its base", _merge_parser),
    "push": _Command(_push, "upload an adapter or a merged model, with a card", _push_parser),
    "demo": _Command(_demo, "try an adapter on a page, beside its base", _demo_parser),
    "report": _Command(
        _report, "write the page of a run anew, or one of several side by side", _report_parser
    ),
}
