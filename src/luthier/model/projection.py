"""The linear projection of a decoder layer: a frozen weight and, where one was added, a low-rank adapter beside it.

    y = x W' + b  [ + adapter(x) ]

How the frozen part is held (full precision here, NF4 in model/quantize.py) and what the adapter is (model/lora.py)
do not know of each other. Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Adapter", "Projection"]


class Adapter(nn.Module):
    """What may stand beside a frozen weight: maps TI to TO. `enabled` False leaves the base model's own output."""

    enabled: bool = True


class Projection(nn.Module):
    """y_TO = x_TI W_OI' + b_O with W and b frozen, plus the adapter's output where there is one."""

    adapter: Adapter | None

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.adapter = None

    def assign(self, name: str, tensor: Tensor) -> None:
        """Take `tensor` (in the compute dtype, on the device of its use) as the frozen `weight` or `bias`."""
        setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def frozen(self, x_TI: Tensor) -> Tensor:
        """The base model's own output."""
        return functional.linear(x_TI, self.weight, self.bias)

    def forward(self, x_TI: Tensor) -> Tensor:
        adapter = self.adapter
        if adapter is None or not adapter.enabled:
            return self.frozen(x_TI)
        y_TO: Tensor = self.frozen(x_TI) + adapter(x_TI)
        return y_TO
