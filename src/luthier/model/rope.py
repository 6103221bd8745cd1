"""Rotary position tables: cos and sin for every position, made once and grown when a longer sequence comes.

Legend: P positions, d head size.

    angle(p, i) = p / theta^(2i/d), i < d/2      Su et al. 2021, section 3.4.2; scaled as RopeScaling says

Frequencies and angles are fp32 in every model, since bf16 cannot tell position 257 from 256; only cos and sin are then
rounded to the compute dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier.model.config import ModelConfig, RopeScaling

__all__ = ["RopeTable", "inverse_frequencies"]


def _llama3(frequencies_f: Tensor, rope: RopeScaling) -> Tensor:
    """Waves longer than the old context / low factor are stretched, short ones kept, those between blended linearly."""
    turns_f = rope.original_positions * frequencies_f / (2 * math.pi)  # full turns within the old context
    blend_f = ((turns_f - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend_f) * frequencies_f / rope.factor + blend_f * frequencies_f


def _yarn(frequencies_f: Tensor, rope: RopeScaling, theta: float) -> Tensor:
    """Kept where a wave turns over beta_fast times in the old context, stretched below beta_slow, a ramp between."""
    size = 2 * frequencies_f.shape[0]

    def dimension(turns: float) -> float:
        return size * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp_f = (torch.arange(size // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    stretched_f = ramp_f.clamp(0, 1)
    return frequencies_f / rope.factor * stretched_f + frequencies_f * (1 - stretched_f)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each of the d/2 pairs, fp32, with the config's scaling applied."""
    exponents_f = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies_f = 1.0 / config.rope_theta**exponents_f
    if config.rope.kind == "llama3":
        return _llama3(frequencies_f, config.rope)
    if config.rope.kind == "yarn":
        return _yarn(frequencies_f, config.rope, config.rope_theta)
    return frequencies_f / config.rope.factor  # linear; the default's factor is 1


class RopeTable:
    """cos and sin (P, d) in a given dtype on a given device, for as many positions as have been asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def get(self, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables of at least `positions` rows."""
        tables = self._tables.get((device, dtype))
        if tables is None or tables[0].shape[0] < positions:
            tables = self._make(max(256, 1 << (positions - 1).bit_length()), device, dtype)
            self._tables[device, dtype] = tables
        return tables

    def _make(self, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # A table first needed while generating must serve training later: never an inference tensor.
        with torch.inference_mode(False):
            frequencies_f = inverse_frequencies(self._config).to(device)
            position_P = torch.arange(positions, device=device, dtype=torch.float32)
            angles_Pd = torch.outer(position_P, frequencies_f).repeat(1, 2)
            factor = self._config.rope.attention_factor
            return (angles_Pd.cos() * factor).to(dtype), (angles_Pd.sin() * factor).to(dtype)
