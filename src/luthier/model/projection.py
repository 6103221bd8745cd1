"""The linear projection of a decoder layer: a frozen weight and, where one was added, a low-rank adapter beside it.

    y = x W' + b  [ + adapter(x) ]

How the frozen part is held (full precision here, NF4 in model/quantize.py, FP8 in model/fp8.py) and what the adapter is
(model/lora.py) do not know of each other. Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.kernels.products import add_product, linear, product

__all__ = ["Adapter", "Projection"]


class Adapter(nn.Module):
    """What may stand beside a frozen weight: maps x_TI to scaling (drop(x) A') B', A (r, I) and B (O, r) trained.

    `enabled` False leaves the base model's own output; `dropout` is the share of x that is dropped in training.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    dropout: float
    enabled: bool = True

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What is trained."""
        return self.A, self.B


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

    @property
    def adapted(self) -> Adapter | None:
        """The adapter, where there is one and it is enabled."""
        return self.adapter if self.adapter is not None and self.adapter.enabled else None

    def dense(self) -> Tensor:
        """(O, I) in the compute dtype: the weight that is multiplied by. Not to be changed."""
        return self.weight

    def multiply(self, x_TI: Tensor, onto_TO: Tensor | None = None) -> Tensor:
        """x W' + b, and `onto` where that is given (which stays as it is). Not for autograd: model/by_hand.py's."""
        weight_OI = self.dense()
        if onto_TO is None:
            return linear(x_TI, weight_OI, self.bias)
        y_TO = add_product(onto_TO.clone(), x_TI, weight_OI.t())
        return y_TO if self.bias is None else y_TO.add_(self.bias)

    def multiply_back(self, grad_TO: Tensor, onto_TI: Tensor | None = None) -> Tensor:
        """g W, the gradient of x from that of y; where `onto` is given, added into it. Not for autograd either."""
        weight_OI = self.dense()
        return product(grad_TO, weight_OI) if onto_TI is None else add_product(onto_TI, grad_TO, weight_OI)

    def frozen(self, x_TI: Tensor) -> Tensor:
        """The base model's own output."""
        return functional.linear(x_TI, self.weight, self.bias)

    def forward(self, x_TI: Tensor) -> Tensor:
        adapted = self.adapted
        if adapted is None:
            return self.frozen(x_TI)
        y_TO: Tensor = self.frozen(x_TI) + adapted(x_TI)
        return y_TO
