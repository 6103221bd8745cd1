"""A frozen projection held in 4 bits: QLoRA's NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3), by bitsandbytes.

    W ~ code[index] * scale of its block     16 levels of a normal distribution, blocks of 64 weights
    scale ~ code8[index8] * scale of 256 scales + mean     "double quantisation", equations 5 and 6

4.127 bits a weight: 4 + 8/64 + 32/(64 x 256). The quantised weight never changes; the gradient flows through it to the
input, dequantised for the product in the compute dtype, as bitsandbytes' own layer does it on CPU and CUDA.
Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from luthier.model.projection import Projection

__all__ = ["BLOCK_SIZE", "NF4Linear", "round_to_nf4"]

BLOCK_SIZE = 64
"""Weights that share one scale."""


class NF4Linear(Projection):
    """A Projection whose weight is NF4 with double quantisation; bias and computation stay in the compute dtype.

    `assign` quantises on the device that the tensor is on. The packed weight belongs to that device: to move the
    model, load it there.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.quant_state: QuantState | None = None

    def assign(self, name: str, tensor: Tensor) -> None:
        """Take `tensor` (in the compute dtype): a `weight` is quantised, a `bias` kept as it is."""
        if name != "weight":
            super().assign(name, tensor)
            return
        packed, self.quant_state = quantize_4bit(
            tensor.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def frozen(self, x_TI: Tensor) -> Tensor:
        # Transposed: releases before 0.50 tell the direction by the shape, (1, packed) for x W^T; later ones take both.
        y_TO: Tensor = bitsandbytes.matmul_4bit(x_TI, self.weight.t(), quant_state=self.quant_state, bias=self.bias)
        return y_TO

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(O, I) in the compute dtype: the weight that this layer really multiplies by."""
        weight_OI: Tensor = dequantize_4bit(self.weight, self.quant_state)
        return weight_OI


@torch.no_grad()
def round_to_nf4(weight_OI: Tensor) -> Tensor:
    """(O, I): what an NF4Linear that is given `weight_OI` multiplies by, in its dtype (the compute dtype)."""
    holder = NF4Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    holder.assign("weight", weight_OI)
    return holder.dense()
