"""The loop: parity with Trainer, invariance of the window, scaling, clipping, logging."""

import copy
import math

import pytest
import torch
from helpers import config_of, every_family, same
from steps import snapshot, state_of, windows_of, without_dropout
from torch.nn import functional as F

import idefics_qlora as iq
from idefics_qlora.model.adapters import trainable_parameters
from idefics_qlora.model.precision import set_compute_dtype
from idefics_qlora.training.flat import FlatAdamW
from idefics_qlora.training.loop import train_step


class Noting(FlatAdamW):
    """Takes no step; ``gradient`` is the whole gradient that it was given."""

    def step(self, closure=None):
        self.gradient = torch.cat([p.grad for p in self.param_groups[0]["params"]])
        return True


def by_the_processor(processor, rows, batch):
    """The micro-batch of these rows as the base's own processor makes it, with our labels."""
    prompts = [[*row.prompt, row.completion + processor.tokenizer.eos_token] for row in rows]
    begin, image = processor.tokenizer("")["input_ids"], processor.image_token
    texts = ["".join(i if isinstance(i, str) else image for i in prompt) for prompt in prompts]
    made = processor(
        text=texts,
        images=[[item for item in prompt if not isinstance(item, str)] for prompt in prompts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert made["input_ids"][0, : len(begin)].tolist() == begin
    assert torch.equal(made["input_ids"], batch.input_ids)
    return {**made, "labels": batch.labels}


def summed_over_the_window(outputs, labels, num_items_in_batch):
    """The loss of a window; IDEFICS has none of its own that works."""
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return summed / num_items_in_batch


@every_family
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.slow
def test_parity_with_hugging_face_trainer(family, base, processor, examples, tmp_path):
    """Six steps of our loop and of Trainer give the same adapters to the bit, where the other
    families have their processor's own batches and their model's own loss."""
    from transformers import Trainer, TrainingArguments

    config = config_of(tmp_path / "ours", max_steps=6, loss_on="all", augment=False)
    theirs, ours = without_dropout(copy.deepcopy(base)), without_dropout(base)
    set_compute_dtype(theirs, torch.float32)
    windows = windows_of(processor, examples, config)
    micro_batches = []
    for window in map(windows.__getitem__, range(config.max_steps)):
        rows = [examples[row] for row in window.batch_rows]
        for n, batch in enumerate(window.micro_batches(config.micro_batch_size)):
            own = {**batch.inputs(), "labels": batch.labels}
            if family != "idefics":
                own = by_the_processor(processor, rows[2 * n : 2 * n + 2], batch)
            micro_batches.append(own)
    assert len(micro_batches) == 4 * config.max_steps

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(micro_batches)

    trainer = InOrder(
        model=theirs,
        args=TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            max_steps=config.max_steps,
            per_device_train_batch_size=1,  # each item is a whole micro-batch of two examples
            gradient_accumulation_steps=4,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            optim="paged_adamw_8bit",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=micro_batches,
        data_collator=lambda items: items[0],
        compute_loss_func=summed_over_the_window if family == "idefics" else None,
    )
    trainer.train()
    result = iq.train(ours, processor, examples, config=config)

    assert same(snapshot(theirs), snapshot(ours))
    theirs_log = [record for record in trainer.state.log_history if "loss" in record]
    ours_log = [record for record in result.log_history if "loss" in record]
    assert len(theirs_log) == len(ours_log) == 6
    for a, b in zip(theirs_log, ours_log, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-12)


@every_family
def test_the_window_decides_not_the_micro_batch(base, processor, mixed):
    """1 x 16, 2 x 8 and 8 x 2 give one gradient, with texts of very different lengths, and with
    several pictures or none."""
    model = without_dropout(base).train()
    set_compute_dtype(model, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    gradients = []
    for micro_batch_size in (16, 8, 3, 1):
        config = config_of(
            "unused", global_batch_size=16, micro_batch_size=micro_batch_size, max_grad_norm=1e9
        )
        state = state_of(model, config)
        # The step is taken by an optimizer that only notes what it is given.
        state.optimizer = Noting(trainable_parameters(model), config)
        train_step(state, windows_of(processor, mixed, config)[0])
        gradients.append(state.optimizer.gradient)
    reference = gradients[0]
    assert reference.norm() > 0
    for gradient in gradients[1:]:
        assert (gradient - reference).norm() / reference.norm() < 1e-5


def test_averaging_per_micro_batch_would_not_do(processor, examples):
    """The control of the test above: micro-batches do differ in their number of targets."""
    window = windows_of(processor, examples, config_of("unused", global_batch_size=16))[0]
    assert len({batch.num_targets for batch in window.micro_batches(2)}) > 1


def test_an_overflow_skips_the_update(lora, processor, examples):
    """An inf in a gradient leaves weights, step and learning rate, and halves the scale."""
    state = state_of(lora, config_of("unused", precision="fp16"))
    windows = windows_of(processor, examples, state.config)
    train_step(state, windows[0])
    before, scale = snapshot(lora), state.scaler.get_scale()
    victim = next(iter(trainable_parameters(lora).values()))
    hook = victim.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    output = train_step(state, windows[1])
    hook.remove()
    assert output.skipped
    assert same(snapshot(lora), before)
    assert state.scaler.get_scale() == scale / 2
    assert (state.global_step, state.window, state.skipped_windows) == (1, 2, 1)
    good = train_step(state, windows[2])
    assert not good.skipped
    assert good.learning_rate == output.learning_rate
    assert not same(snapshot(lora), before)
    assert (state.global_step, state.window, state.skips_in_a_row) == (2, 3, 0)


def test_a_bad_gradient_in_fp32_touches_no_weight(lora, processor, examples, tmp_path):
    """Where no scale can fall, the run stops before the update and names the rows."""
    before = snapshot(lora)
    victim = next(iter(trainable_parameters(lora).values()))
    victim.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    with pytest.raises(FloatingPointError, match=r"window 0 \(rows \[.*weights are untouched"):
        iq.train(lora, processor, examples, config=config_of(tmp_path))
    assert same(snapshot(lora), before)


def test_learning_lowers_the_loss(lora, processor, examples, tmp_path):
    """The whole loop as a user runs it, in fp16 with evaluation, checkpoints and rotation."""
    records = []
    config = iq.TrainConfig(
        output_dir=tmp_path,
        max_steps=10,
        global_batch_size=4,
        learning_rate=5e-3,
        logging_steps=2,
        eval_steps=2,
        save_steps=2,
        save_total_limit=2,
        num_workers=0,
    )
    result = iq.train(lora, processor, examples, examples[:4], config=config, on_log=records.append)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 6, 8, 10]
    evaluations = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    best = min(evaluations, key=evaluations.get)
    assert result.best_checkpoint == tmp_path / f"checkpoint-{best}"
    kept = sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    assert kept == sorted({best, *([10] if best != 10 else [8, 10])})
    assert result.global_step == 10
    assert result.log_history[:-1] == records
    assert math.isfinite(result.training_loss)
    trainers = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    assert trainers | {"epoch", "total_flos"} <= result.metrics.keys()
    assert all(math.isfinite(value) for value in result.metrics.values())
    # The model that comes back is the best one.
    loss = iq.evaluate(lora, processor, examples[:4])["eval_loss"]
    assert loss == pytest.approx(min(evaluations.values()), rel=1e-6)
    assert not lora.training


def test_clipping_sees_the_true_gradient(base, processor, examples):
    """The gradient is unscaled before it is clipped: its norm is fp32's, whatever the scale."""
    norms = []
    for kind, scale in (("fp32", None), ("fp16", 1024.0), ("fp16", 65536.0)):
        model = without_dropout(copy.deepcopy(base))
        state = state_of(model, config_of("unused", precision=kind))
        if kind == "fp16":
            state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        window = windows_of(processor, examples, state.config)[0]
        norms.append(train_step(state, window).grad_norm.item())
    assert norms[1] == pytest.approx(norms[0], rel=0.03)
    assert norms[2] == pytest.approx(norms[0], rel=0.03)


def test_the_gradient_is_clipped(lora, processor, examples):
    """The optimizer gets a gradient of the norm that was asked for; the log its norm before."""
    state = state_of(lora, config_of("unused", max_grad_norm=0.01))
    state.optimizer = Noting(trainable_parameters(lora), state.config)
    output = train_step(state, windows_of(processor, examples, state.config)[0])
    assert output.grad_norm > 0.1
    assert state.optimizer.gradient.norm() == pytest.approx(0.01, rel=1e-3)


def test_a_run_depends_on_its_seed_alone(base, processor, examples, tmp_path):
    """Not on the random numbers that were drawn before it; another seed is another run."""
    ends = []
    for drawn_before, seed in ((1, 42), (2, 42), (1, 43)):
        torch.manual_seed(drawn_before)
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / str(len(ends)), max_steps=2, seed=seed, augment=False)
        iq.train(model, processor, examples[:8], config=config)  # every window has all rows
        ends.append(snapshot(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.slow
def test_bf16_learns(lora, processor, examples, tmp_path):
    """The same loop without a scaler."""
    config = config_of(tmp_path, precision="bf16", learning_rate=5e-3, max_steps=8)
    result = iq.train(lora, processor, examples, config=config)
    losses = [record["loss"] for record in result.log_history if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]


def test_workers_change_nothing(base, processor, examples, tmp_path):
    """Loading by two processes gives the adapters of loading in the main process."""
    results = []
    for num_workers in (0, 2):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / str(num_workers), max_steps=2, num_workers=num_workers)
        iq.train(model, processor, examples, config=config)
        results.append(snapshot(model))
    assert same(*results)
