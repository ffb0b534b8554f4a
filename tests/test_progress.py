"""What a person sees of a run: on a terminal, in a pipe, in a notebook."""

import copy
import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora import progress
from idefics_qlora.progress import EvalTable, counting, waiting_for

SCRIPT = """
import sys
import idefics_qlora as iq
model, processor = iq.tiny.load_model(device="cpu")
rows = iq.tiny.creature_cards(12, seed=0)
config = iq.TrainConfig(
    output_dir=sys.argv[1], max_steps=4, global_batch_size=2, logging_steps=1, eval_steps=2,
    save_steps=2, eval_samples=3, num_workers=0, progress=sys.argv[2],
)
iq.train(iq.add_lora(model), processor, rows[:8], rows[8:], config=config,
         to_example=iq.pokemon_card_example)
"""


def script(folder: Path, style: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), style], **options)


def on_a_terminal(folder: Path, style: str) -> str:
    """What the script writes on a terminal of 100 columns."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with script(folder, style, stdin=there, stdout=there, stderr=there) as process:
        os.close(there)
        written = b""
        while True:
            try:
                part = os.read(here, 2**16)
            except OSError:  # Linux's end of a terminal
                part = b""
            if not part:
                break
            written += part
    os.close(here)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_a_terminal_shows_a_bar_and_the_table(tmp_path):
    """In a real pseudo-terminal: the bar with its figures, one table with a head and a row for each
    evaluation, two samples of three, cut to the width, and where the result is."""
    shown = on_a_terminal(tmp_path, "auto")
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", shown)]
    assert max(len(line) for line in lines if "/" not in line or "|" in line) <= 100
    bars = [line for line in lines if "| 4/4, 00:00 left" in line]
    assert re.search(r"loss \d\.\d{4}, lr \d.*, [\d.]+ examples/s, waited \d", bars[-1])
    assert re.search(r"\| 1/4, \d\d:\d\d left", shown)
    assert shown.count("Step   Training loss   Held-out loss") == 1
    rows = [line.split() for line in lines if re.fullmatch(r" +[24]( +\d+\.\d{4}){2}", line)]
    assert [row[0] for row in rows] == ["2", "4"]
    assert "eval_rows[0] says:" in shown
    assert "eval_rows[1] says:" in shown
    assert "eval_rows[2]" not in shown
    assert "the best checkpoint is" in shown
    assert "iq.load_finetuned(" in shown


def test_a_pipe_gets_a_line_for_each_record(tmp_path):
    """Off a terminal each log record is a line, there before training goes on, without a bar; and
    nothing of it is on stdout."""
    with script(tmp_path, "auto", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = []
        for line in process.stderr:
            seen.append(line.decode())
            if "step 2/4: loss" in seen[-1]:  # it is not held back until the end
                assert process.poll() is None
        assert process.stdout.read() == b""
    assert process.returncode == 0
    steps = [line.split(",")[0].split(" ")[1:3] for line in seen if line.startswith("step ")]
    assert steps == [
        ["1/4:", "loss"], ["2/4:", "loss"], ["2/4:", "eval_loss"], ["3/4:", "loss"],
        ["4/4:", "loss"], ["4/4:", "eval_loss"],
    ]  # fmt: skip
    assert not any("%|" in line for line in seen if "Loading weights" not in line)
    assert any(line.startswith("the best checkpoint is ") for line in seen)


@pytest.mark.slow
def test_bars_can_be_had_in_a_pipe_and_lines_on_a_terminal(tmp_path):
    """``bar`` and ``lines`` hold wherever stderr leads."""
    done = script(tmp_path / "a", "bar", stderr=subprocess.PIPE)
    assert b"| 4/4, 00:00 left" in done.communicate()[1]
    shown = on_a_terminal(tmp_path / "b", "lines")
    assert "step 4/4: loss" in shown
    assert "4/4, 00:00 left" not in shown


def test_none_says_nothing(lora, processor, examples, tmp_path, capfd, monkeypatch):
    """With ``none`` nothing is written, however long things take, and loggers are left alone."""
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    level = logging.getLogger("idefics_qlora").level
    config = config_of(tmp_path, progress="none", max_steps=2)
    iq.train(lora, processor, examples, examples[:4], config=config)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("idefics_qlora").level == level
    assert progress.way_of() == "lines"  # afterwards as before


def test_a_closed_stderr_does_not_stop_a_run(tmp_path):
    """Who looks may go away: the run goes on to its end."""
    with script(tmp_path, "lines", stderr=subprocess.PIPE) as process:
        while b"step 1/4" not in process.stderr.readline():
            pass
        process.stderr.close()
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-4"


def test_the_table_takes_whatever_metrics_there_are():
    """Each number that an evaluation has gets a column; times and counts of bad rows do not; new
    columns get a new head."""
    table = EvalTable()
    assert table.add({"step": 1, "loss": 2.0}) == []
    times = {"eval_runtime": 1.0, "eval_samples_per_second": 3.0, "eval_bad_rows": 1}
    head, row = table.add({"step": 2, "eval_loss": 1.5, "eval_cider": 0.25, **times})
    assert head.split() == ["Step", "Training", "loss", "Held-out", "loss", "cider"]
    assert row.split() == ["2", "2.0000", "1.5000", "0.2500"]
    assert len(head) == len(row)
    (row,) = table.add({"step": 4, "eval_loss": 1.25, "eval_cider": 0.5, "eval_samples": []})
    assert row.split() == ["4", "2.0000", "1.2500", "0.5000"]
    head, row = table.add({"step": 6, "eval_loss": 1.0, "eval_right": 1})
    assert (head.split()[-1], row.split()[-1]) == ("right", "1")
    assert table.rows[0] == ["2", "2.0000", "1.5000", ""]


def notebook_pages(monkeypatch) -> list[str]:
    """Every page that would be displayed, as if a notebook ran this process."""
    pages = []
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setattr(progress, "_displayed", lambda _, page: pages.append(page) or pages)
    return pages


def test_a_notebook_shows_a_live_table(lora, processor, examples, tmp_path, monkeypatch, capfd):
    """One page of HTML is replaced by the next: bar, figures, table, samples, and the last words;
    what the model says is text there, never markup."""
    pages = notebook_pages(monkeypatch)
    held_out = [iq.Example(examples[0].prompt, " <b>bold</b>")]
    config = config_of(tmp_path, eval_steps=2, save_steps=2, eval_samples=1)
    iq.train(lora, processor, examples, held_out, config=config)
    assert capfd.readouterr().err == ""
    assert '<progress value="0" max="4"' in pages[0]
    assert "<th>Held-out loss</th>" in pages[-1]
    assert pages[-1].count("<tr>") == 3
    assert '<progress value="4" max="4"' in pages[-1]
    assert "&lt;b&gt;bold&lt;/b&gt;" in pages[-1]
    assert "<b>" not in pages[-1]
    assert "load_finetuned(" in pages[-1]


def test_what_takes_long_is_shown_and_what_does_not_is_not(capfd, monkeypatch):
    """Before two seconds are over nothing is written; after that a line, and how it ended."""
    with counting("reading", 3, "rows") as counted, waiting_for("loading"):
        counted.advance(3)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    with counting("reading", 3, "rows") as counted:
        counted.advance(2, note="1 failed")
        counted.advance()  # the next line is due later
    assert capfd.readouterr().err.splitlines() == [
        "reading: 2 of 3 rows, 00:00, 1 failed",
        "reading: 3 of 3 rows, 00:00, over",
    ]


def test_what_cannot_be_counted_is_shown_while_it_goes_on(monkeypatch):
    """A thread tells of it, and is gone afterwards."""
    told = progress.threading.Event()
    said = []
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    monkeypatch.setattr(progress, "say", lambda text: (said.append(text), told.set()))
    with waiting_for("loading"):
        assert told.wait(60)
    assert said == ["loading: 00:00", "loading: 00:00, over"]
    assert "progress" not in [thread.name for thread in progress.threading.enumerate()]


@pytest.fixture
def at_once(monkeypatch):
    """Whatever takes long is shown from its beginning on, each time there is something new."""
    for name in ("AFTER_S", "REFRESH_S", "LINES_S"):
        monkeypatch.setattr(progress, name, 0.0)


def test_generating_tells_of_every_token(base, processor, examples, capfd, at_once):
    """Also of a single batch, and of texts that are taken one by one; those are the same."""
    prompts = [example.prompt for example in examples[:3]]
    with progress.asked("none"):
        quiet = iq.generate(base, processor, prompts, max_new_tokens=3, batch_size=2)
    assert capfd.readouterr().err == ""
    assert [*iq.generate_iter(base, processor, prompts, max_new_tokens=3, batch_size=2)] == quiet
    lines = capfd.readouterr().err.splitlines()
    tokens = [f"token {number} of 3" for number in (1, 2, 3)]
    assert [re.sub(r"\d\d:\d\d(, )?", "", line) for line in lines] == [
        *(f"generating: 0 of 3 texts, {token}" for token in tokens),
        "generating: 2 of 3 texts, ",
        *(f"generating: 2 of 3 texts, {token}" for token in tokens),
        "generating: 3 of 3 texts, ",
        "generating: 3 of 3 texts, over",
    ]


def test_a_bar_leaves_the_line_to_texts_that_are_printed(base, processor, examples, capfd, at_once):
    """Whoever prints each text of ``generate_iter`` on a terminal finds the line empty."""
    prompts = [example.prompt for example in examples[:4]]
    with progress.asked("bar"):
        texts = iq.generate_iter(base, processor, prompts, max_new_tokens=2, batch_size=2)
        for number in range(4):
            next(texts)
            shown = capfd.readouterr().err
            assert shown.rpartition("\r")[2].strip() == ""
            assert ("token 2 of 2" in shown) == (number % 2 == 0)
    texts.close()


def test_evaluations_tell_of_every_token(lora, processor, examples, tmp_path, capfd, at_once):
    """Rows that are looked at, batches, answers, samples and pictures that are compared."""
    config = config_of(
        tmp_path, max_steps=1, eval_steps=1, save_steps=1, eval_samples=2, eval_image_use=True,
        eval_max_new_tokens=3, progress="lines",
    )  # fmt: skip
    metrics = {"exact": iq.metrics.exact_match}
    iq.train(lora, processor, examples, examples[:4], config=config, metrics=metrics)
    lines = {re.sub(r"\d\d:\d\d(, )?", "", line) for line in capfd.readouterr().err.splitlines()}
    assert {
        "looking at train_rows: 40 of 40 rows, ",
        "looking at eval_rows: 4 of 4 rows, ",
        "evaluating: 1 of 2 batches, ",
        "evaluating: 2 of 2 batches, answering 4 rows, token 3 of 3",
        "comparing pictures: 12 of 12 rows, ",
        "captioning: 0 of 2 samples, token 2 of 64",
    } <= lines


def test_stop_ends_a_run_that_goes_on_later(base, processor, examples, tmp_path):
    """``on_log`` ends the run after its step, evaluated and saved; another start goes on."""
    config = config_of(tmp_path, max_steps=4, eval_steps=2, save_steps=4)
    told = []

    def stop_at_2(record):
        told.append((record["step"], "loss" in record))
        return iq.STOP if record["step"] == 2 else "STOP"

    model = iq.add_lora(base)
    result = iq.train(model, processor, examples, examples[:2], config=config, on_log=stop_at_2)
    assert (result.global_step, result.stopped_by) == (2, "on_log")
    assert told == [(1, True), (2, True), (2, False)]
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-2"
    result = iq.train(model, processor, examples, examples[:2], config=config, on_log=stop_at_2)
    assert (result.global_step, result.stopped_by) == (4, None)
    assert told[3:] == [(3, True), (4, True), (4, False)]


@pytest.mark.parametrize("progress", ["lines", "none"])
def test_a_resumed_run_says_where_it_goes_on(base, processor, examples, tmp_path, capfd, progress):
    """Or that it is complete and what to raise, with no speed of steps that were not done; nothing
    where nothing is to be shown."""
    said = []
    for steps in (1, 2, 2):
        config = config_of(
            tmp_path, max_steps=steps, lr_scheduler_type="constant", progress=progress
        )
        iq.train(iq.add_lora(copy.deepcopy(base)), processor, examples, config=config)
        lines = capfd.readouterr().err.splitlines()
        said.append(lines[:1])
        assert any("examples/s" in line for line in lines) == (len(said) < 3 and bool(lines))
    if progress == "none":
        assert said == [[], [], []]
        return
    assert said[0] == ["training: 1 steps of 8 examples, logging_steps=1"]
    assert said[1] == [f"goes on after step 1 of 2 from {tmp_path / 'checkpoint-1'}"]
    assert said[2] == ["already complete at step 2: nothing to do; raise max_steps to go on"]


def test_stop_at_the_last_step_is_the_end(lora, processor, examples, tmp_path):
    """A run that was to end anyway was not stopped."""
    config = config_of(tmp_path, max_steps=2)
    result = iq.train(lora, processor, examples, config=config, on_log=lambda _: iq.STOP)
    assert (result.global_step, result.stopped_by) == (1, "on_log")
    result = iq.train(lora, processor, examples, config=config, on_log=lambda _: iq.STOP)
    assert (result.global_step, result.stopped_by) == (2, None)


def test_the_setting_is_checked(tmp_path):
    """A way of showing that there is none names those that there are."""
    with pytest.raises(ValueError, match="progress='quiet': expected one of auto, bar, lines, non"):
        iq.TrainConfig(output_dir=tmp_path, progress="quiet")
