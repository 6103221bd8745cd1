"""Element-wise operations, gradients and the loss of rows for CUDA in Triton: each goes over its operands once.

Computed in fp32 and rounded once at the end; only RMSNorm rounds before the weight as well, as its reference does.
Every tensor is contiguous and on the current device. cuda.py makes a `ByHand` of them.

Legend: T tokens, H heads, d head size, N rows of logits, V vocabulary, I inputs, O outputs.
"""

# The functions under `triton.jit` are written in Triton's language, not in Python: its pointers and blocks have no
# Python types. Triton comes with torch for CUDA and is nowhere else.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call"
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy", "rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward"]

_FLAT = 1024
"""Elements of one program of an operation that knows no rows."""

_LOGITS = 8192
"""Logits of a row that one program holds at once."""


def _warps(block: int) -> int:
    """Of 32 threads each: 16 elements a thread, for one memory access takes 8 of them in 16 bits."""
    return max(1, min(16, block // 512))


@triton.jit
def _rms_norm(x, weight, y, eps, SIZE: tl.constexpr):
    block: tl.constexpr = triton.next_power_of_2(SIZE)
    at = tl.arange(0, block)
    start = tl.program_id(0).to(tl.int64) * SIZE
    wide = tl.load(x + start + at, mask=at < SIZE, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(y + start + at, factor * normed, mask=at < SIZE)


@triton.jit
def _rms_norm_backward(grad, x, weight, onto, out, eps, SIZE: tl.constexpr):
    # with n = x s and g = grad weight:  dx = s (g - n mean(g n)) + onto
    block: tl.constexpr = triton.next_power_of_2(SIZE)
    at = tl.arange(0, block)
    start = tl.program_id(0).to(tl.int64) * SIZE
    wide = tl.load(x + start + at, mask=at < SIZE, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = wide * scale
    factor = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
    error = tl.load(grad + start + at, mask=at < SIZE, other=0.0).to(tl.float32) * factor
    result = (error - normed * (tl.sum(error * normed, 0) / SIZE)) * scale
    if onto is not None:
        result += tl.load(onto + start + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(out + start + at, result, mask=at < SIZE)


@triton.jit
def _rope(x, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr):
    # One token: both halves of all of its heads. The halves of the tables are equal (model/rope.py): one is read.
    heads: tl.constexpr = triton.next_power_of_2(HEADS)
    half: tl.constexpr = triton.next_power_of_2(HALF)
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, half)
    cosine = tl.load(cos + token * 2 * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + token * 2 * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sine = -sine
    head = tl.arange(0, heads)[:, None]
    here = (head < HEADS) & (pair < HALF)[None, :]
    first = x + token * 2 * HALF * HEADS + head * 2 * HALF + pair[None, :]
    a = tl.load(first, mask=here, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=here, other=0.0).to(tl.float32)
    tl.store(first, a * cosine - b * sine, mask=here)
    tl.store(first + HALF, b * cosine + a * sine, mask=here)


@triton.jit
def _swiglu(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, wide * tl.sigmoid(wide) * other, mask=at < count)


@triton.jit
def _swiglu_backward(grad, gate, up, count, BLOCK: tl.constexpr):
    # silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    error = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = wide * sigmoid
    tl.store(gate + at, error * other * sigmoid * (1.0 + wide * (1.0 - sigmoid)), mask=at < count)
    tl.store(up + at, error * silu, mask=at < count)
    tl.store(grad + at, silu * other, mask=at < count)


@triton.jit
def _cross_entropy(logits, labels, weights, losses, SIZE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    # One row: its log-sum-exp in a first pass (the largest so far, and the sum relative to it: Milakov and Gimelshein
    # 2018, arXiv 1805.02867, algorithm 3), the gradient over its logits in a second.
    row = tl.program_id(0).to(tl.int64)
    logits += row * SIZE
    label = tl.load(labels + row)
    top = float("-inf")
    total = 0.0
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wide = tl.load(logits + at, mask=at < SIZE, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(wide, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(wide - higher), 0)
        top = higher
    norm = top + tl.log(total)
    known = label >= 0
    weight = tl.where(known, 1.0, 0.0)
    if weights is not None:
        weight *= tl.load(weights + row).to(tl.float32)
    wanted = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(known, (norm - wanted) * weight, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is read before another thread writes its gradient there
        for start in range(0, SIZE, BLOCK):
            at = start + tl.arange(0, BLOCK)
            wide = tl.load(logits + at, mask=at < SIZE, other=float("-inf")).to(tl.float32)
            error = (tl.exp(wide - norm) - tl.where(at == label, 1.0, 0.0)) * weight
            tl.store(logits + at, error, mask=at < SIZE)


def _rows(x: Tensor) -> tuple[int, int]:
    """How many rows there are, and elements in one."""
    size = x.shape[-1]
    return x.numel() // size, size


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ByHand.rms_norm`. A program takes a row."""
    y = torch.empty_like(x)
    rows, size = _rows(x)
    _rms_norm[(rows,)](x, weight, y, eps, SIZE=size, num_warps=_warps(size))
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None = None) -> Tensor:
    """See `ByHand.rms_norm_backward`."""
    out = torch.empty_like(x)
    rows, size = _rows(x)
    _rms_norm_backward[(rows,)](grad, x, weight, onto, out, eps, SIZE=size, num_warps=_warps(size))
    return out


def rope(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool = False) -> Tensor:
    """See `ByHand.rope`. The tables hold each angle twice, at i and at i + d/2."""
    tokens, heads, size = x_THd.shape
    warps = _warps(heads * size)
    _rope[(tokens,)](x_THd, cos_Td, sin_Td, HEADS=heads, HALF=size // 2, BACK=back, num_warps=warps)
    return x_THd


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `ByHand.swiglu`."""
    y, count = torch.empty_like(gate), gate.numel()
    _swiglu[(triton.cdiv(count, _FLAT),)](gate, up, y, count, BLOCK=_FLAT)
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """See `ByHand.swiglu_backward`; what it returns lies in `grad`."""
    count = gate.numel()
    _swiglu_backward[(triton.cdiv(count, _FLAT),)](grad, gate, up, count, BLOCK=_FLAT)
    return grad


def cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor]:
    """See `loss.cross_entropy`; the gradient takes the place of the logits, in their dtype.

    A row without a label (any number below 0) has loss and gradient 0, so that nobody has to count them beforehand.
    """
    rows, size = logits_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    block = min(_LOGITS, triton.next_power_of_2(size))
    _cross_entropy[(rows,)](
        logits_NV, labels_N, weights_N, loss_N, SIZE=size, GRADIENT=gradient, BLOCK=block, num_warps=_warps(block)
    )
    return loss_N, logits_NV
