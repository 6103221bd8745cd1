"""The keys and values of the tokens already read, so that a new token costs one row and not the whole text again.

Legend: S cached tokens, T new tokens, K key heads, d head size. One Cache serves one text; `length` counts its tokens.
Memory: 2 x layers x capacity x K x d elements. Sliding windows are respected by the attention, which reads the last
`window` rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.model.config import ModelConfig

__all__ = ["Cache"]


class Cache:
    """Room for `capacity` tokens of one text in every layer; Decoder.hidden fills it and moves `length` on."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.capacity = capacity
        self.length = 0
        shape = (capacity, config.kv_heads, config.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    def extend(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new rows behind the cached ones of `layer`; all rows so far (SKd, views) come back.

        `length` stays: the decoder moves it once, after the last layer. Raises ValueError where the room is used up.
        """
        start, end = self.length, self.length + k_TKd.shape[0]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, {end} are needed")
        keys, values = self._keys[layer], self._values[layer]
        keys[start:end] = k_TKd
        values[start:end] = v_TKd
        return keys[:end], values[:end]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length
