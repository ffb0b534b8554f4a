"""What is computed in, unless it is said: what the base's makers trained in."""

import copy
import json

import pytest
import torch
from helpers import SUCCESSORS, config_of, differences

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.model.precision import compute_dtype

MAKERS = {"idefics": "fp16", **dict.fromkeys(SUCCESSORS, "bf16")}


@pytest.fixture(params=MAKERS)
def family(request):
    return request.param


@pytest.fixture
def rows(examples):
    return examples[:8]


def precision_of(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["config"]["precision"]


def test_the_makers_precision_is_the_default(family, bases, rows, tmp_path, caplog):
    """Of loading, of training and of the estimate; the log says which."""
    caplog.set_level("INFO")
    base, processor = bases(family)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[MAKERS[family]]
    assert compute_dtype(base) == dtype
    model = iq.add_lora(copy.deepcopy(base))
    iq.train(model, processor, rows, config=config_of(tmp_path, max_steps=1, precision="auto"))
    assert compute_dtype(model) == dtype
    assert precision_of(tmp_path / "checkpoint-1") == MAKERS[family]
    assert f"precision='auto': {MAKERS[family]}" in caplog.text
    assert iq.TrainConfig(output_dir=tmp_path).precision == "auto"
    estimate = iq.estimate_memory(base.config)
    assert estimate.precision == MAKERS[family]


def test_a_run_keeps_what_it_had(family, bases, rows, tmp_path, caplog):
    """A run that was begun in another precision goes on in it, to the bit, unless it is said."""
    base, processor = bases(family)
    for name, parts in (("whole", ["fp32"]), ("resumed", ["fp32", "auto"])):
        for steps, precision in zip((4,) if len(parts) == 1 else (2, 4), parts, strict=True):
            config = config_of(
                tmp_path / name,
                max_steps=steps,
                save_steps=2,
                precision=precision,
                lr_scheduler_type="constant",
            )
            iq.train(iq.add_lora(copy.deepcopy(base)), processor, rows, config=config)
    assert "precision was" not in caplog.text
    checkpoints = [tmp_path / name / "checkpoint-4" for name in ("whole", "resumed")]
    assert precision_of(checkpoints[1]) == "fp32"
    assert differences(*checkpoints) == []


def test_the_command_line_leaves_it_to_the_base(family, bases, tmp_path, monkeypatch):
    """Neither the file nor an argument says it; an argument decides."""
    monkeypatch.chdir(tmp_path)
    folder = bases(family)[0].name_or_path
    told = ["--data.train", "tiny", "--model.device", "cpu", "--model.base", folder]
    told += ["--train.max_steps", "1", "--train.num_workers", "0", "--train.global_batch_size", "2"]
    told += ["--train.load_best_model_at_end", "false"]
    assert cli.main(["train", *told, "--train.output_dir", "a"]) == 0
    assert precision_of(tmp_path / "a/checkpoint-1") == MAKERS[family]
    asked = ["--train.precision", "fp32"]
    assert cli.main(["train", *told, "--train.output_dir", "b", *asked]) == 0
    assert precision_of(tmp_path / "b/checkpoint-1") == "fp32"


def test_a_base_that_was_trained_in_bf16_is_saved_in_it(bases, tmp_path):
    """It loses nothing; one that was not is refused, as ever."""
    base, processor = bases("smolvlm")
    iq.save_quantized(base, processor, tmp_path / "base")
    again, _ = iq.load_model(tmp_path / "base", device="cpu")
    for (name, ours), theirs in zip(base.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
