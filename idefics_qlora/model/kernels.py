"""Triton kernels of the fast path; without Triton, or on a CPU, nothing here is used.

Past 400 lines: each kernel stands beside the function that launches it.

Each works on any floating dtype, computes in fp32 and rounds once. M rows (tokens of all examples),
D width, H heads, K input and N output features of a linear layer.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, a CPU-only installation
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on a CPU too: for tests."""
OPTIONS = {"enable_fp_fusion": True}
"""What kernels are compiled with, where a launch says nothing else. Triton's default of it changes
with 3.10."""


def usable(tensor: Tensor) -> bool:
    """Whether these kernels run on the tensor's device; one without data stands for a GPU's."""
    return triton is not None and (tensor.is_cuda or INTERPRETED or isinstance(tensor, FakeTensor))


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    # Tensors without data (estimates of memory and work) need no arithmetic.
    if not any(isinstance(arg, FakeTensor) for arg in args):
        kernel[grid](*args, **{**OPTIONS, **options})


if triton is not None:

    @triton.jit
    def _dequantize(
        packed, absmax, code, absmax_code, absmax_scale, absmax_offset, out, blocks,
        NESTED: tl.constexpr, HALF: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # one block of the quantisation each
        inside = row < blocks
        if NESTED:
            level = tl.load(absmax + row, mask=inside, other=0).to(tl.int32)
            scale = tl.load(absmax_code + level)
            scale = scale * tl.load(absmax_scale + row // NESTED_BLOCK, mask=inside, other=0.0)
            scale = scale + tl.load(absmax_offset)
        else:
            scale = tl.load(absmax + row, mask=inside, other=0.0)
        column = tl.arange(0, HALF)
        at = row[:, None].to(tl.int64) * HALF + column[None, :]
        byte = tl.load(packed + at, mask=inside[:, None], other=0).to(tl.int32)
        first = tl.load(code + (byte >> 4)) * scale[:, None]
        second = tl.load(code + (byte & 15)) * scale[:, None]
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))
        column = tl.arange(0, 2 * HALF)
        at = row[:, None].to(tl.int64) * (2 * HALF) + column[None, :]
        tl.store(out + at, both.to(out.dtype.element_ty), mask=inside[:, None])

    @triton.jit(do_not_specialize=["stream"])
    def _drop(x, out, seed, stream, threshold, scale, number, GROUPS: tl.constexpr):
        # Eight elements share one Philox call: 16 random bits each.
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        a, b, c, d = tl.randint4x(tl.load(seed) + stream, group)
        words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32, bitcast=True)
        bits = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
        keep = tl.reshape(bits, (GROUPS, 8)) >= threshold
        at = group[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :]
        inside = at < number
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(keep, value * scale, 0.0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm(
        x, residual, weight, bias, total, out, mean, rstd, rows, width, eps,
        LAYER: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        if LAYER:
            middle = tl.sum(value, axis=1) / width
            tl.store(mean + row, middle, mask=row < rows)
            value = tl.where(inside, value - middle[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
        tl.store(rstd + row, scale, mask=row < rows)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        value = value * scale[:, None] * w[None, :]
        if BIAS:
            b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
            value += b[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_backward(
        grad, grad_total, x, weight, mean, rstd, out, rows, width,
        LAYER: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
        if LAYER:
            middle = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            value = tl.where(inside, value - middle, 0.0)
        normed = value * scale
        result = g - normed * (tl.sum(g * normed, axis=1) / width)[:, None]
        if LAYER:
            result -= (tl.sum(g, axis=1) / width)[:, None]
        result *= scale
        if ADD:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0.0)
        value = gate * tl.sigmoid(gate) * up.to(tl.float32)
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_backward(grad, gate_up, out, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        at_gate = row * 2 * width + column
        at_up = at_gate + width
        gate = tl.load(gate_up + at_gate, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at_up, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        to_gate = g * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(out + at_gate, to_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at_up, (g * silu).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _heads(
        q, k, v, out, index, cos, sin, source_length, length,
        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, heads, kv_heads, half,
        INDEX: tl.constexpr, ROTATE: tl.constexpr, BACK: tl.constexpr,
        HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        # Query, key and value of one token side by side into a row of out.
        row = tl.program_id(0)
        part = tl.program_id(1)
        source = row.to(tl.int64)
        if INDEX:
            source = tl.load(index + row)
        present = source >= 0
        source = tl.maximum(source, 0)
        b = source // source_length
        t = source % source_length
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, HALF)[None, :]
        number = tl.where(part == 0, heads, kv_heads)
        before = tl.where(part == 0, 0, heads + (part - 1) * kv_heads)
        inside = (head < number) & (column < half)
        wanted = (head < tl.where(present, number, 0)) & (column < half)
        if part == 0:
            at = q + b * q_b + t * q_t + head * q_h + column
        elif part == 1:
            at = k + b * k_b + t * k_t + head * k_h + column
        else:
            at = v + b * v_b + t * v_t + head * v_h + column
        first = tl.load(at, mask=wanted, other=0.0)
        second = tl.load(at + half, mask=wanted, other=0.0)
        if ROTATE:  # noqa: SIM102
            if part < 2:
                position = (source if BACK else row) % length
                c = tl.load(cos + position * half + column, mask=column < half, other=0.0)
                s = tl.load(sin + position * half + column, mask=column < half, other=0.0)
                if BACK:
                    s = -s
                x = first.to(tl.float32)
                y = second.to(tl.float32)
                first = (x * c - y * s).to(out.dtype.element_ty)
                second = (y * c + x * s).to(out.dtype.element_ty)
        target = out + (row.to(tl.int64) * (heads + 2 * kv_heads) + before) * (half * 2)
        target += head * (2 * half) + column
        tl.store(target, first, mask=inside)
        tl.store(target + half, second, mask=inside)

    @triton.jit
    def _take(x, index, out, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        source = tl.load(index + row)
        at = tl.maximum(source, 0) * width + column
        value = tl.load(x + at, mask=column < tl.where(source >= 0, width, 0), other=0.0)
        tl.store(out + row * width + column, value, mask=inside)

    @triton.jit
    def _cross_entropy(logits, labels, loss, lse, stride, classes, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        largest = -float("inf")
        total = 0.0
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(
                logits + row * stride + column, mask=column < classes, other=-float("inf")
            ).to(tl.float32)
            new = tl.maximum(largest, tl.max(value, axis=0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(value - new), axis=0)
            largest = new
        log_sum = largest + tl.log(total)
        tl.store(lse + row, log_sum)
        target = tl.load(logits + row * stride + tl.maximum(label, 0)).to(tl.float32)
        tl.store(loss + row, tl.where(label >= 0, log_sum - target, 0.0))

    @triton.jit
    def _cross_entropy_backward(logits, labels, lse, scale, stride, classes, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < classes
        label = tl.load(labels + row)
        at = logits + row * stride + column
        value = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
        value = tl.exp(value - tl.load(lse + row)) - tl.where(column == label, 1.0, 0.0)
        value = tl.where(label >= 0, value * tl.load(scale), 0.0)
        tl.store(at, value.to(logits.dtype.element_ty), mask=inside)

    @triton.jit
    def _cast(sources, targets, rows, columns, strides, scales, out, BLOCK: tl.constexpr):
        # One matrix per first index; out is only there for its dtype.
        n = tl.program_id(0)
        width = tl.load(columns + n)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < tl.load(rows + n) * width
        source = tl.load(sources + n).to(tl.pointer_type(tl.float32))
        target = tl.load(targets + n).to(tl.pointer_type(out.dtype.element_ty))
        value = tl.load(source + at, mask=inside, other=0.0) * tl.load(scales + n)
        to = (at // width) * tl.load(strides + n) + at % width
        tl.store(target + to, value.to(out.dtype.element_ty), mask=inside)


def dequantize(weight: Tensor, state: Any, out: Tensor) -> None:
    """Write a packed NF4 or FP4 weight as numbers into ``out`` (N, K), equal to bitsandbytes.

    Args:
        weight: The packed weight.
        state: bitsandbytes' ``QuantState`` of it; N times K is a multiple of its block.
        out: Contiguous.
    """
    blocks = out.numel() // state.blocksize
    rows = max(1, 4096 // state.blocksize)
    nested = state.state2 if state.nested else None
    _launch(
        _dequantize,
        (triton.cdiv(blocks, rows),),
        weight.view(torch.uint8),
        state.absmax,
        state.code,
        nested.code if nested else state.code,
        nested.absmax if nested else state.code,
        state.offset if nested else state.code,
        out,
        blocks,
        NESTED=nested is not None,
        HALF=state.blocksize // 2,
        NESTED_BLOCK=nested.blocksize if nested else 1,
        ROWS=rows,
        enable_fp_fusion=False,  # as bitsandbytes rounds, product and sum one after the other
    )


def can_dequantize(state: Any) -> bool:
    """Whether :func:`dequantize` knows this ``QuantState``."""
    number = 1
    for size in state.shape:
        number *= size
    tables = [state.absmax, state.code]
    if state.nested:
        tables += [state.state2.absmax, state.state2.code, state.offset]
    return number % state.blocksize == 0 and all(t.is_contiguous() for t in tables)


def drop(x: Tensor, seed: Tensor, stream: int, p: float, out: Tensor) -> None:
    """Dropout of ``x`` into ``out`` (it may be ``x``): the same elements for the same seed.

    Args:
        x: Contiguous, any shape.
        seed: int64 (1,), on the device.
        stream: Number of the layer: others draw other elements.
        p: Probability of a zero, in steps of 2**-16; the rest is scaled by 1 / (1 - p).
        out: Contiguous, the shape of ``x``.
    """
    threshold = round(p * 65536)
    groups = 512
    _launch(
        _drop,
        (triton.cdiv(x.numel(), 8 * groups),),
        x,
        out,
        seed,
        stream,
        threshold,
        65536 / max(65536 - threshold, 1),
        x.numel(),
        GROUPS=groups,
    )


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    layer: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalise the last dimension of ``x`` (+ ``residual``), rows contiguous.

    Returns:
        The sum (``x`` itself without ``residual``), the result in ``dtype``, and mean and inverse
        deviation (M,) of each row.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    total = x if residual is None else torch.empty_like(residual)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    statistics = torch.empty(2 if layer else 1, rows, dtype=torch.float32, device=x.device)
    mean, rstd = statistics[0], statistics[-1]
    block = triton.next_power_of_2(width)
    per_program = max(1, 2048 // block)
    _launch(
        _norm, (triton.cdiv(rows, per_program),),
        x, x if residual is None else residual, weight, weight if bias is None else bias, total,
        out, mean, rstd, rows, width, eps,
        LAYER=layer, ADD=residual is not None, BIAS=bias is not None,
        ROWS=per_program, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return total, out, mean, rstd


def norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    layer: bool,
) -> Tensor:  # fmt: skip
    """The gradient of :func:`norm`'s sum; ``grad_total`` is what comes past the norm."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    per_program = max(1, 2048 // block)
    _launch(
        _norm_backward, (triton.cdiv(rows, per_program),),
        grad, grad if grad_total is None else grad_total, x, weight, mean, rstd, out, rows, width,
        LAYER=layer, ADD=grad_total is not None, ROWS=per_program, BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """(M, 2 I), gate and up side by side, to silu(gate) * up (M, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(width))
    _launch(_swiglu, (rows, triton.cdiv(width, block)), gate_up, out, width, BLOCK=block)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient (M, 2 I) of :func:`swiglu`'s input."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty_like(gate_up)
    block = min(2048, triton.next_power_of_2(width))
    _launch(
        _swiglu_backward, (rows, triton.cdiv(width, block)), grad, gate_up, out, width, BLOCK=block
    )
    return out


def heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    back: bool,
) -> Tensor:
    """Query, key and value side by side, the first two rotated: (M, (H + 2 G) D).

    Args:
        q: (B, H, T, D); D is even and the last dimension dense, here and in the others.
        k: (B, G, T, D).
        v: As ``k``.
        index: int64 (M,): which of the B T tokens a row is; negative: zeros. ``None``: all.
        cos: (L, D / 2) fp32; ``None``: nothing is rotated.
        sin: As ``cos``.
        back: Forwards, the row M is at position M mod L. Back, the token is at its own mod L, and
            it is rotated the other way.
    """
    examples, number, length, width = q.shape
    others = k.shape[1]
    rows = examples * length if index is None else len(index)
    out = torch.empty(rows, (number + 2 * others) * width, dtype=q.dtype, device=q.device)
    _launch(
        _heads, (rows, 3), q, k, v, out, out if index is None else index,
        out if cos is None else cos, out if sin is None else sin,
        length, length if cos is None else len(cos),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], number, others, width // 2,
        INDEX=index is not None, ROTATE=cos is not None, BACK=back,
        HEADS=triton.next_power_of_2(number), HALF=triton.next_power_of_2(width // 2),
    )  # fmt: skip
    return out


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (M, D), contiguous, by number; zeros where it is negative."""
    width = x.shape[1]
    out = torch.empty(len(index), width, dtype=x.dtype, device=x.device)
    block = min(2048, triton.next_power_of_2(width))
    _launch(_take, (len(index), triton.cdiv(width, block)), x, index, out, width, BLOCK=block)
    return out


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log of the sum of exponentials, fp32 (M,) each; label -100: no loss.

    ``logits`` (M, V), its rows dense; ``labels`` int64 (M,).
    """
    rows, classes = logits.shape
    result = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    block = min(4096, triton.next_power_of_2(classes))
    _launch(
        _cross_entropy,
        (rows,),
        logits,
        labels,
        result[0],
        result[1],
        logits.stride(0),
        classes,
        BLOCK=block,
        num_warps=8,
    )
    return result[0], result[1]


def cross_entropy_backward(logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor) -> None:
    """Overwrite the logits with their gradient times ``scale`` (fp32 (1,))."""
    rows, classes = logits.shape
    block = min(4096, triton.next_power_of_2(classes))
    _launch(
        _cross_entropy_backward,
        (rows, triton.cdiv(classes, block)),
        logits,
        labels,
        lse,
        scale,
        logits.stride(0),
        classes,
        BLOCK=block,
    )


class Casts:
    """Casts many fp32 matrices into (views of) others in one launch."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor, float]]) -> None:
        """Take (source, target, factor); sources contiguous fp32, targets with dense rows."""
        self.pairs = pairs
        self.pointers = self._pointers()
        if not self._in_one_launch:
            return
        device = pairs[0][0].device

        def table(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.sources = table(self.pointers)
        self.targets = table([target.data_ptr() for _, target, _ in pairs])
        self.rows = table([target.shape[0] for _, target, _ in pairs])
        self.columns = table([target.shape[1] for _, target, _ in pairs])
        self.strides = table([target.stride(0) for _, target, _ in pairs])
        self.scales = torch.tensor([f for _, _, f in pairs], dtype=torch.float32, device=device)
        self.blocks = triton.cdiv(max(source.numel() for source, _, _ in pairs), 2048)

    @property
    def _in_one_launch(self) -> bool:
        first = self.pairs[0][0] if self.pairs else None
        return first is not None and usable(first) and not isinstance(first, FakeTensor)

    def _pointers(self) -> list[int]:
        if not self._in_one_launch:
            return []
        return [source.data_ptr() for source, _, _ in self.pairs]

    @property
    def stale(self) -> bool:
        """Whether a source lies elsewhere now."""
        return self.pointers != self._pointers()

    def run(self) -> None:
        """Cast them all."""
        if not self._in_one_launch:
            for source, target, factor in self.pairs:
                target.copy_(source * factor if factor != 1 else source)
            return
        _launch(
        _cast, (len(self.pairs), self.blocks),
            self.sources, self.targets, self.rows, self.columns, self.strides, self.scales,
            self.pairs[0][1], BLOCK=2048,
        )  # fmt: skip
