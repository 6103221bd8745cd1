"""What FP8 products need beside the vendor's: rows rounded to FP8 in one pass, and bytes transposed.

Legend: T tokens, I inputs, O outputs. Used by fp8.py.
"""

# As in triton_pointwise.py: the functions under `triton.jit` are written in Triton's language.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call"
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["quantize_rows", "transpose"]

_LARGEST = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)
_TILE = 64
"""Side of the square of bytes that one program turns."""


@triton.jit
def _quantize_rows(x, factor, out, scales, SIZE: tl.constexpr):
    block: tl.constexpr = triton.next_power_of_2(SIZE)
    at = tl.arange(0, block)
    row = tl.program_id(0).to(tl.int64)
    wide = tl.load(x + row * SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if factor is not None:
        wide *= tl.load(factor + at, mask=at < SIZE, other=0.0)
    largest = tl.max(tl.abs(wide), 0)
    scale = tl.where(largest > 0.0, largest / _LARGEST, 1.0)
    tl.store(scales + row, scale)
    tl.store(out + row * SIZE + at, (wide / scale).to(tl.float8e4nv), mask=at < SIZE)


@triton.jit
def _transpose(x, out, rows, columns, TILE: tl.constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row[:, None] * columns + column[None, :], mask=here)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(here))


def quantize_rows(x_TI: Tensor, factor_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `fp8.quantize_rows`."""
    rows, size = x_TI.shape
    out_TI = torch.empty(x_TI.shape, dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TI.device)
    _quantize_rows[(rows,)](x_TI, factor_I, out_TI, scale_T1, SIZE=size, num_warps=max(1, min(16, size // 512)))
    return out_TI, scale_T1


def transpose(x_OI: Tensor) -> Tensor:
    """See `fp8.transpose`."""
    rows, columns = x_OI.shape
    out_IO = torch.empty(columns, rows, dtype=x_OI.dtype, device=x_OI.device)
    grid = triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE)
    _transpose[grid](x_OI.view(torch.uint8), out_IO.view(torch.uint8), rows, columns, TILE=_TILE)
    return out_IO
