"""What the library makes of what a command was told; problems are collected."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from peft import LoraConfig
from transformers import AutoProcessor

from idefics_qlora.checkpoint import ADAPTER_CONFIG, checkpoints, templates_in
from idefics_qlora.config import TrainConfig, check_whole
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.captions import QUESTION, Captions, columns_of
from idefics_qlora.data.files import load_rows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.data.templates import captions_of, known, question_of
from idefics_qlora.evaluation.metrics import BY_NAME
from idefics_qlora.evaluation.predictions import Metric, metric_problems
from idefics_qlora.families import family_of_config, read_pictures
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.model.loading import load_config, load_finetuned, load_model
from idefics_qlora.model.precision import DTYPES
from idefics_qlora.nearby import did_you_mean
from idefics_qlora.tiny import BASE, creature_cards
from idefics_qlora.told import Field, SettingsError, located, read
from idefics_qlora.training.inputs import evaluation_problems
from idefics_qlora.training.trackers import tracker_problems

ROWS_TRIED = 3
"""Rows of which one must be read before a base is loaded."""


@contextlib.contextmanager
def wrong() -> Iterator[None]:
    """What the library says of settings and data, in this block, is what is wrong with them."""
    try:
        yield
    except (torch.OutOfMemoryError, BrokenPipeError):  # the latter: whoever read has left
        raise
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise SettingsError([str(error)]) from error
    except RuntimeError as error:
        if type(error) is not RuntimeError or "does not fit on" in str(error):
            raise
        raise SettingsError([str(error)]) from error


def base_of(name: str) -> str:
    """The Hub id or folder of a base; of ``tiny`` the embedded one's."""
    return str(BASE) if name == "tiny" else name


