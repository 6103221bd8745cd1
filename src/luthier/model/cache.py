"""The keys and values of the tokens already read, so that a new token costs one row and not the whole text again.

Legend: S cached tokens, T new tokens, K key heads, d head size. One Cache serves one text; `length` counts its tokens.
Sliding windows are respected by the attention, which reads the last `window` rows only.

A cache takes memory as its text grows, a block of tokens at a time: 2 x layers x K x d elements a token. What is there
is then copied once a block, 1/BLOCK of what attention reads meanwhile, so each layer's rows lie together and every
kernel takes them as they are. Texts that are decoded together each have their own, so that one that ends gives its
memory back at once and none waits for a place beside others.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from luthier.model.config import ModelConfig

__all__ = ["BLOCK", "Cache"]

BLOCK = 128
"""Tokens of a block."""


class Cache:
    """Room for up to `capacity` tokens of one text in every layer; Decoder.hidden fills it and moves `length` on."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.capacity = capacity
        self.length = 0
        self._room = 0
        self._addresses = (ctypes.c_void_p * (2 * config.layers))()
        shape = (0, config.kv_heads, config.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    @property
    def room(self) -> int:
        """Tokens that there is memory for now."""
        return self._room

    def reserve(self, tokens: int) -> None:
        """Have memory for `tokens` more. Raises ValueError where the capacity is used up."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, {end} are needed")
        if end <= self._room:
            return
        self._room = min(self.capacity, -(-end // BLOCK) * BLOCK)
        for tensors in (self._keys, self._values):
            for layer, old_SKd in enumerate(tensors):  # one after another: only one is there twice
                tensors[layer] = old_SKd.new_empty((self._room, *old_SKd.shape[1:]))
                tensors[layer][: self.length] = old_SKd[: self.length]
        self._addresses[:] = [x.data_ptr() for pair in zip(self._keys, self._values, strict=True) for x in pair]

    def extend(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new rows behind the cached ones of `layer`; all rows so far (SKd, views) come back.

        `length` stays: the decoder moves it once, after the last layer. Raises ValueError where the room is used up.
        """
        start, end = self.length, self.length + k_TKd.shape[0]
        self.reserve(end - start)
        keys, values = self._keys[layer], self._values[layer]
        keys[start:end] = k_TKd
        values[start:end] = v_TKd
        return keys[:end], values[:end]

    @property
    def address(self) -> int:
        """Where the addresses of each layer's keys and values stand, for kernels in C."""
        return ctypes.addressof(self._addresses)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length
