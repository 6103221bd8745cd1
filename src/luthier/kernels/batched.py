"""Operations and gradients by hand in torch alone, for every device and dtype: what native.py falls back to.

Attention is made of matrix products for each document: the query heads that share a key head lie under one another, so
that one product serves them all, and the scores of a block of queries exist at once. On CPUs that is faster than
torch's fused attention, forward and backward (docs/decisions/0012).

Legend: T tokens, H query heads, K key heads, G = H / K, d head size, L tokens of a document; of a block Q queries, S
keys that they see, N = G Q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kernels import pointwise

__all__ = ["Batched"]

SCORES = 2**22
"""Scores of one block of queries: 16 MiB in fp32. Longer documents are taken block by block."""


def _grouped(x_LHd: Tensor, key_heads: int) -> Tensor:
    """(L, H, d) -> (K, G L, d): all queries that meet one key head."""
    length, heads, size = x_LHd.shape
    return x_LHd.view(length, key_heads, heads // key_heads, size).permute(1, 2, 0, 3).reshape(key_heads, -1, size)


def _ungrouped(x_KNd: Tensor, length: int) -> Tensor:
    """Back: (K, G L, d) -> (L, H, d)."""
    key_heads, _, size = x_KNd.shape
    return x_KNd.view(key_heads, -1, length, size).permute(2, 0, 1, 3).reshape(length, -1, size)


@dataclass(frozen=True)
class _Block:
    """Queries `start` to `end` of a document, and the keys from `first` to `end` that one of them sees."""

    first: int
    start: int
    end: int

    def hidden(self, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys), true where the query must not see the key."""
        query_Q1 = torch.arange(self.start, self.end, device=device).unsqueeze(1)
        distance_QS = query_Q1 - torch.arange(self.first, self.end, device=device)
        return distance_QS < 0 if window is None else (distance_QS < 0) | (distance_QS >= window)


def _blocks(lengths: tuple[int, ...], heads: int, window: int | None) -> Iterator[tuple[int, _Block]]:
    """Where each document starts, and its blocks: as many queries as have at most SCORES scores, or 16."""
    start = 0
    for length in lengths:
        rows = max(16, SCORES // (heads * length))
        for at in range(0, length, rows):
            first = 0 if window is None else max(0, at - window + 1)
            yield start, _Block(first, at, min(length, at + rows))
        start += length


class Batched:
    """See `ByHand`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pointwise.rms_norm(x, weight, eps)

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None = None
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = x.to(wide)
        scale = torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
        normed = normed * scale
        out = (grad * weight).to(wide)
        out = (out - normed * (out * normed).mean(-1, keepdim=True)) * scale
        return out.to(x.dtype) if onto is None else (out + onto).to(x.dtype)

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool = False) -> Tensor:
        return x_THd.copy_(pointwise.rope(x_THd, cos_Td, -sin_Td if back else sin_Td))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return pointwise.swiglu(gate, up)

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        silu = functional.silu(gate)
        product = silu * up
        gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(grad, silu, out=up)
        return product

    def attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> tuple[Tensor, Tensor]:
        o_THd = torch.empty_like(q_THd)
        lse_TH = torch.empty(q_THd.shape[:2], dtype=_wide(q_THd), device=q_THd.device)
        for at, block in _blocks(lengths, q_THd.shape[1], window):
            here, keys = slice(at + block.start, at + block.end), slice(at + block.first, at + block.end)
            weights_KNS, lse_KN1 = _weights(q_THd[here], k_TKd[keys], block, window, None)
            rows = block.end - block.start
            o_THd[here] = _ungrouped(weights_KNS @ v_TKd[keys].transpose(0, 1), rows)
            lse_TH[here] = _ungrouped(lse_KN1, rows)[..., 0]
        return o_THd, lse_TH

    def attention_backward(
        self,
        grad_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_THd, k_TKd, v_TKd = inputs
        o_THd, lse_TH = outputs
        wide, key_heads = _wide(q_THd), k_TKd.shape[1]
        dq_THd = torch.empty_like(q_THd)
        dk_KTd, dv_KTd = (torch.zeros_like(x.transpose(0, 1), dtype=wide) for x in (k_TKd, v_TKd))
        for at, block in _blocks(lengths, q_THd.shape[1], window):
            here, keys = slice(at + block.start, at + block.end), slice(at + block.first, at + block.end)
            grad_KNd, q_KNd = _grouped(grad_THd[here], key_heads), _grouped(q_THd[here], key_heads)
            weights_KNS, _ = _weights(
                q_THd[here], k_TKd[keys], block, window, _grouped(lse_TH[here].unsqueeze(-1), key_heads)
            )
            dv_KTd[:, keys] += weights_KNS.transpose(1, 2) @ grad_KNd
            error_KNS = grad_KNd @ v_TKd[keys].permute(1, 2, 0)
            mean_KN1 = (grad_KNd.to(wide) * _grouped(o_THd[here], key_heads)).sum(-1, keepdim=True)
            error_KNS = (error_KNS - mean_KN1).mul_(weights_KNS).mul_(_scale(q_THd)).to(q_THd.dtype)
            dq_THd[here] = _ungrouped(error_KNS @ k_TKd[keys].transpose(0, 1), block.end - block.start)
            dk_KTd[:, keys] += error_KNS.transpose(1, 2) @ q_KNd
        return dq_THd, dk_KTd.transpose(0, 1).to(k_TKd.dtype), dv_KTd.transpose(0, 1).to(v_TKd.dtype)


def _weights(
    q_QHd: Tensor, k_SKd: Tensor, block: _Block, window: int | None, lse_KN1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The probabilities (K, G Q, S) of the queries of a block, in q's dtype, and their log-sum-exp."""
    key_heads = k_SKd.shape[1]
    scores_KNS = (_grouped(q_QHd, key_heads) @ k_SKd.permute(1, 2, 0)).to(_wide(q_QHd))
    scores_KNS *= _scale(q_QHd)
    hidden_QS = block.hidden(window, q_QHd.device)
    scores_KNS.view(key_heads, -1, *hidden_QS.shape).masked_fill_(hidden_QS, -math.inf)
    if lse_KN1 is None:
        lse_KN1 = torch.logsumexp(scores_KNS, dim=-1, keepdim=True)
    return (scores_KNS - lse_KN1).exp_().to(q_QHd.dtype), lse_KN1


def _scale(q_THd: Tensor) -> float:
    return 1.0 / math.sqrt(q_THd.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
