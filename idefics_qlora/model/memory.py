"""How much GPU memory a training run will take, from the configuration alone.

Nothing is downloaded but ``config.json``, and nothing is computed: the model is built from tensors
that have shapes and dtypes but no data, the library's own :func:`~idefics_qlora.add_lora` puts the
adapters on, and a pass tells what it takes: the fast way's forward and backward pass, or a forward
pass of the model's own layers under the GPU's autocast rules, of which the tensors count that the
backward pass would keep. So the estimate follows the installed versions of ``transformers``,
``peft`` and ``bitsandbytes`` instead of a formula that would have to be kept in step with them.

    python -m idefics_qlora.model.memory HuggingFaceM4/idefics-9b --text-tokens 200
"""

from __future__ import annotations

import argparse
import copy
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel

# Not public, but what PyTorch's own compiler traces with: tensors that claim to be on a GPU, so
# that autocast and dropout behave as there, without a GPU.
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from idefics_qlora.config import AskedPrecision, Optim, Precision, check_choice, check_whole
from idefics_qlora.families import family_of_config
from idefics_qlora.model.base_weights import BaseWeights, check_base_weights, linear4bit_layers
from idefics_qlora.model.graphs import FastPath
from idefics_qlora.model.loading import load_config
from idefics_qlora.model.memory_fast import MAX_MICRO_BATCH, fast_passes, packed_rows
from idefics_qlora.model.memory_trace import (
    Bytes,
    materialize,
    model_on_meta,
    num_weights,
    quantized_tensors,
    storage_bytes,
    total_bytes,
    traced_forward,
)
from idefics_qlora.model.precision import DTYPES
from idefics_qlora.progress import waiting_for

CARDS = (16, 24, 40, 80)
"""Nominal sizes of common cards in GB."""

CONTEXT_BYTES = 700 * 2**20
"""Outside PyTorch's allocator: the CUDA context and the code of the kernels."""

FRAGMENTATION = 1.05
"""The allocator reserves more than is in use, because freed blocks do not fit what comes next."""

WORKSPACE_BYTES = 2 * 32 * 2**20
"""What cuBLAS allocates through PyTorch for its products on Hopper, for each of two threads or
streams; less on older cards."""

