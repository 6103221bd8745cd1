"""Packed and cached attention against the definition, written out in float64 one query at a time."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from luthier.kernels import REFERENCE, attention, cached_attention, efficient_attention, kernels_with, only_math

HEADS, KEYS, SIZE = 6, 2, 5
TOLERANCE = 1e-12
"""float64 carries 1.1e-16; softmax and two sums over at most 40 terms lose less than 40 x 10 of that, times 4."""


def definition(q_Hd: Tensor, k_SKd: Tensor, v_SKd: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v of one query that sees all the keys given, head by head."""
    out = []
    for head in range(HEADS):
        group = head // (HEADS // KEYS)
        weights_S = torch.softmax(k_SKd[:, group] @ q_Hd[head] / SIZE**0.5, dim=0)
        out.append(weights_S @ v_SKd[:, group])
    return torch.stack(out)


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(count, heads, SIZE, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (HEADS, KEYS, KEYS)
    )  # type: ignore[return-value]


def packed_by_definition(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    rows = []
    for start, length in zip(itertools.accumulate((0, *lengths[:-1])), lengths, strict=True):
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            rows.append(definition(q[i], k[first : i + 1], v[first : i + 1]))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 40])
@pytest.mark.parametrize("lengths", [(13,), (7, 7, 7), (1, 11, 4, 7), (1,), (1, 1)])
def test_each_token_sees_its_own_document_within_the_window(lengths: tuple[int, ...], window: int | None) -> None:
    q, k, v = tokens(sum(lengths), seed=len(lengths))
    ours, wanted = attention(q, k, v, lengths, window), packed_by_definition(q, k, v, lengths, window)
    torch.testing.assert_close(ours, wanted, atol=TOLERANCE, rtol=0)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(5))
    grads = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (ours, wanted))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE * 10, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [(13,), (7, 7, 7), (1, 11, 4, 7)])
@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_every_kind_of_attention_is_the_definition(
    name: Literal["flash", "efficient", "math"], lengths: tuple[int, ...], window: int | None
) -> None:
    q, k, v = tokens(sum(lengths), seed=3)
    wanted = packed_by_definition(q, k, v, lengths, window)
    with only_math(name):
        ours = kernels_with(name).attention(q, k, v, lengths, window)
        weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(5))
        grads = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (ours, wanted)]
    torch.testing.assert_close(ours, wanted, atol=TOLERANCE, rtol=0)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE * 10, rtol=0)


def test_math_takes_no_other_kernel_and_the_others_leave_torch_free() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()

    with only_math("math"):
        assert (allowed(), torch.backends.cuda.math_sdp_enabled()) == ((False, False), True)
    for name in ("flash", "efficient"):
        with only_math(name):
            assert allowed() == (True, True)


def test_efficient_attention_asks_torch_for_no_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the memory-efficient kernel does not have: keys and values come in as many heads as queries."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return real(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    efficient_attention(*tokens(9, seed=1), (4, 5), None)
    assert seen == [(HEADS, HEADS, False)] * 2
    assert kernels_with("efficient").attention is efficient_attention
    assert kernels_with("flash") is kernels_with("math") is REFERENCE


@pytest.mark.parametrize("window", [None, 1, 3, 6, 40])
@pytest.mark.parametrize(("cached", "new"), [(0, 9), (9, 1), (8, 3), (1, 1), (0, 1), (3, 8)])
def test_cached_attention_is_the_tail_of_full_attention(cached: int, new: int, window: int | None) -> None:
    q, k, v = tokens(cached + new, seed=cached)
    full = packed_by_definition(q, k, v, (cached + new,), window)
    torch.testing.assert_close(cached_attention(q[cached:], k, v, window), full[cached:], atol=TOLERANCE, rtol=0)
