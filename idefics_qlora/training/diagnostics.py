"""Catching training that only looks fine: dead adapters, wrong labels, a model that does not look.

Shapes: B examples, T tokens, N images per example, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.config import LossOn, TrainConfig, check_whole
from idefics_qlora.data.batches import IGNORE, Batch, Collator, Tokens
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.windows import RowReader, Rows, Window
from idefics_qlora.evaluation.generation import generate_from_tokens
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.images.opening import write_png
from idefics_qlora.model import loading as models
from idefics_qlora.model.loss import summed_cross_entropy
from idefics_qlora.process import advising
from idefics_qlora.training.optim import lr_at

logger = logging.getLogger(__name__)

Fields = Callable[[str], Mapping[str, str]]
"""Reads what a text states: field to value."""


class DeadAdapters(RuntimeError):
    """A whole part of the model learns nothing; the message names it and what to do."""


@dataclass(frozen=True)
class Coverage:
    """Which adapters a step's gradient reached."""

    modules: dict[str, bool]
    """Each adapted module, and whether any of its tensors got a gradient that is not zero."""

    def dead_parts(self) -> list[str]:
        """Parts of the model none of whose adapters got a gradient."""
        reached = {models.part_of(name) for name, alive in self.modules.items() if alive}
        return sorted({models.part_of(name) for name in self.modules} - reached)

    def dead_modules(self) -> list[str]:
        """Modules that got no gradient."""
        return [name for name, alive in self.modules.items() if not alive]

    def __str__(self) -> str:
        every = Counter(map(models.part_of, self.modules))
        alive = Counter(models.part_of(name) for name, alive in self.modules.items() if alive)
        parts = (f"{part} {alive[part]} of {every[part]}" for part in sorted(every))
        return f"adapters with a gradient: {', '.join(parts)}"


def gradient_coverage(parameters: Mapping[str, Parameter]) -> Coverage | None:
    """Which adapted modules have a gradient; ``None`` if it is not finite and tells nothing.

    One of a module's matrices is enough: while ``lora_B`` is zero, ``lora_A`` has none.

    Args:
        parameters: The model's parameters by name, with their gradients; all but LoRA matrices are
            passed over. A frozen matrix counts as one without gradient.
    """
    parameters = {name: p for name, p in parameters.items() if ".lora_" in name}
    if not parameters:
        return Coverage({})
    with_gradient = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not with_gradient:
        return Coverage({module_of(name): False for name in parameters})
    norms = torch.stack(torch._foreach_norm(list(with_gradient.values())))
    sizes = dict(zip(with_gradient, norms.tolist(), strict=True))  # sync
    if not all(np.isfinite(list(sizes.values()))):
        return None
    modules: dict[str, bool] = {}
    for name in parameters:
        module = module_of(name)
        modules[module] = modules.get(module, False) or sizes.get(name, 0.0) > 0.0
    return Coverage(modules)


def module_of(parameter: str) -> str:
    """Name of the adapted module that a trainable parameter belongs to."""
    return parameter.partition(".lora_")[0].removeprefix("base_model.model.")


def check_coverage(coverage: Coverage, allowed: Sequence[str]) -> None:
    """Tell the coverage of the first step.

    Raises:
        DeadAdapters: If a part has adapters and none of them got a gradient.
    """
    dead = [part for part in coverage.dead_parts() if part not in allowed]
    if dead:
        names = [name for name in coverage.dead_modules() if models.part_of(name) in dead]
        raise DeadAdapters(
            f"no adapter of the {' and the '.join(dead)} got a gradient in the first step "
            f"({coverage}; such as {names[0]}): that part would learn nothing. Usual causes: "
            "peft.prepare_model_for_kbit_training or reentrant gradient checkpointing (leave both "
            "to this library), requires_grad switched off, rows whose pictures the words do not "
            f"see; if it is meant, allow_dead_parts={tuple(dead)!r}"
        )
    if names := coverage.dead_modules():
        logger.warning("%s; without: %s", coverage, ", ".join(names[:5]))
    else:
        logger.info("%s", coverage)


