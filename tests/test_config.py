"""TrainConfig: defaults are the recipe, and every wrong value is named at once."""

import dataclasses
import inspect
import pickle
import pydoc
import re

import pytest

import idefics_qlora as iq
from idefics_qlora.config import GROUPS, OTHER_NAMES, explanations


def test_defaults_are_the_tutorials_recipe():
    """Someone who sets nothing gets the tutorial's numbers."""
    config = iq.TrainConfig(output_dir="runs")
    recipe = {
        "global_batch_size": 16,
        "micro_batch_size": "auto",
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "precision": "auto",
        "optim": "paged_adamw_8bit",
        "logging_steps": 20,
        "eval_steps": 20,
        "save_steps": 40,
        "save_total_limit": 3,
        "load_best_model_at_end": True,
        "eval_batch_size": 2,
        "seed": 42,
    }
    assert {name: getattr(config, name) for name in recipe} == recipe


def test_fields_are_frozen_names():
    """A field is only added or renamed on purpose: users write them in their scripts."""
    assert GROUPS == {
        "run": ("output_dir", "seed", "progress", "report_to"),
        "schedule": (
            "max_steps",
            "num_train_epochs",
            "learning_rate",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
            "warmup_ratio",
            "weight_decay",
            "max_grad_norm",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
        ),
        "batch": ("global_batch_size", "micro_batch_size", "gradient_checkpointing", "fast"),
        "precision": ("precision", "optim"),
        "evaluation": (
            "logging_steps",
            "eval_steps",
            "eval_batch_size",
            "eval_image_use",
            "eval_samples",
            "eval_generate_rows",
            "eval_max_new_tokens",
            "eval_predictions",
        ),
        "checkpoints": (
            "save_steps",
            "save_total_limit",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "early_stopping_patience",
            "early_stopping_threshold",
            "resume",
        ),
        "data": ("loss_on", "max_length", "augment", "num_workers", "cache_images"),
        "faults": ("on_bad_row", "on_save_error", "loader_timeout_s", "allow_dead_parts"),
    }
    names = [field.name for field in dataclasses.fields(iq.TrainConfig)]
    assert names == [name for group in GROUPS.values() for name in group]


def test_help_explains_every_field_under_its_heading():
    """The README promises it; what stands below a field in the source is else seen by editors."""
    told = pydoc.render_doc(iq.TrainConfig, renderer=pydoc.plaintext)
    assert "Settings of one training run." in told
    place = 0
    for group, names in GROUPS.items():
        place = told.index(f" {group.capitalize()}:\n", place)
        for name in names:
            place = told.index(f" {name}: ", place)
            assert explanations(iq.TrainConfig)[name].splitlines()[0] in told[place:]
    assert "learning_rate: float = 0.0002" in told


def test_every_problem_is_reported_at_once():
    """One failed start is enough to correct a configuration."""
    with pytest.raises(ValueError, match="cannot work") as caught:
        iq.TrainConfig(
            output_dir="",
            max_steps=0,
            micro_batch_size=2.5,
            learning_rate=float("nan"),
            precision="fp8",
            optim="sgd",
            lr_scheduler_type="step",
            loss_on="prompt",
            max_length=1,
            augment="yes",
            num_workers="many",
            cache_images="tape",
            max_grad_norm=-1,
        )
    message = str(caught.value)
    for problem in (
        "output_dir=''",
        "max_steps=0",
        "micro_batch_size=2.5",
        "learning_rate=nan",
        "precision='fp8': expected one of auto, fp16, bf16, fp32",
        "optim='sgd'",
        "lr_scheduler_type='step'",
        "loss_on='prompt'",
        "max_length=1",
        "augment='yes'",
        "cache_images='tape': expected one of disk, memory",
        "num_workers='many': expected 'auto' or a whole number of at least 0",
        "max_grad_norm=-1",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": 32}, "larger than global_batch_size=16"),
        ({"warmup_steps": 50, "max_steps": 40}, "never reach its peak"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio=0.1 beside warmup_steps=5"),
        (
            {"lr_scheduler_kwargs": {"num_decay_steps": 3}},
            r"num_decay_steps.*only lr_scheduler_type='warmup_stable_decay' has any",
        ),
        ({"save_steps": 30}, "not a multiple of eval_steps=20"),
    ],
)
def test_values_that_contradict_each_other(values, message):
    """Fields that are fine alone but not together are refused, with the way out."""
    with pytest.raises(ValueError, match=message):
        iq.TrainConfig(output_dir="runs", **values)


