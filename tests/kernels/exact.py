"""The operations of `ByHand` and their gradients in float64, each with a bound of what a kernel may be off by.

Bounds are made of the same sums with every term's absolute value, times the roundings that a term has behind it. u is
half the distance from 1 to the next number: 2^-24 in fp32, in which everything is summed, and 2^-8 in bf16. A sum of n
terms may be off by 4 sqrt(n) u of the sum of their absolute values: its roundings are as good as independent (Higham
and Mary 2019, theorem 2.4, where 4 stands for a probability of 0.999). Second orders of u are neglected.

Legend: T tokens, H query heads, K key heads, G = H / K, d head size, D size of a row, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Bounded",
    "attention",
    "cross_entropy",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
]

FLOOR = 1e-34
"""Below 1e-37 numbers lose bits, e^x is no longer told apart from 0 (kernels/native/common.h), and a few factors stand
beside it."""

SINGLE = 2.0**-24


@dataclass(frozen=True)
class Bounded:
    """What is right, and how far from it is near enough."""

    value: Tensor
    bound: Tensor

    def holds(self, ours: Tensor) -> None:
        """Fails where `ours` is too far from it, with the largest error in units of the bound."""
        assert ours.shape == self.value.shape
        error = (ours.double() - self.value).abs() / (self.bound + FLOOR)
        assert bool((error <= 1).all()), f"off by {float(error.max()):.3g} of what is allowed"


def unit(dtype: torch.dtype) -> float:
    """u."""
    return torch.finfo(dtype).eps / 2


def summed(terms: int) -> float:
    """What a sum in fp32 is off by, of the sum of absolute values."""
    return 4 * math.sqrt(terms) * SINGLE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Bounded:
    """The scale is a sum's square root, half as far off as that; the result is rounded twice."""
    u, x, weight = unit(x.dtype), x.double(), weight.double()
    y = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return Bounded(y, y.abs() * (summed(x.shape[-1]) / 2 + 4 * SINGLE + 2 * u))


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None) -> Bounded:
    """s (g w - x s^2 mean(g w x)) + onto: two sums, s three times, and g w rounded where torch makes it."""
    u, wide = unit(x.dtype), x.double()
    s = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    g, before = grad.double() * weight.double(), torch.zeros_like(wide) if onto is None else onto.double()
    value = s * (g - wide * s.pow(2) * (g * wide).mean(-1, keepdim=True)) + before
    terms = s * (g.abs() + wide.abs() * s.pow(2) * (g * wide).abs().mean(-1, keepdim=True)) + before.abs()
    return Bounded(value, terms * (3 * summed(x.shape[-1]) + 8 * SINGLE + 3 * u))


def rope(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool) -> Bounded:
    """Two products and a sum, each rounded where torch makes them."""
    u, half = unit(x_THd.dtype), x_THd.shape[-1] // 2
    a, b = x_THd.double()[..., :half], x_THd.double()[..., half:]
    cos, sin = (turn.double().unsqueeze(1)[..., :half] for turn in (cos_Td, sin_Td))
    sin = -sin if back else sin
    value = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    terms = torch.cat(((a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs()), dim=-1)
    return Bounded(value, 4 * u * terms)


def swiglu(gate: Tensor, up: Tensor) -> Bounded:
    """e^-g is off by 2 |g| u of itself from its argument and 2 u from its polynomial; silu is rounded before `up`."""
    u, g = unit(gate.dtype), gate.double()
    value = g * torch.sigmoid(g) * up.double()
    return Bounded(value, value.abs() * ((2 * g.abs() + 8) * SINGLE + 3 * u))


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Bounded, Bounded, Bounded]:
    """The gradients of gate and up, and the product. 1 - sigmoid is off by u of 1."""
    u, dy, g = unit(gate.dtype), grad.double(), gate.double()
    sigmoid, exponent = torch.sigmoid(g), (2 * g.abs() + 16) * SINGLE
    silu = g * sigmoid
    dgate = dy * up.double() * (sigmoid + silu * (1 - sigmoid))
    terms = (dy * up.double()).abs() * (sigmoid + silu.abs())
    dup = dy * silu
    return (
        Bounded(dgate, terms * (exponent + 4 * SINGLE) + dgate.abs() * 3 * u + terms * u),
        Bounded(dup, dup.abs() * (exponent + 3 * u)),
        swiglu(gate, up),
    )


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None) -> tuple[Bounded, Bounded]:
    """Each row's loss, and the gradient of the logits."""
    u, wide_NV = unit(logits_NV.dtype), logits_NV.double()
    weight_N1 = torch.ones(len(labels_N), 1, dtype=torch.float64) if weights_N is None else weights_N.double()[:, None]
    norm_N1 = torch.logsumexp(wide_NV, 1, keepdim=True)
    right_N1 = wide_NV.gather(1, labels_N[:, None])
    # of the logarithm of a sum: as much as the sum is off, and the rounding of its parts
    norm_bound_N1 = summed(logits_NV.shape[1]) + 32 * SINGLE + 4 * SINGLE * norm_N1.abs()
    loss = Bounded(
        (weight_N1 * (norm_N1 - right_N1))[:, 0],
        (weight_N1 * (norm_bound_N1 + 4 * SINGLE * right_N1.abs()))[:, 0],
    )
    share_NV = (wide_NV - norm_N1).exp()
    right_NV = torch.zeros_like(wide_NV).scatter_(1, labels_N[:, None], 1.0)
    value = weight_N1 * (share_NV - right_NV)
    off_NV = share_NV * (norm_bound_N1 + (2 * (wide_NV - norm_N1).nan_to_num(neginf=0).abs() + 8) * SINGLE)
    return loss, Bounded(value, weight_N1 * (off_NV + right_NV * 4 * SINGLE) + 2 * u * value.abs())


