"""Train the idefics-9b architecture at full size, with random weights and no download.

    python benchmarks/full_size.py                    # ten steps of the recipe; needs a CUDA GPU
    python benchmarks/full_size.py --architecture small   # the same code at toy size, on a CPU too

Every linear layer is made and quantised on the device, one at a time, so the fp16 model never
exists as a whole. The gates of the cross-attention are set to 1 (``alpha_initializer="ones"``);
closed, as a fresh configuration has them, the images would be without effect. Loss values of random
weights mean nothing beyond being finite and falling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text

import idefics_qlora as iq
from idefics_qlora.families import FAMILIES
from idefics_qlora.machine import library_versions
from idefics_qlora.model.precision import set_compute_dtype
from idefics_qlora.training.result import peak_memory_bytes

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "9b": {
        "vocab_size": 32000,
        "additional_vocab_size": 2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "cross_layer_interval": 4,
        "vision_config": {
            "embed_dim": 1280,
            "image_size": 224,
            "patch_size": 14,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 64,
            "resampler_depth": 6,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "qk_layer_norms_perceiver": True,
        },
    },
    "small": {
        "vocab_size": 1000,
        "additional_vocab_size": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "vision_config": {
            "embed_dim": 128,
            "image_size": 56,
            "patch_size": 14,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
    },
}
ARCHITECTURES["80b"] = {
    **ARCHITECTURES["9b"],
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def configuration(architecture: str) -> IdeficsConfig:
    """The configuration of an architecture, its gates open."""
    return IdeficsConfig(
        **ARCHITECTURES[architecture],
        use_resampler=True,
        qk_layer_norms=True,
        alpha_type="float",
        alpha_initializer="ones",
    )


def random_4bit_model(config: IdeficsConfig, device: torch.device) -> IdeficsForVisionText2Text:
    """The model with random weights, NF4 like ``load_model`` makes it, built on the device."""
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config)
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: torch.Size, std: float = 0.02) -> torch.Tensor:
        weight = torch.empty(shape, dtype=torch.float16, device=device)
        return weight.normal_(std=std, generator=generator)

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(
            part in name for part in FAMILIES["idefics"].not_quantized
        ):
            quantised = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.float16,
                quant_type="nf4",
                device="meta",
            )
            weight = normal(module.weight.shape)
            quantised.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", module=quantised
            ).to(device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised)
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        if "alpha" in child or ("norm" in parent.lower() and child == "weight"):
            value = torch.ones(parameter.shape, dtype=torch.float16, device=device)
        elif child == "bias":
            value = torch.zeros(parameter.shape, dtype=torch.float16, device=device)
        else:
            value = normal(parameter.shape)
        setattr(module, child, nn.Parameter(value, requires_grad=False))
    fresh_buffers(model, device)
    # transformers sets this on loading; without it peft takes its adapter for unquantised layers.
    model.is_loaded_in_4bit = True
    set_compute_dtype(model, torch.float16)
    return model.eval()


def fresh_buffers(model: nn.Module, device: torch.device) -> None:
    """Fill the buffers that ``__init__`` computed on the meta device."""
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.num_positions, device=device)[None]
        if hasattr(module, "inv_freq"):
            inv_freq, _ = module.compute_default_rope_parameters(module.config)
            module.inv_freq = inv_freq.to(device)
            module.original_inv_freq = inv_freq.clone().to(device)


def example_rows(processor: Any, number: int, num_tokens: int) -> list[iq.Example]:
    """Cards with a text of about ``num_tokens`` tokens each."""
    tokenizer = processor.tokenizer
    rows = []
    for card in iq.tiny.creature_cards(number, seed=0):
        ids = tokenizer(f"This is {card['name']}. " + card["caption"] * 20)["input_ids"]
        text = tokenizer.decode(ids[: num_tokens - 20], skip_special_tokens=True)
        prompt = [card["image"], "Question: What's on the picture? Answer:"]
        rows.append(iq.Example(prompt, " " + text))
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Build, train, print one line per step and a summary; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="9b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--num-tokens", type=int, default=100, help="text tokens per example")
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default="fp16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--num-workers", type=int, default=2)
    options = parser.parse_args(arguments)

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    config = configuration(options.architecture)
    base = random_4bit_model(config, device)
    _, processor = iq.tiny.load_model(device="cpu")
    processor.image_processor.size = {
        "height": config.vision_config.image_size,
        "width": config.vision_config.image_size,
    }
    model = iq.add_lora(base)
    built = time.perf_counter() - started
    weights = peak_memory_bytes(device)

    rows = example_rows(processor, 2 * options.global_batch_size, options.num_tokens)
    times: list[float] = []

    def on_log(record: dict[str, float]) -> None:
        times.append(time.perf_counter())
        print(
            f"step {record['step']:3d}  loss {record['loss']:.4f}  "
            f"grad norm {record['grad_norm']:.4f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        result = iq.train(
            model,
            processor,
            rows,
            config=iq.TrainConfig(
                output_dir=folder,
                max_steps=options.steps,
                global_batch_size=options.global_batch_size,
                micro_batch_size=options.micro_batch_size,
                precision=options.precision,
                gradient_checkpointing=options.gradient_checkpointing,
                num_workers=options.num_workers,
                logging_steps=1,
                save_steps=options.steps,
                load_best_model_at_end=False,
            ),
            on_log=on_log,
        )
    # The first steps load kernels and fill caches; the rest is timed step by step.
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times[1:]))
    losses = [record["loss"] for record in result.log_history if "loss" in record]
    tokens = result.metrics["train_tokens_per_second"] / result.metrics["train_samples_per_second"]
    summary = {
        "architecture": options.architecture,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "precision": options.precision,
        "micro_batch_size": options.micro_batch_size,
        "global_batch_size": options.global_batch_size,
        "gradient_checkpointing": options.gradient_checkpointing,
        "text_tokens_per_example": round(tokens, 1),
        "seconds_to_build": round(built, 1),
        "seconds_per_step": seconds,
        "examples_per_second": options.global_batch_size / seconds,
        "tflops": result.metrics["total_flos"] / options.steps / seconds / 1e12,
        "gib_peak_while_building": weights / 2**30,
        "gib_peak_while_training": result.metrics["peak_memory_bytes"] / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "skipped_windows": result.metrics["skipped_windows"],
        "versions": library_versions(),
    }
    print(json.dumps(summary, indent=2))
    return summary


if __name__ == "__main__":
    main()
