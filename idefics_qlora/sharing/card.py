"""The model card: what an adapter or a merged model is, how it came about, and how to load it.

No card has the name of a user, a host or a folder, but for the last one of what ``merge`` makes:
bases are named by their Hub id or not at all.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig

from idefics_qlora.config import TrainConfig
from idefics_qlora.data.captions import columns_of
from idefics_qlora.data.templates import captions_of, known
from idefics_qlora.machine import COMPUTING
from idefics_qlora.model.saved_base import is_hub_id

PICTURES = "samples/"
"""Folder of the samples' pictures beside a card."""
MOST_SAMPLES = 4
_OF_THE_MACHINE = {"output_dir", "resume", "num_workers", "report_to", "seed"}
"""Settings that say where and how it ran, not what was learnt; a seed means something here only."""
_CLOCKS = ("runtime", "per_second", "_s", "bad_rows")
"""Ends of the names of what an evaluation measures beside its results."""
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]+)")
"""Where a base of the Hub lies in its cache."""


@dataclass(frozen=True)
class Facts:
    """What is known of a model that is given away; JSON values."""

    is_merged: bool = False
    base: str | None = None
    """Its Hub id; ``None`` for a base of no such name."""
    base_revision: str | None = None
    dtype: str | None = None
    """Of merged weights."""
    lora: dict[str, Any] = field(default_factory=dict)
    """What differs from the defaults of ``peft``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs from the defaults of ``TrainConfig``."""
    num_rows: int | None = None
    num_held_out: int | None = None
    step: int | None = None
    results: dict[str, float] = field(default_factory=dict)
    """Of the evaluation at this step."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """``row``, ``images`` (names of files), ``target`` and ``text`` of some held-out rows."""
    versions: dict[str, str | None] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    fingerprint: dict[str, str] | None = None
    """Of the base."""
    image_side: int | None = None
    """Pixels, as the model was trained."""
    image_splitting: bool | None = None
    """Whether pictures were cut into tiles."""
    quantize: bool | None = None
    """Whether the base had its weights in 4 bits in training, if that is known."""
    templates: dict[str, str] | None = None
    """What it was asked in training, as ``data/templates.py`` has it, if that is known."""

    def with_pictures(self, there: Container[str]) -> Facts:
        """The same with those of the samples' pictures that are there, by their files' names."""
        samples = [
            {**s, "images": [n for i in s["images"] if (n := i.rpartition("/")[2]) in there]}
            for s in self.samples
        ]
        return dataclasses.replace(self, samples=samples)


def hub_name(base: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """Hub id and revision of a base by the name that an adapter has for it, if that leads there."""
    if is_hub_id(base):
        return base, revision
    if found := _CACHED.search(base):
        return f"{found[1]}/{found[2]}", found[3]
    return None, None


def facts_of(
    adapter_config: Mapping[str, Any], state: Mapping[str, Any] | None, **more: Any
) -> Facts:
    """What a checkpoint tells.

    Args:
        adapter_config: Content of ``adapter_config.json``.
        state: That of ``state.json``; ``None`` for an adapter of another program.
        **more: Fields that are known better.
    """
    base, revision = hub_name(
        adapter_config.get("base_model_name_or_path") or "", adapter_config.get("revision")
    )
    facts = Facts(base=base, base_revision=revision, lora=_other_than(LoraConfig, adapter_config))
    if state is not None:
        records = [r for r in state["log_history"] if r["step"] == state["global_step"]]
        evaluation: dict[str, Any] = next((r for r in reversed(records) if "eval_loss" in r), {})
        facts = dataclasses.replace(
            facts,
            settings={
                name: value
                for name, value in _other_than(TrainConfig, state["config"]).items()
                if name not in _OF_THE_MACHINE
            },
            num_rows=state["train_rows"].get("number"),
            num_held_out=(state["eval_rows"] or {}).get("number"),
            step=state["global_step"],
            results={
                name: value
                for name, value in evaluation.items()
                if name.startswith("eval_")
                and type(value) in (int, float)
                and not name.endswith(_CLOCKS)
            },
            samples=evaluation.get("eval_samples", [])[:MOST_SAMPLES],
            versions={n: state["environment"]["versions"].get(n) for n in COMPUTING},
            gpus=sorted({gpu["name"] for gpu in state["environment"].get("gpus", ())}),
            fingerprint=state["base"],
            image_side=state.get("image_side"),
            image_splitting=state.get("image_splitting"),
            quantize=state.get("quantize"),
            templates=known(state.get("templates")),
        )
    return dataclasses.replace(facts, **more)


_OF_PEFT = {
    *("peft_type", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("base_model_name_or_path", "revision"),
}


def _other_than(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from a dataclass's defaults."""
    usual = {}
    for each in dataclasses.fields(kind):
        if each.default is not dataclasses.MISSING:
            usual[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            usual[each.name] = each.default_factory()
    return {
        name: value
        for name, value in values.items()
        if name not in _OF_PEFT
        and value != usual.get(name)
        and not (value in ([], {}) and not usual.get(name))
        and not (dataclasses.is_dataclass(usual.get(name)) or name == "runtime_config")
        and not (isinstance(usual.get(name), tuple) and list(usual[name]) == value)
    }


TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{% if facts.is_merged %}\
{{ base_link[0] | upper }}{{ base_link[1:] }}, fine-tuned on pictures and texts: \
a LoRA adapter merged into its weights\
{% if facts.dtype %} ({{ facts.dtype }}){% endif %}. No adapter is needed.
{% else %}\
A LoRA adapter for {{ base_link }}, fine-tuned on pictures and texts.
{% endif %}\
Trained with `idefics_qlora`\
{% if facts.quantize is not none %}\
, the base's weights {{ "in 4 bits" if facts.quantize else "not quantised" }}\
{% endif %}.

## How to load

```python
import idefics_qlora as iq
{% if facts.is_merged %}\

model, processor = iq.load_model({{ source }})
{% else %}\
{% if is_on_hub %}\
from huggingface_hub import snapshot_download

model, processor = iq.load_finetuned(snapshot_download({{ source }}))
{% else %}\

model, processor = iq.load_finetuned({{ source }})
{% endif %}\
{% endif %}\
{% if row %}\
print(iq.generate(model, processor, [{{ row }}])[0])
{% else %}\
prompt = [iq.images.open_image("photo.jpg"), "..."]  # the text as in training
print(iq.generate(model, processor, [prompt])[0])
{% endif %}\
```

Without that library:

```python
{% if facts.is_merged %}\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({{ source }}, dtype="auto")
processor = AutoProcessor.from_pretrained({{ source }})
{% else %}\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = {{ base_source }}
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto"{{ revision }})
model = PeftModel.from_pretrained(model, {{ source }})
processor = AutoProcessor.from_pretrained(base{{ revision }})
{% endif %}\
```
{% if facts.results %}\

## Results

On {{ facts.num_held_out or "the" }} held-out rows\
{% if facts.step is not none %}, after {{ facts.step }} steps{% endif %}:

| | |
| --- | --- |
{% for name, value in facts.results.items() %}\
| `{{ name }}` | {{ "%.4g" | format(value) }} |
{% endfor %}\
{% endif %}\
{% if samples %}\

## Samples

Held-out rows, as the model saw them. They were not chosen.

| picture | text to be said | what the model said |
| --- | --- | --- |
{% for sample in samples %}\
| {% for image in sample.images %}![{{ sample.row }}]({{ image }}) {% endfor %}\
| {{ sample.target }} | {{ sample.text }} |
{% endfor %}\
{% endif %}\

## Training

{% if facts.num_rows is not none %}\
Data: {{ facts.num_rows }} rows of pictures and texts\
{% if facts.num_held_out %}, and {{ facts.num_held_out }} held out{% endif %}.

{% endif %}\
{% if prompt %}\
Each prompt was a picture and the text "{{ prompt }}"\
{% if answer %}; what was learnt to be said is "{{ answer }}"{% endif %}\
{% if columns %}, where names in braces stand for a row's values{% endif %}.

{% endif %}\
| setting | value |
| --- | --- |
{% for name, value in settings %}\
| `{{ name }}` | `{{ value }}` |
{% endfor %}\

All others are the defaults of `idefics_qlora` and `peft`.
{% if facts.versions %}\

## Versions

{% for name, version in facts.versions.items() if version %}\
{{ name }} {{ version }}{{ "" if loop.last else ", " }}\
{% endfor %}\
{% if facts.gpus %}; on {{ facts.gpus | join(", ") }}{% endif %}.
{% endif %}\

## Limits

The model says what its training data made likely, and may be wrong with confidence. It was \
{% if facts.results %}evaluated on the rows above and on nothing else{% else %}not \
evaluated on held-out rows{% endif %}; \
on pictures of another kind expect less. The limits and the licence of the base hold for it, too.
"""


def model_card(
    facts: Facts,
    source: str,
    *,
    is_on_hub: bool,
    pictures: str,
    license: str | None = None,
    name: str | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        facts: What is known.
        source: Repository, or folder, from which the model is loaded.
        is_on_hub: Which of the two it is.
        pictures: Folder of the samples' pictures, as seen from the card; with a slash at its end.
        license: The base's, as the Hub names it.
        name: What the model is called; by default as its source.
    """
    name = source.rpartition("/")[2] if name is None else name
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="held-out",
            dataset_name="held-out rows of the training data",
            metric_type=metric.removeprefix("eval_"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in facts.results.items()
    ]
    relation = "finetune" if facts.is_merged else "adapter"
    data = ModelCardData(
        base_model=facts.base,
        base_model_relation=relation if facts.base else None,
        library_name="transformers" if facts.is_merged else "peft",
        license=license,
        model_name=name,
        pipeline_tag="image-text-to-text",
        tags=["idefics_qlora", "lora", "vision-language"],
        eval_results=results or None,
        metrics=[metric.removeprefix("eval_") for metric in facts.results] or None,
    )
    revision = facts.base_revision
    if facts.base is None:
        link, base = "a base that is not on the Hub", '"folder of the base"'
    else:
        link = f"[{facts.base}](https://huggingface.co/{facts.base})"
        link += f" (revision `{revision}`)" if revision else ""
        base = f'"{facts.base}"'
    samples = [
        {
            "row": _cell(sample.get("row", "")),
            "images": [pictures + image.rpartition("/")[2] for image in sample.get("images", ())],
            "target": _cell(sample.get("target", "")),
            "text": _cell(sample.get("text", "")),
        }
        for sample in facts.samples
    ]
    templates = known(facts.templates) or {}
    captions = captions_of(templates)
    asked = [] if captions is None else columns_of("question", captions.question)
    row = {"image": "photo.jpg"} | dict.fromkeys(asked, "...")
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        facts=facts,
        base_link=link,
        base_source=base,
        revision=f', revision="{revision}"' if revision else "",
        source=f'"{source}"',
        is_on_hub=is_on_hub,
        samples=samples,
        row=json.dumps(row, ensure_ascii=False) if templates else None,
        prompt=_cell(templates.get("question", "")),
        answer=_cell(templates.get("answer", "").strip()),
        columns=any("{" in templates.get(name, "") for name in ("question", "answer")),
        settings=[(n, _cell(v)) for part in (facts.lora, facts.settings) for n, v in part.items()],
    )
    return str(card)


def _cell(value: Any) -> str:
    """Text as a table's cell can hold it: data, whatever it looks like."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", text) if isinstance(value, str) else text