class Told:
    """What a command was told, and what the library makes of it; problems are collected.

    Args:
        fields: The command's settings.
        parser: The command's.
        arguments: Those behind the command.
        needed: Names of the settings that must be there.
        takes_pictures: Whether the other arguments are pictures.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        parser: ArgumentParser,
        arguments: list[str],
        needed: tuple[str, ...],
        takes_pictures: bool = False,
    ) -> None:
        self.values = {name: each.default for name, each in fields.items()}
        self.pictures: list[str] = []
        if {"-h", "--help"} & set(arguments):
            parser.parse_args(arguments)  # prints and exits
        asked = any(argument.startswith("--print_") for argument in arguments)
        needed = () if asked else needed
        self.given, self.problems = read(arguments, fields, needed, takes_pictures)
        if asked:
            self.raise_problems()
        if self.problems:  # find what else is wrong in what could be read
            self.values |= {name: given.value for name, given in self.given.items()}
        else:
            told = parser.parse_args(arguments)
            # An empty section of a file hides its defaults.
            self.values |= {name: told[name] for name in fields if name in told}
            self.pictures = told.get("pictures", [])
        self.access = self._made("data.access", ImageAccess, ValueError) or DEFAULT_ACCESS

    def raise_problems(self) -> None:
        """End the command if there are any."""
        if self.problems:
            raise SettingsError(self.problems)

    def section(self, name: str) -> dict[str, Any]:
        """The fields of a section, without those of sections inside it."""
        inside = ((n.removeprefix(f"{name}."), v) for n, v in self.values.items() if n != name)
        return {n: v for n, v in inside if "." not in n and f"{name}.{n}" in self.values}

    def config(self) -> Any:
        """The settings of ``train``."""
        if self.values["train.output_dir"] is None:  # told already
            self.values["train.output_dir"] = "."
        return self._made("train", TrainConfig, ValueError)

    def adapters(self) -> dict[str, Any]:
        """What ``add_lora`` makes adapters of, beside the seed."""
        fields = self.section("lora")
        recipe, parts = fields.pop("recipe"), fields.pop("train_parts") or []
        if recipe is None:
            lora = self._made("lora", LoraConfig, Exception, fields)
            return {"config": lora, "train_parts": parts}
        for name in fields:
            if f"lora.{name}" in self.given:
                self._note(
                    f"lora.{name}", f"lora.recipe={recipe} decides it: leave one of them out"
                )
        return {"config": recipe, "train_parts": parts}

    def to_example(self) -> Captions | None:
        """How a row becomes an example; ``None`` for a known format, or as in training."""
        if not (own := self._templates()):
            return None  # the model knows what it was trained with
        templates = {**self._templates_of_run(), **own}
        if "answer" not in templates:
            for name in own:
                self._note(f"data.{name}", "needs data.answer, the template of what is learnt")
            return None
        try:
            return Captions(**templates)
        except ValueError as error:
            name = str(error).partition("=")[0]
            where = f"{self.given[key].where}: " if (key := f"data.{name}") in self.given else ""
            self.problems.append(f"{where}data.{error}")
            return None

    def _templates(self) -> dict[str, Any]:
        """``answer``, ``question`` and ``image``, those that are set."""
        values = {name: self.values[f"data.{name}"] for name in ("answer", "question", "image")}
        return {name: value for name, value in values.items() if value is not None}

    def _templates_of_run(self) -> dict[str, Any]:
        """The same of the run that trained the model, if that is known."""
        if "adapter" not in self.values:  # a training begins anew
            return {}
        source = self.values["adapter"] or self.values["model.base"]  # which may be merged
        return known(templates_in(Path(source).expanduser())) or {} if source else {}

    def metrics(self) -> dict[str, Metric]:
        """The metrics that are asked for, by name."""
        asked = self.values["metrics"] or ()
        names = [asked] if isinstance(asked, str) else asked
        chosen: dict[str, Metric] = {name: BY_NAME[name] for name in names}
        for problem in metric_problems(chosen):
            self._note("metrics", problem)
        return chosen

    def question(self) -> str:
        """The text behind a picture that is no row."""
        field = "has a field, and a picture alone has no columns: pass --question"
        for name in ("question", "data.question"):
            if question := self.values[name]:
                if "{" in question:
                    self._note(name, field)
                return str(question)
        templates = self._templates_of_run()
        question = templates.get("question", QUESTION)
        if captions_of(templates) is not None and columns_of("question", question):
            self.problems.append(f"the question of the training, {question!r}, {field}")
        return question_of(templates)

    def rows(self, name: str) -> Any:
        """The rows that ``data.train`` or ``data.eval`` names."""
        source = self.values[f"data.{name}"]
        if source is None:
            return None
        try:
            if source == "tiny":
                number, split = (256, "train") if name == "train" else (32, "held_out")
                return creature_cards(number, seed=0, split=split)
            if not source.startswith("hf:"):
                image = {**self._templates_of_run(), **self._templates()}.get("image")
                return load_rows(source, image=image, access=self.access)
            dataset, _, split = source.removeprefix("hf:").partition(":")
            if not dataset or not split:
                raise ValueError("expected hf:NAME:SPLIT, such as hf:me/photos:train")
            from datasets import load_dataset

            return load_dataset(dataset, split=split)
        except (OSError, RuntimeError, ValueError) as error:
            self._note(f"data.{name}", str(error))
            return None

    def check_run(self, config: Any, train_rows: Any, metrics: Mapping[str, Metric]) -> None:
        """See that there are the packages, steps, rows and numbers that a run's settings need."""
        if config is None:  # told already
            return
        problems = [*tracker_problems(config)]
        if config.max_steps is None and train_rows is not None:
            problems += config.too_few_steps(config.total_steps(len(train_rows)))
        if not any(metric_problems(metrics)):  # told already
            has_rows = self.values["data.eval"] is not None
            problems += evaluation_problems(config, metrics, has_rows)
        for problem in problems:
            self.problems += located("train", ValueError(problem), self.given)

    def check_rows(self, to_example: Captions | None, **rows: Any) -> None:
        """See that one of the first rows of each kind can be read, without loading a model."""
        if to_example is None and self.values["data.answer"] is not None:
            return  # the template is wrong
        try:
            collator = Collator(self.processor(), access=self.access)
        except (OSError, TypeError, ValueError):  # what is wrong with the base is told
            return
        for name, some in rows.items():
            first: ValueError | None = None
            for index in range(min(ROWS_TRIED, len(some or ()))):
                try:
                    RowReader(some, f"data.{name}", to_example, collator).read(index)
                except ValueError as error:
                    first = first or error
                else:
                    first = None
                    break
            said = str(first).partition(": ")[2]
            if first is not None and not any(each.endswith(f": {said}") for each in self.problems):
                self.problems.append(str(first))  # once: the rows of both kinds may have the fault

    def check_base(self) -> None:
        """See that there is such a base, without loading it."""
        if (name := self.values["model.base"]) is not None:
            try:
                load_config(base_of(name), self.values["model.revision"])
            except (OSError, ValueError) as error:
                self._note("model.base", str(error))

    def check_adapters(self) -> None:
        """See that the base has such a recipe and such parts, without loading it."""
        try:
            name, revision = self.values["model.base"], self.values["model.revision"]
            family = family_of_config(load_config(base_of(name), revision)[1])
        except (AttributeError, OSError, TypeError, ValueError):  # what is wrong with it is told
            return
        if self.values["lora.recipe"] and family.makers_lora is None:
            self._note("lora.recipe", f"those of {family.model_type} published none: leave it out")
        parts = self.values["lora.train_parts"] or []
        if not {*parts} <= {*family.parts}:
            known = ", ".join(map(repr, family.parts))
            self._note("lora.train_parts", f"expected parts of {family.model_type}, {known}")
        if parts and self.values["model.quantize"] and self.values["model.base_weights"] == "4bit":
            self._note("lora.train_parts", "weights in 4 bits learn nothing: model.quantize=false")

    def check_source(self) -> None:
        """See that there is an adapter or a base."""
        adapter = self.values["adapter"]
        if adapter is None and self.values["model.base"] is None:
            self.problems.append("neither --adapter nor --model.base: expected one of them")
        elif adapter is None:
            self.check_base()
        elif not Path(adapter).expanduser().is_dir():
            expected = "expected a run's, or a checkpoint-N of it"
            self._note("adapter", f"is no folder{did_you_mean(adapter)}: {expected}")

    def check_whole(self, *names: str) -> None:
        """See that numbers are at least 1, where they are numbers."""
        for name in names:
            try:
                if self.values[name] != "auto":
                    check_whole(**{name: self.values[name]})
            except ValueError as error:
                where = f"{self.given[name].where}: " if name in self.given else ""
                self.problems.append(f"{where}{error}")

    def check_output(self, name: str, overwrite: bool = False) -> None:
        """See that a file can be written, and is not there yet unless it may be."""
        if (output := self.values[name]) is None:
            return
        if os.path.isdir(output) or (os.path.lexists(output) and not overwrite):
            self._note(name, "is there already: choose another name, or delete it")
        elif not Path(output).absolute().parent.is_dir():
            self._note(name, "lies in a folder that there is not: make it")

    def base(self) -> Any:
        """The base and its processor."""
        values = self.section("model")
        return load_model(base_of(values.pop("base")), **values, compute_dtype=self._dtype())

    def model(self) -> Any:
        """The adapter on its base, or the base alone, and its processor."""
        values = self.section("model")
        base, adapter = values.pop("base"), self.values["adapter"]
        if adapter is None:
            return self.base()
        for name in ("revision", "longest_edge", "image_splitting"):
            if values[name] is None:  # the adapter knows
                values.pop(name)
        base = None if base is None else base_of(base)
        return load_finetuned(adapter, base=base, **values, compute_dtype=self._dtype())

    def processor(self) -> Any:
        """The base's processor, without its weights."""
        base, revision, edge, splits = (
            self.values[f"model.{name}"]
            for name in ("base", "revision", "longest_edge", "image_splitting")
        )
        if base is None:
            base, revision = self._base_of_adapter()
        name, config = load_config(base_of(base), revision)
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        read_pictures(family_of_config(config, name), processor, edge, splits)
        return processor

    def _base_of_adapter(self) -> tuple[str, str | None]:
        """The base that the adapter, or one of the run in whose folder it is, was trained on."""
        if (adapter := self.values.get("adapter")) is None:
            raise ValueError("neither a base nor an adapter: told already")
        folder = Path(adapter).expanduser()
        for each in (folder, *reversed(checkpoints(folder))):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                config = json.loads((each / ADAPTER_CONFIG).read_text(encoding="utf-8"))
                return str(config["base_model_name_or_path"]), config.get("revision")
        raise ValueError(f"{folder} names no base")

    def _dtype(self) -> torch.dtype | None:
        """``None``: as the base's family has it."""
        return DTYPES.get(self.values["train.precision"])

    def _made(
        self,
        section: str,
        kind: type,
        errors: type[Exception],
        fields: dict[str, Any] | None = None,
    ) -> Any:
        try:
            return kind(**(self.section(section) if fields is None else fields))
        except errors as error:
            self.problems += located(section, error, self.given)
            return None

    def _note(self, name: str, problem: str) -> None:
        where = f"{self.given[name].where}: " if name in self.given else ""
        self.problems.append(f"{where}{name}={self.values[name]!r}: {problem}")
