"""Idefics2, Idefics3 and SmolVLM are trained, evaluated and generated from as IDEFICS is."""

import pytest
import torch
from helpers import config_of

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.model.precision import set_compute_dtype

QUESTION = "Question: What's on the picture? Answer:"


@pytest.fixture
def lora(base):
    return iq.add_lora(base)


@pytest.fixture
def rows(mixed):
    return mixed


def test_it_learns(lora, processor, rows, tmp_path):
    """The loss falls, on training rows and on what evaluate says of them; every part learns."""
    before = iq.evaluate(lora, processor, rows)["eval_loss"]
    settings = config_of(
        tmp_path, max_steps=12, learning_rate=1e-2, warmup_steps=0, augment=True, save_steps=12
    )
    result = iq.train(lora, processor, rows, config=settings)
    losses = [record["loss"] for record in result.log_history if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert iq.evaluate(lora, processor, rows)["eval_loss"] < 0.8 * before
    assert result.metrics["total_flos"] > 0
    again, _ = iq.load_finetuned(tmp_path / "checkpoint-12", device="cpu")
    assert iq.generate(again, processor, [rows[0].prompt]) == iq.generate(
        lora, processor, [rows[0].prompt]
    )


def test_coverage_names_the_parts(lora, processor, rows, tmp_path, caplog):
    """The first step tells which parts of the model learn."""
    caplog.set_level("INFO")
    iq.train(lora, processor, rows, config=config_of(tmp_path, max_steps=1))
    perceiver = "perceiver 6 of 6, " * (lora.config.model_type == "idefics2")
    learn = f"adapters with a gradient: {perceiver}text layers 6 of 6, vision tower 6 of 6"
    assert learn in caplog.text


def test_batched_generation_is_that_of_one_prompt(lora, processor, rows):
    """Texts do not depend on the batch, whatever pictures the others have; no image is said."""
    prompts = [row.prompt for row in rows]
    torch.nn.init.normal_(next(p for n, p in lora.named_parameters() if "lora_B" in n))
    set_compute_dtype(lora, torch.float32)  # in fp16 the likeliest two may change places
    options = {"max_new_tokens": 8}
    together = iq.generate(lora, processor, prompts, batch_size=len(prompts), **options)
    alone = [iq.generate(lora, processor, [prompt], **options)[0] for prompt in prompts]
    assert together == alone


def test_no_image_is_said(base, processor, rows):
    """Tokens of images are passed over, however likely they are: the text is what it would be."""
    prompts = [row.prompt for row in rows[:3]]
    texts = iq.generate(base, processor, prompts, max_new_tokens=6)
    image_ids = Collator(processor).image_ids

    def prefer_images(module, args, logits):
        logits = logits.clone()
        logits[..., image_ids] += 1000.0
        return logits

    base.lm_head.register_forward_hook(prefer_images)
    assert any(texts)
    assert iq.generate(base, processor, prompts, max_new_tokens=6) == texts


def test_the_full_text_leaves_images_out(base, processor, rows):
    """Rows and columns are no part of a prompt's text, where they are ordinary words either."""
    (text,) = iq.generate(
        base, processor, [rows[0].prompt], max_new_tokens=2, return_full_text=True
    )
    assert text.lstrip().startswith(QUESTION)
    assert "row_" not in text
    assert "global-img" not in text


def test_image_use_is_measured(lora, processor, rows):
    """Pictures are exchanged between rows that have other numbers of tiles."""
    use = iq.image_use(lora, processor, rows, batch_size=3, fields=lambda text: {"said": text})
    assert use.num_rows == 11
    assert not use.looks
    assert set(use.loss) == {"own", "another", "blank"}
