"""The first look at the compiled step of decoding: one small layer of everything, against the reference (see check.py).

Legend: T cached tokens, R rows, D hidden size, H query heads, K key heads, d head size, r rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kernels.attention import cached_attention
from luthier.kernels.decoding import LayerWeights, Matrix, ModelWeights, lay_out
from luthier.kernels.native import Native
from luthier.kernels.pointwise import rms_norm, rope, swiglu

__all__ = ["decoding_pairs"]

ROWS, HIDDEN, INNER, HEADS, KEY_HEADS, SIZE, RANK, VOCABULARY = 5, 70, 37, 4, 2, 18, 3, 41
WINDOW, EPS = 3, 1e-5
LENGTHS = (0, 2, 9, 4, 1)
"""Tokens that the rows have before: none, fewer than the window, more."""


def decoding_pairs(ops: Native, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What the step gives and what the reference does, in fp32: logits, and the keys and values that it wrote."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        made: Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return made.to(dtype)

    def matrix(outputs: int, inputs: int) -> Matrix:
        return Matrix(random(outputs, inputs), random(outputs), random(RANK, inputs), random(outputs, RANK), 1.5)

    wide, narrow = HEADS * SIZE, KEY_HEADS * SIZE
    shapes = ((wide, HIDDEN), (narrow, HIDDEN), (narrow, HIDDEN), (HIDDEN, wide), *[(INNER, HIDDEN)] * 2)
    matrices = (*(matrix(*shape) for shape in shapes), matrix(HIDDEN, INNER))
    layer = LayerWeights((random(HIDDEN), random(HIDDEN), random(SIZE), random(SIZE)), matrices, WINDOW)
    embedding, norm, head = random(VOCABULARY, HIDDEN) * 8, random(HIDDEN), random(VOCABULARY, HIDDEN)
    weights = ModelWeights(embedding, norm, head, (layer,), HEADS, KEY_HEADS, SIZE, EPS)
    angles_Pd = torch.randn(max(LENGTHS) + 1, SIZE // 2, generator=generator).repeat(1, 2)
    tables = angles_Pd.cos().to(dtype), angles_Pd.sin().to(dtype)
    cached = [(random(length + 1, KEY_HEADS, SIZE), random(length + 1, KEY_HEADS, SIZE)) for length in LENGTHS]
    places = [(ctypes.c_void_p * 2)(k.data_ptr(), v.data_ptr()) for k, v in cached]
    ids = [7 * row % VOCABULARY for row in range(ROWS)]
    wanted = [_row(weights, token, (k, v), tables) for token, (k, v) in zip(ids, cached, strict=True)]
    logits_RV = lay_out(ops, weights).step(ids, LENGTHS, [ctypes.addressof(place) for place in places], tables)
    yield "the logits of a step", logits_RV, torch.stack([logits_V for logits_V, _ in wanted])
    for (k, v), (_, (wanted_k, wanted_v)) in zip(cached, wanted, strict=True):
        yield "the keys of a step", k, wanted_k
        yield "the values of a step", v, wanted_v


def _row(
    weights: ModelWeights, token: int, cached: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Logits (V,), and keys and values with the new ones, of one row in fp32; `cached` stays as it is."""
    layer, size = weights.layers[0], weights.size
    k_SKd, v_SKd = (x.float().clone() for x in cached)
    last = slice(len(k_SKd) - 1, len(k_SKd))
    cos, sin = (table[last].float() for table in tables)
    project: list[Callable[[Tensor], Tensor]] = [_projection(one) for one in layer.matrices]
    before, after, q_norm, k_norm = (_norm(one, weights.eps) for one in layer.norms)
    h_1D = weights.embedding[token : token + 1].float()
    x_1D = before(h_1D)
    q, k, v = (project[i](x_1D).view(1, -1, size) for i in range(3))
    k_SKd[last] = rope(k_norm(k), cos, sin)
    v_SKd[last] = v
    o = cached_attention(rope(q_norm(q), cos, sin), k_SKd, v_SKd, layer.window)
    h_1D = h_1D + project[3](o.flatten(1))
    x_1D = after(h_1D)
    h_1D = h_1D + project[6](swiglu(project[4](x_1D), project[5](x_1D)))
    logits_V = functional.linear(rms_norm(h_1D, weights.norm.float(), weights.eps), weights.head.float())[0]
    return logits_V, (k_SKd, v_SKd)


def _norm(weight: Tensor | None, eps: float) -> Callable[[Tensor], Tensor]:
    return (lambda x: x) if weight is None else (lambda x: rms_norm(x, weight.float(), eps))


def _projection(one: Matrix) -> Callable[[Tensor], Tensor]:
    weight, bias = one.weight.float(), None if one.bias is None else one.bias.float()
    if one.a is None or one.b is None:
        return lambda x: functional.linear(x, weight, bias)
    a, b = one.a.float() * one.scaling, one.b.float()
    return lambda x: functional.linear(x, weight, bias) + functional.linear(functional.linear(x, a), b)
