"""What is timed of the kernels that a run computes with: given to measure.py by who may import them.

`Timed` is what is asked for; `TorchTimed` answers with torch's own operations under autograd, as the reference kernels
compute. train/timed.py has the answers for the others.

Legend: T tokens, I inputs, O outputs, r rank, B documents, L tokens of one, H heads, d head size, n elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from luthier.hardware.device import DeviceKind, Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LAYER_OPERATIONS", "RANK", "Call", "Documents", "Timed", "TorchTimed"]

Call = Callable[[], object]

RANK = 16

LAYER_OPERATIONS: dict[Precision, float] = {"bf16": 203.0, "fp16": 203.0, "fp32": 156.0}
"""Of a layer under autograd forward and backward, as plan/passes.py counts them: fp32 has no casts in its norms and
adapters."""


@dataclass(frozen=True)
class Documents:
    """`count` documents of `length` tokens, with so many heads of `head_dim`."""

    count: int
    length: int
    heads: int
    head_dim: int


class Timed(Protocol):
    """Calls to be timed, each on tensors of its own; `kernels` are named as a plan names them."""

    @property
    def kernels(self) -> str: ...

    def attention(self, precision: Precision, documents: Documents) -> tuple[Call, Call]:
        """Causal attention forward, and backward after that."""
        ...

    def elements(self, precision: Precision, count: int) -> tuple[Call, float]:
        """What a layer does element by element, on rows of about `count` elements in all; and how many it reads and
        writes, as plan/passes.py counts them, in 4 bytes each."""
        ...

    def layers(self, precision: Precision) -> tuple[Call, float]:
        """Small layers with LoRA over a few tokens, forward and backward; and how many operations that is, as
        plan/passes.py counts them. Each layer has weights of its own, for a part of what an operation costs is fetching
        what no cache holds any more."""
        ...


class TorchTimed:
    """See `Timed`."""

    def __init__(self, kind: DeviceKind) -> None:
        import torch

        self.torch, self.kind = torch, kind
        self.dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    @property
    def kernels(self) -> str:
        return "reference"

    def dtype(self, precision: Precision) -> torch.dtype:
        return self.dtypes[precision]

    def random(self, *shape: int, precision: Precision, grad: bool = False) -> Tensor:
        made = self.torch.randn(*shape, device=self.kind).to(self.dtypes[precision])
        return made.requires_grad_(grad)

    def attention(self, precision: Precision, documents: Documents) -> tuple[Call, Call]:
        torch, one = self.torch, documents
        leaves = tuple(
            self.random(one.count, one.length, one.heads, one.head_dim, precision=precision, grad=True)
            for _ in range(3)
        )

        def attend() -> Tensor:
            q_BHLd, k_BHLd, v_BHLd = (x.transpose(1, 2) for x in leaves)
            out_BHLd: Tensor = torch.nn.functional.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
            return out_BHLd

        o_BHLd = attend()
        grad_BHLd = torch.ones_like(o_BHLd)
        return attend, lambda: torch.autograd.grad(o_BHLd, leaves, grad_BHLd, retain_graph=True)

    def elements(self, precision: Precision, count: int) -> tuple[Call, float]:
        """A chain as the norms, rotations and gates are: the passes over n elements counted."""
        torch = self.torch
        x_n, y_n = (self.random(count, precision=precision) for _ in range(2))

        def chain() -> None:
            wide = x_n.float()  # 2 passes; nothing where it is fp32 already
            wide = wide * wide.pow(2)  # 5
            narrow = wide.to(x_n.dtype)  # 2, or nothing
            narrow = narrow * y_n + x_n  # 6
            torch.nn.functional.silu(narrow).mul(y_n)  # 5

        passes = 16 if precision == "fp32" else 20
        width = 4 if self.kind == "cpu" or precision == "fp32" else 2.8  # of a GPU: 12 passes of 2 bytes, 8 of 4
        return chain, passes * width / 4 * count

    def layers(self, precision: Precision) -> tuple[Call, float]:
        torch, linear = self.torch, self.torch.nn.functional.linear
        tokens, hidden, inner, heads, layers = 16, 256, 768, 4, 5
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        frozen = [[self.random(o, i, precision=precision) * 0.01 for o, i in shapes] for _ in range(layers)]
        adapters = [
            (self.random(RANK, i, precision="fp32", grad=True), self.random(o, RANK, precision="fp32", grad=True))
            for _ in range(layers)
            for o, i in shapes
        ]
        x_TI, scale_I = self.random(tokens, hidden, precision=precision), self.random(hidden, precision=precision)

        def norm(h_TI: Tensor) -> Tensor:
            wide = h_TI.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            scaled_TI: Tensor = scale_I * wide.to(h_TI.dtype)
            return scaled_TI

        def project(h_TI: Tensor, layer: int, which: int) -> Tensor:
            a_rI, b_Or = adapters[layer * len(shapes) + which]
            low_Tr = linear(h_TI, a_rI.to(h_TI.dtype)) * 0.01
            y_TO: Tensor = linear(h_TI, frozen[layer][which]) + linear(low_Tr, b_Or.to(h_TI.dtype))
            return y_TO

        def rotate(h_THd: Tensor) -> Tensor:
            half = h_THd.shape[-1] // 2
            turned_THd: Tensor = h_THd * 0.5 + torch.cat((-h_THd[..., half:], h_THd[..., :half]), dim=-1) * 0.5
            return turned_THd

        def layers_of_a_decoder() -> None:
            h_TI = x_TI
            for layer in range(layers):
                y_TI = norm(h_TI)
                q_THd, k_THd, v_THd = (project(y_TI, layer, which).view(tokens, heads, -1) for which in range(3))
                q_HTd, k_HTd, v_HTd = (one.transpose(0, 1)[None] for one in (rotate(q_THd), rotate(k_THd), v_THd))
                o_HTd = torch.nn.functional.scaled_dot_product_attention(q_HTd, k_HTd, v_HTd, is_causal=True)
                h_TI = h_TI + project(o_HTd[0].transpose(0, 1).reshape(tokens, hidden), layer, 3)
                y_TI = norm(h_TI)
                gate_TI = torch.nn.functional.silu(project(y_TI, layer, 4))
                h_TI = h_TI + project(gate_TI * project(y_TI, layer, 5), layer, 6)
            torch.autograd.backward(h_TI.float().sum())

        return layers_of_a_decoder, layers * LAYER_OPERATIONS[precision]
