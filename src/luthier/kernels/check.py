"""The first look at compiled kernels: each, forward and backward, against the reference on a few awkward numbers.

What a processor or a compiler gets wrong is found here, in a few milliseconds, before it spoils a run. (What is wrong
in the code itself the tests find: tests/kernels/.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from luthier.kernels.attention import attention
from luthier.kernels.by_hand import Differentiable
from luthier.kernels.check_decoding import decoding_pairs
from luthier.kernels.loss import cross_entropy
from luthier.kernels.native import DTYPES, Native
from luthier.kernels.pointwise import rms_norm, rope, swiglu

__all__ = ["disagreement"]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest number: about a hundred units in the last place of fp32, five of bf16, which rounds between operations
where the reference, computed in fp32 here, does not."""

LENGTHS, HEADS, KEY_HEADS, SIZE = (1, 70, 3), 4, 2, 18
"""Documents of one token, of more than one block, and not of whole vectors; grouped heads of an odd size."""


def disagreement(ops: Native) -> str | None:
    """What is wrong, as the end of a sentence; None where all kernels agree with the reference."""
    for dtype, name in DTYPES.items():
        for kernel, ours, wanted in (*_pairs(ops, dtype), *decoding_pairs(ops, dtype)):
            error = (ours.float() - wanted).abs().max() / wanted.abs().max()
            if not bool(error <= TOLERANCE[dtype]):  # NaN is no agreement
                return f"computes {kernel} in {name} wrongly here (off by {float(error):.1g} of the largest number)"
    return None


def _pairs(ops: Native, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kernel, its result, the reference's, for each output and each gradient."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    known, window, angles_Td = Differentiable(ops), 9, random(tokens, SIZE // 2).repeat(1, 2)
    weight = random(37)
    q, k, v = random(tokens, HEADS, SIZE), random(tokens, KEY_HEADS, SIZE), random(tokens, KEY_HEADS, SIZE)
    cases: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = [
        (
            "rms_norm",
            lambda x: known.rms_norm(x, weight, 1e-5),
            lambda x: rms_norm(x, weight.float(), 1e-5),
            [random(5, 37)],
        ),
        ("swiglu", known.swiglu, swiglu, [random(5, 37), random(5, 37)]),
        (
            "rope",
            lambda x: known.rope(x, angles_Td.cos(), angles_Td.sin()),
            lambda x: rope(x, angles_Td.cos().float(), angles_Td.sin().float()),
            [q],
        ),
        (
            "attention",
            lambda q, k, v: known.attention(q, k, v, LENGTHS, None),
            lambda q, k, v: attention(q, k, v, LENGTHS, None),
            [q, k, v],
        ),
        (
            "attention",
            lambda q, k, v: known.attention(q, k, v, LENGTHS, window),
            lambda q, k, v: attention(q, k, v, LENGTHS, window),
            [q, k, v],
        ),
    ]
    with torch.enable_grad():
        for kernel, ours, reference, inputs in cases:
            mine = [x.detach().requires_grad_() for x in inputs]
            theirs = [x.detach().float().requires_grad_() for x in inputs]
            y, wanted = ours(*mine), reference(*theirs)
            grad = random(*y.shape)
            yield kernel, y.detach(), wanted.detach()
            # Of a scalar: torch imports half a second of libraries where gradients of another shape are given.
            gradients = torch.autograd.grad((y * grad).sum(), mine), torch.autograd.grad((wanted * grad).sum(), theirs)
            yield from ((f"the gradient of {kernel}", one, other) for one, other in zip(*gradients, strict=True))
    logits, labels, weights = random(3, 41), torch.tensor([0, 40, 7]), torch.tensor([1.0, 0.5, 0.0])
    wanted, wanted_error = cross_entropy(logits.float().clone(), labels, weights, True)
    loss, error = ops.cross_entropy(logits.clone(), labels, weights, True)
    yield "cross_entropy", loss, wanted
    yield "the gradient of cross_entropy", error, wanted_error
