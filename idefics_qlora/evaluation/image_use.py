"""Whether a model looks at the pictures, or would say the same without.

Shapes: B examples, T tokens, N images per example, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from idefics_qlora.config import LossOn, check_whole
from idefics_qlora.data.batches import IGNORE, Batch, Collator, Tokens
from idefics_qlora.data.example import ToExample
from idefics_qlora.data.rows import RowReader, Rows
from idefics_qlora.data.templates import trained_captions
from idefics_qlora.evaluation.generation import generate_from_tokens
from idefics_qlora.families import check_model_and_processor, family_of
from idefics_qlora.families.family import Model, Processor
from idefics_qlora.images.access import DEFAULT_ACCESS, ImageAccess
from idefics_qlora.model.loss import predictions
from idefics_qlora.model.precision import evaluation_mode
from idefics_qlora.notices import advising
from idefics_qlora.progress import Counting, counting

logger = logging.getLogger(__name__)


Fields = Callable[[str], Mapping[str, str]]
"""Reads what a text states: field to value."""


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
    model: Model,
    processor: Processor,
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
        to_example: As in ``evaluate``.
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
    check_model_and_processor(model, processor)
    check_whole(max_rows=max_rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    collator = Collator(
        processor, loss_on, family_of(model).num_embeddings(model), max_length, access
    )
    reader = RowReader(rows, "rows", to_example, collator, trained=trained_captions(model))
    reader.need_length()
    read: list[tuple[int, Tokens, list[Tensor]]] = []
    number = min(max_rows, len(reader))
    with counting("reading rows", number, "rows") as counted:
        for index in range(number):
            counted.advance()
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
    with (
        advising("the comparison of pictures", batch_size=batch_size),
        counting("comparing pictures", len(pictures) * len(read), "rows") as counted,
    ):
        losses = {
            kind: _losses(model, collator, tokens, shown, batch_size, counted)
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
            placed = list(map(collator.placed, prompts, kinds_pictures))
            with counting("generating", len(placed), "texts") as counted:
                texts = generate_from_tokens(
                    *(model, collator, placed, kinds_pictures, batch_size, max_new_tokens),
                    counted.note,
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
    return [[collator.reader.blank(image) for image in pixels] for pixels in own]


def _losses(
    model: Model,
    collator: Collator,
    tokens: Sequence[Tokens],
    pixels: Sequence[Sequence[Tensor]],
    batch_size: int,
    counted: Counting,
) -> np.ndarray:
    device = next(model.parameters()).device
    sums = []
    with evaluation_mode(model):
        for start in range(0, len(tokens), batch_size):
            part = slice(start, start + batch_size)
            # Another picture may have another number of tokens.
            placed = list(map(collator.placed, tokens[part], pixels[part]))
            batch: Batch = collator.collate(placed, pixels[part]).to(device)
            losses = predictions(model, batch).by_example(len(batch.labels))
            sums.append(torch.stack([losses, (batch.labels[:, 1:] != IGNORE).sum(1)], dim=1))
            counted.advance(len(losses))
    return torch.cat(sums).double().cpu().numpy()  # sync