LOSS_BYTES = 12
"""Per logit, while the loss goes back: fp32 log-probabilities and two fp32 gradients of them."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GPU memory of a training run, in bytes; ``print`` it for a table."""

    name: str
    """The checkpoint."""
    text_tokens: int
    """Text tokens per example, the longest of a micro-batch: the others are padded to it."""
    images: int
    """Images per example."""
    micro_batch: int
    """Examples in one forward and backward pass, unless :meth:`peak` is told otherwise."""
    gradient_checkpointing: bool
    """Whether layers are recomputed, unless :meth:`peak` is told otherwise."""
    precision: Precision
    """Arithmetic of forward and backward."""
    fast: bool
    """Whether micro-batches are computed the fast way."""

    quantized_weights: int
    """NF4 weights and their scales."""
    other_weights: int
    """Frozen weights and buffers that are not quantised, in the compute dtype."""
    adapters: int
    """Trainable parameters, fp32."""
    gradients: int
    """Their gradients, fp32."""
    copies: int
    """Copies of the adapters in the compute dtype, which the fast way has."""
    optimizer: int
    """Both moments of AdamW, as if none of them were paged out."""

    kept: Bytes
    """Saved for the backward pass when all activations are kept, and the logits."""
    inputs: Bytes
    """The same with activation checkpointing: the layers' inputs instead of what is inside them."""
    moments: tuple[Bytes, ...]
    """What a pass takes when it may take the most, with all activations kept."""
    moments_recomputed: tuple[Bytes, ...]
    """The same with activation checkpointing."""

    @property
    def static(self) -> int:
        """Bytes in use whatever the micro-batch is."""
        weights = self.quantized_weights + self.other_weights + self.adapters
        return weights + self.gradients + self.optimizer + self.copies + WORKSPACE_BYTES

    def activations(self, gradient_checkpointing: bool | None = None) -> Bytes:
        """Bytes that a micro-batch keeps from the forward to the backward pass.

        Args:
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.
        """
        if gradient_checkpointing is None:
            gradient_checkpointing = self.gradient_checkpointing
        return self.inputs if gradient_checkpointing else self.kept

    def peak(
        self, micro_batch: int | None = None, gradient_checkpointing: bool | None = None
    ) -> int:
        """The most bytes in use, to be compared with ``torch.cuda.max_memory_allocated``.

        With ``fast=False``, what exists for a moment only, while the loss or a layer goes back, is
        an upper bound.

        Args:
            micro_batch: Examples in one pass; the estimate's own by default.
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.
        """
        return self.static + self.passing(micro_batch, gradient_checkpointing)

    def passing(
        self, micro_batch: int | None = None, gradient_checkpointing: bool | None = None
    ) -> int:
        """The part of :meth:`peak` that a forward and backward pass takes.

        Args:
            micro_batch: Examples in one pass; the estimate's own by default.
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.
        """
        if micro_batch is None:
            micro_batch = self.micro_batch
        if gradient_checkpointing is None:
            gradient_checkpointing = self.gradient_checkpointing
        moments = self.moments_recomputed if gradient_checkpointing else self.moments
        rows = packed_rows(micro_batch, self.text_tokens) if self.fast else 0
        return max(moment.of(micro_batch, rows) for moment in moments)

    def largest_micro_batch(
        self, card_gb: float, gradient_checkpointing: bool | None = None
    ) -> int:
        """The most examples in one pass for which a card's memory suffices.

        700 MiB are left for the CUDA context, and 5 % of the peak for fragmentation. A GB is
        counted as 10^9 bytes, which allows for what error correction and the driver take.

        Args:
            card_gb: Size of the card in GB.
            gradient_checkpointing: Whether layers are recomputed; the estimate's own by default.

        Returns:
            The number, 0 if not even one example fits; at most 1024.
        """
        available = (card_gb * 10**9 - CONTEXT_BYTES) / FRAGMENTATION
        return bisect_right(
            range(1, MAX_MICRO_BATCH + 1),
            available,
            key=lambda micro_batch: self.peak(micro_batch, gradient_checkpointing),
        )

    def __str__(self) -> str:
        def line(label: str, *cells: str) -> str:
            return f"  {label:<32}" + "".join(f"{cell:>12}" for cell in cells)

        def gib(*numbers: int) -> list[str]:
            return [f"{number / 2**30:.2f}" for number in numbers]

        both = (False, True)
        plural = "" if self.images == 1 else "s"
        lines = [
            f"{self.name}: {self.text_tokens} text tokens and {self.images} image{plural} per "
            f"example, {self.precision}" + ("" if self.fast else ", fast=False"),
            line("weights and optimizer", "GiB"),
            line("4-bit weights", *gib(self.quantized_weights)),
            line(f"other weights ({self.precision})", *gib(self.other_weights)),
            line("adapters (fp32)", *gib(self.adapters)),
            line("their gradients (fp32)", *gib(self.gradients)),
            *([line(f"their copies ({self.precision})", *gib(self.copies))] if self.fast else []),
            line("optimizer", *gib(self.optimizer)),
            line("with cuBLAS' workspace", *gib(self.static)),
            line("activations", "kept", "recomputed"),
            line("per example", *gib(*(self.activations(c).per_example for c in both))),
            line(
                f"peak at micro-batch {self.micro_batch}",
                *gib(*(self.peak(gradient_checkpointing=c) for c in both)),
            ),
            line("largest micro-batch that fits", "kept", "recomputed"),
        ]
        for card in CARDS:
            fitting = [self.largest_micro_batch(card, c) for c in both]
            lines.append(line(f"{card} GB", *(str(number or "none") for number in fitting)))
        return "\n".join(lines)


