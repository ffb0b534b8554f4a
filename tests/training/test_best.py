"""Which checkpoint is the best, when a run ends early, and what a restart makes of both."""

import copy
import json
import logging
import os

import pytest
from helpers import config_of, differences, same, warnings_of
from steps import snapshot

import idefics_qlora as iq
from idefics_qlora.checkpoint import checkpoints, load_checkpoint
from idefics_qlora.training.best import Criterion


def early(folder, **changes):
    """An evaluation and a checkpoint at every step; nothing counts as a gain but the first."""
    settings = {
        "max_steps": 6,
        "global_batch_size": 4,
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": None,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "early_stopping_threshold": 100.0,
        "lr_scheduler_type": "constant",
    }
    return config_of(folder, **{**settings, **changes})


def run(base, processor, examples, config, seed=42, eval_rows=None, **options):
    model = iq.add_lora(copy.deepcopy(base), seed=seed)
    held_out = examples[:3] if eval_rows is None else eval_rows
    return model, iq.train(model, processor, examples, held_out, config=config, **options)


def scripted(*values):
    """A metric with these values in the order of its calls, the last one for ever."""
    left = list(values)
    return lambda predictions, references: left.pop(0) if len(left) > 1 else left[0]


def metric_config(folder, **changes):
    settings = {"metric_for_best_model": "eval_right", "greater_is_better": True}
    settings |= {"eval_generate_rows": 2, "eval_max_new_tokens": 2}
    without = {"early_stopping_patience": None, "early_stopping_threshold": 0.0}
    return early(folder, **{**settings, **without, **changes})


@pytest.mark.parametrize(
    ("values", "settings", "is_over"),
    [
        ([3, 2, 1], {"patience": 1}, False),
        ([3, 2, 2], {"patience": 1}, True),
        ([3, 2, 4, 4], {"patience": 3}, False),
        ([3, 2, 4, 4, 2], {"patience": 3}, True),
        ([1, 1, 1], {"patience": None}, False),
        ([1, 2, 3], {"patience": 2, "greater": True}, False),
        ([3, 2, 1], {"patience": 2, "greater": True}, True),
        ([1.0, 0.9, 0.8], {"patience": 2, "threshold": 0.15}, False),  # they add up
        ([1.0, 0.9, 0.9], {"patience": 2, "threshold": 0.15}, True),
        ([1.0, 0.9], {"patience": 1, "threshold": 0.15}, True),
        ([float("nan"), float("nan")], {"patience": 2}, True),
        ([float("nan"), 5.0], {"patience": 2}, False),
        ([], {"patience": 1}, False),
    ],
)
def test_when_it_is_over(values, settings, is_over):
    """Evaluations without a gain are counted from the last one with a gain."""
    records = [{"loss": 1.0}, *({"eval_loss": value} for value in values)]
    assert Criterion(**settings).is_over(records) == is_over


def test_an_early_stop_ends_as_if_complete(base, processor, examples, tmp_path):
    """The best is loaded; a new start returns at once; more patience goes on as it would have."""
    model, result = run(base, processor, examples, early(tmp_path / "run"))
    assert (result.stopped_by, result.global_step) == ("early_stopping", 3)
    losses = {r["step"]: r["eval_loss"] for r in result.log_history if "eval_loss" in r}
    assert list(losses) == [1, 2, 3]
    best = min(losses, key=losses.get)
    assert result.best_checkpoint == tmp_path / "run" / f"checkpoint-{best}"
    assert result.metrics["eval_loss"] == losses[best]
    assert iq.evaluate(model, processor, examples[:3])["eval_loss"] == losses[best]
    files = sorted(os.listdir(tmp_path / "run"))

    records = []
    options = {"on_log": records.append, "seed": 1}
    again, same_result = run(base, processor, examples, early(tmp_path / "run"), **options)
    assert same(snapshot(again), snapshot(model))
    assert (same_result.stopped_by, same_result.global_step) == ("early_stopping", 3)
    assert same_result.log_history[:-1] == result.log_history[:-1]  # the last has the clocks
    assert same_result.metrics["eval_loss"] == losses[best]
    assert records == []
    assert sorted(os.listdir(tmp_path / "run")) == files

    patient = {"early_stopping_patience": 4}
    _, longer = run(base, processor, examples, early(tmp_path / "run", **patient), seed=1)
    _, whole = run(base, processor, examples, early(tmp_path / "whole", **patient))
    assert (longer.stopped_by, longer.global_step) == ("early_stopping", 5)
    assert whole.global_step == 5
    last = "checkpoint-5"
    assert differences(tmp_path / "whole" / last, tmp_path / "run" / last) == []

    for patience in (None, 9):
        config = early(
            tmp_path / "run",
            early_stopping_patience=patience,
            early_stopping_threshold=100.0 if patience else 0.0,
        )
        _, complete = run(base, processor, examples, config)
        assert (complete.stopped_by, complete.global_step) == (None, 6)