def weight_marks(parameters: Mapping[str, Parameter]) -> Tensor:
    """Two numbers for each tensor that change when it does, on the device, (2, parameters)."""
    with torch.no_grad():
        tensors = [p.detach() for p in parameters.values()]
        return torch.stack(
            [torch.stack(torch._foreach_norm(tensors, 1)), torch.stack([t.sum() for t in tensors])]
        )


def unmoved_modules(parameters: Mapping[str, Parameter], before: Tensor) -> list[str]:
    """Adapted modules none of whose tensors changed since ``before`` was taken."""
    moved = (weight_marks(parameters) != before).any(dim=0).tolist()  # sync
    modules: dict[str, bool] = {}
    for name, has_moved in zip(parameters, moved, strict=True):
        if ".lora_" not in name:
            continue
        module = module_of(name)
        modules[module] = modules.get(module, False) or has_moved
    return [name for name, has_moved in modules.items() if not has_moved]


LEAST_PROGRESS = 1e-3
"""Share of the loss; a run that cannot lower it by more has too small a learning rate."""


def too_small_a_rate(
    loss: float, grad_norm: float, numbers: int, config: TrainConfig, total_steps: int
) -> str | None:
    """What to say of a learning rate with which nothing moves; ``None`` if it is large enough.

    A step of AdamW moves a number by about the learning rate. To first order a run therefore lowers
    the loss by at most the sum of its rates times the gradient's L1 norm, and that is at most its
    L2 norm times the root of how many numbers there are.

    Args:
        loss: Of the first step's window.
        grad_norm: L2 norm of its whole gradient, before clipping.
        numbers: Trainable ones.
        config: Gives the learning rate.
        total_steps: Optimizer steps of the run.
    """
    reach = sum(lr_at(step, total_steps, config) for step in range(total_steps))
    progress = reach * grad_norm * numbers**0.5
    if progress >= LEAST_PROGRESS * loss:
        return None
    return (
        f"learning_rate={config.learning_rate:g} is so small that nothing moves: in {total_steps} "
        f"steps no weight goes further than about {reach:.1g}, which lowers the loss of "
        f"{loss:.4g} by {progress:.1g} at most; LoRA is mostly trained with 1e-5 to 1e-3"
    )


def check_labels(window: Window, collator: Collator, name: str = "train_rows") -> str:
    """Look at the labels and the image mask of a window.

    Args:
        window: The first window of a run, on the CPU.
        collator: Made it.
        name: What to call the rows.

    Returns:
        A line with the shares of targets.

    Raises:
        ValueError: If a row has no target, padding or image tokens are targets, or a word behind
            an image does not see it; the message names the row.
    """
    batch = window.batch
    if batch is None:
        return "no row of the first window could be read"
    is_target = batch.labels != IGNORE
    is_token = batch.attention_mask.bool()
    never = torch.isin(batch.input_ids, collator.never_target)
    sees = batch.image_attention_mask.any(dim=2)  # (B, T)
    behind_image = (batch.input_ids == collator.image_id).cumsum(1) > 0
    ends = torch.isin(batch.labels, torch.tensor(collator.end_ids)).any(dim=1)
    faults = {
        "has no target token: nothing of it would be learnt": ~is_target.any(dim=1),
        "has padding among its targets: it would learn to pad": (is_target & ~is_token).any(dim=1),
        "has image or begin tokens among its targets": (is_target & never & is_token).any(dim=1),
        "has other labels than its tokens": (
            (batch.labels != batch.input_ids) & is_target
        ).any(dim=1),
        "has words behind an image that do not see it": (
            behind_image & is_token & ~sees
        ).any(dim=1),
    }  # fmt: skip
    for fault, rows in faults.items():
        if rows.any():
            row = window.batch_rows[int(rows.nonzero()[0])]
            raise ValueError(
                f"{name}[{row}] {fault} ({int(rows.sum())} of {len(rows)} rows of the first "
                "window): look at it with idefics_qlora.preview_batch"
            )
    share = is_target.sum() / is_token.sum()
    line = (
        f"labels of the first window: {share:.0%} of {int(is_token.sum())} tokens are learnt, "
        f"{int((~is_token).sum())} are padding"
    )
    if not ends.all():
        rows = [window.batch_rows[i] for i in (~ends).nonzero().flatten().tolist()]
        logger.warning(
            "%s[%d] and %d more of the first window learn no end token, because max_length cuts "
            "them: the model will not learn there when to stop",
            *(name, rows[0], len(rows) - 1),
        )
    return line


