"""One table: operation -> implementation. The plain-torch `REFERENCE` is the specification of every operation.

The decoder and the loss take their operations from a `Kernels` value, so that a faster set with the same signatures
can take its place; each must agree with the reference, forward and backward. Tensors never carry padding: documents
lie one after another along T, and `lengths` says where each ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from luthier.kernels.attention import attention, cached_attention, efficient_attention, only_math
from luthier.kernels.by_hand import ByHand
from luthier.kernels.loss import IGNORED, linear_cross_entropy
from luthier.kernels.pointwise import rms_norm, rope, swiglu

__all__ = [
    "IGNORED",
    "REFERENCE",
    "Kernels",
    "attention",
    "cached_attention",
    "efficient_attention",
    "kernels_with",
    "linear_cross_entropy",
    "only_math",
    "rms_norm",
    "rope",
    "swiglu",
]


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class Rope(Protocol):
    def __call__(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor: ...


class SwiGLU(Protocol):
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...


class Attention(Protocol):
    def __call__(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> Tensor: ...


class CachedAttention(Protocol):
    def __call__(self, q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, window: int | None) -> Tensor: ...


class LinearCrossEntropy(Protocol):
    def __call__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int | None = None,
        weights_N: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """An implementation for each operation; what each computes is in the docstring of its reference."""

    name: str
    rms_norm: RmsNorm
    rope: Rope
    swiglu: SwiGLU
    attention: Attention
    cached_attention: CachedAttention
    linear_cross_entropy: LinearCrossEntropy
    document: int = 16
    """To a multiple of how many tokens documents are filled up on a CPU in 16 bits (data/batches.py)."""
    by_hand: ByHand | None = None
    """The same with gradients, for the layer that is written by hand (model/by_hand.py); None: autograd takes it."""


REFERENCE = Kernels("reference", rms_norm, rope, swiglu, attention, cached_attention, linear_cross_entropy)
"""Plain torch, on every device."""


def kernels_with(attention: Literal["flash", "efficient", "math"]) -> Kernels:
    """The reference for a wanted implementation of attention (kernels/attention.py); to "math" belongs `only_math`."""
    if attention == "efficient":
        return replace(REFERENCE, name="reference, efficient attention", attention=efficient_attention)
    return REFERENCE
