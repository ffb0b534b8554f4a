"""Pages taken apart, and folders of runs that are written for a test."""

import json
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}
RAW = {"style", "script"}


class Page(HTMLParser):
    """A page's elements and texts; every element must be closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and "/" not in tag:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in RAW:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes) -> list[dict]:
        """Attributes of the elements of a kind that have these, too."""
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(k) == v for k, v in attributes.items())
        ]


def write_run(folder, log, *, samples=(), gallery=None, result=None, bad_rows=(), train=None):
    """A run's folder, with the files that training writes."""
    folder.mkdir(parents=True)

    def lines(records):
        return "".join(json.dumps(record) + "\n" for record in records)

    (folder / "log.jsonl").write_text(lines(log))
    settings = {"train": {"output_dir": str(folder), "max_steps": 10, **(train or {})}}
    (folder / "config.yaml").write_text(json.dumps(settings))  # YAML holds all of JSON
    if samples:
        (folder / "samples.jsonl").write_text(lines(samples))
    if bad_rows:
        (folder / "bad_rows.jsonl").write_text(lines(bad_rows))
    if gallery is not None:
        (folder / "gallery").mkdir()
        (folder / "gallery" / "rows.json").write_text(json.dumps(gallery))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def entry(index=0, **changes):
    """A row of the gallery."""
    return {
        "row": f"eval_rows[{index}]",
        "index": index,
        "images": [],
        "more_images": 0,
        "prompt": "What is it?",
        "right": [" A red box."],
        "base": "A dog.",
        "text": "A red ball.",
        "loss": 1.5,
        **changes,
    }
