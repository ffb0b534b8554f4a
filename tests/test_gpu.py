"""What only a CUDA GPU can show; ``pytest -m gpu`` runs these alone."""

import contextlib
import copy
import dataclasses
import gc

import bitsandbytes as bnb
import peft
import pytest
import torch

import idefics_qlora as iq
from idefics_qlora.data.captions import pokemon_card_example
from idefics_qlora.model.adapters import adapter_tensors
from idefics_qlora.training.flat import FlatAdamW

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def memory_left(mib):
    """Let this process have so much more of the GPU's memory than it holds now."""
    gc.collect()  # tracebacks hold tensors
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    in_use = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((in_use + mib * 2**20) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def on_gpu():
    """The tiny base on the GPU with fresh adapters, and its processor."""
    model, processor = iq.tiny.load_model(device="cuda:0")
    return iq.add_lora(model), processor


def test_load_puts_everything_on_the_gpu_in_4_bits(on_gpu):
    """No parameter stays behind on the CPU, and linear layers are NF4 with fp16 compute; their
    scales, which are small beside the GPU's memory, are kept in fp32."""
    model, _ = on_gpu
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    quantised = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(quantised) == 52
    assert {m.compute_dtype for m in quantised} == {torch.float16}
    assert {m.weight.quant_state.absmax.dtype for m in quantised} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_training_learns(on_gpu, tmp_path, cards, precision):
    """The recipe's loop, with the paged optimizer, lowers the loss in every precision."""
    model, processor = on_gpu
    config = iq.TrainConfig(
        output_dir=tmp_path,
        max_steps=20,
        learning_rate=2e-3,
        precision=precision,
        logging_steps=5,
        eval_steps=10,
        save_steps=10,
    )
    result = iq.train(model, processor, cards, cards[:8], config=config)
    losses = [record["loss"] for record in result.log_history if "loss" in record]
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics["skipped_windows"] == 0
    assert result.best_checkpoint is not None


def test_the_optimizer_pages_large_states_and_holds_8_bit_ones():
    """From 100,000 elements on, the recipe's optimizer keeps its states in paged memory; they come
    from a checkpoint as they were, and the next step is the same."""
    config = iq.TrainConfig(output_dir="unused")
    first = torch.nn.Parameter(torch.randn(400, 400, device="cuda:0"))
    before = first.detach().clone()
    optimizer = FlatAdamW({"w": first}, config)
    first.square().sum().backward()
    optimizer.step()
    assert not torch.equal(first, before)
    tensors, scalars = optimizer.state_by_name()
    assert tensors["w::state1"].dtype == torch.uint8
    saved = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
    second = torch.nn.Parameter(first.detach().clone())
    resumed = FlatAdamW({"w": second}, config)
    resumed.load_state_by_name(saved, scalars)
    for optim in (optimizer, resumed):
        (buffer,) = optim._buffers
        assert all(state.is_paged for state in buffer.moments.flat())
    assert torch.equal(resumed.state_by_name()[0]["w::state1"].cpu(), saved["w::state1"])
    for parameter, stepping in ((first, optimizer), (second, resumed)):
        stepping.zero_grad()
        parameter.sum().backward()
        stepping.step()
    assert torch.equal(first, second)


def test_memory_that_does_not_suffice_halves_the_micro_batch(on_gpu, tmp_path, cards):
    """Really out of memory: the window is done again in smaller parts, and the run goes on."""
    model, processor = on_gpu
    config = iq.TrainConfig(
        output_dir=tmp_path,
        max_steps=2,
        global_batch_size=32,
        micro_batch_size=32,
        load_best_model_at_end=False,
    )
    with memory_left(100):  # of it 32 for cuBLAS on another stream
        result = iq.train(model, processor, cards, config=config)
    assert result.global_step == 2
    assert result.metrics["micro_batch_size"] < 32


def test_an_evaluation_that_does_not_fit_says_what_to_lower(on_gpu, tmp_path, cards):
    """Really out of memory: the step is saved first, and with the advice followed it goes on."""
    model, processor = on_gpu

    def run(eval_batch_size):
        config = iq.TrainConfig(
            output_dir=tmp_path,
            max_steps=4,
            global_batch_size=4,
            micro_batch_size=1,
            eval_steps=2,
            save_steps=4,
            eval_batch_size=eval_batch_size,
        )
        return iq.train(model, processor, cards, cards * 16, config=config)

    with memory_left(140):
        message = r"evaluation after step 2 does not fit .* eval_batch_size \(now 640\)"
        with pytest.raises(torch.OutOfMemoryError, match=message):
            run(640)
        assert iq.latest_checkpoint(tmp_path).name == "checkpoint-2"
        assert run(2).global_step == 4


def test_generation_that_does_not_fit_says_what_to_lower(on_gpu, cards):
    """Really out of memory: the message names the two arguments and their values."""
    model, processor = on_gpu
    prompts = [pokemon_card_example(card).prompt for card in cards * 16]
    message = r"lower batch_size \(now 640\) or max_new_tokens \(now 8\)"
    with memory_left(60), pytest.raises(torch.OutOfMemoryError, match=message):
        iq.generate(model, processor, prompts, batch_size=640, max_new_tokens=8)
    with memory_left(60):
        assert len(iq.generate(model, processor, prompts[:4], max_new_tokens=8)) == 4


@pytest.fixture
def wide():
    """The tiny base on the GPU with adapters of 2.2 million numbers, and its processor."""
    model, processor = iq.tiny.load_model(device="cuda:0")
    lora = peft.LoraConfig(r=256, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
    return iq.add_lora(model, lora), processor


def settings(folder, optim):
    return iq.TrainConfig(
        output_dir=folder,
        max_steps=3,
        global_batch_size=4,
        micro_batch_size=4,
        optim=optim,
        precision="bf16",  # no window is skipped
        load_best_model_at_end=False,
        num_workers=0,
    )


def hoarding(model, window):
    """Take all memory but 1 MiB at the end of a window's backward pass; what holds it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    spare = [torch.empty(2**20, dtype=torch.uint8, device="cuda:0")]
    held, calls = [], [0]

    def accumulated(_):
        calls[0] += 1
        if calls[0] == (window + 1) * len(parameters):
            for size in (2**20, 2**16):  # bytes; the second that of an 8-bit state
                with contextlib.suppress(torch.OutOfMemoryError):
                    while True:
                        held.append(torch.empty(size, dtype=torch.uint8, device="cuda:0"))
            spare.clear()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(accumulated)
    return held


def test_optimizer_states_that_do_not_fit_stop_before_the_first_window(wide, tmp_path, cards):
    """Really out of memory: no weight has moved, and with more of it the run begins."""
    model, processor = wide
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    config = settings(tmp_path, "adamw_torch")  # 18 MB of states
    with (
        memory_left(6),
        pytest.raises(
            torch.OutOfMemoryError, match="the optimizer's state does not fit .*lower rank"
        ),
    ):
        iq.train(model, processor, cards, config=config)
    assert all(torch.equal(adapter_tensors(model)[name], before[name]) for name in before)
    assert iq.train(model, processor, cards, config=config).global_step == 3


def test_the_first_step_needs_no_memory(wide, tmp_path, cards):
    """With 1 MiB left after the first backward pass, the 8-bit optimizer makes its whole step."""
    model, processor = wide
    with memory_left(200):
        held = hoarding(model, window=0)
        config = dataclasses.replace(settings(tmp_path, "paged_adamw_8bit"), max_steps=1)
        blocks = []

        def after_the_step(_):
            blocks.append(len(held))
            held.clear()

        iq.train(model, processor, cards, config=config, on_log=after_the_step)
    assert blocks[0] > 10


def test_an_update_that_does_not_fit_is_not_begun(wide, tmp_path, cards):
    """PyTorch's AdamW, really out of memory: the state before the window is saved, and goes on."""
    model, processor = wide
    config = settings(tmp_path, "adamw_torch")
    with memory_left(200):
        held = hoarding(model, window=2)
        with pytest.raises(torch.OutOfMemoryError, match=r"in window 2 \(rows.*\(step 2\) is kept"):
            iq.train(model, processor, cards, config=config)
        assert held
        held.clear()
    assert iq.latest_checkpoint(tmp_path).name == "checkpoint-2"
    assert iq.train(model, processor, cards, config=config).global_step == 3


def test_generation_is_the_same_batched_and_alone(on_gpu, cards):
    """Left padding and the image mask do not change greedy texts on the GPU."""
    model, processor = on_gpu
    examples = [pokemon_card_example(card) for card in cards[:4]]
    prompts = [example.prompt for example in examples]
    prompts[1] = [prompts[1][0], "Question: What is it? It is one of the cards. Answer:"]
    together = iq.generate(model, processor, prompts, max_new_tokens=12)
    alone = [iq.generate(model, processor, [p], max_new_tokens=12)[0] for p in prompts]
    assert together == alone


def test_a_checkpoint_goes_on_exactly(on_gpu, tmp_path, cards):
    """On the GPU too, a run continued from its checkpoint continues dropout, scale and states."""
    model, processor = on_gpu
    start = copy.deepcopy(adapter_tensors(model))

    def run(folder, steps, resume):
        config = iq.TrainConfig(
            output_dir=tmp_path / folder,
            max_steps=6,
            eval_steps=steps,
            save_steps=steps,
            resume=resume,
            lr_scheduler_type="constant",
        )
        return iq.train(model, processor, cards, cards[:4], config=config)

    run("whole", 3, "never")
    resumed_from = tmp_path / "whole" / "checkpoint-3"
    whole = iq.load_finetuned(tmp_path / "whole" / "checkpoint-6", device="cuda:0")[0]
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(start[name])
    run("resumed", 6, resumed_from)
    resumed = iq.load_finetuned(tmp_path / "resumed" / "checkpoint-6", device="cuda:0")[0]
    torch.testing.assert_close(
        adapter_tensors(resumed), adapter_tensors(whole), rtol=1e-3, atol=1e-5
    )