def visible(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """(T, T) of bool: does the token of the row see that of the column."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance_TT = torch.arange(len(document_T))[:, None] - torch.arange(len(document_T))
    seen_TT = (document_T[:, None] == document_T) & (distance_TT >= 0)
    return seen_TT if window is None else seen_TT & (distance_TT < window)


def attention(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_THd: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    *,
    scores_rounded: bool,
) -> dict[str, Bounded]:
    """o, lse, dq, dk and dv, from all scores of all tokens. `scores_rounded`: to the dtype, as torch's products are.

    With S the largest scale sum |q k| of any two tokens: a score is off by S (sum of d + 4 u, or u of the dtype), so is
    lse; a probability, relatively, by that for score and lse and by its own rounding.
    """
    u, heads, size = unit(grad_THd.dtype), inputs[0].shape[1], inputs[0].shape[2]
    groups = heads // inputs[1].shape[1]
    q, g = inputs[0].double().transpose(0, 1), grad_THd.double().transpose(0, 1)  # (H, T, d)
    k, v = (x.double().repeat_interleave(groups, 1).transpose(0, 1) for x in inputs[1:])
    scale, seen, longest = size**-0.5, visible(lengths, window), max(lengths)
    scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
    lse, p = scores.logsumexp(-1), scores.softmax(-1)
    largest = float((q.abs() @ k.abs().mT * scale * seen).max())
    score_off = largest * (summed(size) + 4 * SINGLE + (2 * u if scores_rounded else 0.0))
    p_off = 2 * score_off + (2 * largest + 16) * SINGLE + summed(longest) + 2 * u
    o, terms = p @ v, p @ v.abs()
    error = p * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
    error_terms = p * (g.abs() @ v.abs().mT + (g.abs() * terms).sum(-1, keepdim=True)) * scale
    error_off = (
        2 * p_off + summed(size) + summed(longest) + 3 * u
    )  # p twice, for o is made of it; e and its parts rounded

    def of_keys(x_HTd: Tensor) -> Tensor:
        return x_HTd.transpose(0, 1).unflatten(1, (-1, groups)).sum(2)

    return {
        "o": Bounded(o.transpose(0, 1), terms.transpose(0, 1) * (p_off + summed(longest) + u)),
        "lse": Bounded(lse.T, lse.T.abs() * 4 * SINGLE + score_off + summed(longest) + 16 * SINGLE),
        "dq": Bounded((error @ k).transpose(0, 1), (error_terms @ k.abs()).transpose(0, 1) * (error_off + u)),
        "dk": Bounded(of_keys(error.mT @ q), of_keys(error_terms.mT @ q.abs()) * (error_off + u)),
        "dv": Bounded(of_keys(p.mT @ g), of_keys(p.mT @ g.abs()) * (p_off + summed(longest) + 2 * u)),
    }
