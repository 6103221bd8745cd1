"""RMSNorm, rotary positions and SwiGLU against their formulas."""

from __future__ import annotations

import math

import torch

from luthier.kernels import rms_norm, rope, swiglu


def test_rms_norm_is_its_formula_row_by_row() -> None:
    x, weight = torch.randn(7, 33, dtype=torch.float32), torch.randn(33)
    for row, ours in zip(x.tolist(), rms_norm(x, weight, 1e-5).tolist(), strict=True):
        scale = 1 / math.sqrt(sum(value * value for value in row) / 33 + 1e-5)
        wanted = [w * value * scale for w, value in zip(weight.tolist(), row, strict=True)]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_rms_norm_of_half_precision_squares_in_fp32() -> None:
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # 300^2 is above fp16's largest number
    assert torch.equal(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones(1, 8, dtype=torch.float16))


def test_rope_turns_each_pair_by_the_angle() -> None:
    x_THd, angle_Tf = torch.randn(5, 3, 8, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64) * 6
    cos_Td, sin_Td = angle_Tf.cos().repeat(1, 2), angle_Tf.sin().repeat(1, 2)
    turned = torch.complex(x_THd[..., :4], x_THd[..., 4:]) * torch.polar(torch.ones_like(angle_Tf), angle_Tf)[:, None]
    wanted = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rope(x_THd, cos_Td, sin_Td), wanted, atol=1e-14, rtol=0)


def test_swiglu_is_its_formula() -> None:
    gate, up = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, atol=1e-14, rtol=1e-14)