def estimate_memory(
    checkpoint: str | os.PathLike[str] | PretrainedConfig,
    *,
    text_tokens: int = 100,
    images: int = 1,
    micro_batch: int = 2,
    gradient_checkpointing: bool = False,
    fast: bool = True,
    precision: AskedPrecision = "auto",
    quantize: bool = True,
    base_weights: BaseWeights = "4bit",
    nested_constants: bool = False,
    lora: LoraConfig | Literal["makers"] | None = None,
    train_parts: Sequence[str] = (),
    optim: Optim = "paged_adamw_8bit",
    revision: str | None = None,
) -> MemoryEstimate:
    """Estimate the GPU memory of a training run; neither weights nor a GPU are needed.

    Args:
        checkpoint: Hub id (only its ``config.json`` is fetched), local folder, or configuration.
        text_tokens: Text tokens per example, those of image tokens included.
        images: Images per example; of Idefics2, Idefics3 and SmolVLM their tiles (Idefics2's as
            large as they may be), which, like their tokens, ``preview_batch`` tells for a picture.
            A micro-batch without any is estimated as with one each.
        micro_batch: Examples in one forward and backward pass. The estimate answers for every
            other number as well.
        gradient_checkpointing: Whether layers are recomputed. The estimate answers for both.
        fast: As in ``TrainConfig``: a model that cannot go the fast way is estimated as it is
            computed then, layer by layer.
        precision: As in ``TrainConfig``; ``auto`` for what the makers trained in.
        quantize: As in ``load_model``.
        base_weights: As in ``load_model``.
        nested_constants: Whether the scales of 4-bit weights are quantised themselves, as
            ``load_model`` leaves them where the GPU's memory is short. Otherwise they are in fp32,
            which takes 0.4 GB more for idefics-9b.
        lora: As in ``add_lora``; the recipe's by default.
        train_parts: As in ``add_lora``; what is trained whole counts as adapters.
        optim: As in ``TrainConfig``.
        revision: Branch, tag or commit of a Hub checkpoint.

    Returns:
        The estimate.

    Raises:
        FileNotFoundError: If a local folder, or its ``config.json``, does not exist.
        ValueError: If a value cannot work, or the checkpoint holds another architecture.
    """
    check_whole(text_tokens=text_tokens, micro_batch=micro_batch)
    check_whole(0, images=images)
    check_choice("precision", precision, AskedPrecision)
    check_choice("optim", optim, Optim)
    check_choice("base_weights", base_weights, BaseWeights)
    check_base_weights(base_weights, quantize)
    config = _configuration(checkpoint, revision)
    if precision == "auto":
        precision = family_of_config(config).precision
    dtype = DTYPES[precision]
    with waiting_for("estimating memory"):
        model = model_on_meta(config, dtype, quantize and base_weights == "4bit", lora, train_parts)
        fast = fast and FastPath.why_not(model) is None
        passes = fast_passes if fast else _layer_by_layer
        taken = passes(model, config, dtype, text_tokens, images, nested_constants)
    trainable = [p for p in model.parameters() if p.requires_grad]
    quantized = quantized_tensors(model)
    everything = storage_bytes([*model.parameters(), *model.buffers(), *quantized])
    adapters = total_bytes(storage_bytes(trainable))
    return MemoryEstimate(
        name=getattr(config, "_name_or_path", "") or config.model_type,
        text_tokens=text_tokens,
        images=images,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        fast=fast,
        quantized_weights=total_bytes(storage_bytes(quantized)),
        other_weights=total_bytes(everything) - total_bytes(storage_bytes(quantized)) - adapters,
        adapters=adapters,
        gradients=adapters,
        optimizer=sum(optimizer_bytes(p.numel(), optim) for p in trainable),
        **taken,
    )