def test_it_stops_between_two_saves(base, processor, examples, tmp_path):
    """The last step is saved, though no save is due."""
    config = early(tmp_path, save_steps=4, early_stopping_patience=1)
    _, result = run(base, processor, examples, config)
    assert (result.stopped_by, result.global_step) == ("early_stopping", 2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_patience_that_ends_with_the_run(base, processor, examples, tmp_path):
    """A run that has done all its steps was not stopped."""
    _, result = run(base, processor, examples, early(tmp_path, max_steps=3))
    assert (result.stopped_by, result.global_step) == (None, 3)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("how", ["STOP", "raises"])
def test_interrupted_at_every_step(base, processor, examples, tmp_path, at, how):
    """A run that broke off in a step, or was stopped behind it, ends at the same step, equal."""
    run(base, processor, examples, early(tmp_path / "whole"))

    def on_log(record):
        if "eval_loss" in record and record["step"] == at:
            if how == "raises":
                raise RuntimeError("injected")
            return iq.STOP
        return None

    config = early(tmp_path / "run")
    if how == "raises":
        with pytest.raises(RuntimeError, match="injected"):
            run(base, processor, examples, config, on_log=on_log)
    else:
        _, stopped = run(base, processor, examples, config, on_log=on_log)
        assert stopped.stopped_by == ("on_log" if at < 3 else "early_stopping")
    _, result = run(base, processor, examples, config, seed=1)
    assert (result.stopped_by, result.global_step) == ("early_stopping", 3)
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        if (tmp_path / "run" / name).exists():
            assert differences(tmp_path / "whole" / name, tmp_path / "run" / name) == []
    assert (tmp_path / "run" / "checkpoint-3").exists()


def test_the_best_by_a_metric(base, processor, examples, tmp_path):
    """More of it is better, or less, as it is said; the best is kept and loaded."""
    for greater, best in ((True, 2), (False, 4)):
        config = metric_config(
            tmp_path / str(greater), greater_is_better=greater, max_steps=4, save_total_limit=1
        )
        metrics = {"right": scripted(0.5, 0.75, 0.25, 0.0)}
        _, result = run(base, processor, examples, config, metrics=metrics)
        assert result.best_checkpoint.name == f"checkpoint-{best}"
        assert result.metrics["eval_right"] == (0.75 if greater else 0.0)
        state = load_checkpoint(result.best_checkpoint).state
        assert state["best_metric"] == result.metrics["eval_right"]


def test_early_stopping_on_a_metric(base, processor, examples, tmp_path):
    """The patience is that of the metric, whatever the loss does; its best is loaded."""
    values = {"r": scripted(0.1, 0.3, 0.2, 0.3)}

    def exact(predictions, references):
        return {"right": values["r"](predictions, references)}

    changed = {"metric_for_best_model": "eval_m_right"}
    config = metric_config(tmp_path, greater_is_better=None, **changed)
    with pytest.raises(ValueError, match="whether more of eval_m_right is better is not known"):
        run(base, processor, examples, config, metrics={"m": exact})
    config = metric_config(tmp_path, early_stopping_patience=2, **changed)
    _, result = run(base, processor, examples, config, metrics={"m": exact})
    assert (result.stopped_by, result.global_step) == ("early_stopping", 4)
    assert result.best_checkpoint.name == "checkpoint-2"


def test_the_direction_of_our_metrics_is_known(base, processor, examples, tmp_path):
    """Nothing has to be said of them."""
    config = metric_config(
        tmp_path, metric_for_best_model="eval_x", greater_is_better=None, max_steps=1
    )
    _, result = run(base, processor, examples, config, metrics={"x": iq.metrics.exact_match})
    assert result.best_checkpoint.name == "checkpoint-1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "right"}, "did you mean 'eval_right'"),
        ({"metric_for_best_model": "eval_rigth"}, "did you mean 'eval_right'"),
        (
            {"metric_for_best_model": "eval_wombat"},
            "pass metrics={name: function}; there are eval_loss, .*eval_right",
        ),
        (
            {"metric_for_best_model": "cider"},
            "for 'eval_cider' pass metrics={'cider': iq.metrics.cider_d}; there are eval_loss",
        ),
        ({"metric_for_best_model": "eval_exact_mach"}, "for 'eval_exact_match' pass metrics="),
        ({"metric_for_best_model": "eval_image_gain"}, "it needs eval_image_use=True"),
        ({"metric_for_best_model": "eval_samples"}, "nothing that an evaluation"),
        ({"greater_is_better": None}, "greater_is_better=None: .*: expected True or False"),
        (
            {"metric_for_best_model": "eval_loss"},
            "greater_is_better=True contradicts metric_for_best_model='eval_loss', .* less is",
        ),
    ],
)
def test_what_cannot_decide(base, processor, examples, tmp_path, settings, message):
    """It is told before training, while nothing has been written."""
    config = metric_config(tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=message):
        run(base, processor, examples, config, metrics={"right": len})
    assert not (tmp_path / "run").exists()


