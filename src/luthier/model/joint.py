"""Projections that read the same input, with their adapters, forward and backward by hand (for model/by_hand.py).

For y = x W' + low B' with low = s x A' (lora.py; A acts on the input that dropout leaves), and g the gradient of y:

    d low = s g B      dA = d low' x      dB = g' low      dx = g W + d low A

The thin products cost far more than their few operations, for each goes over x or dx once. So those of all adapters
here are one: their A stand under one another, and low is (T, R) with R the sum of their ranks. With dropout each has an
input of its own, and stands alone.

Legend: T tokens, I inputs, O outputs, r rank, R the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.kernels.products import add_product, linear, product, weighted_sum
from luthier.model.projection import Adapter, Projection

__all__ = ["Joint", "joints"]


def joints(projections: Mapping[str, Projection], *, training: bool) -> list[Joint]:
    """Those that go together: all, or where an adapter drops inputs, each by itself."""
    drops = training and any(one.adapted is not None and one.adapted.dropout > 0 for one in projections.values())
    if not drops:
        return [Joint(projections, 0.0)]
    shares = {name: 0.0 if one.adapted is None else one.adapted.dropout for name, one in projections.items()}
    return [Joint({name: one}, shares[name]) for name, one in projections.items()]


class Joint:
    """`projections` by name; `dropout` is the share of x that their adapters do not see. For one forward and backward.

    `kept` everywhere is where the layer keeps what its backward pass needs.
    """

    def __init__(self, projections: Mapping[str, Projection], dropout: float) -> None:
        self.projections, self.dropout = projections, dropout
        self.adapted: dict[str, Adapter] = {
            name: one.adapted for name, one in projections.items() if one.adapted is not None
        }
        first = next(iter(projections))
        self.low, self.mask = f"low of {first}", f"mask of {first}"
        (self.scaling,) = {one.scaling for one in self.adapted.values()} or {1.0}  # one spec made them all
        self._cast: dict[str, Tensor] = {}  # A and B in the compute dtype, made once for both directions

    def forward(self, x_TI: Tensor, kept: dict[str, Tensor], onto: Tensor | None = None) -> list[Tensor]:
        """The y of each, added to `onto`."""
        y_TO = [one.multiply(x_TI, onto) for one in self.projections.values()]
        if self.adapted:
            if self.dropout:
                x_TI, kept[self.mask] = torch.native_dropout(x_TI, self.dropout, True)
            kept[self.low] = linear(x_TI, self._A(x_TI.dtype)).mul_(self.scaling)
            low_Tr = self._parts(kept[self.low])
            for y, name in zip(y_TO, self.projections, strict=True):
                if name in self.adapted:
                    add_product(y, low_Tr[name], self._B(name, y.dtype).t())
        return y_TO

    def mask_again(self, x_TI: Tensor, kept: dict[str, Tensor]) -> None:
        """Draw the mask that `forward` draws, from the same state of the generator; of x only the shape matters."""
        if self.adapted and self.dropout:
            kept[self.mask] = torch.native_dropout(x_TI, self.dropout, True)[1]

    def low_gradient(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        """d low (T, R) from the gradient of each y; None where nothing is adapted."""
        if not self.adapted:
            return None
        parts = [product(grads[name], self._B(name, grads[name].dtype)) for name in self.adapted]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).mul_(self.scaling)

    def input_gradient(self, grads: Mapping[str, Tensor], dlow_TR: Tensor | None, kept: Mapping[str, Tensor]) -> Tensor:
        """dx (T, I)."""
        (first, grad), *others = ((name, grads[name]) for name in self.projections)
        dx_TI = self.projections[first].multiply_back(grad)
        for name, grad in others:
            dx_TI = self.projections[name].multiply_back(grad, dx_TI)
        if dlow_TR is None:
            return dx_TI
        A_RI = self._A(dx_TI.dtype)
        if not self.dropout:
            return add_product(dx_TI, dlow_TR, A_RI)
        return dx_TI.addcmul_(product(dlow_TR, A_RI), kept[self.mask], value=1 / (1 - self.dropout))

    def leaf_gradients(
        self, grads: Mapping[str, Tensor], dlow_TR: Tensor | None, x_TI: Tensor, kept: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """dA and dB of each adapter, in fp32 as the masters are."""
        if dlow_TR is None:
            return {}
        if self.dropout:
            x_TI = x_TI * kept[self.mask] * (1 / (1 - self.dropout))
        low_Tr = self._parts(kept[self.low])
        dA_RI = weighted_sum(dlow_TR, x_TI).to(torch.promote_types(x_TI.dtype, torch.float32))
        found: dict[str, tuple[Tensor, Tensor]] = {}
        start = 0
        for name, one in self.adapted.items():
            rank = one.A.shape[0]
            dB_Or = weighted_sum(grads[name], low_Tr[name]).to(one.B.dtype)
            found[name] = dA_RI[start : start + rank], dB_Or
            start += rank
        return found

    def _A(self, dtype: torch.dtype) -> Tensor:  # noqa: N802  the matrix A
        """(R, I), all A in the compute dtype."""
        if "A" not in self._cast:
            leaves: list[Tensor] = [one.A for one in self.adapted.values()]
            self._cast["A"] = (leaves[0].detach() if len(leaves) == 1 else torch.cat(leaves)).to(dtype)
        return self._cast["A"]

    def _B(self, name: str, dtype: torch.dtype) -> Tensor:  # noqa: N802  the matrix B
        """(O, r) in the compute dtype."""
        if name not in self._cast:
            self._cast[name] = self.adapted[name].B.detach().to(dtype)
        return self._cast[name]

    def _parts(self, low_TR: Tensor) -> dict[str, Tensor]:
        """Each adapter's part of low, a view."""
        ranks = [one.A.shape[0] for one in self.adapted.values()]
        return dict(zip(self.adapted, torch.split(low_TR, ranks, dim=1), strict=True))
