"""The loop: parity with Trainer, invariance of the window, scaling, logging, errors."""

import copy
import math

import pytest
import torch
from helpers import config_of, same
from peft import LoraConfig
from torch.nn import functional as F

import idefics_qlora as iq
from idefics_qlora.data.batches import Collator
from idefics_qlora.data.order import Windows
from idefics_qlora.data.rows import RowReader
from idefics_qlora.model.adapters import adapter_tensors, trainable_parameters
from idefics_qlora.model.precision import DTYPES, set_compute_dtype
from idefics_qlora.training.loop import train_step
from idefics_qlora.training.optim import lr_at, make_optimizer
from idefics_qlora.training.state import TrainState


def without_dropout(base):
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
    return iq.add_lora(base, config)


def state_of(model, config):
    """A state as train() makes it, for single steps."""
    set_compute_dtype(model, DTYPES[config.precision])
    return TrainState(
        model=model.train(),
        optimizer=make_optimizer(trainable_parameters(model).values(), config),
        scaler=torch.amp.GradScaler("cpu", enabled=config.precision == "fp16"),
        config=config,
        total_steps=config.max_steps,
        device=torch.device("cpu"),
    )


def windows_of(processor, examples, config):
    return Windows(
        RowReader(examples, "train_rows", None, Collator(processor, config.loss_on)),
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        augment=config.augment,
    )


class Noting(torch.optim.SGD):
    """Takes no step; ``gradient`` is the whole gradient that it was given, before clipping."""

    def __init__(self, parameters):
        super().__init__(list(parameters), lr=0.0)

    def step(self, closure=None):
        pass

    def zero_grad(self, set_to_none=True):
        gradients = [p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None]
        self.gradient = torch.cat(gradients) if gradients else None
        super().zero_grad(set_to_none)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.slow
def test_parity_with_hugging_face_trainer(base, processor, examples, tmp_path):
    """Eight steps of our loop and of Trainer give the same adapters to the bit."""
    from transformers import Trainer, TrainingArguments

    config = config_of(tmp_path / "ours", max_steps=8, loss_on="all")
    theirs, ours = without_dropout(copy.deepcopy(base)), without_dropout(base)
    set_compute_dtype(theirs, torch.float32)
    windows = windows_of(processor, examples, config)
    micro_batches = [
        {**batch.inputs(), "labels": batch.labels}
        for w in range(config.max_steps)
        for batch in windows[w].micro_batches(config.micro_batch_size)
    ]
    assert len(micro_batches) == 4 * config.max_steps

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(micro_batches)

    def loss_function(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return summed / num_items_in_batch

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
        compute_loss_func=loss_function,
    )
    trainer.train()
    result = iq.train(ours, processor, examples, config=config)

    assert same(snapshot(theirs), snapshot(ours))
    theirs_log = [record for record in trainer.state.log_history if "loss" in record]
    ours_log = [record for record in result.log_history if "loss" in record]
    assert len(theirs_log) == len(ours_log) == 8
    for a, b in zip(theirs_log, ours_log, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-12)