def test_evaluations_without_rows_are_told_at_once(base, processor, examples, tmp_path):
    """All that is asked of evaluations that there are not, in one message."""
    config = early(tmp_path, eval_predictions=True)
    with pytest.raises(ValueError, match="needs held-out rows") as caught:
        iq.train(iq.add_lora(base), processor, examples, config=config, metrics={"right": len})
    for what in ("metrics (right)", "early_stopping_patience=2", "eval_predictions=True"):
        assert f"{what} without eval_rows" in str(caught.value)


def test_settings_that_contradict_each_other(tmp_path):
    """All of them at once."""
    with pytest.raises(ValueError, match="cannot work") as caught:
        iq.TrainConfig(
            output_dir=tmp_path,
            eval_generate_rows=0,
            eval_max_new_tokens=1.5,
            eval_predictions="yes",
            metric_for_best_model=None,
            greater_is_better="yes",
            early_stopping_patience=0,
            early_stopping_threshold=-1,
        )
    for name in (
        *("eval_generate_rows=0", "eval_max_new_tokens=1.5", "eval_predictions='yes'"),
        *("metric_for_best_model=None", "greater_is_better='yes'"),
        *("early_stopping_patience=0", "early_stopping_threshold=-1"),
    ):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="has no effect without early_stopping_patience"):
        iq.TrainConfig(output_dir=tmp_path, early_stopping_threshold=0.1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (float("nan"), ValueError, r"metrics\['right'\] after step 2 gave nan"),
        ("much", TypeError, r"metrics\['right'\] after step 2 gave 'much'"),
        (None, ZeroDivisionError, r"raised by metrics\['right'\] after step 2"),
        (
            {"other": 1.0},
            ValueError,
            "metric_for_best_model='eval_right' is not among what the evaluation after step 2 "
            "gave: expected one of eval_loss, .*eval_right_other",
        ),
    ],
)
def test_a_metric_that_fails(base, processor, examples, tmp_path, given, error, message):
    """It is named with the step, which is saved; mended, the run ends like one without it."""
    values = (0.5, 0.25, 0.75)
    config = metric_config(tmp_path / "run", max_steps=3, save_steps=3)
    whole = metric_config(tmp_path / "whole", max_steps=3, save_steps=3)
    run(base, processor, examples, whole, metrics={"right": scripted(*values)})
    bad = scripted(0.5, given)

    def failing(predictions, references):
        value = bad(predictions, references)
        return 1 / 0 if value is None else value

    with pytest.raises(error, match=message):
        run(base, processor, examples, config, metrics={"right": failing})
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    mended = {"right": scripted(*values[1:])}
    _, result = run(base, processor, examples, config, seed=1, metrics=mended)
    assert [r["eval_right"] for r in result.log_history if "eval_right" in r] == list(values)
    last = "checkpoint-3"
    assert differences(tmp_path / "whole" / last, tmp_path / "run" / last) == []


