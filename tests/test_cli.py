"""The command line: mistakes, exit codes, and that it does what the library does.

More than 400 lines: each command, and each way in which what it is told can be wrong.
"""

import configparser
import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from helpers import without_clocks
from PIL import Image

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.data.captions import QUESTION
from idefics_qlora.evaluation.metrics import BY_NAME
from idefics_qlora.fields import MetricName, sections
from idefics_qlora.training import trackers

ROOT = Path(__file__).parents[1]
RUN = """
model: {base: tiny, device: cpu}
lora: {r: 8, lora_alpha: 16}
data: {train: tiny, eval: tiny}
train: {output_dir: run, max_steps: 2, learning_rate: 8e-3, global_batch_size: 2, precision: fp32,
  num_workers: 0, eval_steps: 1, save_steps: 1, logging_steps: 1, eval_batch_size: 16}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with the file run.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def problems_of(capsys, *arguments):
    """The problems for which a command ends before it does anything."""
    assert cli.main([*arguments]) == 2
    told = capsys.readouterr().err
    lines = told[told.index(f"{cli.PROG} {arguments[0]}: ") :].splitlines()
    number = len(lines) - 1
    assert lines[0].endswith(f"{number} problem" + "s" * (number > 1))
    return [line.removeprefix("  - ") for line in lines[1:]]


def process(*arguments, **options):
    """The command as a user starts it."""
    command = [sys.executable, "-m", "idefics_qlora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


@contextlib.contextmanager
def started(arguments, **options):
    """A process that is gone afterwards, whatever happens."""
    with subprocess.Popen(arguments, text=True, **options) as child:
        try:
            yield child
        finally:
            child.kill()


def test_the_list_of_commands_is_there_at_once():
    """`--help` imports nothing heavy, names all commands, and says how to complete."""
    code = (
        "import sys; from idefics_qlora.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(re.search(rf"^    {name} +\w", done.stdout, re.MULTILINE) for name in cli.COMMANDS)
    assert "--print_completion=shtab-bash" in done.stdout


def test_the_entry_points_are_there():
    """`idefics-qlora` is the function that `python -m idefics_qlora` calls; no command is 2."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == cli.PROG
    assert getattr(import_module(module), function) is cli.main
    done = process()
    assert done.returncode == 2
    assert "commands:" in done.stderr
    assert process("trian").returncode == 2


def test_shells_complete_every_setting(capsys):
    """What is printed for bash is a script of bash with the commands' options."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print_completion=shtab-bash"])
    assert ended.value.code in (0, None)
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for name in ("--train.learning_rate", "--lora.use_dora", "--adapter", "--text-tokens"):
        assert name in script


def test_the_help_of_train_explains_every_field(capsys):
    """Each setting stands there with the text that its dataclass has."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code in (0, None)
    told = " ".join(capsys.readouterr().out.split())
    for name, field in sections().items():
        assert f"--{name} " in told
        # Lines are broken at hyphens, too.
        assert field.text.replace(" ", "")[:60] in told.replace(" ", ""), name


def test_three_mistakes_are_three_problems(here, capsys):
    """Keys and types of a file are told with their lines, all at once, with the way out."""
    Path("bad.yaml").write_text(
        "model: {base: tiny}\n"
        "data: {train: tiny, eval: tiny}\n"
        "train:\n"
        "  output_dir: run\n"
        "  leraning_rate: 1e-3\n"
        "  max_steps: many\n"
        "  per_device_train_batch_size: 4\n"
    )
    assert problems_of(capsys, "train", "--config", "bad.yaml") == [
        "bad.yaml, line 5: train.leraning_rate: did you mean train.learning_rate?",
        "bad.yaml, line 6: train.max_steps='many': expected a whole number or null",
        "bad.yaml, line 7: train.per_device_train_batch_size is called otherwise here: "
        "micro_batch_size",
    ]
    assert not Path("run").exists()


