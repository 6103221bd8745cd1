"""The first look at the kernels for CUDA: each, forward and backward, against the reference in fp32, on the card.

Much as check.py does for the C kernels. What a driver, a compiler or a release of torch gets wrong is found here, in
the seconds that compiling takes anyway. Legend: N rows of logits, V vocabulary.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from luthier.kernels.attention import attention
from luthier.kernels.by_hand import ByHand, Differentiable
from luthier.kernels.loss import IGNORED, cross_entropy
from luthier.kernels.pointwise import rms_norm, rope, swiglu

__all__ = ["TOLERANCE", "disagreement", "faults", "pairs"]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Of the largest number: five units in the last place of 16 bits, which round between operations where the reference,
computed in fp32 here, does not."""

LENGTHS, HEADS, KEY_HEADS, SIZES, WINDOW = (1, 200, 3), 4, 2, (18, 128), 9
"""Documents of one token and of more than one block; grouped heads, of a size that no kernel has and of the usual."""

_Case: TypeAlias = tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


class _Rows(Protocol):
    def cross_entropy(
        self, logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]: ...


class Whole(ByHand, _Rows, Protocol):
    """Everything that is looked at."""


def faults() -> tuple[type[Exception], ...]:
    """What compiling and running a Triton kernel may end with where the fault is the installation's."""
    known = (RuntimeError, ImportError, OSError, AttributeError, TypeError, ValueError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except known:  # whoever imports a kernel meets the same, and has it among the faults
        return known
    return (*known, TritonError)


def disagreement(ops: Whole, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong, as the end of a sentence; None where all kernels agree with the reference."""
    name = str(dtype).removeprefix("torch.")
    for kernel, ours, wanted in (*pairs(ops, device, dtype), *_attention_pairs(ops, device, dtype)):
        error = (ours.float() - wanted).abs().max() / wanted.abs().max()
        if not bool(error <= TOLERANCE[dtype]):  # NaN is no agreement
            return f"compute {kernel} in {name} wrongly here (off by {float(error):.1g} of the largest number)"
    return None


class _Random:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)


def pairs(ops: Whole, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kernel, its result, the reference's, for each output and each gradient of all but attention."""
    random, known, tokens = _Random(device, dtype), Differentiable(ops), sum(LENGTHS)
    weight, angles_Td = random(37), random(tokens, SIZES[0] // 2).repeat(1, 2)
    cosine_Td, sine_Td = angles_Td.cos(), angles_Td.sin()
    cases: list[_Case] = [
        (
            "rms_norm",
            lambda x: known.rms_norm(x, weight, 1e-5),
            lambda x: rms_norm(x, weight.float(), 1e-5),
            [random(5, 37)],
        ),
        ("swiglu", known.swiglu, swiglu, [random(5, 37), random(5, 37)]),
        (
            "rope",
            lambda x: known.rope(x, cosine_Td, sine_Td),
            lambda x: rope(x, cosine_Td.float(), sine_Td.float()),
            [random(tokens, HEADS, SIZES[0])],
        ),
    ]
    yield from _compared(cases, random)
    x, grad, onto = random(5, 37), random(5, 37), random(5, 37)
    wanted = ops.rms_norm_backward(grad, x, weight, 1e-5).float() + onto.float()
    yield "the gradient of rms_norm", ops.rms_norm_backward(grad, x, weight, 1e-5, onto), wanted
    for wide in (41, 9000):  # of less than one block, and of more
        logits = random(4, wide)
        labels, weights = torch.tensor([0, wide - 1, 7, IGNORED]), torch.tensor([1.0, 0.5, 0.0, 1.0])
        labels, weights = labels.to(device), weights.to(device)
        wanted, wanted_error = cross_entropy(logits[:3].to(torch.float32, copy=True), labels[:3], weights[:3], True)
        loss, error = ops.cross_entropy(logits, labels, weights, True)
        yield "cross_entropy", loss, torch.cat((wanted, wanted.new_zeros(1)))
        yield "the gradient of cross_entropy", error, torch.cat((wanted_error, torch.zeros_like(wanted_error[:1])))


def _attention_pairs(ops: Whole, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    random, known, tokens = _Random(device, dtype), Differentiable(ops), sum(LENGTHS)
    cases: list[_Case] = []
    for size in SIZES:
        inputs = [random(tokens, heads, size) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        for window in (None, WINDOW):
            cases.append(
                (
                    f"attention with heads of {size}",
                    lambda q, k, v, window=window: known.attention(q, k, v, LENGTHS, window),
                    lambda q, k, v, window=window: attention(q, k, v, LENGTHS, window),
                    inputs,
                )
            )
    yield from _compared(cases, random)


@torch.inference_mode(False)
@torch.enable_grad()
def _differentiated(compute: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The result, and with `grad` of it the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = compute(*leaves)
    return [y.detach(), *(torch.autograd.grad(y, leaves, grad) if grad is not None else ())]


def _compared(cases: list[_Case], random: _Random) -> Iterator[tuple[str, Tensor, Tensor]]:
    for kernel, ours, reference, inputs in cases:
        grad = random(*_differentiated(reference, [x.float() for x in inputs], None)[0].shape)
        mine = _differentiated(ours, inputs, grad)
        theirs = _differentiated(reference, [x.float() for x in inputs], grad.float())
        names = (kernel, *(f"the gradient of {kernel}" for _ in inputs))
        yield from zip(names, mine, theirs, strict=True)
