"""One step of decoding in C (native/decode.h): the values that it reads, laid out as its structures are.

    DecodeModel -> layers -> seven matrices each      addresses of weights, which must outlive the structure
    DecodeRows                                         what one step continues

Legend: R rows (texts), V vocabulary, I inputs, O outputs, P positions, d head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.kernels.native import Native

__all__ = ["Laid", "LayerWeights", "Matrix", "ModelWeights", "lay_out"]


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "a", "b")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "rank")),
        ("scaling", ctypes.c_double),
    )


_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, _Matrix) for name in _MATRICES),
        ("window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("embedding", "norm")),
        ("head", _Matrix),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "inner", "heads", "key_heads", "size")),
        ("eps", ctypes.c_double),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cached", "ids", "lengths", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("rows", "threads")),
    )


@dataclass(frozen=True)
class Matrix:
    """A projection: `weight` (O, I) and `bias` (O,), `a` (r, I) and `b` (O, r) of its adapter, all in one dtype."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


@dataclass(frozen=True)
class LayerWeights:
    """One layer; `norms` before attention and before the MLP, then those of q and k where the family has them."""

    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    matrices: tuple[Matrix, ...]  # as _MATRICES
    window: int | None


@dataclass(frozen=True)
class ModelWeights:
    """All that a step reads; `head` makes logits. Every tensor on the CPU, contiguous, in one dtype."""

    embedding: Tensor
    norm: Tensor
    head: Tensor
    layers: tuple[LayerWeights, ...]
    heads: int
    key_heads: int
    size: int
    eps: float


class Laid:
    """A model laid out for `ops`, and its step."""

    def __init__(self, ops: Native, weights: ModelWeights, model: _Model, kept: list[object]) -> None:
        self._ops, self._weights, self._model, self._kept = ops, weights, model, kept

    def step(
        self, ids: Sequence[int], lengths: Sequence[int], cached: Sequence[int], tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Logits (R, V) in the weights' dtype after one more token of each text.

        `lengths` count each text's tokens before it; `cached` says where the addresses of its keys and values
        stand (Cache.address), (S, K, d) with room for one more, which is written; `tables` are cos and sin (P, d).
        Raises MemoryError where there is none for scratch space.
        """
        count, (cos_Pd, sin_Pd) = len(ids), tables
        logits_RV = torch.empty((count, self._weights.head.shape[0]), dtype=self._weights.head.dtype)
        places = (ctypes.c_void_p * len(cached))(*cached)
        tokens, before = (ctypes.c_int64 * count)(*ids), (ctypes.c_int64 * count)(*lengths)
        rows = _Rows(
            ctypes.addressof(places),
            ctypes.addressof(tokens),
            ctypes.addressof(before),
            cos_Pd.data_ptr(),
            sin_Pd.data_ptr(),
            count,
            torch.get_num_threads(),
        )
        self._ops.decode(ctypes.addressof(self._model), ctypes.addressof(rows), logits_RV)
        return logits_RV


def lay_out(ops: Native, weights: ModelWeights) -> Laid:
    """`weights` as the C code reads them; they are neither copied nor changed. Raises ValueError for other tensors."""
    dtype = weights.embedding.dtype

    def at(x: Tensor | None) -> int | None:
        if x is None:
            return None
        if x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
            raise ValueError(f"a weight of {x.dtype} on {x.device} in a model of {dtype} on a CPU, or not contiguous")
        return x.data_ptr()

    def matrix(one: Matrix) -> _Matrix:
        outputs, inputs = one.weight.shape
        rank = 0 if one.a is None else one.a.shape[0]
        return _Matrix(at(one.weight), at(one.bias), at(one.a), at(one.b), outputs, inputs, rank, one.scaling)

    layers = (_Layer * len(weights.layers))(
        *(_Layer(*map(at, layer.norms), *map(matrix, layer.matrices), layer.window or 0) for layer in weights.layers)
    )
    hidden, inner = weights.embedding.shape[1], weights.layers[0].matrices[_MATRICES.index("gate")].weight.shape[0]
    model = _Model(
        at(weights.embedding),
        at(weights.norm),
        matrix(Matrix(weights.head)),
        ctypes.cast(layers, ctypes.POINTER(_Layer)),
        len(weights.layers),
        hidden,
        inner,
        weights.heads,
        weights.key_heads,
        weights.size,
        weights.eps,
    )
    return Laid(ops, weights, model, [layers])
