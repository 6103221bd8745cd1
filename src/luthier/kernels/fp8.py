"""Products in FP8: e4m3 numbers (4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022, arXiv 2209.05433).

    x_TI ~ q_TI s_T     each row scaled so that its largest number is e4m3's largest, 448
    y_TO = x W'  ~ s_T (q_TI p_OI') s_O         for W ~ p_OI s_O
    dx_TI = g W  ~ s'_T (q'_TO p_OI)            q', s' of g_TO s_O: the scales of W lie along what is summed over, so
                                                they go into g before it is rounded, and p is the same in both

The hardware takes both factors along what is summed over, so the second product needs p transposed. It is transposed
for each use: that reads and writes a byte a weight, a small part of a product over thousands of tokens, while a copy
that stays would be all that FP8 saves over bf16; and bf16 numbers made of p would be twice the bytes to write for a
product at half the rate. (Reckoned from datasheets; benchmarks/gpu.py measures it.)

Triton's versions go over the numbers once; without Triton, or where its first results are wrong, torch does it in
several passes, and a warning says so. Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DTYPE", "LARGEST", "missing", "product", "product_back", "quantize_rows", "rounded", "transpose"]

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
CAPABILITY = (8, 9)
"""The first CUDA compute capability with products in FP8: Ada, then Hopper (9.0) and Blackwell (10.0)."""


class _Passes(Protocol):
    def quantize_rows(self, x_TI: Tensor, factor_I: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def transpose(self, x_OI: Tensor) -> Tensor: ...


def missing(device: torch.device, dtype: torch.dtype) -> str:
    """What `device` lacks for FP8 products with results in `dtype`, as the end of a sentence; empty: nothing."""
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "ROCm" if device.type == "cuda" else {"cpu": "a CPU", "mps": "Apple's GPU"}.get(device.type, device.type)
        return f"NVIDIA cards of compute capability 8.9 or more have them, and this is {kind}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        have = ".".join(map(str, capability))
        return f"cards of compute capability 8.9 or more have them (Ada, Hopper, Blackwell), and this one has {have}"
    if dtype != torch.bfloat16:
        return f"with a scale for each row their results are bf16, not {str(dtype).removeprefix('torch.')}"
    return _fault(device)


@cache
@torch.inference_mode(False)
@torch.no_grad()
def _fault(device: torch.device) -> str:
    """What is wrong with the products here, both held against the same numbers in fp32; empty: nothing."""
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI, grad_TO = (torch.randn(*shape, generator=generator) for shape in ((5, 64), (32, 64), (5, 32)))
    packed_OI, scale_O1 = quantize_rows(weight_OI.to(device))
    scale_O, plain_OI = scale_O1.flatten(), packed_OI.float() * scale_O1
    for ours, of, plain in (
        (product, x_TI, plain_OI.t()),
        (product_back, grad_TO, plain_OI),
    ):
        of = of.to(device, torch.bfloat16)
        try:
            got = ours(of, packed_OI, scale_O).float()
        except RuntimeError as error:
            return f"this torch cannot compute them here ({str(error).splitlines()[0]})"
        wanted = of.float() @ plain
        # A number rounded to e4m3 is off by 1/16 at most, 1/28 in the mean square; so is a sum of such products.
        if not bool((got - wanted).norm() <= 0.06 * wanted.norm()):  # NaN is no agreement
            return "they come out wrong on this card with this torch"
    return ""


def quantize_rows(x_TI: Tensor, factor_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(q_TI in e4m3, s_T1 in fp32) with x factor ~ q s; the reference. A row of zeros has the scale 1.

    The error of an element is at most 1/16 of itself, or 2^-10 s where it is tiny; a number that is not finite leaves
    its row without any that is.
    """
    wide_TI = x_TI.float() if factor_I is None else x_TI.float() * factor_I
    largest_T1 = wide_TI.abs().amax(dim=1, keepdim=True)
    scale_T1 = torch.where(largest_T1 == 0, 1.0, largest_T1 / LARGEST)
    return (wide_TI / scale_T1).to(DTYPE), scale_T1


def transpose(x_OI: Tensor) -> Tensor:
    """x_IO, contiguous; the reference."""
    return x_OI.t().contiguous()


def rounded(x_TI: Tensor, factor_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, in one pass where that can be had."""
    return _passes(x_TI.device).quantize_rows(x_TI.contiguous(), factor_I)


def product(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """y_TO in x's dtype (bf16), of a weight in FP8. I and O are multiples of 16."""
    q_TI, scale_T1 = rounded(x_TI)
    return torch._scaled_mm(
        q_TI, weight_OI.t(), scale_T1, scale_O.unsqueeze(0), out_dtype=x_TI.dtype, use_fast_accum=True
    )


def product_back(grad_TO: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """dx_TI of `product`, from the gradient of y."""
    q_TO, scale_T1 = rounded(grad_TO, scale_O)
    other_OI = _passes(grad_TO.device).transpose(weight_OI).t()
    ones_1I = _ones(weight_OI.shape[1], grad_TO.device)
    return torch._scaled_mm(q_TO, other_OI, scale_T1, ones_1I, out_dtype=grad_TO.dtype, use_fast_accum=True)


@cache
def _ones(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made while evaluating, it must serve training later
        return torch.ones(1, size, device=device)


class _Torch:
    """The references as they stand."""

    quantize_rows = staticmethod(quantize_rows)
    transpose = staticmethod(transpose)


@cache
def _passes(device: torch.device) -> _Passes:
    """Triton's, if it is there and agrees with the references; else these, with a warning, once in a process."""
    if device.type != "cuda":
        return _Torch()
    if find_spec("triton") is None:
        wrong = "triton is not installed"
    else:
        from luthier.kernels import triton_fp8
        from luthier.kernels.check_cuda import faults

        try:
            wrong = _disagreement(triton_fp8, device)
        except faults() as error:
            wrong = f"triton's cannot be used ({error})"
        if not wrong:
            return triton_fp8
    warnings.warn(f"FP8: {wrong}; torch rounds the operands in several passes, which is slower", stacklevel=2)
    return _Torch()


@torch.inference_mode(False)
def _disagreement(ours: _Passes, device: torch.device) -> str:
    """What is wrong; empty: nothing. Of a row count and a width that are no powers of two."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(5, 100, generator=generator).to(device, torch.bfloat16)
    factor_I = torch.rand(100, generator=generator).to(device)
    for factor in (None, factor_I):
        (q_TI, scale_T1), (wanted_TI, wanted_T1) = ours.quantize_rows(x_TI, factor), quantize_rows(x_TI, factor)
        error_TI = (q_TI.float() * scale_T1 - wanted_TI.float() * wanted_T1).abs()
        # A number that lies in the middle of two may go either way: to within one step of e4m3, an eighth.
        if not bool((error_TI <= wanted_TI.float().abs() * wanted_T1 / 8 + wanted_T1 / 256).all()):
            return "triton rounds wrongly here"
    if not torch.equal(ours.transpose(q_TI).view(torch.uint8), transpose(q_TI).view(torch.uint8)):
        return "triton transposes wrongly here"
    return ""
