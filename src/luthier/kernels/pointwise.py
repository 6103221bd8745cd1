"""The reference of the element-wise operations of a decoder layer: RMSNorm, rotary positions, SwiGLU.

Legend: T tokens, H heads, d head size. Used by model/decoder.py through the table in `luthier.kernels`.

    rms_norm(x)  = weight * x / sqrt(mean(x^2) + eps)            Zhang and Sennrich 2019, equation 4
    rope(x)      = x cos + rotate(x) sin, rotate((a, b)) = (-b, a)   Su et al. 2021, equation 34, halves as in GPT-NeoX
    swiglu(g, u) = g sigmoid(g) u                                Shazeer 2020, equation 6
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["rms_norm", "rope", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension; computed in fp32, returned in x's dtype (rounded before the weight is applied)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of every head by the angle of its token's position; cos and sin in x's dtype."""
    half = x_THd.shape[-1] // 2
    rotated_THd = torch.cat((-x_THd[..., half:], x_THd[..., :half]), dim=-1)
    return x_THd * cos_Td.unsqueeze(1) + rotated_THd * sin_Td.unsqueeze(1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element."""
    return functional.silu(gate) * up
