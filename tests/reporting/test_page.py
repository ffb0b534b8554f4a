"""The page, of folders as they may be: whole, torn, hostile, huge, without this or that."""

import itertools
import json
import math
import os
import random
import re

import pytest
from pages import Page, entry, write_run
from PIL import Image

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.reporting.page import TEMPLATES

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' autofocus onfocus='alert(1)",
    "</style></script><h1>gone</h1>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt; <!-- ]]>",
    "\x00\u202e\ud83d half",
]


def training(steps=8):
    return [
        {
            **{"step": n, "loss": 3.0 / n, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": n / 8},
            **{"examples_per_second": 40.0, "data_wait_s": 0.01},
        }
        for n in range(1, steps + 1)
    ]


def held_out(step, loss, **more):
    return {"step": step, "eval_loss": loss, "eval_runtime": 1.0, **more}


def page_of(*runs, **options) -> Page:
    return Page(iq.report(*runs, **options).read_text(encoding="utf-8"))


def test_text_of_users_is_text(tmp_path):
    """Whatever stands in captions, rows, settings, metrics: no element, no attribute of its own."""
    for number, evil in enumerate(EVIL):
        row = entry(row=evil, prompt=evil, right=[evil, evil], base=evil, text=evil)
        folder = write_run(
            tmp_path / str(number),
            [*training(), held_out(8, 1.0, **{f"eval_{evil}": 0.5})],
            samples=[{"step": 8, "row": evil, "target": evil, "text": evil, "images": [evil]}],
            gallery={"step": 8, "captioned": 8, "rows": [row], "highest": [row]},
            bad_rows=[{"row": evil, "source": evil + "2", "reason": evil}],
            train={"metric_for_best_model": evil},
            result={
                **{"global_step": 8, "stopped_by": evil, "metrics": {"micro_batch_size": evil}},
                "diagnostics": {"warnings": {evil: 2}, "unmoved_adapters": [evil]},
            },
        )
        (folder / "environment.json").write_text(json.dumps({"gpus": [{"name": evil}], evil: evil}))
        (folder / "best").write_bytes(evil.encode(errors="replace"))
        plain = write_run(tmp_path / f"plain {number}", training())
        for runs in ([folder], [folder, plain]):
            page = page_of(*runs, output=tmp_path / "page.html")
            kinds = {tag for tag, _ in page.elements}
            assert not kinds & {"b ", "iframe", "object", "form"}
            assert len(page.all("script")) == 1
            assert len(page.all("h1")) == 1
            assert not any(name.startswith("on") for _, found in page.elements for name in found)
            assert "autofocus" not in {name for _, found in page.elements for name in found}
            addresses = [f.get("src") or f.get("href") for _, f in page.elements]
            assert all(a.startswith(("#", "data:")) for a in addresses if a)
            shown = evil.replace("\x00", "\ufffd").replace("\u202e", "\ufffd")
            assert " ".join(shown.replace("\ud83d", "\ufffd").split()) in page.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    """No address but those within it; its own rules forbid any other, and any foreign script."""
    folder = write_run(tmp_path / "run", training())
    html = iq.report(folder).read_text()
    page = Page(html)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:")
    assert re.search("script-src 'sha256-[^']+'$", policy["content"])
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html


def test_a_single_run_shows_all_of_it(tmp_path):
    """Numbers, changed settings, charts with axes and values, the gallery, rows left out."""
    folder = write_run(
        tmp_path / "mine",
        [*training(), held_out(4, 1.2, eval_cider=0.4), held_out(8, 0.9, eval_cider=0.7)],
        gallery={"step": 8, "captioned": 8, "rows": [entry(0), entry(1)], "highest": [entry(1)]},
        bad_rows=[{"row": "train_rows[3]", "source": "a.png", "reason": "no such file"}],
        train={"learning_rate": 0.008, "warmup_steps": 0, "report_to": ["wandb"]},
        result={
            **{"global_step": 8, "stopped_by": None, "metrics": {"peak_memory_bytes": 2**31}},
            "diagnostics": {"warnings": {"duplicate rows": 3}, "unmoved_adapters": []},
        },
    )
    (folder / "best").write_text("checkpoint-8\n")
    page = page_of(folder)
    for words in (
        *("finished after 8 steps", "2 GiB", "nats per target token", "cider", "learning_rate"),
        *("train_rows[3] : no such file (a.png)", "warned of: duplicate rows (3 times)"),
        *("after training (step 8, the best)", "base, before training", "1.5", "wandb"),
        "the held-out loss fell from 1.2 to 0.9",
    ):
        assert words in page.text, words
    assert "warmup_steps" not in page.text  # the default
    assert "output_dir" not in page.text
    charts = [found["aria-label"] for found in page.all("div", role="img")]
    assert [label.split(",")[0] for label in charts] == [
        *("Loss", "cider", "Learning rate", "Gradient norm", "Throughput", "Wait for data"),
    ]
    assert "held out: 1.2 at step 4, 0.9 at step 8" in charts[0]
    assert "step" in page.words
    points = json.loads(page.all("g", **{"class": "curve"})[0]["data-points"])
    assert [(step, value) for step, _, _, value in points][:2] == [(1, "3"), (2, "1.5")]
    assert "wrong: ball." in page.text
    assert "missing: box." in page.text


def test_a_short_run_says_of_what_its_points_are(tmp_path):
    """Of how many steps a training loss is the mean, and in which size the model sees a picture."""
    log = [record for record in training(20) if record["step"] % 10 == 0]
    seen = entry(0, images=["gallery/a.png"], seen=[[224, 224]])
    rows = [seen, entry(1, images=["gallery/a.png"]), entry(2, seen="x")]
    page = page_of(write_run(tmp_path / "run", log, gallery={"step": 20, "rows": rows}))
    names = [g["data-name"] for g in page.all("g", **{"class": "curve"})]
    assert names[0] == "training (mean of 10 steps)"
    assert page.text.count("the model sees 224 \N{MULTIPLICATION SIGN} 224 pixels") == 1
    assert page.text.count("as the model sees it") == 1  # of runs that kept no others
    page = page_of(write_run(tmp_path / "one", training(2)[1:]))
    assert "training (mean of 2 steps)" in page.text  # also where it is the only curve


def test_what_is_as_usual_is_not_listed(tmp_path):
    """Of base and adapter, too; a folder of this machine is known by its last name, CUDA as what
    torch was built for, and a row by its pictures' files."""
    rows = [entry(0, files=["cat.png", "", 7], text="A red box, and more of it."), entry(1)]
    folder = write_run(tmp_path / "run", training(), gallery={"step": 8, "rows": rows})
    settings = {
        "model": {"base": str(iq.tiny.BASE), "quantize": True, "base_weights": "4bit"},
        "lora": {"r": 8, "lora_alpha": 32, "target_modules": ["k_proj", "q_proj", "v_proj"]},
        "train": {"output_dir": "x", "precision": "fp32", "resume": "/home/me/runs/checkpoint-4"},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "environment.json").write_text('{"versions": {"cuda": "13.2"}, "gpus": []}')
    text = page_of(folder).text
    for usual in (
        "model.quantize",
        "base_weights",
        "lora_alpha",
        "target_modules",
        "/home",
        "/tiny",
    ):
        assert usual not in text, usual
    for other in (
        *("model.base the embedded tiny base", "lora.r 8", "resume checkpoint-4"),
        *("precision fp32", "torch built for CUDA 13.2", "gpus none", "eval_rows[0] cat.png"),
        "3 of 3 words, 4 too many",
    ):
        assert other in text, other
    plain = write_run(tmp_path / "plain", training())
    (plain / "config.yaml").write_text('{"model": {"base": "a/b", "quantize": false}}')
    assert "model.quantize True False" in page_of(folder, plain).text


def test_values_that_are_not_finite(tmp_path):
    """NaN and infinite losses and metrics are told, and do not spoil the curves."""
    log = [
        *training(),
        held_out(4, math.nan, eval_cider=math.inf),
        held_out(8, 2.0, eval_cider=1.0),
    ]
    log[2]["loss"], log[5]["grad_norm"] = math.inf, math.nan
    rows = [entry(0, loss=math.nan), entry(1)]
    folder = write_run(tmp_path / "run", log, gallery={"step": 8, "rows": rows, "highest": rows})
    page = page_of(folder)
    assert "training was not finite at step 3" in page.text
    assert "held out was not finite at step 4" in page.text
    assert "not finite: loss at step 3, grad_norm at step 6, eval_loss at step 4" in page.text
    assert "loss per token not finite" in page.text
    assert not any(re.search("nan|inf", f["points"].lower()) for f in page.all("polyline"))


@pytest.mark.parametrize("what", ["log", "torn", "only samples", "wrong kinds"])
def test_what_is_not_there_is_left_out(tmp_path, what):
    """Of a run that has just begun, was killed while it wrote, or kept no gallery."""
    folder = tmp_path / "run"
    if what == "log":
        write_run(folder, [])
    elif what == "torn":
        write_run(folder, training(2), gallery={"rows": []}, result={"global_step": 2})
        for name in ("result.json", "gallery/rows.json", "config.yaml"):
            (folder / name).write_bytes(b'{"rows": [{"ro\xff')
        with (folder / "log.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')
    elif what == "only samples":
        said = [{"row": "eval_rows[0]", "target": " A box", "images": ["eval_samples/x.png"]}]
        samples = [{**said[0], "step": step, "text": f"A box {step}"} for step in range(1, 21)]
        write_run(folder, [*training(), held_out(8, 1.0)], samples=samples)
        (folder / "eval_samples").mkdir()
        Image.new("RGB", (2000, 1000)).save(folder / "eval_samples" / "x.png")
    else:
        log = [{"step": "3"}, {"loss": 1}, [], {"step": 1, "loss": "low", "eval_loss": None}]
        rows = [7, {}, {"right": "x"}, {"right": [None]}, entry(images="x", base=3, loss="high")]
        write_run(folder, log, gallery={"rows": rows, "highest": {"a": 1}, "step": "x"})
        (folder / "result.json").write_text('{"metrics": [], "fp16_ledger": 3, "diagnostics": 1}')
        (folder / "config.yaml").write_text("train: 3\nmodel: [1]\nlora: {r: null}\n")
    page = page_of(folder)
    assert ("under way or broken off" in page.text) == (what != "wrong kinds")
    if what == "only samples":
        assert re.findall(r"step (\d+) ✓", page.text) == ["1", "7", "13", "20"]
        (image,) = page.all("img")
        assert (image["width"], image["height"]) == ("320", "160")
        assert "A box" in image["alt"]


def test_a_page_is_never_large(tmp_path):
    """Thousands of records, many metrics, long texts, large pictures: less than 5 MB."""
    rng = random.Random(0)
    log = [
        {**record, "loss": rng.random(), "examples_per_second": rng.random()}
        for record in training(4000)
    ]
    names = [f"eval_metric_{n}" for n in range(60)]
    log += [
        held_out(step, rng.random(), **{name: rng.random() for name in names})
        for step in range(20, 4000, 40)
    ]
    files = [f"gallery/row-{n}-image-{m}.webp" for n in range(30) for m in range(4)]
    rows = [
        entry(n, images=files[4 * n : 4 * n + 4], text="word " * 3000, right=["other " * 3000])
        for n in range(30)
    ]
    gallery = {"step": 4000, "captioned": 4000, "rows": rows, "highest": rows}
    runs = [
        write_run(tmp_path / f"run{n}", log, gallery=gallery, bad_rows=[{"row": "x" * 500}] * 500)
        for n in range(2)
    ]
    noise = Image.frombytes("RGB", (640, 640), rng.randbytes(640 * 640 * 3))
    noise.save(runs[0] / files[0], quality=95)
    content = (runs[0] / files[0]).read_bytes()
    for run, file in itertools.product(runs, files):
        (run / file).write_bytes(content)
    for shown in (runs[:1], runs):
        path = iq.report(*shown, output=tmp_path / "page.html")
        assert path.stat().st_size < 5_000_000
        page = Page(path.read_text())
        assert page.all("img")
        assert "the page is full" in page.text
        assert "Not drawn" in page.text


def test_a_picture_outside_of_the_run_is_not_embedded(tmp_path):
    """A run's folder that came from somebody else cannot make others' files part of the page."""
    Image.new("RGB", (10, 10)).save(tmp_path / "mine.png")
    names = ["../mine.png", str(tmp_path / "mine.png"), "gallery/link.png", "config.yaml"]
    rows = [entry(0, images=names)]
    folder = write_run(tmp_path / "run", training(), gallery={"rows": rows})
    (folder / "gallery" / "link.png").symlink_to(tmp_path / "mine.png")
    assert page_of(folder).all("img") == []
    Image.new("RGB", (10, 10)).save(folder / "gallery" / "own.png")
    gallery = {"rows": [entry(0, images=["gallery/own.png"])]}
    (folder / "gallery" / "rows.json").write_text(json.dumps(gallery))
    assert len(page_of(folder).all("img")) == 1


PIPES = [
    *("config.yaml", "samples.jsonl", "bad_rows.jsonl", "result.json", "environment.json", "best"),
    *("last", "gallery/rows.json", "gallery/own.png", "report.html"),
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes that a path names")
@pytest.mark.parametrize("name", PIPES)
def test_nobody_is_waited_for(tmp_path, name):
    """A pipe in a file's place would never end: its content is missing, the page is written."""
    gallery = {"rows": [entry(0, images=["gallery/own.png"])]}
    folder = write_run(tmp_path / "run", training(), gallery=gallery)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert page_of(folder).all("h1")


def test_several_runs_stand_side_by_side(tmp_path):
    """With the difference of their settings, both curves in one chart, and each one's captions."""
    log = [*training(), held_out(8, 1.0)]
    gallery = {"step": 8, "captioned": 8, "rows": [entry(0)]}
    a = write_run(tmp_path / "a" / "run", log, gallery=gallery, train={"learning_rate": 0.008})
    other = {**gallery, "rows": [entry(0, text="A red box."), entry(1)]}
    b = write_run(tmp_path / "b" / "run", log, gallery=other, train={"seed": 7})
    path = iq.report(a, b, a)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    assert [w for w in page.words if w in ("a/run", "b/run")]
    table = page.text.partition("Curves")[0]
    assert re.search(r"seed 42 7 ", table)
    assert re.search(r"learning_rate 0.008 0.0002", table)
    assert "max_steps" not in table
    names = [g["data-name"] for g in page.all("g", **{"class": "curve"})][:4]
    assert names == ["a/run, training", "a/run, held out", "b/run, training", "b/run, held out"]
    looks = [f["class"] for f in page.all("polyline")][:4]
    assert len({*looks}) == 4  # no two are told apart by nothing
    assert page.text.count("eval_rows[0]") == 1
    assert page.text.count("after training (step 8)") == 3
    assert not (a / "report.html").exists()


def test_a_folder_of_no_run_is_named(tmp_path, capsys):
    """The error says which, and what was expected."""
    run = write_run(tmp_path / "run", training())
    with pytest.raises(ValueError, match="at least one run"):
        iq.report()
    with pytest.raises(
        ValueError, match="nowhere: there is no such folder: expected the output_dir"
    ):
        iq.report(run, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it has no log.jsonl"):
        iq.report(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == cli.WRONG
    assert "it has no log.jsonl" in capsys.readouterr().err


def test_the_command_writes_the_page(tmp_path, capsys):
    """And prints where it is."""
    runs = [str(write_run(tmp_path / name, training())) for name in "ab"]
    assert cli.main(["report", runs[0]]) == cli.DONE
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'report.html'}\n"
    assert cli.main(["report", *runs, "--output", str(tmp_path / "c.html")]) == cli.DONE
    assert Page((tmp_path / "c.html").read_text()).all("h1")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_and_lines_stand_out():
    """Light and dark, all colours of text have a contrast of at least 4.5 on both grounds."""
    style = (TEMPLATES / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        assert len(colours) == 15
        for name in colours.keys() - {"ground", "card", "line"}:
            for ground in ("ground", "card"):
                pair = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, ground, scheme)
