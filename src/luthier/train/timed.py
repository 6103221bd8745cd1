"""What hardware/calibrate.py times on a machine: the kernels that a run on it computes with, and small layers of the
decoder itself.

Legend: T tokens, H query heads, K key heads, d head size, D hidden size, F inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.hardware.calibrate import kernels_timed
from luthier.hardware.device import Device, Precision
from luthier.hardware.timed import RANK, Call, Documents, TorchTimed
from luthier.kernels.by_hand import ByHand
from luthier.kernels.choose import kernels_for
from luthier.model.config import PROJECTIONS, ModelConfig
from luthier.model.decoder import Decoder
from luthier.model.lora import LoRASpec, add_lora
from luthier.plan.passes import backward_passes, forward_passes, hand_elements
from luthier.plan.work import Work

__all__ = ["KernelsTimed"]

_SMALL = ModelConfig("llama", 64, 256, 768, 5, 4, 4, 64, tied=True)
_TOKENS = 16
_GROUP = 3
"""Query heads that share a key head."""


class KernelsTimed(TorchTimed):
    """The kernels that kernels/choose.py gives to `device`; where these have no gradients by hand, torch's own."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.kind)
        self._name = kernels_timed(device)

    @property
    def kernels(self) -> str:
        return self._name

    def _by_hand(self, precision: Precision) -> ByHand | None:
        return kernels_for(torch.device(self.kind), self.dtype(precision)).kernels.by_hand

    def attention(self, precision: Precision, documents: Documents) -> tuple[Call, Call]:
        ops, one = self._by_hand(precision), documents
        if ops is None:
            return super().attention(precision, documents)
        tokens, lengths = one.count * one.length, (one.length,) * one.count
        key_heads = max(1, one.heads // _GROUP)
        q_THd, grad_THd = (self.random(tokens, one.heads, one.head_dim, precision=precision) for _ in range(2))
        k_TKd, v_TKd = (self.random(tokens, key_heads, one.head_dim, precision=precision) for _ in range(2))
        inputs = (q_THd, k_TKd, v_TKd)
        outputs = ops.attention(*inputs, lengths, None)
        return (
            lambda: ops.attention(*inputs, lengths, None),
            lambda: ops.attention_backward(grad_THd, inputs, outputs, lengths, None),
        )

    def elements(self, precision: Precision, count: int) -> tuple[Call, float]:
        """`count` of the inner size's; the other sizes are to it as in a small Llama."""
        ops = self._by_hand(precision)
        if ops is None:
            return super().elements(precision, count)
        hidden, heads, key_heads, size, inner = 576, 9, 3, 64, 1536
        tokens = max(1, count // inner)
        x_TD, grad_TD = (self.random(tokens, hidden, precision=precision) for _ in range(2))
        scale_D, angle_Td = self.random(hidden, precision=precision), self.random(tokens, size, precision=precision)
        q_THd = self.random(tokens, heads, size, precision=precision)
        k_TKd = self.random(tokens, key_heads, size, precision=precision)
        first = tuple(self.random(tokens, inner, precision=precision) for _ in range(3))
        gate_TF, up_TF, product_TF = (x.clone() for x in first)
        cos_Td, sin_Td = angle_Td.cos(), angle_Td.sin()

        def of_a_layer() -> None:
            for _ in range(2):
                ops.rms_norm(x_TD, scale_D, 1e-5)
                ops.rms_norm(x_TD, scale_D, 1e-5)
                ops.rms_norm_backward(grad_TD, x_TD, scale_D, 1e-5, onto=grad_TD)
            for back in (False, True):
                ops.rope(q_THd, cos_Td, sin_Td, back)
                ops.rope(k_TKd, cos_Td, sin_Td, back)
            for now, before in zip((gate_TF, up_TF, product_TF), first, strict=True):
                now.copy_(before)  # what comes next writes into them
            ops.swiglu(gate_TF, up_TF)
            ops.swiglu_backward(product_TF, gate_TF, up_TF)

        passes = sum(hand_elements(hidden, heads * size, key_heads * size, inner)) + 6 * inner
        width = 4 if self.kind == "cpu" else self.dtype(precision).itemsize
        return of_a_layer, tokens * passes * width / 4

    def layers(self, precision: Precision) -> tuple[Call, float]:
        kernels = kernels_for(torch.device(self.kind), self.dtype(precision)).kernels
        if kernels.by_hand is None:
            return super().layers(precision)
        decoder = Decoder(_SMALL, kernels).to(self.kind, self.dtype(precision))
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=0.02)
        add_lora(decoder, LoRASpec(RANK, float(RANK)), 0)
        decoder.train()
        ids_T = torch.arange(_TOKENS, device=self.kind)
        work = Work(_SMALL, precision, "none", "adamw", "flash", RANK, PROJECTIONS, _TOKENS, _TOKENS, kernels="native")

        def forward_backward() -> None:
            h_TD: Tensor = decoder.hidden(ids_T)
            torch.autograd.backward(h_TD.float().sum())

        one = forward_passes(work, training=True).operations + backward_passes(work).operations
        return forward_backward, _SMALL.layers * one
