"""Operations and gradients for CUDA in 16 bits: element by element in Triton, attention by torch's flash kernels.

Attention is FlashAttention-2 (Dao 2023, arXiv 2307.08691) for documents of any lengths that lie one after another: the
kernel is told where each begins. torch.nn.attention.varlen makes the same two calls for autograd; they are made here
directly, for the layer that is written by hand, and because the signature of that module changed between releases
while those of the calls did not (2.9 to 2.13). The kernel knows grouped heads and sliding windows, and heads of a
multiple of 8 up to 256: smaller ones are filled up with zeros, larger ones are computed by batched.py.

Nothing here waits for the device. Legend: T tokens, H query heads, K key heads, d head size, N rows of logits,
V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kernels import triton_pointwise
from luthier.kernels.batched import Batched
from luthier.kernels.loss import every_row

__all__ = ["Cuda"]


_LARGEST_HEAD, _MULTIPLE = 256, 8
_LOGITS = 2**26
"""Logits of one chunk of the loss: 128 MiB in 16 bits. They are never held in fp32, as the reference's 2^25 are."""
_TILE = 256
"""Rows of a chunk are a multiple of this, if there are so many, lest the last tile of the products be half empty."""


class Cuda:
    """See `ByHand`. Every tensor is contiguous and on one CUDA device."""

    rms_norm = staticmethod(triton_pointwise.rms_norm)
    rms_norm_backward = staticmethod(triton_pointwise.rms_norm_backward)
    rope = staticmethod(triton_pointwise.rope)
    swiglu = staticmethod(triton_pointwise.swiglu)
    swiglu_backward = staticmethod(triton_pointwise.swiglu_backward)
    cross_entropy = staticmethod(triton_pointwise.cross_entropy)

    def attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> tuple[Tensor, Tensor]:
        size = q_THd.shape[-1]
        if size > _LARGEST_HEAD:
            _say_too_large(size)
            return Batched().attention(q_THd, k_TKd, v_TKd, lengths, window)
        q_THd, k_TKd, v_TKd = (_filled(x) for x in (q_THd, k_TKd, v_TKd))
        starts, longest = _starts(lengths, q_THd.device), max(lengths)
        o_THd, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            *(q_THd, k_TKd, v_TKd, starts, starts, longest, longest, 0.0),  # 0.0: dropout
            *(window is None, False),  # causal, no mask for debugging
            scale=1.0 / math.sqrt(size),
            window_size_left=_left(window),
            window_size_right=0,
        )
        return o_THd[..., :size].contiguous(), lse

    def attention_backward(
        self,
        grad_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, device = grad_THd.shape[-1], grad_THd.device
        if size > _LARGEST_HEAD:
            return Batched().attention_backward(grad_THd, inputs, outputs, lengths, window)
        starts, longest = _starts(lengths, device), max(lengths)
        seed, unused = _no_dropout(device)
        dq_THd, dk_TKd, dv_TKd = torch.ops.aten._flash_attention_backward.default(
            *(_filled(grad_THd), *(_filled(x) for x in inputs), _filled(outputs[0]), outputs[1]),
            *(starts, starts, longest, longest, 0.0, window is None, seed, unused),
            scale=1.0 / math.sqrt(size),
            window_size_left=_left(window),
            window_size_right=0,
        )
        return (
            dq_THd[..., :size].contiguous(),
            dk_TKd[..., :size].contiguous(),
            dv_TKd[..., :size].contiguous(),
        )

    def linear_cross_entropy(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int | None = None,
        weights_N: Tensor | None = None,
    ) -> Tensor:
        """See `loss.linear_cross_entropy`. Rows without a label are computed too: to count them would be to wait.

        (Training and evaluation hand over labelled rows alone.)
        """
        if chunk is None:
            rows = max(1, _LOGITS // weight_VD.shape[0])
            chunk = rows // _TILE * _TILE or rows
        return every_row(self.cross_entropy, hidden_ND, weight_VD, labels_N, chunk, weights_N)


@lru_cache(maxsize=8)  # once
def _say_too_large(size: int) -> None:
    warnings.warn(
        f"torch's flash attention has no kernel for heads of {size} (at most {_LARGEST_HEAD}): their attention is "
        "computed block by block, which is slower",
        stacklevel=3,
    )


def _left(window: int | None) -> int:
    """How many tokens before its own a token sees, as the kernel counts; -1: all."""
    return -1 if window is None else window - 1


def _filled(x_THd: Tensor) -> Tensor:
    """Heads filled up with zeros to a size that the kernel has: no score and no output changes."""
    short = -x_THd.shape[-1] % _MULTIPLE
    return functional.pad(x_THd, (0, short)) if short else x_THd


@lru_cache(maxsize=64)  # the layers of a micro-batch ask for the same
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each document starts, and where the last one ends: int32, on the device, without waiting for it."""
    with torch.inference_mode(False):  # made while evaluating, it must serve training later
        starts = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, pin_memory=device.type == "cuda")
        return starts.to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a generator that is never asked, and an argument that is not read: as torch's own call has them."""
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)
