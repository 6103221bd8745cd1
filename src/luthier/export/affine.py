"""MLX's affine quantisation, in numpy: 4 or 8 bits a weight, in groups of 64 along each row, bit for bit mlx's own.

    w ≈ scale · q + bias,   q in 0 … 2^bits - 1

Legend: R rows, C columns, G = R · C / 64 groups.

The edge of a group that is farther from zero is met exactly: bias is that edge, scale its distance to zero over a whole
number of steps, so that zero is a whole number of steps away too. Source: mlx, `mx.quantize(mode="affine")`, whose CPU
kernel computes in fp32 and rounds scale and bias to the weight's dtype at the end; a test compares the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["GROUP", "Affine", "Bits", "affine_quantized"]

Bits = Literal[4, 8]

GROUP = 64
"""Weights that share one scale and one bias."""

_SMALLEST = np.float32(1e-7)
_AT_ONCE = 2**22
"""Weights that are taken at once: the fp32 copies of a large embedding would be gigabytes."""


@dataclass(frozen=True)
class Affine:
    """`packed` is uint32 (R, C · bits / 32), the first column in the lowest bits; `scales` and `biases` are (R, C / 64)
    in the weight's dtype."""

    packed: Tensor
    scales: Tensor
    biases: Tensor


def affine_quantized(weight_RC: Tensor, bits: Bits) -> Affine:
    """A CPU matrix of floats, quantised. Raises ValueError where its rows are no multiple of 64."""
    rows, columns = weight_RC.shape
    if columns % GROUP:
        raise ValueError(f"rows of {columns} are no multiple of {GROUP}")
    step = max(1, _AT_ONCE // columns)
    pieces = [_quantized(weight_RC[row : row + step], bits) for row in range(0, rows, step)]
    packed, scales, biases = (torch.cat([piece[part] for piece in pieces]) for part in range(3))
    return Affine(packed.view(torch.uint32), scales, biases)


def _quantized(weight_RC: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """(packed as int32, which torch can join, scales, biases)."""
    rows = weight_RC.shape[0]
    groups_GK = weight_RC.to(torch.float32).numpy().reshape(-1, GROUP)
    scale_G, bias_G = _lines(groups_GK, np.float32(2**bits - 1))
    steps_GK = np.rint((groups_GK - bias_G[:, None]) / scale_G[:, None]).clip(0, 2**bits - 1)
    each = 32 // bits
    words = steps_GK.astype(np.uint32).reshape(rows, -1, each) << (np.arange(each, dtype=np.uint32) * np.uint32(bits))
    packed = torch.from_numpy(np.bitwise_or.reduce(words, axis=2).view(np.int32))
    scales, biases = (torch.from_numpy(one.reshape(rows, -1)).to(weight_RC.dtype) for one in (scale_G, bias_G))
    return packed, scales, biases


def _lines(groups_GK: NDArray[np.float32], steps: np.float32) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(scale, bias) of each group."""
    low_G, high_G = groups_GK.min(axis=1), groups_GK.max(axis=1)
    below_G = np.abs(low_G) > np.abs(high_G)
    width_G = np.maximum((high_G - low_G) / steps, _SMALLEST)
    scale_G = np.where(below_G, width_G, -width_G)
    edge_G = np.where(below_G, low_G, high_G)
    whole_G = np.rint(edge_G / scale_G)
    away_G = whole_G != 0
    exact_G = np.divide(edge_G, whole_G, out=scale_G.copy(), where=away_G)
    return exact_G, np.where(away_G, edge_G, np.float32(0))