@pytest.mark.parametrize("value", ["many", (), -1, True, 2.5])
@pytest.mark.parametrize(
    "name", ["max_steps", "warmup_steps", "global_batch_size", "eval_steps", "save_steps"]
)
def test_a_check_of_two_fields_bears_any_value_of_either(name, value):
    """What is wrong by itself is told once, by its own check."""
    with pytest.raises(ValueError, match="cannot work") as caught:
        iq.TrainConfig(**{"output_dir": "runs", "max_steps": 40, "warmup_steps": 1, name: value})
    assert str(caught.value).count("\n") == 1
    assert f"  - {name}={value!r}: expected a whole number" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"=None: .* expected a dictionary such as \{'num_decay_steps': 100\}"),
        ("100", r"='100': .* expected a dictionary"),
        ({"num_decay_steps": 0}, "num_decay_steps=0: expected a whole number from 1 on"),
        ({"num_decay_steps": 8}, "num_decay_steps=8 is more than the 7 steps that max_steps=10"),
        ({"num_decay_steps": 5, "decay_type": "step"}, "decay_type='step': expected one of"),
        ({"num_decay_steps": 5, "min_lr_ratio": 1.5}, "min_lr_ratio=1.5: expected a number"),
        ({"num_decay_steps": 5, "num_cycles": 2}, "has 'num_cycles': expected num_decay_steps, "),
    ],
)
def test_the_parameters_of_a_decay_are_checked(settings, message):
    """A schedule that cannot be is no surprise at the end of a long run."""
    with pytest.raises(ValueError, match=message) as caught:
        iq.TrainConfig(
            output_dir="runs",
            max_steps=10,
            warmup_ratio=0.3,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs=settings,
        )
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2", "warmup_ratio"])
@pytest.mark.parametrize("value", [1, -0.1, float("nan"), "0.9", True])
def test_shares_are_below_one(name, value):
    """AdamW with a beta of 1 never moves; a ratio of 1 and more is mostly a number of steps."""
    with pytest.raises(ValueError, match=rf"{name}=.*: expected a number of at least 0 and below"):
        iq.TrainConfig(output_dir="runs", max_steps=10, **{name: value})


def test_steps_follow_from_epochs():
    """Without max_steps, the epochs decide, the last window included."""
    config = iq.TrainConfig(output_dir="runs", num_train_epochs=1.5)
    assert config.total_steps(100) == 10  # 150 examples, 16 at a time
    assert iq.TrainConfig(output_dir="runs", max_steps=7).total_steps(100) == 7


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("per_device_train_batch_size", 2, "per_device_train_batch_size: micro_batch_size"),
        ("per_device_eval_batch_size", 2, "eval_batch_size"),
        ("gradient_accumulation_steps", 8, "derived: set global_batch_size"),
        ("evaluation_strategy", "steps", "eval_steps"),
        ("eval_strategy", "steps", "eval_steps"),
        ("fp16", True, "precision='fp16'"),
        ("bf16", True, "precision='bf16'"),
        ("dataloader_num_workers", 2, "num_workers"),
        ("resume_from_checkpoint", True, "resume='auto'"),
        ("leraning_rate", 1e-4, "did you mean learning_rate"),
        ("wombat", 1, "there is no such setting; there are output_dir, .* allow_dead_parts"),
    ],
)
def test_settings_of_other_trainers_are_told_by_our_names(name, value, message):
    """Who comes from TrainingArguments, or mistypes, is told what to write, all at once."""
    with pytest.raises(TypeError, match=rf"  - {name}: ") as caught:
        iq.TrainConfig(output_dir="runs", seeed=1, **{name: value})
    assert re.search(message, str(caught.value))
    assert "seeed: did you mean seed?" in str(caught.value)


def test_the_table_of_other_names_names_ours():
    """A renamed field or function would leave advice that leads nowhere; no field is in it."""
    fields = {field.name for field in dataclasses.fields(iq.TrainConfig)}
    assert not fields & OTHER_NAMES.keys()
    ours = fields | set(dir(iq)) | {"eval_loss", "eval_rows", "on_log", "to_example"}
    for other, text in OTHER_NAMES.items():
        names = re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)
        assert set(names) <= ours, other


def test_the_signature_is_that_of_the_fields():
    """Editors and notebooks show the settings, not *args and **values."""
    signature = inspect.signature(iq.TrainConfig)
    assert [*signature.parameters] == [f.name for f in dataclasses.fields(iq.TrainConfig)]
    config = iq.TrainConfig(output_dir="runs")
    assert dataclasses.replace(config, seed=1).seed == 1
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("value", ["perceiver", None, 3, (1,)])
def test_dead_parts_are_a_tuple(value):
    """A string is no list of its letters."""
    with pytest.raises(ValueError, match=r"allow_dead_parts=.*: expected a tuple of parts, such"):
        iq.TrainConfig(output_dir="runs", allow_dead_parts=value)
    iq.TrainConfig(output_dir="runs", allow_dead_parts=["perceiver"])
