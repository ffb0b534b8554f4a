"""The settings of a training run: one frozen dataclass, every field with its unit and default.

The fields stand in groups, each with its checks behind it; :data:`GROUPS` names them in order.
Field names follow Hugging Face's ``TrainingArguments`` wherever the meaning is the same, and the
defaults are the recipe of the well-known IDEFICS fine-tuning tutorial. More than 400 lines, for
each field is explained where it stands.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

Precision = Literal["fp16", "bf16", "fp32"]
AskedPrecision = Literal["auto", "fp16", "bf16", "fp32"]
Optim = Literal["paged_adamw_8bit", "adamw_torch"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]
DecayType = Literal["linear", "cosine", "1-sqrt"]
LossOn = Literal["completion", "all"]
OnSaveError = Literal["raise", "continue"]
OnBadRow = Literal["skip", "raise"]
CacheImages = Literal["disk", "memory"]
ReportTo = Literal["tensorboard", "wandb", "trackio"]
Progress = Literal["auto", "bar", "lines", "none"]
RECIPE: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
"""The tutorial's ``peft.LoraConfig``, on the modules that the family names."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one of a ``Literal``'s."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(get_args(choices))}")


def check_whole(smallest: int = 1, /, **numbers: int) -> None:
    """Raise ``ValueError`` unless all are whole numbers of at least ``smallest``."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < smallest:
            raise ValueError(f"{name}={number!r}: expected a whole number of at least {smallest}")


_STEPS = "every so many steps, if there are eval_rows"
_RESUME = "resume='auto' (the default) goes on, 'never' refuses, a path goes back to it"
_ALWAYS = "nothing to set: it is done always"
_FUSED = "fast (the default)"
_PUSH = "nothing to set: iq.push(output_dir, 'me/name') uploads the best adapter with a model card"
OTHER_NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
    "per_gpu_train_batch_size": "micro_batch_size",
    "train_batch_size": "global_batch_size (examples of one optimizer step)",
    "batch_size": "global_batch_size (examples of one optimizer step)",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_gpu_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "derived: set global_batch_size, the examples of one optimizer "
    "step, to micro_batch_size times as many",
    "auto_find_batch_size": "micro_batch_size='auto'",
    "eval_strategy": f"eval_steps: {_STEPS}",
    "evaluation_strategy": f"eval_steps: {_STEPS}",
    "do_eval": f"eval_steps: {_STEPS}",
    "do_train": "nothing to set: call train",
    "save_strategy": "save_steps",
    "logging_strategy": "logging_steps",
    "logging_dir": "output_dir; or train(..., on_log=...)",
    "fp16": "precision='fp16', 'bf16' or 'fp32'; 'auto' by default",
    "bf16": "precision='bf16'",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "dataloader_num_workers": "num_workers",
    "dataloader_pin_memory": _ALWAYS,
    "data_seed": "seed",
    "group_by_length": _ALWAYS,
    "gradient_checkpointing_kwargs": "gradient_checkpointing, which is never reentrant",
    "activation_checkpointing": "gradient_checkpointing",
    "remove_unused_columns": "nothing to set: to_example gets the whole row",
    "resume_from_checkpoint": f"resume: {_RESUME}",
    "overwrite_output_dir": f"resume: {_RESUME}",
    "compute_metrics": "train(..., metrics={...})",
    "predict_with_generate": "train(..., metrics={...})",
    "generation_max_length": "eval_max_new_tokens",
    "completion_only_loss": "loss_on='completion' (the default) or 'all'",
    "train_on_inputs": "loss_on='all'",
    "use_cpu": "load_model(..., device='cpu')",
    "disable_tqdm": "progress='none'; or 'lines'",
    "no_cuda": "load_model(..., device='cpu')",
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "run_name": "output_dir",
    "activation_checkpointing_kwargs": "gradient_checkpointing, which is never reentrant",
    "average_tokens_across_devices": _ALWAYS,
    "bf16_full_eval": "precision, which holds in evaluations too",
    "fp16_full_eval": "precision, which holds in evaluations too",
    "dataloader_persistent_workers": _ALWAYS,
    "dataloader_prefetch_factor": "nothing to set: windows are read ahead",
    "dataloader_drop_last": "nothing to set: windows do not stop at the end of an epoch",
    "eval_on_start": "call evaluate before train",
    "ignore_data_skip": "nothing to set: a resume goes on with the next row, at once",
    "full_determinism": "seed, from which everything follows",
    "logging_nan_inf_filter": "nothing to set: a loss that is not finite is never hidden",
    "save_only_model": "nothing to set: a checkpoint is whole, so that a resume is exact",
    "train_sampling_strategy": _ALWAYS,
    "length_column_name": _ALWAYS,
    "torch_compile": _FUSED,
    "use_liger_kernel": _FUSED,
}
"""Arguments of other trainers, ``transformers.TrainingArguments`` first of all, and ours."""

GROUPS = {
    "run": ("output_dir", "seed", "progress", "report_to"),
    "schedule": (
        *("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type"),
        *("lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
        *("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    "batch": ("global_batch_size", "micro_batch_size", "gradient_checkpointing", "fast"),
    "precision": ("precision", "optim"),
    "evaluation": (
        *("logging_steps", "eval_steps", "eval_batch_size", "eval_image_use", "eval_samples"),
        *("eval_generate_rows", "eval_max_new_tokens", "eval_predictions"),
    ),
    "checkpoints": (
        *("save_steps", "save_total_limit", "load_best_model_at_end"),
        *("metric_for_best_model", "greater_is_better"),
        *("early_stopping_patience", "early_stopping_threshold", "resume"),
    ),
    "data": ("loss_on", "max_length", "augment", "num_workers", "cache_images"),
    "faults": ("on_bad_row", "on_save_error", "loader_timeout_s", "allow_dead_parts"),
}
"""The fields of :class:`TrainConfig` by group, both in the order of the class."""

Config = TypeVar("Config")


def _naming_ours(config: type[Config]) -> type[Config]:
    """Let an unknown argument be an error that says what it is called here."""
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    plain: Any = config.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **values: Any) -> None:
        problems = []
        for name in values:
            if name in known:
                continue
            similar = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            if name in OTHER_NAMES:
                problems.append(f"{name}: {OTHER_NAMES[name]}")
            elif similar:
                problems.append(f"{name}: did you mean {similar[0]}?")
            else:
                problems.append(f"{name}: there is no such setting; there are {', '.join(known)}")
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise TypeError(f"{config.__name__} has other settings than these; use\n{lines}")
        plain(self, *args, **values)

    config.__init__ = init  # type: ignore[method-assign]
    return config


def explanations(config: type) -> dict[str, str]:
    """What stands below each field of a dataclass in its source; empty where there is no source."""
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):
        return {}
    (found,) = ast.parse(source).body
    assert isinstance(found, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(found.body, found.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def _explaining(config: type[Config]) -> type[Config]:
    """Let ``help`` show what stands below each field, group by group."""
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    told, lines = explanations(config), [inspect.cleandoc(config.__doc__ or "")]
    for group, names in GROUPS.items():
        lines.append(f"\n{group.capitalize()}:")
        for name in names:
            default = fields[name].default
            value = "" if default is dataclasses.MISSING else f" = {default!r}"
            lines.append(f"    {name}: {fields[name].type}{value}")
            lines += [f"        {line}" for line in told.get(name, "").splitlines()]
    config.__doc__ = "\n".join(lines)
    return config


def _not_whole(config: Any, smallest: int, *names: str, optional: bool = False) -> Iterator[str]:
    """A problem for each field that is no whole number of at least ``smallest``."""
    for name in names:
        value = getattr(config, name)
        if not (_is_whole(value, smallest) or (optional and value is None)):
            yield f"{name}={value!r}: expected a whole number of at least {smallest}"


def _is_whole(value: Any, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _no_number(config: Any, *names: str, zero: bool = False) -> Iterator[str]:
    """A problem for each field that is no finite number above 0 (``zero``: or 0)."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            yield f"{name}={value!r}: expected a number"
        elif not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            bound = "of at least 0" if zero else "above 0"
            yield f"{name}={value!r}: expected a finite number {bound}"


