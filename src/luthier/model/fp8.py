"""A frozen projection held in FP8 with a scale for each output, whose products are FP8 too (kernels/fp8.py).

    W_OI ~ p_OI s_O      p in e4m3: a byte a weight, and 4 bytes an output

The activations, and in the backward pass the gradients, are rounded to e4m3 row by row before each product; what comes
out is bf16 (summed in fp32). The adapter beside it is computed in bf16 as ever. Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from luthier.errors import UsageError
from luthier.kernels.fp8 import missing, product, product_back, rounded
from luthier.model.projection import Projection

__all__ = ["FP8Linear", "check_fp8"]

_MULTIPLE = 16
"""What the sides of a weight must be multiples of: the products load 16 bytes at a time."""


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError where `device` has no FP8 products with results in `dtype`."""
    lacks = missing(device, dtype)
    if lacks:
        raise UsageError(
            f"quantize: fp8 needs products in FP8: {lacks}",
            "set train.precision: bf16, or quantize: none or nf4" if device.type == "cuda" else "set quantize: none",
        )


class _Context(FunctionCtx):
    projection: FP8Linear


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, projection: FP8Linear, x_TI: Tensor) -> Tensor:
        ctx.projection = projection
        return projection.multiply(x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_TO: Tensor) -> tuple[None, Tensor]:
        return None, ctx.projection.multiply_back(grad_TO.contiguous())


class FP8Linear(Projection):
    """A Projection whose weight is FP8; the bias stays in the compute dtype.

    `assign` quantises on the device that the tensor is on. The scales belong to that device: to move the model, load it
    there. A weight with a side that is no multiple of 16 is turned back into the compute dtype for each product.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.fits = inputs % _MULTIPLE == 0 and outputs % _MULTIPLE == 0
        self.scale_O = torch.empty(0)
        self.dtype = torch.bfloat16

    def assign(self, name: str, tensor: Tensor) -> None:
        """Take `tensor` (in the compute dtype): a `weight` is quantised, a `bias` kept as it is."""
        if name != "weight":
            super().assign(name, tensor)
            return
        packed_OI, scale_O1 = rounded(tensor)
        self.weight = nn.Parameter(packed_OI, requires_grad=False)
        self.scale_O, self.dtype = scale_O1.flatten(), tensor.dtype

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(O, I) in the compute dtype: what the products multiply by, but for the rounding to that dtype."""
        return self.weight.to(self.dtype).mul_(self.scale_O.unsqueeze(1))

    @torch.no_grad()
    def multiply(self, x_TI: Tensor, onto_TO: Tensor | None = None) -> Tensor:
        if not self.fits:
            return super().multiply(x_TI, onto_TO)
        y_TO = product(x_TI, self.weight, self.scale_O)
        if self.bias is not None:
            y_TO += self.bias
        return y_TO if onto_TO is None else y_TO.add_(onto_TO)

    @torch.no_grad()
    def multiply_back(self, grad_TO: Tensor, onto_TI: Tensor | None = None) -> Tensor:
        if not self.fits:
            return super().multiply_back(grad_TO, onto_TI)
        dx_TI = product_back(grad_TO, self.weight, self.scale_O)
        return dx_TI if onto_TI is None else onto_TI.add_(dx_TI)

    def frozen(self, x_TI: Tensor) -> Tensor:
        apply: Callable[..., Tensor] = _Frozen.apply
        return apply(self, x_TI.contiguous())