LEAST_GAIN = 0.01
"""Nats per target token that the own picture must be worth."""
LEAST_GAIN_SHARE = 0.02
"""The same as a share of the loss with another row's picture; the larger of the two counts."""
LEVEL = 0.01 / 50
"""Chance at which one evaluation may take a model that does not look for one that does, so that it
is below 1 % over the fifty evaluations of a run."""


@dataclass(frozen=True)
class ImageUse:
    """How much a model's answers depend on the pictures."""

    num_rows: int
    loss: dict[str, float]
    """Per target token in nats, with each row's ``own`` picture, ``another`` row's, a ``blank``."""
    gain: tuple[float, float, float]
    """Loss with another row's picture minus loss with the own one, and its 95 % confidence
    interval, over rows paired with themselves."""
    gain_over_blank: tuple[float, float, float]
    """The same with a blank picture."""
    fields: dict[str, dict[str, float]]
    """For each field of generated texts, the share of rows with the right value, with the ``own``
    and with ``another`` row's picture."""
    p_value: float
    """Bound on the chance of such a gain in a model that does not look."""

    @property
    def looks(self) -> bool:
        """Whether the gain is beyond chance and large enough to matter.

        Beyond chance: ``p_value`` is at most 0.0002, so that of the models that do not look fewer
        than 1 % are taken for one that does in any of fifty evaluations. Large enough: at least
        0.01 nats per target token, and 2 % of the loss with another row's picture.
        """
        return self.p_value <= LEVEL and self.gain[0] >= self._least_gain

    @property
    def _least_gain(self) -> float:
        return max(LEAST_GAIN, LEAST_GAIN_SHARE * self.loss["another"])

    def __str__(self) -> str:
        own, another, blank = (self.loss[kind] for kind in ("own", "another", "blank"))
        losses = (
            f"loss per token {own:.4f} with the own picture, {another:.4f} with another row's "
            f"({self.gain[0]:+.4f}, 95 % between {self.gain[1]:+.4f} and {self.gain[2]:+.4f}), "
            f"{blank:.4f} with a blank one, over {self.num_rows} rows"
        )
        fields = "".join(
            f"; {name} right {share['own']:.0%}, with another picture {share['another']:.0%}"
            for name, share in self.fields.items()
        )
        counts = f"; a gain counts from {self._least_gain:+.4f} on"
        if self.looks:
            verdict, counts = "This model looks at the pictures", ""
        elif self.p_value > LEVEL and self.gain[2] >= self._least_gain:
            verdict = f"{self.num_rows} rows cannot tell whether this model looks at the pictures"
        elif self.gain[1] > 0:
            verdict = (
                "This model hardly looks at the pictures, they are worth next to nothing to it"
            )
        else:
            verdict = (
                "This model does not look at the pictures, it answers as well with those of others"
            )
        return f"{verdict}: {losses}{counts}{fields}"