def _no_share(config: Any, *names: str) -> Iterator[str]:
    """A problem for each field that is no number of at least 0 and below 1."""
    for name in names:
        if not _is_share(value := getattr(config, name)):
            yield f"{name}={value!r}: expected a number of at least 0 and below 1"


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _decay_problems(settings: Any) -> Iterator[str]:
    """What is wrong with the parameters of ``warmup_stable_decay``."""
    if not isinstance(settings, dict) or "num_decay_steps" not in settings:
        yield (
            f"lr_scheduler_kwargs={settings!r}: 'warmup_stable_decay' needs to know when to decay: "
            "expected a dictionary such as {'num_decay_steps': 100}"
        )
        return
    expected = {
        "num_decay_steps": (_is_whole(settings["num_decay_steps"], 1), "a whole number from 1 on"),
        "decay_type": (
            settings.get("decay_type", "cosine") in get_args(DecayType),
            f"one of {', '.join(get_args(DecayType))}",
        ),
        "min_lr_ratio": (
            _is_share(settings.get("min_lr_ratio", 0)),
            "a number of at least 0 and below 1",
        ),
    }
    for name, value in settings.items():
        if name not in expected:
            yield f"lr_scheduler_kwargs has {name!r}: expected {', '.join(expected)}"
        elif not expected[name][0]:
            yield f"lr_scheduler_kwargs: {name}={value!r}: expected {expected[name][1]}"


