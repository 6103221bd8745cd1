"""Tokens that a base model was never trained on, read off its embedding.

Base models carry the chat tokens of their Instruct versions in the vocabulary, with embedding rows that training never
reached (Llama 3's are all but zero). LoRA does not train the embedding, so a model that is tuned with such tokens
cannot tell them apart, and does not learn to stop (torchtune issue 2429).

Only the rows asked for are read, straight from the safetensors file, without torch: the plan asks before it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.guard.header import check_safetensors
from luthier.model.locate import weight_files

__all__ = ["untrained_tokens"]

_EMBEDDING = "model.embed_tokens.weight"
_SAMPLE = 1000
_SMALL = 0.05
"""A row with less than this share of the usual norm was not trained: rows that were lie within a factor of a few."""

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def untrained_tokens(folder: Path, ids: Sequence[int]) -> tuple[int, ...]:
    """Those of `ids` whose embedding rows were never trained: all but zero, or equal to another one's of `ids`.

    Raises:
        ModelError: the folder has no weights.
        FileError: a file of them is damaged.
    """
    for file in weight_files(folder):
        stored = check_safetensors(file).tensors.get(_EMBEDDING)
        if stored is not None and stored.dtype in _BYTES and len(stored.shape) == 2 and stored.stop > stored.start:
            vocabulary, width = stored.shape
            shape = (vocabulary, width * _BYTES[stored.dtype])
            raw = np.memmap(file, dtype=np.uint8, mode="r", offset=stored.start, shape=shape)
            return _untrained(raw, stored.dtype, [number for number in ids if 0 <= number < vocabulary])
    return ()


def _untrained(raw_VB: NDArray[np.uint8], dtype: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Legend: V vocabulary, B bytes of a row, S sampled rows, K rows asked for."""
    sample = np.linspace(0, len(raw_VB) - 1, min(_SAMPLE, len(raw_VB))).astype(np.int64)
    usual = float(np.sort(np.linalg.norm(_floats(raw_VB[sample], dtype), axis=1))[len(sample) // 2])
    norms_K = np.linalg.norm(_floats(raw_VB[np.array(ids, dtype=np.int64)], dtype), axis=1)
    rows = [raw_VB[number].tobytes() for number in ids]
    return tuple(
        number
        for number, norm, row in zip(ids, norms_K.tolist(), rows, strict=True)
        if norm < _SMALL * usual or rows.count(row) > 1
    )


def _floats(raw_SB: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    raw_SB = np.ascontiguousarray(raw_SB)
    if dtype == "BF16":  # the upper half of a float32
        return (raw_SB.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw_SB.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)