def test_the_window_decides_not_the_micro_batch(base, processor, examples):
    """1 x 16, 2 x 8 and 8 x 2 give one gradient, with texts of very different lengths."""
    model = without_dropout(base).train()
    set_compute_dtype(model, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    gradients = []
    for micro_batch_size in (16, 8, 2, 1):
        config = config_of(
            "unused", global_batch_size=16, micro_batch_size=micro_batch_size, max_grad_norm=1e9
        )
        state = state_of(model, config)
        # The step is taken by an optimizer that only notes what it is given.
        state.optimizer = Noting(trainable_parameters(model).values())
        train_step(state, windows_of(processor, examples, config)[0])
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


def test_endless_overflow_stops_with_advice(lora, processor, examples, tmp_path):
    """After 25 skipped windows in a row the run says what to do."""
    victim = next(iter(trainable_parameters(lora).values()))
    victim.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    config = config_of(tmp_path, precision="fp16", global_batch_size=1, micro_batch_size=1)
    with pytest.raises(FloatingPointError, match="25 windows in a row.*precision='bf16'"):
        iq.train(lora, processor, examples, config=config)


def test_a_bad_gradient_in_fp32_touches_no_weight(lora, processor, examples, tmp_path):
    """Where no scale can fall, the run stops before the update and names the rows."""
    before = snapshot(lora)
    victim = next(iter(trainable_parameters(lora).values()))
    victim.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    with pytest.raises(FloatingPointError, match=r"window 0 \(rows \[.*weights are untouched"):
        iq.train(lora, processor, examples, config=config_of(tmp_path))
    assert same(snapshot(lora), before)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_evaluating_changes_nothing(base, processor, examples, tmp_path, precision):
    """Train, evaluate, train gives the weights of train, train; dropout goes on where it was."""
    results = []
    for eval_rows in (None, examples[:5]):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(
            tmp_path / str(bool(eval_rows)), precision=precision, eval_steps=1, save_steps=4
        )
        iq.train(model, processor, examples, eval_rows, config=config)
        results.append(snapshot(model))
    assert same(*results)


def test_evaluate_averages_over_tokens(base, processor, examples):
    """The loss is per target token of all rows together, whatever the batch size; modes stay."""
    base.model.vision_model.train()
    modes = [module.training for module in base.modules()]
    losses = [
        iq.evaluate(base, processor, examples[:7], batch_size=size)["eval_loss"] for size in (1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # fp16
    assert [module.training for module in base.modules()] == modes
    batch = Collator(processor)(examples[:1])
    with torch.no_grad():
        logits = base(**batch.inputs()).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    assert iq.evaluate(base, processor, examples[:1])["eval_loss"] == pytest.approx(
        expected.item(), rel=1e-3
    )


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


def test_the_last_step_is_evaluated_and_saved(lora, processor, examples, tmp_path):
    """Whatever its number: the end of a run is neither unknown nor lost."""
    config = config_of(tmp_path, max_steps=3, eval_steps=2, save_steps=2)
    result = iq.train(lora, processor, examples, examples[:2], config=config)
    assert [r["step"] for r in result.log_history if "eval_loss" in r] == [2, 3]
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-3"


def test_the_best_is_loaded_and_never_deleted(lora, processor, examples, tmp_path):
    """A run that is ruined after its second step keeps that checkpoint and gives it back."""

    def ruin(record):
        if record["step"] == 3 and "loss" in record:
            for name, parameter in trainable_parameters(lora).items():
                if "lora_B" in name:
                    parameter.data.normal_(std=1.0)

    config = iq.TrainConfig(
        output_dir=tmp_path,
        max_steps=5,
        global_batch_size=2,
        precision="fp32",
        logging_steps=1,
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        num_workers=0,
    )
    result = iq.train(lora, processor, examples, examples[:4], config=config, on_log=ruin)
    evaluations = [r["eval_loss"] for r in result.log_history if "eval_loss" in r]
    best = 1 + evaluations.index(min(evaluations))
    assert best <= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{best}", "checkpoint-5"]
    loss = iq.evaluate(lora, processor, examples[:4])["eval_loss"]
    assert loss == pytest.approx(min(evaluations), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "warmup"), [("linear", 0), ("linear", 3), ("cosine", 3), ("constant", 3)]
)
def test_schedules_equal_transformers(kind, warmup):
    """The pure function has the curves of transformers.get_scheduler."""
    from transformers import get_scheduler

    config = config_of("unused", lr_scheduler_type=kind, warmup_steps=warmup, max_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        assert lr_at(step, 10, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_8_bit_optimizer_holds_8_bit_states(lora, processor, examples):
    """The text adapters are large enough for real 8-bit states, also on a CPU."""
    state = state_of(lora, config_of("unused"))
    train_step(state, windows_of(processor, examples, state.config)[0])
    kinds = {
        parameter.numel() >= 4096: values["state1"].dtype
        for parameter, values in state.optimizer.state.items()
    }
    assert kinds == {True: torch.uint8, False: torch.float32}


def test_never_refuses_to_overwrite(lora, processor, examples, tmp_path):
    """resume="never" keeps an earlier run from being mixed up with a new one."""
    config = config_of(tmp_path, max_steps=1, resume="never")
    iq.train(lora, processor, examples, config=config)
    with pytest.raises(ValueError, match="checkpoint-1 exists: choose another output_dir"):
        iq.train(lora, processor, examples, config=config)


def bad_image(examples):
    return [*examples[:3], iq.Example([{"path": "no/such.png"}, "What?"], " x")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda examples: [], "train_rows is empty"),
        (lambda examples: [*examples[:2], {"text": 1}], r"train_rows\[2\]: .*no known format"),
        (bad_image, r"'no/such.png' of train_rows\[3\]: there is no such file"),
    ],
)
def test_bad_rows_stop_before_training(lora, processor, examples, tmp_path, rows, message):
    """Nothing is trained and nothing written when a row is bad."""
    before = snapshot(lora)
    with pytest.raises(ValueError, match=message):
        iq.train(lora, processor, rows(examples), config=config_of(tmp_path / "run"))
    assert same(snapshot(lora), before)
    assert not (tmp_path / "run").exists()


def test_bad_evaluation_rows_stop_before_training(lora, processor, examples, tmp_path):
    """A bad held-out row is found now, not at the first evaluation."""
    with pytest.raises(ValueError, match=r"eval_rows\[1\]"):
        iq.train(
            lora, processor, examples, [examples[0], 3],
            config=config_of(tmp_path, on_bad_row="raise"),
        )  # fmt: skip


def test_the_best_needs_evaluation_rows(lora, processor, examples, tmp_path):
    """load_best_model_at_end without evaluation rows cannot work, and says so."""
    config = config_of(tmp_path, load_best_model_at_end=True, save_steps=20)
    with pytest.raises(ValueError, match="needs eval_rows.*eval_steps=20"):
        iq.train(lora, processor, examples, config=config)


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
    state.optimizer = Noting(trainable_parameters(lora).values())
    output = train_step(state, windows_of(processor, examples, state.config)[0])
    assert output.grad_norm > 0.1
    assert state.optimizer.gradient.norm() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_weights_decay(base, processor, examples, optim):
    """By the learning rate times ``weight_decay`` of themselves, beside what the gradient does."""
    before, after = {}, []
    for decay in (0.0, 0.5):
        model = without_dropout(copy.deepcopy(base))
        before = snapshot(model)
        settings = {"optim": optim, "weight_decay": decay, "learning_rate": 0.1}
        state = state_of(model, config_of("unused", **settings))
        train_step(state, windows_of(processor, examples, state.config)[0])
        after.append(snapshot(model))
    for name, tensor in before.items():
        expected = -0.1 * 0.5 * tensor
        torch.testing.assert_close(after[1][name] - after[0][name], expected, rtol=1e-3, atol=1e-6)


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


def test_warm_up_fits_the_epochs(lora, processor, examples, tmp_path):
    """A warm-up longer than the steps that the epochs come to is refused."""
    config = config_of(tmp_path, max_steps=None, warmup_steps=6)
    with pytest.raises(ValueError, match="warmup_steps=6 is more than the 5 steps"):
        iq.train(lora, processor, examples, config=config)


def test_a_model_without_adapters_is_refused(base, processor, examples, tmp_path):
    """Forgetting add_lora, or fp16 adapters, is said before anything else happens."""
    with pytest.raises(ValueError, match="call add_lora"):
        iq.train(base, processor, examples, config=config_of(tmp_path))
    model = iq.add_lora(base)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.half()
    with pytest.raises(ValueError, match=r"is torch\.float16: expected float32"):
        iq.train(model, processor, examples, config=config_of(tmp_path))


def test_workers_change_nothing(base, processor, examples, tmp_path):
    """Loading by two processes gives the adapters of loading in the main process."""
    results = []
    for num_workers in (0, 2):
        model = iq.add_lora(copy.deepcopy(base))
        config = config_of(tmp_path / str(num_workers), max_steps=2, num_workers=num_workers)
        iq.train(model, processor, examples, config=config)
        results.append(snapshot(model))
    assert same(*results)