def image_use(
    model: models.Model,
    processor: models.Processor,
    rows: Rows,
    *,
    to_example: ToExample | None = None,
    fields: Fields | None = None,
    max_rows: int = 256,
    batch_size: int = 8,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    max_new_tokens: int = 50,
    seed: int = 0,
    access: ImageAccess = DEFAULT_ACCESS,
) -> ImageUse:
    """Measure whether a model uses the pictures, or would say the same without.

    Every row's loss is taken with its own picture, with another row's, and with a blank one. The
    pictures are exchanged by a permutation without fixed point that depends on ``seed`` alone, and
    no random generator is touched.

    Args:
        model: The base, or the base with an adapter.
        processor: The base's processor.
        rows: Held-out rows; those without a picture are passed over, as are bad ones.
        to_example: As in ``train``.
        fields: Reads a text's fields, to compare generated texts with the completions. ``None``:
            nothing is generated.
        max_rows: Rows to use at most, from the first.
        batch_size: Examples in one forward pass.
        loss_on: Which text tokens are targets.
        max_length: Text tokens of an example at most.
        max_new_tokens: Tokens of a generated text at most.
        seed: Decides which pictures are exchanged, and the confidence interval's resampling.
        access: As in ``train``.

    Returns:
        The losses, their paired differences, and the fields' shares of right values.

    Raises:
        TypeError: If model and processor are swapped.
        ValueError: If fewer than two rows have a picture.
    """
    models.check_model_and_processor(model, processor)
    check_whole(max_rows=max_rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    collator = Collator(processor, loss_on, models.num_embeddings(model), max_length, access)
    reader = RowReader(rows, "rows", to_example, collator)
    reader.need_length()
    read: list[tuple[int, Tokens, list[Tensor]]] = []
    for index in range(min(max_rows, len(reader))):
        try:
            row = reader.read(index)
        except ValueError as error:
            logger.warning("left out: %s", error)
            continue
        if row[1]:
            read.append((index, *row))
    if len(read) < 2:
        raise ValueError(f"{len(read)} of {len(reader)} rows have a picture: expected two or more")
    rng = np.random.default_rng(seed)
    tokens = [row_tokens for _, row_tokens, _ in read]
    own = [pixels for *_, pixels in read]
    pictures = {"own": own, "another": _exchanged(own, rng), "blank": _blank(own, collator)}
    with advising("the comparison of pictures", batch_size=batch_size):
        losses = {
            kind: _losses(model, collator, tokens, shown, batch_size)
            for kind, shown in pictures.items()
        }  # each (rows, 2): summed loss and number of targets
    groups = _groups(own)
    draws = rng.integers(groups.max() + 1, size=(2000, groups.max() + 1))
    counts = np.bincount(groups, losses["own"][:, 1])

    def differences(kind: str) -> np.ndarray:
        return np.bincount(groups, losses[kind][:, 0] - losses["own"][:, 0])

    def gain(kind: str) -> tuple[float, float, float]:
        difference = differences(kind)
        means = difference[draws].sum(1) / counts[draws].sum(1)  # bootstrap over groups of rows
        low, high = np.quantile(means, [0.025, 0.975])
        return float(difference.sum() / counts.sum()), float(low), float(high)

    shares: dict[str, dict[str, float]] = {}
    if fields is not None:
        examples = [reader.example(reader.rows[index]) for index, *_ in read]  # type: ignore[index]
        prompts = collator.prompt_tokens([example.prompt for example in examples])
        expected = [fields(example.completion) for example in examples]
        # A max_length may have cut off turns with pictures; the prompt to generate from has all.
        whole = [collator.pixels(example.prompt) for example in examples]
        shown = {"own": whole, "another": _exchanged(whole, np.random.default_rng(seed))}
        for kind, kinds_pictures in shown.items():
            texts = generate_from_tokens(
                model, collator, prompts, kinds_pictures, batch_size, max_new_tokens
            )
            said = [fields(text) for text in texts]
            for name in dict.fromkeys(name for row in expected for name in row):
                pairs = [(a[name], b.get(name)) for a, b in zip(expected, said, strict=True)
                         if name in a]  # fmt: skip
                shares.setdefault(name, {})[kind] = sum(a == b for a, b in pairs) / len(pairs)
    return ImageUse(
        num_rows=len(read),
        loss={kind: float(sums[:, 0].sum() / sums[:, 1].sum()) for kind, sums in losses.items()},
        gain=gain("another"),
        gain_over_blank=gain("blank"),
        fields=shares,
        p_value=chance_of(differences("another")),
    )


def chance_of(differences: np.ndarray) -> float:
    """Bound on the chance that a model that does not look gains as much by the own pictures.

    To such a model a row's own picture and another's are exchangeable, so each difference of losses
    is as likely to be positive as negative, however heavy its tails. The sum of such differences,
    divided by the root of the sum of their squares, exceeds any bound at most 3.178 times as often
    as a normal variable does (Bentkus and Dzindzalieta, A tight Gaussian bound for weighted sums of
    Rademacher random variables, Bernoulli 21, 2015). At least 15 differences are needed to reach
    the level that is asked for.

    Args:
        differences: Loss with another's picture minus loss with the own one, of independent rows.
    """
    size = math.sqrt(np.square(differences).sum())
    normal = 0.5 * math.erfc(differences.sum() / size / math.sqrt(2)) if size else 1.0
    return min(1.0, 3.178 * normal)


def _groups(own: list[list[Tensor]]) -> np.ndarray:
    """Number of each row's group: rows that share a picture are no independent witnesses."""
    groups = np.arange(len(own))
    first: dict[bytes, int] = {}
    for row, pixels in enumerate(own):
        for picture in pixels:
            other = first.setdefault(sha256(picture.numpy().tobytes()).digest(), row)
            groups[groups == groups[row]] = groups[other]
    return np.unique(groups, return_inverse=True)[1]


def _exchanged(own: list[list[Tensor]], rng: np.random.Generator) -> list[list[Tensor]]:
    """Each row with other pictures than its own, as many as it has, of the rows that follow."""
    order = rng.permutation(len(own)).tolist()
    exchanged: dict[int, list[Tensor]] = {}
    for place, row in enumerate(order):
        others: list[Tensor] = []
        for other in order[place + 1 :] + order[:place]:
            # Rows may share a picture: several questions about it.
            others += [p for p in own[other] if not any(torch.equal(p, mine) for mine in own[row])]
            if len(others) >= len(own[row]):
                break
        if not others:
            raise ValueError("all rows show the same pictures: there is nothing to exchange")
        exchanged[row] = [others[n % len(others)] for n in range(len(own[row]))]
    return [exchanged[row] for row in range(len(own))]


def _blank(own: list[list[Tensor]], collator: Collator) -> list[list[Tensor]]:
    grey = collator.pixel_mean.round().to(torch.uint8)  # about 0 when normalised
    picture = grey[:, None, None].expand(3, collator.side, collator.side)
    return [[picture] * len(pixels) for pixels in own]


def _losses(
    model: models.Model,
    collator: Collator,
    tokens: Sequence[Tokens],
    pixels: Sequence[Sequence[Tensor]],
    batch_size: int,
) -> np.ndarray:
    device = next(model.parameters()).device
    sums = []
    with models.evaluation_mode(model):
        for start in range(0, len(tokens), batch_size):
            part = slice(start, start + batch_size)
            batch: Batch = collator.collate(tokens[part], pixels[part]).to(device)
            logits = model(**batch.inputs(), use_cache=False).logits
            for row_logits, labels in zip(logits, batch.labels, strict=True):
                loss = summed_cross_entropy(row_logits[None], labels[None])
                sums.append(torch.stack([loss, (labels[1:] != IGNORE).sum()]))
    return torch.stack(sums).double().cpu().numpy()  # sync


class EvalSamples:
    """The same few held-out rows, captioned at every evaluation.

    Args:
        reader: The held-out rows.
        number: Rows to caption, from the first that can be read.
        folder: The run's folder; the pictures go to ``eval_samples`` in it, as the model sees them.
    """

    MAX_NEW_TOKENS = 64

    def __init__(self, reader: RowReader, number: int, folder: Path) -> None:
        self.collator = reader.collator
        self.rows: list[dict[str, Any]] = []
        self.pixels: list[list[Tensor]] = []
        prompts = []
        for index in range(len(reader)):
            if len(self.rows) == number:
                break
            try:
                example = reader.example(reader.rows[index])  # type: ignore[index]
                pixels = self.collator.pixels(example.prompt)
            except Exception:
                continue  # it is noted when its batch is evaluated
            files = [f"eval_samples/row-{index}-image-{n}.png" for n in range(len(pixels))]
            for file, image in zip(files, pixels, strict=True):
                write_png(image, folder / file)
            name = f"{reader.name}[{index}]"
            self.rows.append({"row": name, "images": files, "target": example.completion})
            self.pixels.append(pixels)
            prompts.append(example.prompt)
        self.tokens = self.collator.prompt_tokens(prompts)

    def caption(self, model: models.Model, batch_size: int) -> list[dict[str, Any]]:
        """For each row its name, its pictures' files, the text to be said, and what is said."""
        texts = generate_from_tokens(
            model, self.collator, self.tokens, self.pixels, batch_size, self.MAX_NEW_TOKENS
        )
        return [{**row, "text": text} for row, text in zip(self.rows, texts, strict=True)]