def test_keys_and_values_and_data_are_told_together(here, capsys):
    """What the settings' own checks, the templates, the files and the base say comes with it."""
    Path("rows.jsonl").write_text('{"image": "a.png", "text": "A."}\nno JSON\n')
    Path("bad.yaml").write_text(
        "model: {base: ./nowhere}\n"
        "lora: {layers_pattern: layers, lora_alpa: 3}\n"
        "data:\n"
        "  train: rows.jsonl\n"
        "  eval: hf:photos\n"
        "  answer: '{text'\n"
        "train:\n"
        "  max_steps: 0\n"
        "  save_steps: 30\n"
        "  seed: 1\n"
        "  seed: 2\n"
        "max_steps: 3\n"
    )
    found = problems_of(capsys, "train", "--config", "bad.yaml", "--train.augmnt", "false")
    expected = (
        r"bad.yaml, line 12: max_steps: did you mean train.max_steps\?",
        r"bad.yaml, line 2: lora.lora_alpa: did you mean lora.lora_alpha\?",
        r"bad.yaml, line 11: train.seed stands here a second time: keep one",
        r"command line: train.augmnt: did you mean train.augment\?",
        r"train.output_dir is missing: expected .* in the file of --config or as --train.output_",
        r"bad.yaml, line 8: train.max_steps=0: expected a whole number of at least 1",
        r"bad.yaml, line 9: train.save_steps=30 is not a multiple of train.eval_steps=20",
        r"lora: .*`layers_to_transform`",
        r"bad.yaml, line 6: data.answer='\{text': expected '\}'",
        r"bad.yaml, line 4: data.train='rows.jsonl': rows.jsonl, line 2: no JSON",
        r"bad.yaml, line 5: data.eval='hf:photos': expected hf:NAME:SPLIT",
        r"bad.yaml, line 1: model.base='./nowhere': there is no folder",
    )
    for pattern in expected:
        assert any(re.match(pattern, problem) for problem in found), (pattern, found)
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: [1, 2]", "line 1: train is [1, 2]: expected settings, `name: value`"),
        ("- a", "line 1: the file is ['a']: expected settings, `name: value`"),
        ("train: {", "line 1: no YAML: "),
        ("trian: {max_steps: 3}", "line 1: trian: did you mean train?"),
        ("wombat: 1", "line 1: wombat: there is no such setting; there are model, lora, data, tra"),
        ("lr: 1e-3", "line 1: lr is called otherwise here: learning_rate"),
        ("model: {base: null}", "line 1: model.base=null: expected text"),
    ],
)
def test_a_file_that_holds_something_else(here, capsys, text, problem):
    """Whatever stands in the file, it is named with its line."""
    Path("bad.yaml").write_text(text)
    found = problems_of(capsys, "train", "--config", "bad.yaml", "--config", "gone.yaml")
    assert any(line.startswith(f"bad.yaml, {problem}") for line in found), found
    assert any(line.startswith("--config gone.yaml: No such file") for line in found)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("gone.yaml", None, "--config gone.yaml: No such file"),
        ("bad.yaml", "model:\n  base: tiny\n   revision: a\n", "bad.yaml, line 3: no YAML: "),
        ("bad.yaml", "a: \xff", "bad.yaml: no text in UTF-8: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_problem(here, capsys, name, text, problem):
    """What its settings are is not known, so none is said to be missing."""
    if text is not None:
        Path(name).write_text(text, encoding="latin-1")
    (found,) = problems_of(capsys, "train", "--config", name)
    assert found.startswith(problem)
    assert ("check the indentation" in found) == ("no YAML" in problem)


def test_a_file_without_its_option(here, capsys):
    """The first that one tries: told beside what is missing for want of it."""
    problems = problems_of(capsys, "train", "run.yaml")
    assert problems[0].startswith(
        "command line: 'run.yaml' is no setting: a file of settings is given as --config FILE"
    )
    assert any(problem.startswith("model.base is missing") for problem in problems)


def test_numbers_are_numbers_and_the_command_line_wins(here, capsys):
    """`8e-3`, which YAML 1.1 reads as text; and what is printed can be read again."""
    arguments = ["train", "--config", "run.yaml", "--train.max_steps", "5"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--train.lr_scheduler_kwargs.num_decay_steps", "3", "--print_config"])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["train"]["learning_rate"] == 0.008
    assert config["train"]["max_steps"] == 5
    assert config["train"]["lr_scheduler_kwargs"] == {"num_decay_steps": 3}
    assert config["lora"]["r"] == 8
    assert config["data"]["access"]["allow_private_hosts"] is False
    Path("again.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "again.yaml", "--print_config"])
    assert capsys.readouterr().out == printed


def test_what_train_finds_before_its_first_step_is_2(here, capsys):
    """Rows and settings that do not go together are settings: told together with what else is
    wrong, before a base is loaded."""
    Path("rows.jsonl").write_text('{"image": "a.png", "text": "A."}\n' * 2)
    Path("run.yaml").write_text(RUN.replace("{train: tiny, eval: tiny}", "{train: rows.jsonl}"))
    arguments = ["train", "--config", "run.yaml", "--train.load_best_model_at_end", "true"]
    best, row = problems_of(capsys, *arguments)
    assert best.startswith("command line: train.load_best_model_at_end=True needs held-out rows to")
    assert row.startswith(f"cannot open the image '{here / 'a.png'}' of image of data.train[0]: ")
    metric = ["--data.eval", "tiny", "--train.metric_for_best_model", "eval_cidr"]
    template = ["--data.train", "tiny", "--data.answer", " {nme}", "--metrics", "cider"]
    problems = problems_of(capsys, *arguments, *metric, *template)
    assert problems[0].endswith("records: did you mean 'eval_cider'?")
    (column,) = problems[1:]  # once, though the rows of both kinds lack it
    assert column.startswith("data.train[0]: column 'nme', which answer=' {nme}' asks for")


def test_packages_and_steps_are_told_with_the_rest(here, capsys, monkeypatch):
    """What is not installed, each with the way out and its line; and a warm-up that is longer than
    the run whose steps follow from the rows: before a base is loaded."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    text = RUN.replace("max_steps: 2", "num_train_epochs: 1, warmup_steps: 1000")
    Path("run.yaml").write_text(text.replace("num_workers: 0", "report_to: [wandb, trackio]"))
    template = ["--data.answer", " {nme}"]
    problems = problems_of(capsys, "train", "--config", "run.yaml", *template)
    for problem, name in zip(problems, ("wandb", "trackio"), strict=False):
        assert problem == (
            f"run.yaml, line 6: train.report_to='{name}' needs the package {name}: "
            f'pip install "idefics_qlora[{name}]"'
        )
    assert problems[2].startswith(
        "run.yaml, line 5: train.warmup_steps=1000 is more than the 128 steps that train.num_tra"
    )
    assert [problem.split(":")[0] for problem in problems[3:]] == ["data.train[0]"]


@pytest.mark.parametrize("section", ["lora:", "data: {train: tiny, access: }", "lora: null"])
def test_an_empty_section_sets_nothing(here, capsys, section):
    """Its defaults are there, also beside what the command line sets in it."""
    Path("run.yaml").write_text(f"model: {{base: tiny, device: cpu}}\n{section}\n")
    options = ["--lora.r", "2", "--data.access.max_bytes", "1000000", "--data.train", "tiny"]
    options += ["--train.output_dir", "run", "--train.max_steps", "1", "--train.num_workers", "0"]
    options += ["--train.load_best_model_at_end", "false", "--train.global_batch_size", "2"]
    assert cli.main(["train", "--config", "run.yaml", *options]) == 0
    lora = json.loads(Path("run/checkpoint-1/adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"]) == (2, 32)
    assert cli.main(["generate", "--config", "run.yaml", "none.png"]) == 1
    assert "cannot open the image 'none.png'" in capsys.readouterr().err


def test_train_evaluate_and_generate(here, capsys):
    """A run by its file, its adapter evaluated, and pictures of every kind of source described."""
    assert cli.main(["train", "--config", "run.yaml", "--train.max_steps", "1"]) == 0
    told = capsys.readouterr()
    assert told.out == ""  # what the library shows of a run is all there is
    assert told.err.count(f"the best checkpoint is {Path('run/checkpoint-1')}\n") == 1
    assert told.err.count("checkpoint-1") == 1
    assert told.err.endswith(
        "on the command line: idefics-qlora generate --adapter run photo.jpg\n"
    )
    training, held_out = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    assert (training["step"], held_out["step"]) == (1, 1)
    lora = json.loads(Path("run/checkpoint-1/adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (8, 16, 0.05)

    run = ["--config", "run.yaml", "--adapter", "run"]
    assert cli.main(["evaluate", *run, "--output", "metrics.json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert json.loads(Path("metrics.json").read_text()) == metrics
    # Its precision is fp32, as the run's was, so the loss is that of the run to the rounding.
    assert metrics["eval_loss"] == pytest.approx(held_out["eval_loss"], rel=1e-4)

    Path("folder/deep").mkdir(parents=True)
    Path("more").mkdir()
    cards = iq.tiny.creature_cards(4, seed=3)
    names = ["photo.png", "folder/deep/a.png", "more/b.png", "more/c.jpg"]
    for card, name in zip(cards, names, strict=True):
        card["image"].save(name)
    Path("folder/metadata.csv").write_text("no picture")
    Path("folder/broken.png").write_bytes(b"no picture")
    few = ["--max_new_tokens", "5", "--batch_size", "auto"]
    pictures = ["photo.png", "folder", "more/*.png", "gone.png"]
    assert cli.main(["generate", "--adapter", "run/checkpoint-1", *pictures, *few]) == 0
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line["image"] for line in lines] == names[:3]
    assert all(line.keys() == {"image", "text"} and line["text"] for line in lines)
    assert "cannot open the image 'folder/broken.png'" in told.err
    assert "cannot open the image 'gone.png'" in told.err
    assert told.err.endswith("3 pictures described, 2 left out\n")

    out = ["--output", "out.csv"]
    assert cli.main(["generate", "--adapter", "run", "more/*", *few, *out]) == 0
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == names[2:]
    assert rows[0]["text"] == lines[2]["text"]
    capsys.readouterr()
    found = problems_of(capsys, "generate", "--adapter", "gone", "more/*", *out, "--batch_size=0")
    assert [problem.partition(": ")[2] for problem in found] == [
        "adapter='gone': is no folder: expected a run's, or a checkpoint-N of it",
        "batch_size=0: expected a whole number of at least 1",
        "output='out.csv': is there already: choose another name, or delete it",
    ]
    assert cli.main(["generate", "--adapter", "run", "gone.png"]) == 1


@pytest.mark.slow
def test_a_tracker_that_cannot_start_is_a_wrong_setting(here, monkeypatch):
    """Nobody has logged in to wandb: named in one line, without a traceback."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(here / name))
    monkeypatch.setenv("WANDB_MODE", "online")
    done = process("train", "--config", "run.yaml", "--train.report_to", "[wandb]")
    assert done.returncode == 2, done.stderr
    *_, summary, problem = done.stderr.splitlines()
    assert summary == "idefics-qlora train: 1 problem"
    assert problem.startswith("  - wandb, which report_to names, does not start: No API key")


def test_names_that_are_no_text_and_narrow_encodings(here, monkeypatch):
    """A file's name may be any bytes, and stdout may have few characters: each picture is written,
    as JSON from which its name can be had back."""
    names = [b"a.png", "é中.png".encode(), b"\xff.png"]
    os.mkdir("folder")
    for name in names:
        Image.new("RGB", (64, 64)).save(os.path.join("folder", os.fsdecode(name)))
    command = ["generate", "--model.base", "tiny", "folder", "--max_new_tokens", "2"]
    for encoding in ("utf-8", "ascii", "cp1252"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(command) == 0
        out.flush()
        lines = [json.loads(line) for line in out.buffer.getvalue().decode(encoding).splitlines()]
        found = {os.path.basename(os.fsencode(line["image"])) for line in lines}
        assert found == {*names}, encoding
    for file in ("out.jsonl", "out.csv"):
        assert cli.main([*command, "--output", file]) == 0
    written = Path("out.jsonl").read_text(encoding="utf-8").splitlines()
    assert {os.path.basename(os.fsencode(json.loads(w)["image"])) for w in written} == {*names}
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        assert len([*csv.DictReader(file)]) == 3


def test_metrics_by_name_and_the_predictions(here, capsys):
    """`metrics` of the file scores a run's evaluations and decides which is the best; `evaluate`
    gives the same numbers over all rows, and writes what the model said of each."""
    assert MetricName.__args__ == tuple(BY_NAME)
    Path("run.yaml").write_text(RUN + "metrics: [exact_match, chrf]\n")
    arguments = ["--config", "run.yaml", "--train.metric_for_best_model", "eval_chrf"]
    arguments += ["--train.eval_max_new_tokens", "5", "--train.max_steps", "1"]
    assert cli.main(["train", *arguments]) == 0
    result = json.loads(Path("run/result.json").read_text())
    asked = ["--adapter", "run", "--max_new_tokens", "5", "--predictions_file", "said.jsonl"]
    capsys.readouterr()
    assert cli.main(["evaluate", *arguments, *asked]) == 0
    record = json.loads(capsys.readouterr().out)
    for name in ("eval_exact_match", "eval_chrf"):
        assert record[name] == pytest.approx(result["metrics"][name], rel=1e-3)
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert [line["row"] for line in said] == [*range(32)]
    pairs = [line["prediction"] for line in said], [line["references"] for line in said]
    assert record["eval_chrf"] == iq.metrics.chrf(*pairs)


def test_rows_are_looked_at_before_a_base_is_loaded(here, capsys):
    """`evaluate` tells of rows that cannot be read at once, of a base as of an adapter, whose base
    has no weights here that could be loaded."""
    (here / "rows.csv").write_text("picture;text\na.png;A fox.\n")
    copied = here / "base"
    shutil.copytree(iq.tiny.BASE, copied, ignore=shutil.ignore_patterns("*.safetensors"))
    Path("made/checkpoint-1").mkdir(parents=True)
    adapter = json.dumps({"base_model_name_or_path": str(copied)})
    Path("made/checkpoint-1/adapter_config.json").write_text(adapter)
    for source in (["--model.base", str(copied)], ["--adapter", "made"]):
        (problem,) = problems_of(capsys, "evaluate", "--data.eval", "rows.csv", *source)
        assert problem.startswith("data.eval[0]: the row has ['picture', 'text'] and no picture: ")
        assert "did you mean `file_name` for `picture`?" in problem
    (here / "rows.csv").write_text("picture;text\na;A fox.\n")
    (problem,) = problems_of(capsys, "evaluate", "--data.eval", "rows.csv", *source)
    assert problem.startswith("data.eval[0]: a row with columns ['picture', 'text'] is no known")
    assert problem.endswith(
        'otherwise pass --data.image "picture_column" --data.answer " {your_column}"'
    )


def test_a_mistyped_column_of_both_kinds_of_rows_is_one_problem(here, capsys):
    """It is the template's fault, and told once, with the column that may be meant."""
    Image.new("RGB", (64, 64)).save("a.png")
    Path("rows.csv").write_text("file_name,text\na.png,A fox.\n")
    kinds = ["--data.train", "rows.csv", "--data.eval", "rows.csv", "--data.answer", " {txt}"]
    (problem,) = problems_of(capsys, "train", "--config", "run.yaml", *kinds)
    assert problem.startswith("data.train[0]: column 'txt', which answer=' {txt}' asks for")
    assert problem.endswith(": did you mean {text}?")


def test_the_pictures_column_is_told(here, capsys):
    """`--data.image` finds pictures beside the file, as `file_name` would."""
    Path("cards").mkdir()
    Image.new("RGB", (64, 64)).save("cards/a.png")
    Path("cards/rows.csv").write_text("picture,text\na.png,A fox.\n")
    command = ["preview", "--model.base", "tiny", "--data.train", "cards/rows.csv"]
    assert cli.main([*command, "--data.image", "picture", "--data.answer", " {text}"]) == 0


def test_without_held_out_rows_it_says_what_is_lost(here, capsys):
    """As a problem while a best checkpoint is asked for; else in one line."""
    Path("run.yaml").write_text(RUN.replace(", eval: tiny", ""))
    (problem,) = problems_of(capsys, "train", "--config", "run.yaml")
    assert problem.startswith("train.load_best_model_at_end=True needs held-out rows")
    assert "pass --data.eval, or set --train.load_best_model_at_end false to be" in problem
    last = ["--train.load_best_model_at_end", "false", "--train.max_steps", "1"]
    assert cli.main(["train", "--config", "run.yaml", *last]) == 0
    told = capsys.readouterr().err
    assert (
        told.count("no data.eval: nothing is held out, so there is no held-out loss, no best") == 1
    )


def test_metrics_that_cannot_be(here, capsys, monkeypatch):
    """A name that there is not, a package that is not installed, a file that cannot be written:
    told before anything is loaded."""
    arguments = ["evaluate", "--model.base", "tiny", "--data.eval", "tiny"]
    more = ["--max_new_tokens", "0", "--predictions_file", "none/said.jsonl"]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    (problem,) = problems_of(capsys, *arguments, "--metrics", "[cider, rouge]")
    names = "one of anls, bleu, chrf, cider, exact_match, vqa_accuracy"
    assert problem == (
        f"command line: metrics=['cider', 'rouge']: expected {names} or a list or null"
    )
    assert problems_of(capsys, *arguments, "--metrics", "bleu", *more) == [
        "command line: metrics='bleu': metrics['bleu']: bleu needs the package sacrebleu: "
        'pip install "idefics_qlora[metrics]"',
        "command line: max_new_tokens=0: expected a whole number of at least 1",
        "command line: predictions_file='none/said.jsonl': lies in a folder that there is not: "
        "make it",
    ]


def test_rows_and_templates(here, capsys):
    """A folder with metadata and the templates of the file make the examples; so does `hf:`."""
    Path("photos").mkdir()
    for card in iq.tiny.creature_cards(2, seed=0):
        card["image"].save(f"photos/{card['id']}.png")
    files = sorted(path.name for path in Path("photos").iterdir())
    lines = [json.dumps({"file_name": name, "text": "A creature."}) for name in files]
    Path("photos/metadata.jsonl").write_text("\n".join(lines))
    command = ["preview", "--model.base", "tiny", "--data.answer", " {text}"]
    command += ["--data.question", "What is it?", "--rows", "[1]"]
    assert cli.main([*command, "--data.train", "photos"]) == 0
    told = capsys.readouterr().out
    assert "row 1: " in told
    assert "▁creature" in told or "creature" in told
    page = Path("preview.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "data:image/png;base64," in page
    hf = ["--data.train", f"hf:{here / 'photos'}:train", "--output", "hf.html"]
    assert cli.main([*command, *hf]) == 0
    assert Path("hf.html").read_text().count("<img") == page.count("<img") == 1


def test_the_folder_of_a_run_is_a_configuration(here, capsys):
    """`config.yaml` of a run has templates and metrics too: with rows it trains the same again, and
    `generate --adapter` and `evaluate` ask what was asked in training, not something else."""
    Path("photos").mkdir()
    rows = [["file_name", "text"]]
    for card in iq.tiny.creature_cards(4, seed=0):
        card["image"].save(f"photos/{card['id']}.png")
        rows.append([f"{card['id']}.png", card["name"]])
    Path("photos/metadata.csv").write_text("\n".join(map(",".join, rows)))
    data = '{train: photos, eval: photos, question: "What is it?", answer: " {text}"}'
    text = RUN.replace("{train: tiny, eval: tiny}", data) + "metrics: chrf\n"
    Path("run.yaml").write_text(text)
    assert cli.main(["train", "--config", "run.yaml"]) == 0
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    assert settings["data"] == {"answer": " {text}", "question": "What is it?"}
    assert settings["metrics"] == ["chrf"]
    again = ["--data.train", "photos", "--data.eval", "photos", "--train.output_dir", "again"]
    assert cli.main(["train", "--config", "run/config.yaml", *again]) == 0
    first, second = (
        without_clocks(map(json.loads, Path(run, "log.jsonl").read_text().splitlines()))
        for run in ("run", "again")
    )
    assert first == second

    def texts(*options):
        capsys.readouterr()
        command = ["generate", "--adapter", "run/checkpoint-2", "photos", "--max_new_tokens", "5"]
        assert cli.main([*command, *options]) == 0
        return capsys.readouterr().out

    assert texts() == texts("--question", "What is it?") != texts("--question", QUESTION)
    few = ["--data.eval", "photos", "--train.precision", "fp32", "--train.eval_batch_size", "16"]
    losses = []
    for options in ([], ["--data.answer", " {text}"], ["--data.question", QUESTION]):
        assert cli.main(["evaluate", "--adapter", "run/checkpoint-2", *few, *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["eval_loss"])
    assert losses[0] == losses[1] == pytest.approx(first[-1]["eval_loss"], rel=1e-4)
    assert losses[2] != losses[0]
    Path("shared").mkdir()
    templates = {"question": "What {kind} is it?", "answer": " {text}"}
    Path("shared/idefics_qlora.json").write_text(json.dumps({"templates": templates}))
    (problem,) = problems_of(capsys, "generate", "--adapter", "shared", "photos")
    assert problem.startswith("the question of the training, 'What {kind} is it?', has a field")
    told = problems_of(capsys, "generate", "--model.base", "shared", "photos")
    assert problem in told  # as of merged weights


def test_the_longest_edge_is_a_setting(here, capsys, bases):
    """What a picture costs is previewed as it will be trained; a run's adapter brings it along."""
    base = bases("smolvlm")[0].name_or_path
    preview = ["preview", "--data.train", "tiny", "--rows", "[0]", "--model.base"]
    numbers = []
    for edge in ("null", "64"):
        assert cli.main([*preview, base, "--model.longest_edge", edge]) == 0
        numbers.append(int(re.search(r"row 0: (\d+) tokens", capsys.readouterr().out)[1]))
    assert numbers[1] < numbers[0]
    (problem,) = problems_of(capsys, *preview, "tiny", "--model.longest_edge", "64")
    assert problem.startswith("model.longest_edge=64: pictures of 'idefics' models have one size")
    small = ["--config", "run.yaml", "--model.base", base, "--model.longest_edge", "64"]
    assert cli.main(["train", *small, "--train.max_steps", "1"]) == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"]["longest_edge"] == 64
    capsys.readouterr()
    assert (
        cli.main(["evaluate", "--config", "run.yaml", "--adapter", "run", "--model.base", base])
        == 0
    )
    loss = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])["eval_loss"]
    assert json.loads(capsys.readouterr().out)["eval_loss"] == pytest.approx(loss, rel=1e-4)


def test_memory(capsys):
    """The command is that of the module, for the embedded base as well."""
    assert cli.main(["memory", "tiny", "--text-tokens", "40"]) == 0
    by_command = capsys.readouterr().out
    import_module("idefics_qlora.model.memory").main([str(iq.tiny.BASE), "--text-tokens", "40"])
    assert capsys.readouterr().out == by_command
    (problem,) = problems_of(capsys, "memory", "./nowhere")
    assert "there is no folder './nowhere'" in problem


@pytest.mark.slow
def test_a_stopped_run_ends_with_its_signals_number(here):
    """128 + n, after the step was finished and saved; started again it goes on."""
    arguments = [sys.executable, "-m", "idefics_qlora", "train", "--config", "run.yaml"]
    arguments += ["--train.max_steps", "5000", "--train.save_steps", "5000"]
    arguments += ["--train.eval_steps", "5000"]
    with started(arguments, stderr=subprocess.PIPE) as child:
        while not child.stderr.readline().startswith("step 1/5000: "):
            pass
        child.send_signal(signal.SIGTERM)
        _, told = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGTERM
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", told)[1])
    assert iq.latest_checkpoint("run").name == f"checkpoint-{step}"


@pytest.mark.slow
def test_an_interrupted_generate_keeps_what_it_wrote(here):
    """Each line is there when its batch is done; Ctrl-C ends with 130 and no traceback."""
    Path("many").mkdir()
    for number in range(400):
        Image.new("RGB", (64, 64), (number % 256, 0, 0)).save(f"many/{number:03}.png")
    arguments = [sys.executable, "-m", "idefics_qlora", "generate", "--model.base", "tiny", "many"]
    arguments += ["--batch_size", "2"]
    with started(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        first = child.stdout.readline()
        child.send_signal(signal.SIGINT)
        rest, told = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGINT
    assert "Traceback" not in told
    lines = [json.loads(line) for line in [first, *rest.splitlines()]]
    assert len(lines) < 400
    assert [line["image"] for line in lines] == [f"many/{n:03}.png" for n in range(len(lines))]


def test_a_reader_who_leaves_ends_generate_quietly(here):
    """`generate ... | head -1` prints no traceback; the exit code is SIGPIPE's."""
    for number in range(8):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(f"{number}.png")
    arguments = [sys.executable, "-m", "idefics_qlora", "generate", "--model.base", "tiny"]
    arguments += ["*.png", "--batch_size", "1", "--max_new_tokens", "3"]
    with started(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdout.close()
        told = child.stderr.read()
        assert child.wait(timeout=120) == 128 + signal.SIGPIPE
    assert "Traceback" not in told
    assert "BrokenPipe" not in told


def test_a_reader_who_leaves_is_no_wrong_setting(here):
    """So does `preview ... | head`, which prints less of it."""
    arguments = [sys.executable, "-m", "idefics_qlora", "preview", "--config", "run.yaml"]
    with started(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        told = child.stderr.read()
        assert child.wait(timeout=120) == 128 + signal.SIGPIPE, told
    assert "problem" not in told


def test_the_page_shows_commands_and_a_file_that_are_read(here):
    """Each command's options exist and have values that fit, and so do the file's settings."""
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    shown = [
        shlex.split(line) for line in re.findall(rf"^    {cli.PROG} (.*)$", page, re.MULTILINE)
    ]
    assert [command for command, *_ in shown] == [*cli.COMMANDS]
    (text,) = re.findall(r"```text\n(model: .*?)```", page, re.DOTALL)
    Path("run.yaml").write_text(text)
    for command, *arguments in shown:
        namespace = cli.COMMANDS[command].parser().parse_args(arguments)
        if "run.yaml" in arguments:
            assert (namespace["train.learning_rate"], namespace["data.answer"]) == (8e-3, " {text}")