def _layer_by_layer(
    model: PeftModel, config: PretrainedConfig, dtype: torch.dtype, text_tokens: int, images: int,
    nested: bool,
) -> dict[str, Any]:  # fmt: skip
    """What passes take through the model's own layers: the fields of an estimate."""
    with FakeTensorMode(), torch.device("cuda"):
        materialize(model, dtype, nested)
        # Two points of a straight line; at 1, some copies would be views.
        two, three = (traced_forward(model, config, n, text_tokens, images, dtype) for n in (2, 3))

    def line(at_two: int, at_three: int) -> Bytes:
        return Bytes(3 * at_two - 2 * at_three, at_three - at_two)

    family = family_of_config(config)
    num_logits = family.vocabulary(config) * (
        family.most_targets(config, text_tokens, images) if family.head_on_targets else text_tokens
    )
    logits, loss = Bytes(0, num_logits * dtype.itemsize), Bytes(0, num_logits * LOSS_BYTES)
    largest = max(range(len(three.inside)), key=three.inside.__getitem__)
    # At most: the gradients of gate, up and their product beside an MLP's weight, dequantised.
    dequantized = (
        max((num_weights(m) for m in linear4bit_layers(model).values()), default=0) * dtype.itemsize
    )
    # At most: an identity (fp32 and cast), the product of the matrices, scaled, and the weight.
    dora = max(
        (
            4 * m.in_features**2 + dtype.itemsize * (m.in_features**2 + 4 * num_weights(m))
            for m in model.modules()
            if getattr(m, "lora_magnitude_vector", None)
        ),
        default=0,
    )
    layer = line(3 * two.largest, 3 * three.largest) + Bytes(max(dequantized, dora), 0)
    recomputed = line(two.inside[largest], three.inside[largest])
    kept = line(two.kept, three.kept) + logits
    inputs = line(two.inputs, three.inputs) + logits
    return {
        "copies": 0,
        "kept": kept,
        "inputs": inputs,
        "moments": (kept + loss, kept + layer),
        "moments_recomputed": (inputs + loss, inputs + layer + recomputed),
    }


def _configuration(
    checkpoint: str | os.PathLike[str] | PretrainedConfig, revision: str | None
) -> PretrainedConfig:
    if isinstance(checkpoint, PretrainedConfig):
        return copy.deepcopy(checkpoint)  # building a model writes into its configuration
    return load_config(checkpoint, revision)[1]


def optimizer_bytes(number: int, optim: str) -> int:
    """Both moments of AdamW for a tensor of so many elements."""
    if optim == "adamw_torch" or number < 4096:
        return 8 * number
    return 2 * (number + 4 * -(-number // 256))  # 8 bits each, and a scale for each block of 256


def add_arguments(parser: Any) -> None:
    """Give a parser the arguments of :func:`estimate_memory`."""
    parser.add_argument("checkpoint", help="Hub id or local folder")
    parser.add_argument("--text-tokens", type=int, default=100, help="per example")
    parser.add_argument("--images", type=int, default=1, help="per example")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument(
        "--slow", dest="fast", action="store_false", help="through the model's own layers"
    )
    parser.add_argument("--precision", choices=get_args(AskedPrecision), default="auto")
    parser.add_argument(
        "--no-quantize", dest="quantize", action="store_false", help="a base in 16 bits"
    )
    parser.add_argument("--base-weights", choices=get_args(BaseWeights), default="4bit")
    parser.add_argument("--lora", choices=["makers"], help="their recipe; left out: the usual one")
    parser.add_argument(
        "--train-parts", nargs="+", default=[], help="trained whole, such as 'vision tower'"
    )
    parser.add_argument("--revision", help="of a Hub checkpoint")


def main(arguments: list[str] | None = None) -> MemoryEstimate:
    """Print the table of a checkpoint; returns the estimate."""
    parser = argparse.ArgumentParser(
        prog="python -m idefics_qlora.model.memory", description=(__doc__ or "").splitlines()[0]
    )
    add_arguments(parser)
    estimate = estimate_memory(**vars(parser.parse_args(arguments)))
    print(estimate)
    return estimate


if __name__ == "__main__":
    main()
