"""Operations and their gradients as plain functions that autograd knows nothing of, for a layer written by hand.

`ByHand` is what a set of kernels has to offer; batched.py (torch alone) and native.py (C, on CPUs) are two of them.
`Differentiable` makes of one what everything else computes with: the same operations and gradients under autograd.

Legend: T tokens, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["ByHand", "Differentiable"]


class ByHand(Protocol):
    """What each computes is in the docstrings of pointwise.py and attention.py. None may be called under autograd."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """y, as `pointwise.rms_norm`."""
        ...

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None = None
    ) -> Tensor:
        """The gradient of x from that of y, added to `onto` where that is given (which stays as it is)."""
        ...

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool = False) -> Tensor:
        """Turn x in place, or `back`: the gradient of x from that of y. Returns x."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) up."""
        ...

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """Turn `gate` and `up` into their gradients, in place; returns silu(gate) up, which may lie in `grad`."""
        ...

    def attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> tuple[Tensor, Tensor]:
        """o_THd, and what the gradient needs beside it: the log-sum-exp of each row of scores, or nothing, (0,)."""
        ...

    def attention_backward(
        self,
        grad_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k, v; `inputs` are these, `outputs` what `attention` returned."""
        ...


class _Context(FunctionCtx):
    ops: ByHand
    eps: float
    lengths: tuple[int, ...]
    window: int | None
    saved_tensors: tuple[Tensor, ...]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, ops: ByHand, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.ops, ctx.eps = ops, eps
        ctx.save_for_backward(x, weight)
        return ops.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return None, ctx.ops.rms_norm_backward(grad.contiguous(), x, weight, ctx.eps), None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, ops: ByHand, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(cos_Td, sin_Td)
        return ops.rope(x_THd.clone(memory_format=torch.contiguous_format), cos_Td, sin_Td)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_THd: Tensor) -> tuple[None, Tensor, None, None]:
        cos_Td, sin_Td = ctx.saved_tensors
        turned_THd = grad_THd.clone(memory_format=torch.contiguous_format)
        return None, ctx.ops.rope(turned_THd, cos_Td, sin_Td, back=True), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, ops: ByHand, gate: Tensor, up: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(gate, up)
        return ops.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = (x.clone(memory_format=torch.contiguous_format) for x in ctx.saved_tensors)
        ctx.ops.swiglu_backward(grad.clone(memory_format=torch.contiguous_format), gate, up)
        return None, gate, up


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        ops: ByHand,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        lengths: tuple[int, ...],
        window: int | None,
    ) -> Tensor:
        ctx.ops, ctx.lengths, ctx.window = ops, lengths, window
        o_THd, rest = ops.attention(q_THd, k_TKd, v_TKd, lengths, window)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, o_THd, rest)
        return o_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_THd: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        q_THd, k_TKd, v_TKd, *outputs = ctx.saved_tensors
        inputs, after = (q_THd, k_TKd, v_TKd), (outputs[0], outputs[1])
        grads = ctx.ops.attention_backward(grad_THd.contiguous(), inputs, after, ctx.lengths, ctx.window)
        return None, *grads, None, None


class Differentiable:
    """The operations of `ops` with the signatures of the table, under autograd; weights of norms get no gradient."""

    def __init__(self, ops: ByHand) -> None:
        self.ops = ops
        self._norm: Callable[..., Tensor] = _RmsNorm.apply
        self._rope: Callable[..., Tensor] = _Rope.apply
        self._swiglu: Callable[..., Tensor] = _SwiGLU.apply
        self._attention: Callable[..., Tensor] = _Attention.apply

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(self.ops, x.contiguous(), weight, eps)

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        return self._rope(self.ops, x_THd, cos_Td, sin_Td)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._swiglu(self.ops, gate.contiguous(), up.contiguous())

    def attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> Tensor:
        q_THd, k_TKd, v_TKd = q_THd.contiguous(), k_TKd.contiguous(), v_TKd.contiguous()
        return self._attention(self.ops, q_THd, k_TKd, v_TKd, lengths, window)
