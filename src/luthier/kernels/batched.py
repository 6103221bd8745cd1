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
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kernels import pointwise

__all__ = ["Batched"]

SCORES = 2**22
"""Scores of one block of queries: 16 MiB in fp32. Longer documents are taken block by block."""

TILE = 2**19
"""Numbers that several passes go over at once, so that they stay in the processor's cache: 2 MiB in fp32."""


def _grouped(x_LHd: Tensor, key_heads: int) -> Tensor:
    """(L, H, d) -> (K, G L, d): all queries that meet one key head."""
    return _by_key_head(x_LHd, key_heads).reshape(key_heads, -1, x_LHd.shape[-1])


def _by_key_head(x_LHd: Tensor, key_heads: int) -> Tensor:
    """(L, H, d) -> (K, G, L, d), a view."""
    length, heads, size = x_LHd.shape
    return x_LHd.view(length, key_heads, heads // key_heads, size).permute(1, 2, 0, 3)


@dataclass(frozen=True)
class _Block:
    """Queries `start` to `end` of a document, and the keys from `first` to `end` that one of them sees."""

    first: int
    start: int
    end: int

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(queries, keys), -inf where the query must not see the key and 0 elsewhere, in the dtype of `like`."""
        rows, keys = self.end - self.start, self.end - self.first
        make = _kept_mask if rows * keys <= TILE // 2 else _mask
        return make(rows, keys, window, like.dtype, like.device)


def _mask(rows: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For the last `rows` queries of `keys` tokens."""
    with torch.inference_mode(False):  # it may serve training later
        query_Q1 = torch.arange(keys - rows, keys, device=device).unsqueeze(1)
        distance_QS = query_Q1 - torch.arange(keys, device=device)
        hidden_QS = distance_QS < 0 if window is None else (distance_QS < 0) | (distance_QS >= window)
        return torch.zeros(hidden_QS.shape, dtype=dtype, device=device).masked_fill_(hidden_QS, -math.inf)


_kept_mask = lru_cache(maxsize=16)(_mask)
"""Those of short documents are kept, 16 MiB at most in fp32: every layer asks for the same ones."""


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
        wide_x = x.to(_wide(x))
        scale = torch.rsqrt((wide_x * wide_x).mean(-1, keepdim=True) + eps)
        out = (grad * weight).to(wide_x.dtype)
        along = (out * wide_x).mean(-1, keepdim=True) * scale.square()
        out.addcmul_(wide_x, along, value=-1).mul_(scale)
        return (out if onto is None else out.add_(onto)).to(x.dtype)

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool = False) -> Tensor:
        half, sign = x_THd.shape[-1] // 2, -1.0 if back else 1.0
        across_THd = x_THd * sin_Td.unsqueeze(1)  # both halves of sin are the same
        x_THd *= cos_Td.unsqueeze(1)
        x_THd[..., :half].sub_(across_THd[..., half:], alpha=sign)
        x_THd[..., half:].add_(across_THd[..., :half], alpha=sign)
        return x_THd

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return pointwise.swiglu(gate, up)

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        rows = max(1, TILE // gate.shape[-1])
        for grad_R, gate_R, up_R in zip(*(torch.split(x, rows) for x in (grad, gate, up)), strict=True):
            silu_R = functional.silu(gate_R)
            product_R = silu_R * up_R
            torch.ops.aten.silu_backward.grad_input(up_R.mul_(grad_R), gate_R, grad_input=gate_R)
            torch.mul(grad_R, silu_R, out=up_R)
            grad_R.copy_(product_R)
        return grad

    def attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> tuple[Tensor, Tensor]:
        o_THd, key_heads = torch.empty_like(q_THd), k_TKd.shape[1]
        for at, block in _blocks(lengths, q_THd.shape[1], window):
            here, keys = slice(at + block.start, at + block.end), slice(at + block.first, at + block.end)
            scores_KGQS = _scores(_grouped(q_THd[here], key_heads), k_TKd[keys], block, window)
            weights_KGQS = torch.softmax(scores_KGQS, dim=-1)
            del scores_KGQS
            o_KNd = weights_KGQS.to(q_THd.dtype).flatten(1, 2) @ v_TKd[keys].transpose(0, 1)
            o_KGQd = _by_key_head(o_THd[here], key_heads)
            o_KGQd.copy_(o_KNd.view(o_KGQd.shape))
        return o_THd, q_THd.new_empty(0)  # see `attention_backward`

    def attention_backward(
        self,
        grad_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],  # noqa: ARG002  torch's softmax is faster than exponentials of what is known
        lengths: tuple[int, ...],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_THd, k_TKd, v_TKd = inputs
        key_heads, dtype, scale = k_TKd.shape[1], q_THd.dtype, _scale(q_THd)
        blocks = list(_blocks(lengths, q_THd.shape[1], window))
        dq_THd = torch.empty_like(q_THd)
        several = len(blocks) > len(lengths)  # of a document: its keys have a sum of gradients then
        dk_TKd, dv_TKd = (torch.zeros_like(x, dtype=_wide(x) if several else dtype) for x in (k_TKd, v_TKd))
        for at, block in blocks:
            here, keys = slice(at + block.start, at + block.end), slice(at + block.first, at + block.end)
            grad_KNd, q_KNd = _grouped(grad_THd[here], key_heads), _grouped(q_THd[here], key_heads)
            scores_KGQS = _scores(q_KNd, k_TKd[keys], block, window)
            weights_KNS = torch.softmax(scores_KGQS, dim=-1).to(dtype).flatten(1, 2)
            del scores_KGQS
            dv_TKd[keys] += (weights_KNS.transpose(1, 2) @ grad_KNd).transpose(0, 1)
            error_KNS = grad_KNd @ v_TKd[keys].permute(1, 2, 0)
            error_KNS = torch.ops.aten._softmax_backward_data(error_KNS, weights_KNS, -1, dtype)
            dq_KGQd = _by_key_head(dq_THd[here], key_heads)
            torch.mul((error_KNS @ k_TKd[keys].transpose(0, 1)).view(dq_KGQd.shape), scale, out=dq_KGQd)
            dk_TKd[keys].add_((error_KNS.transpose(1, 2) @ q_KNd).transpose(0, 1), alpha=scale)
        return dq_THd, dk_TKd.to(dtype), dv_TKd.to(dtype)

    def cross_entropy(
        self, logits_CV: Tensor, labels_C: Tensor, weights_C: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """See `loss.cross_entropy`; the gradient takes the place of the logits, some rows after others, so that what
        is computed in fp32 stays in the processor's cache."""
        rows = max(1, TILE // logits_CV.shape[1])
        loss_C = torch.empty(logits_CV.shape[0], dtype=_wide(logits_CV), device=logits_CV.device)
        for start in range(0, len(loss_C), rows):
            here = slice(start, start + rows)
            weights_R = None if weights_C is None else weights_C[here]
            loss_C[here] = _row_losses(logits_CV[here], labels_C[here], weights_R, gradient)
        return loss_C, logits_CV


def _row_losses(logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor | None, gradient: bool) -> Tensor:
    """(R,) in fp32 or wider; with `gradient` the logits become theirs."""
    wide_RV, label_R1 = logits_RV.to(_wide(logits_RV)), labels_R.unsqueeze(1)
    weights_R1 = 1.0 if weights_R is None else weights_R.to(wide_RV.dtype).unsqueeze(1)
    share_RV = torch.softmax(wide_RV, dim=1)
    # by the largest, whose share never underflows; logsumexp would compute all exponentials once more
    loss_R1 = wide_RV.amax(1, keepdim=True) - share_RV.amax(1, keepdim=True).log_()
    loss_R1 = (loss_R1 - wide_RV.gather(1, label_R1)) * weights_R1
    if gradient:
        share_RV.scatter_add_(1, label_R1, torch.full_like(loss_R1, -1.0))
        logits_RV.copy_(share_RV if weights_R is None else share_RV.mul_(weights_R1))
    return loss_R1.squeeze(1)


def _scores(q_KNd: Tensor, k_SKd: Tensor, block: _Block, window: int | None) -> Tensor:
    """(K, G, Q, S), in fp32 or wider; -inf where a query must not look."""
    products_KNS = q_KNd @ k_SKd.permute(1, 2, 0)
    scores_KNS = products_KNS.to(_wide(q_KNd))
    mask_QS = block.mask(window, scores_KNS)
    scores_KGQS = scores_KNS.view(len(scores_KNS), -1, *mask_QS.shape)
    return torch.add(mask_QS, scores_KGQS, alpha=_scale(q_KNd), out=scores_KGQS)


def _scale(q_THd: Tensor) -> float:
    return 1.0 / math.sqrt(q_THd.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
