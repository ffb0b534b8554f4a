"""The page in a real browser: what people see, point at and read; skipped where there is none."""

import itertools
import json

import browser
import pytest
from pages import entry, write_run
from PIL import Image

import idefics_qlora as iq

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one run, and one of two, with all there can be on them."""
    folder = tmp_path_factory.mktemp("runs")
    long = "Word" * 60
    log = [{"step": n, "loss": 3 / n, "learning_rate": 1e-3, "epoch": 1} for n in range(1, 41)]
    log += [{"step": n, "eval_loss": 4 / n, f"eval_{long}": 0.5} for n in range(10, 50, 10)]
    files = ["gallery/tall.webp", "gallery/wide.webp"]
    rows = [
        entry(0, images=files, text=f"A <b>red</b> {long}"),
        entry(1, row=long, prompt=long, right=[long]),
    ]
    gallery = {"step": 40, "captioned": 40, "rows": rows, "highest": rows}
    told = {"diagnostics": {"warnings": {long: 1}, "unmoved_adapters": [long]}, "global_step": 40}
    runs = []
    for name in ("one", "two" + long[:100]):
        bad = [{"row": long, "source": long, "reason": long}]
        given = {"metric_for_best_model": long, "seed": len(runs)}
        run = write_run(folder / name, log, gallery=gallery, result=told, bad_rows=bad, train=given)
        Image.new("RGB", (64, 900), "red").save(run / files[0])
        Image.new("RGB", (900, 64), "blue").save(run / files[1])
        (run / "environment.json").write_text(json.dumps({"gpus": [{"name": long}]}))
        runs.append(run)
    return iq.report(runs[0]), iq.report(*runs)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [browser.PHONE, browser.DESKTOP, (320, 640)])
def test_it_fits_and_nothing_complains(chromium, pages, size, dark):
    """No console message, no request, nothing wider than the window, on phones and in the dark."""
    chromium.complaints.clear()
    for page in pages:
        chromium.requests.clear()
        chromium.open(page, size, dark=dark)
        chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert chromium.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert chromium.evaluate("document.images.length") >= 2
        assert chromium.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        assert [r for r in chromium.requests if not r.startswith("data:")] == [page.as_uri()]
        ground = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (not dark)
    assert chromium.complaints == []


def test_a_forbidden_script_does_not_run(chromium, pages, tmp_path):
    """The control of the policy, and of what counts as a complaint."""
    page = tmp_path / "page.html"
    evil = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x.png'>"
    page.write_text(pages[0].read_text().replace("</body>", evil + "</body>"))
    chromium.open(page)
    assert chromium.evaluate("document.title") == "one"
    assert len(chromium.complaints) >= 2
    chromium.complaints.clear()


SHOWN = "document.querySelector('.values').textContent"


def test_values_are_shown_under_the_pointer(chromium, pages):
    """The nearest step's values of every curve; nothing when the pointer has gone."""
    chromium.open(pages[0])
    box = chromium.evaluate(
        "(b => [b.left, b.top, b.width, b.height])"
        "(document.querySelector('.plot svg').getBoundingClientRect())"
    )
    assert chromium.evaluate(SHOWN).strip() == ""
    chromium.move(box[0] + box[2] * 0.99, box[1] + box[3] / 2)
    assert chromium.evaluate(SHOWN) == "step 40: training 0.075, held out 0.1"
    assert chromium.evaluate("document.querySelectorAll('.at').length") == 2
    chromium.move(2, 2)
    assert chromium.evaluate(SHOWN).strip() == ""


def test_the_keyboard_reaches_every_value(chromium, pages):
    """Tab goes to a chart, arrows from step to step; the value is told to screen readers."""
    chromium.open(pages[0])
    for _ in range(30):
        chromium.press("Tab")
        if chromium.evaluate("document.activeElement.classList.contains('plot')"):
            break
    told = "document.activeElement.getAttribute('aria-valuetext')"
    assert chromium.evaluate(told) == "step 40: training 0.075, held out 0.1"
    chromium.press("Home")
    assert chromium.evaluate(told) == "step 1: training 3"
    chromium.press("ArrowRight")
    assert chromium.evaluate(told) == "step 2: training 1.5" == chromium.evaluate(SHOWN)
    assert chromium.evaluate("document.activeElement.getAttribute('role')") == "slider"
    charts = chromium.evaluate("document.querySelectorAll('.plot').length")
    seen = set()
    for _ in range(200):
        chromium.press("Tab")
        seen.add(chromium.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
    assert sum('class="plot"' in element for element in seen) == charts
    assert any("<summary>" in element for element in seen)


def test_everything_has_a_name(chromium, pages):
    """In the browser's own tree of accessibility, no picture, link, region or chart is nameless."""
    for page in pages:
        chromium.open(page)
        tree = chromium.send("Accessibility.getFullAXTree")["nodes"]
        roles = {"image", "link", "region", "slider", "heading", "columnheader", "rowheader"}
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in tree
            if not node["ignored"] and node["role"]["value"] in roles
        ]
        assert {"image", "link", "slider", "heading"} <= {role for role, _ in named}
        assert [role for role, name in named if not name] == []
        levels = chromium.evaluate(
            "[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))"
        )
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
