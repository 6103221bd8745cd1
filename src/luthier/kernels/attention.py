"""The reference of causal attention over documents packed one after another, and over a KV cache.

Legend: T query tokens, S cached tokens, H query heads, K key heads (H a multiple of K: grouped queries, Ainslie et al.
2023), d head size, B documents of equal length, L tokens of one.

    o = softmax(q k' / sqrt(d)) v,  token i sees tokens max(0, i - window + 1) .. i of its own document

Each document is one call of torch's scaled_dot_product_attention, so nothing is padded and no document sees another;
documents that are all equally long are one call together. A mask is built only where a document outgrows the window.

torch has several implementations behind that call and takes the first that can do what is asked. Its documentation says
that of those on CUDA only FlashAttention and the plain one (`math`) know grouped queries; so on a device, or in a
precision, that FlashAttention has no kernel for, grouped queries fall to `math`, which holds all scores of all heads.
`efficient_attention` repeats the keys and values for each query head first, which lets the memory-efficient kernel
(Rabe and Staats 2021, arXiv 2112.05682) take the call, and a mask with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["attention", "cached_attention", "efficient_attention", "only_math"]


@contextmanager
def only_math(name: Literal["flash", "efficient", "math"]) -> Iterator[None]:
    """With "math": no other implementation is taken while the block runs, its backward passes included.

    With the others torch stays free to choose. The setting is of the process, so one block goes around a whole run.
    """
    if name != "math":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) of bool: may the query see the key; the last query stands at the last key."""
    query_T1 = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key_S = torch.arange(keys, device=device)
    visible_TS = key_S <= query_T1
    return visible_TS if window is None else visible_TS & (key_S > query_T1 - window)


def _attend(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, window: int | None) -> Tensor:
    q_BHLd, k_BKLd, v_BKLd = q_BLHd.transpose(1, 2), k_BLKd.transpose(1, 2), v_BLKd.transpose(1, 2)
    grouped = q_BHLd.shape[1] != k_BKLd.shape[1]
    length = q_BHLd.shape[2]
    if window is None or length <= window:
        o_BHLd = functional.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, is_causal=True, enable_gqa=grouped)
    else:
        mask_LL = _visible(length, length, window, q_BHLd.device)
        o_BHLd = functional.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, attn_mask=mask_LL, enable_gqa=grouped)
    return o_BHLd.transpose(1, 2)


def attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """Causal attention within each document; `lengths` (tokens, all positive) sum to T. Returns THd."""
    if len(set(lengths)) == 1:
        q_BLHd, k_BLKd, v_BLKd = (x.view(len(lengths), lengths[0], *x.shape[1:]) for x in (q_THd, k_TKd, v_TKd))
        return _attend(q_BLHd, k_BLKd, v_BLKd, window).reshape(q_THd.shape)
    cuts = list(lengths)
    documents = zip(torch.split(q_THd, cuts), torch.split(k_TKd, cuts), torch.split(v_TKd, cuts), strict=True)
    return torch.cat([_attend(q[None], k[None], v[None], window)[0] for q, k, v in documents])


def efficient_attention(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
) -> Tensor:
    """`attention` with keys and values repeated for each query head; see above."""
    queries = q_THd.shape[1] // k_TKd.shape[1]
    if queries > 1:
        k_TKd, v_TKd = k_TKd.repeat_interleave(queries, 1), v_TKd.repeat_interleave(queries, 1)
    return attention(q_THd, k_TKd, v_TKd, lengths, window)


def cached_attention(q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, window: int | None) -> Tensor:
    """Causal attention of T new tokens to S cached ones, the new ones being the last T of them. Returns THd."""
    queries, keys = q_THd.shape[0], k_SKd.shape[0]
    if window is not None and keys > window + queries - 1:  # what no query reaches
        k_SKd, v_SKd = k_SKd[1 - window - queries :], v_SKd[1 - window - queries :]
        keys = window + queries - 1
    grouped = q_THd.shape[1] != k_SKd.shape[1]
    q_1HTd, k_1KSd, v_1KSd = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_SKd, v_SKd))
    if queries == 1:  # one token sees all that is left: no mask
        o_1HTd = functional.scaled_dot_product_attention(q_1HTd, k_1KSd, v_1KSd, enable_gqa=grouped)
    elif queries == keys and (window is None or keys <= window):
        o_1HTd = functional.scaled_dot_product_attention(q_1HTd, k_1KSd, v_1KSd, is_causal=True, enable_gqa=grouped)
    else:
        mask_TS = _visible(queries, keys, window, q_THd.device)
        o_1HTd = functional.scaled_dot_product_attention(q_1HTd, k_1KSd, v_1KSd, attn_mask=mask_TS, enable_gqa=grouped)
    return o_1HTd[0].transpose(0, 1)