def test_another_metric_in_a_resume(base, processor, examples, tmp_path, caplog):
    """The best is looked for among the checkpoints that are left; told, and only if it changed."""
    metrics = {"right": scripted(0.9, 0.1, 0.5)}
    settings = {"max_steps": 3, "metric_for_best_model": "eval_loss", "greater_is_better": None}
    config = metric_config(tmp_path, **settings)
    _, first = run(base, processor, examples, config, metrics=metrics)
    caplog.clear()
    config = metric_config(tmp_path, max_steps=3)
    _, result = run(base, processor, examples, config, metrics=metrics)
    assert result.best_checkpoint.name == "checkpoint-1"
    assert result.metrics["eval_right"] == 0.9
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["best_checkpoint"] == (tmp_path / "best").read_text().strip() == "checkpoint-1"
    assert (
        "metric_for_best_model was eval_loss and is eval_right now: of the checkpoints that are "
        "left, that of step 1 is the best"
    ) in warnings_of(caplog)
    caplog.clear()
    config = metric_config(tmp_path, max_steps=3, greater_is_better=False)
    _, result = run(base, processor, examples, config, metrics=metrics)
    assert result.best_checkpoint.name == "checkpoint-2"
    caplog.clear()
    config = metric_config(tmp_path, **settings)
    _, result = run(base, processor, examples, config, metrics=metrics)
    assert result.best_checkpoint == first.best_checkpoint


def test_other_rows_begin_the_comparison_anew(base, processor, examples, tmp_path, caplog):
    """Evaluations of other rows, or of other answers, are compared with none before."""
    run(base, processor, examples, early(tmp_path / "run", max_steps=2))
    config = early(tmp_path / "run", early_stopping_patience=1)
    caplog.clear()

    def on_log(record):
        return iq.STOP if "eval_loss" in record else None

    other = {"eval_rows": examples[5:8]}
    _, stopped = run(base, processor, examples, config, on_log=on_log, **other)
    assert (stopped.stopped_by, stopped.global_step) == ("on_log", 3)
    _, result = run(base, processor, examples, config, **other)
    # Of step 2 nothing is known for these rows: step 3 is the first, step 4 without a gain.
    assert (result.stopped_by, result.global_step) == ("early_stopping", 4)
    assert "the best checkpoint so far is forgotten" in caplog.text
    assert load_checkpoint(tmp_path / "run" / "checkpoint-4").state["judged_from"] == 4
    _, again = run(base, processor, examples, config, **other)
    assert (again.stopped_by, again.global_step) == ("early_stopping", 4)

    config = metric_config(tmp_path / "metric", max_steps=2)
    metrics = {"right": scripted(0.9, 0.8, 0.1, 0.2)}
    run(base, processor, examples, config, metrics=metrics)
    caplog.clear()
    config = metric_config(tmp_path / "metric", max_steps=4, eval_max_new_tokens=3)
    _, result = run(base, processor, examples, config, metrics=metrics)
    assert "eval_max_new_tokens differ from those of" in caplog.text
    assert result.best_checkpoint.name == "checkpoint-4"


def test_predictions_of_every_evaluation(base, processor, examples, tmp_path, caplog):
    """A line for each row and step, none twice and none missing after any resume."""
    config = metric_config(
        tmp_path,
        max_steps=3,
        eval_predictions=True,
        metric_for_best_model="eval_loss",
        greater_is_better=None,
    )
    said = []
    metrics = {"right": lambda p, r: said.append(p) or len(said)}
    run(base, processor, examples, config, metrics=metrics)
    file = tmp_path / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["row"]) for line in lines] == [
        (step, row) for step in (1, 2, 3) for row in (0, 1)
    ]
    assert [line["prediction"] for line in lines] == [text for texts in said for text in texts]
    assert lines[0]["references"] == [examples[0].completion.strip()]
    whole = file.read_text()
    with file.open("a") as torn:
        torn.write('{"step": 1, "ro')
    config = metric_config(
        tmp_path,
        max_steps=3,
        eval_predictions=True,
        resume=tmp_path / "checkpoint-1",
        metric_for_best_model="eval_loss",
        greater_is_better=None,
    )
    run(base, processor, examples, config)  # without metrics as well
    assert file.read_text() == whole
    file.unlink()
    file.mkdir()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(base, processor, examples, config)
    assert "predictions.jsonl cannot be written" in caplog.text
