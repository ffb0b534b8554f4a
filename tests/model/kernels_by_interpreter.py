"""Compares each Triton kernel with PyTorch, on a CPU, by Triton's interpreter (a script)."""

import bitsandbytes as bnb
import torch
import torch.nn.functional as F

from idefics_qlora.model import kernels


def close(actual, expected, tolerance=3e-6):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def dequantize():
    for nested in (True, False):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            weight = bnb.nn.Params4bit(
                torch.randn(96, 128), quant_type="nf4", compress_statistics=nested,
                requires_grad=False,
            ).to("cpu")  # fmt: skip
            weight.quant_state.dtype = dtype
            out = torch.full((96, 128), float("nan"), dtype=dtype)
            assert kernels.can_dequantize(weight.quant_state)
            kernels.dequantize(weight, weight.quant_state, out)
            expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            if dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds
                close(out, expected, 0.01)
            else:
                assert torch.equal(out, expected)


def drop():
    x, seed = torch.randn(300, 128), torch.tensor([12345678901234])
    out = torch.full_like(x, float("nan"))
    kernels.drop(x, seed, 3, 0.25, out)
    kept = out != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    assert (kept.float().view(-1, 8).mean(0) - 0.75).abs().max() < 0.03
    close(out[kept], x[kept] / 0.75)
    again = x.clone()
    kernels.drop(again, seed, 3, 0.25, again)  # in place
    assert torch.equal(again, out)
    other = torch.empty_like(x)
    kernels.drop(x, seed, 4, 0.25, other)
    assert abs(((other != 0) & kept).float().mean() - 0.75**2) < 0.02  # independent


def norm():
    for layer in (False, True):
        for residual in (None, torch.randn(37, 96)):
            x = torch.randn(37, 96, requires_grad=True)
            weight, bias = torch.randn(96), torch.randn(96) if layer else None
            total, out, mean, rstd = kernels.norm(
                x.detach(), residual, weight, bias, 1e-5, layer, torch.float32
            )
            added = x if residual is None else x + residual
            expected = (
                F.layer_norm(added, (96,), weight, bias, 1e-5)
                if layer
                else F.rms_norm(added, (96,), weight, 1e-5)
            )
            close(out, expected.detach())
            grad, past = torch.randn(37, 96), torch.randn(37, 96)
            expected.backward(grad)
            arguments = (total, weight, mean, rstd, layer)
            close(kernels.norm_backward(grad, past, *arguments), x.grad + past)
            close(kernels.norm_backward(grad, None, *arguments), x.grad)


def swiglu():
    gate_up = torch.randn(5, 600, requires_grad=True)
    expected = F.silu(gate_up[:, :300]) * gate_up[:, 300:]
    close(kernels.swiglu(gate_up.detach()), expected.detach())
    grad = torch.randn(5, 300)
    expected.backward(grad)
    close(kernels.swiglu_backward(grad, gate_up.detach()), gate_up.grad)


def heads():
    _heads_of(3, 3)
    _heads_of(5, 2)


def _heads_of(number, others):
    """Heads of the query, and of key and value each."""
    examples, length, width = 2, 7, 10
    every = [number, others, others]
    positions = torch.arange(length)[:, None].float()
    angles = positions / 10000 ** (torch.arange(0, width, 2) / width)
    cos, sin = angles.cos(), angles.sin()
    # 14 slots, of which the second example's last three are padding; two rows are no token.
    row_at = torch.tensor([*range(11), -1, -1, -1])
    slot_of = torch.tensor([*range(11), -1, -1])
    rows = torch.randn(13, sum(every) * width)

    def views(t, count):
        return t.view(count, -1, sum(every), width).transpose(1, 2).split(every, dim=1)

    out = kernels.heads(*views(rows, 1), row_at, cos, sin, back=False)
    slots = torch.where((row_at >= 0)[:, None], rows[row_at.clamp(min=0)], 0.0)
    q, k, v = views(slots, examples)

    def rotated(x):
        half = width // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)

    for actual, expected in zip(views(out, examples), (rotated(q), rotated(k), v), strict=True):
        close(actual, expected)
    back = kernels.heads(*views(out, examples), slot_of, cos, sin, back=True)
    close(back[:11], rows[:11])
    assert (back[11:] == 0).all()
    plain = kernels.heads(*(t.contiguous() for t in (q, k, v)), None, None, None, back=True)
    assert torch.equal(plain, slots)
    assert torch.equal(kernels.take(rows, row_at), slots)


def cross_entropy():
    logits = torch.randn(9, 1010)[:, :1003].requires_grad_()
    labels = torch.randint(0, 1003, (9,))
    labels[2] = -100
    loss, lse = kernels.cross_entropy(logits.detach(), labels)
    expected = F.cross_entropy(logits, labels, reduction="none")
    close(loss, expected.detach())
    (expected.sum() * 3).backward()
    buffer = logits.detach().clone()
    kernels.cross_entropy_backward(buffer, labels, lse, torch.tensor([3.0]))
    close(buffer, logits.grad)


def casts():
    a, b = torch.randn(16, 40), torch.randn(70, 8)
    to_a, to_b = torch.zeros(16, 40).half(), torch.zeros(100, 24).half()
    casts = kernels.Casts([(a, to_a, 1.0), (b, to_b[10:80, 8:16], 2.0)])
    casts.run()
    assert torch.equal(to_a, a.half())
    assert torch.equal(to_b[10:80, 8:16], (b * 2).half())
    assert to_b.count_nonzero() == to_b[10:80, 8:16].count_nonzero()
    assert not casts.stale
    a.set_(torch.randn(16, 40))
    assert casts.stale


if __name__ == "__main__":
    assert kernels.usable(torch.ones(1))
    torch.manual_seed(0)
    for check in (dequantize, drop, norm, swiglu, heads, cross_entropy, casts):
        check()
        print(check.__name__, "equal")