def _no_choice(config: Any, **choices: Any) -> Iterator[str]:
    """A problem for each field that is none of its ``Literal``'s values."""
    for name, choice in choices.items():
        value = getattr(config, name)
        if value not in get_args(choice):
            yield f"{name}={value!r}: expected one of {', '.join(get_args(choice))}"


def _no_flag(config: Any, *names: str) -> Iterator[str]:
    """A problem for each field that is neither ``True`` nor ``False``."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            yield f"{name}={getattr(config, name)!r}: expected True or False"


def _no_path(config: Any, *names: str) -> Iterator[str]:
    """A problem for each field that is no path."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            yield f"{name}={value!r}: expected a path"


@_naming_ours
@_explaining
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    Raises:
        TypeError: If there is no such field; the message says what it is called here.
        ValueError: If any field has a value that cannot work. The message lists *every* such
            field with its value and what is expected, so that one run of the script finds all.
    """

    # --- run ----------------------------------------------------------------------------------

    output_dir: str | os.PathLike[str]
    """Folder that receives ``checkpoint-N`` folders; created when missing."""

    seed: int = 42
    """Decides the order of the rows, their crops and the dropout masks."""

    progress: Progress = "auto"
    """What is seen of the run, on stderr: a ``bar`` below the table of its evaluations (in a
    notebook a live table), ``lines``, one for each log record, or ``none``. ``auto``: the bar on a
    terminal or in a notebook, lines elsewhere."""

    report_to: tuple[ReportTo, ...] = ()
    """Where charts are drawn, as well: of ``tensorboard`` (event files in ``tensorboard`` in
    ``output_dir``), ``wandb`` and ``trackio``; each is an extra of that name to be installed."""

    def _run_problems(self) -> Iterator[str]:
        yield from _no_path(self, "output_dir")
        yield from _not_whole(self, 0, "seed")
        yield from _no_choice(self, progress=Progress)
        names, known = self.report_to, get_args(ReportTo)
        if not isinstance(names, (tuple, list)) or not all(name in known for name in names):
            yield f"report_to={names!r}: expected a tuple of {', '.join(known)}, or ()"

    # --- schedule -----------------------------------------------------------------------------

    max_steps: int | None = None
    """Optimizer steps to train for. ``None``: as many as ``num_train_epochs`` needs."""

    num_train_epochs: float = 1.0
    """Passes over the training rows; used only when ``max_steps`` is ``None``."""

    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""

    lr_scheduler_type: Scheduler = "linear"
    """What follows the warm-up: a ``linear`` or ``cosine`` decay to 0; ``constant``, also called
    ``constant_with_warmup``; or ``warmup_stable_decay``: constant, and a decay at the end."""

    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Of ``warmup_stable_decay``, as in ``transformers``: ``num_decay_steps`` (optimizer steps of
    the decay; needed), ``decay_type`` (``cosine``, ``linear`` or ``1-sqrt``) and ``min_lr_ratio``
    (where it ends, and the warm-up begins, as a share of the learning rate: 0)."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""

    warmup_ratio: float = 0.0
    """The same as a share of all optimizer steps, rounded up; instead of ``warmup_steps``."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, applied to every adapter tensor."""

    max_grad_norm: float = 1.0
    """L2 norm to which the gradient of all adapter tensors together is clipped."""

    adam_beta1: float = 0.9
    """Of the mean of the gradients, AdamW keeps this share from step to step."""

    adam_beta2: float = 0.999
    """The same of the mean of their squares."""

    adam_epsilon: float = 1e-8
    """Added to the root of that mean, by which AdamW divides."""

    def _schedule_problems(self) -> Iterator[str]:
        yield from _not_whole(self, 1, "max_steps", optional=True)
        yield from _no_number(self, "num_train_epochs", "learning_rate", "max_grad_norm")
        yield from _no_choice(self, lr_scheduler_type=Scheduler)
        yield from _not_whole(self, 0, "warmup_steps")
        yield from _no_number(self, "weight_decay", zero=True)
        yield from _no_number(self, "adam_epsilon")
        yield from _no_share(self, "adam_beta1", "adam_beta2", "warmup_ratio")
        if _is_whole(self.warmup_steps, 1) and self.warmup_ratio:
            yield (
                f"warmup_ratio={self.warmup_ratio!r} beside warmup_steps={self.warmup_steps}: "
                "expected one of the two"
            )
        if self.lr_scheduler_type == "warmup_stable_decay":
            yield from _decay_problems(self.lr_scheduler_kwargs)
        elif self.lr_scheduler_kwargs is not None:
            yield (
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs!r}: only "
                "lr_scheduler_type='warmup_stable_decay' has any"
            )
        if _is_whole(self.max_steps, 1):
            yield from self.too_few_steps(self.max_steps)  # type: ignore[arg-type]

    def too_few_steps(self, total_steps: int) -> Iterator[str]:
        """What of the schedule has no place in a run of so many optimizer steps, as problems."""
        of = f"max_steps={total_steps}"
        if self.max_steps is None:
            of = f"the {total_steps} steps that num_train_epochs={self.num_train_epochs} comes to"
        if _is_whole(self.warmup_steps, total_steps + 1):
            yield (
                f"warmup_steps={self.warmup_steps} is more than {of}: the learning rate would "
                "never reach its peak"
            )
        elif _is_whole(self.warmup_steps, 0) and _is_share(self.warmup_ratio):
            settings = self.lr_scheduler_kwargs
            decay = settings.get("num_decay_steps") if isinstance(settings, dict) else None
            left = total_steps - self.num_warmup_steps(total_steps)
            if _is_whole(decay, left + 1):
                yield (
                    f"lr_scheduler_kwargs: num_decay_steps={decay} is more than the {left} steps "
                    f"that {of} leaves after the warm-up"
                )

    # --- batch --------------------------------------------------------------------------------

    global_batch_size: int = 16
    """Examples in one window, that is, examples one optimizer step sees."""

    micro_batch_size: int | Literal["auto"] = "auto"
    """Examples in one forward and backward pass. Changes speed and memory, not the mathematics.
    ``auto``: the most that fit into the GPU's free memory by estimate, corrected by what the first
    window takes; 2 on a CPU. Whatever it is, a window that does not fit is done again in smaller
    parts: with ``auto`` it and others as long alone, with a number the run goes on with half."""

    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third slower.
    Same results."""

    fast: bool = True
    """Compute with fused blocks, on a GPU replayed as CUDA graphs, where the model is one that this
    knows; results differ by rounding. ``False``: through the model's own layers, equal to version
    0.1 to the bit."""

    def _batch_problems(self) -> Iterator[str]:
        yield from _not_whole(self, 1, "global_batch_size")
        size = self.micro_batch_size
        if size != "auto" and not _is_whole(size, 1):
            yield f"micro_batch_size={size!r}: expected 'auto' or a whole number of at least 1"
        elif _is_whole(self.global_batch_size, 1) and _is_whole(size, self.global_batch_size + 1):
            yield (
                f"micro_batch_size={size} is larger than "
                f"global_batch_size={self.global_batch_size}: a micro-batch is a part of a window"
            )
        yield from _no_flag(self, "gradient_checkpointing", "fast")

    # --- precision ----------------------------------------------------------------------------

    precision: AskedPrecision = "auto"
    """Arithmetic of forward and backward: ``fp16`` (autocast + gradient scaling), ``bf16``
    (autocast) or ``fp32``. ``auto``: that of the run which is continued, or what the base's makers
    trained in: fp16 for IDEFICS, bf16 for Idefics2, Idefics3 and SmolVLM (fp16 on a GPU before
    Ampere). Adapter weights and optimizer arithmetic are fp32 in every case."""

    optim: Optim = "paged_adamw_8bit"
    """``paged_adamw_8bit`` (bitsandbytes) or ``adamw_torch`` (fp32 states)."""

    def _precision_problems(self) -> Iterator[str]:
        yield from _no_choice(self, precision=AskedPrecision, optim=Optim)

    # --- evaluation ---------------------------------------------------------------------------

    logging_steps: int = 20
    """Optimizer steps between two training log records."""

    eval_steps: int = 20
    """Optimizer steps between two evaluations (when there are evaluation rows)."""

    eval_batch_size: int = 2
    """Examples in one evaluation forward pass."""

    eval_image_use: bool = False
    """At every evaluation, compare the loss with that on other rows' pictures and on blank ones (of
    the first 64 evaluation rows): does the model look?"""

    eval_samples: int = 0
    """Evaluation rows to caption at every evaluation, always the same; kept in the log history."""

    eval_generate_rows: int = 64
    """The first so many evaluation rows are answered for ``metrics`` and ``eval_predictions``."""

    eval_max_new_tokens: int = 50
    """Tokens at most of such an answer."""

    eval_predictions: bool = False
    """Write these answers to ``predictions.jsonl`` in ``output_dir``: for each evaluation and row a
    line of JSON with ``step``, the number ``row``, the ``prediction`` and the ``references``."""

    def _evaluation_problems(self) -> Iterator[str]:
        yield from _not_whole(self, 1, "logging_steps", "eval_steps", "eval_batch_size")
        yield from _not_whole(self, 1, "eval_generate_rows", "eval_max_new_tokens")
        yield from _no_flag(self, "eval_image_use", "eval_predictions")
        yield from _not_whole(self, 0, "eval_samples")

    # --- checkpoints --------------------------------------------------------------------------

    save_steps: int = 40
    """Optimizer steps between two checkpoints. The last step is always saved."""

    save_total_limit: int | None = 3
    """Checkpoints to keep; the best and the newest are kept whatever the limit. ``None``: all."""

    load_best_model_at_end: bool = True
    """After training, load the adapter of the checkpoint whose evaluation was the best."""

    metric_for_best_model: str = "eval_loss"
    """The recorded number by which evaluations are compared, such as ``eval_cider`` where
    ``metrics`` has a ``cider``."""

    greater_is_better: bool | None = None
    """Whether more of it is better. ``None``: as is known of ``eval_loss``, of the gain that
    ``eval_image_use`` records, and of the functions of ``iq.metrics``. Of others it must be set."""

    early_stopping_patience: int | None = None
    """End the run, as if it were complete, after so many evaluations in a row without a gain.
    ``None``: never."""

    early_stopping_threshold: float = 0.0
    """A gain is to be better by more than this than the evaluation with the last gain."""

    resume: str | os.PathLike[str] = "auto"
    """``auto``: continue from the newest complete checkpoint of ``output_dir``, if there is one.
    ``never``: refuse to start where checkpoints exist. A path: continue from that checkpoint."""

    def _checkpoints_problems(self) -> Iterator[str]:
        yield from _not_whole(self, 1, "save_steps")
        yield from _not_whole(self, 1, "save_total_limit", optional=True)
        yield from _no_flag(self, "load_best_model_at_end")
        if not isinstance(self.metric_for_best_model, str) or not self.metric_for_best_model:
            yield (
                f"metric_for_best_model={self.metric_for_best_model!r}: expected the name of a "
                "recorded number, such as 'eval_loss'"
            )
        if self.greater_is_better is not None:
            yield from _no_flag(self, "greater_is_better")
        yield from _not_whole(self, 1, "early_stopping_patience", optional=True)
        yield from _no_number(self, "early_stopping_threshold", zero=True)
        if self.early_stopping_patience is None and self.early_stopping_threshold != 0:
            yield (
                f"early_stopping_threshold={self.early_stopping_threshold!r} has no effect without "
                "early_stopping_patience: set both"
            )
        yield from _no_path(self, "resume")
        sane = _is_whole(self.save_steps, 1) and _is_whole(self.eval_steps, 1)
        if sane and self.load_best_model_at_end is True and self.save_steps % self.eval_steps:
            yield (
                f"save_steps={self.save_steps} is not a multiple of eval_steps={self.eval_steps}: "
                "with load_best_model_at_end=True every checkpoint needs an evaluation; "
                "change one of the two, or set load_best_model_at_end=False"
            )

    # --- data ---------------------------------------------------------------------------------

    loss_on: LossOn = "completion"
    """Which text tokens are targets: the completion and the end token only, or ``all`` text tokens
    (the tutorial's labelling, padding excluded)."""

    max_length: int | None = None
    """Text tokens of an example at most, image tokens included. A longer example loses the end of
    its completion; one whose prompt alone is longer is an error. ``None``: no limit."""

    augment: bool = True
    """Crop training images randomly (90-100 % of the area). ``False``: the checkpoint's own
    preprocessing, as in evaluation."""

    num_workers: int | Literal["auto"] = "auto"
    """Processes that load windows ahead; 0 loads in the main process. Changes speed only. ``auto``:
    2, and on a GPU as many more as the first rows' reading time asks for and the machine has; the
    log says why."""

    cache_images: CacheImages | None = None
    """Keep decoded pictures, so that later epochs and evaluations need not decode them: on ``disk``
    (in the cache folder, for other runs as well), or in ``memory`` (half of what is available at
    most). About 3 bytes per pixel. Changes speed only."""

    def _data_problems(self) -> Iterator[str]:
        yield from _no_choice(self, loss_on=LossOn)
        yield from _not_whole(self, 2, "max_length", optional=True)
        yield from _no_flag(self, "augment")
        workers = self.num_workers
        if workers != "auto" and not _is_whole(workers, 0):
            yield f"num_workers={workers!r}: expected 'auto' or a whole number of at least 0"
        if self.cache_images is not None:
            yield from _no_choice(self, cache_images=CacheImages)

    # --- faults -------------------------------------------------------------------------------

    on_bad_row: OnBadRow = "skip"
    """When a row cannot be read: leave it out of its window, note it in ``bad_rows.jsonl`` and go
    on (until more than 5 % of the rows seen are bad), or ``raise``."""

    on_save_error: OnSaveError = "raise"
    """When a checkpoint cannot be written (a full disk): stop, or ``continue`` training and try
    again at the next ``save_steps``. The last save must work in either case."""

    loader_timeout_s: float = 600.0
    """Seconds that reading a window may take in a loader worker before the run stops."""

    allow_dead_parts: tuple[str, ...] = ()
    """Parts of the model whose adapters may go without a gradient in the first step: of ``vision
    tower``, ``perceiver``, ``cross-attention`` and ``text layers``. Any other dead part stops the
    run."""

    def _faults_problems(self) -> Iterator[str]:
        yield from _no_choice(self, on_bad_row=OnBadRow, on_save_error=OnSaveError)
        yield from _no_number(self, "loader_timeout_s")
        parts = self.allow_dead_parts
        if not isinstance(parts, (tuple, list)) or not all(isinstance(p, str) for p in parts):
            yield f"allow_dead_parts={parts!r}: expected a tuple of parts, such as ('perceiver',)"

    # -----------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        problems = [p for group in GROUPS for p in getattr(self, f"_{group}_problems")()]
        if problems:
            raise ValueError("TrainConfig cannot work:\n" + "\n".join(f"  - {p}" for p in problems))
        object.__setattr__(self, "output_dir", Path(self.output_dir))

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a full window (derived, never set).

        1 is what ``auto`` aims at; what it came to is in ``result.metrics["micro_batch_size"]``.
        """
        if self.micro_batch_size == "auto":
            return 1
        return math.ceil(self.global_batch_size / self.micro_batch_size)

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of a run over ``num_rows`` training rows."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * num_rows / self.global_batch_size))

    def num_warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of the warm-up in a run of so many."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, as a checkpoint records them."""
        fields = dataclasses.asdict(self)
        paths = {name: str(v) for name, v in fields.items() if isinstance(v, os.PathLike)}
        lists = {"report_to": list(self.report_to), "allow_dead_parts": list(self.allow_dead_parts)}
        return {**fields, **paths, **lists}
