"""LoRA: a low-rank update beside a frozen weight (Hu et al. 2021, arXiv 2106.09685, equation 3).

    y = x W' + s (dropout(x) A') B',   s = alpha / r, for rsLoRA alpha / sqrt(r)

rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.

A is uniform in +-1/sqrt(inputs) (Kaiming with a = sqrt(5), as PEFT), B zero, so training starts at the base model.
A and B are kept in fp32, since a step of 1e-4 is lost in bf16, and cast to the compute dtype in the forward pass.
Legend: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.model.config import PROJECTIONS, expand_targets
from luthier.model.decoder import Decoder
from luthier.model.projection import Adapter, Projection

__all__ = [
    "LoRA",
    "LoRASpec",
    "add_lora",
    "lora_enabled",
    "lora_parameters",
    "lora_shapes",
    "merge_delta",
    "projections",
    "set_lora_enabled",
]


@dataclass(frozen=True)
class LoRASpec:
    """What to add. `targets` are projection names, or the groups `all-linear` and `attention`; kept as names."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS
    scale: Literal["standard", "rslora"] = "standard"

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"rank {self.rank} and dropout {self.dropout}: rank is at least 1, dropout in [0, 1)")
        object.__setattr__(self, "targets", expand_targets(self.targets))

    @property
    def scaling(self) -> float:
        """s, the factor of the update: the only place where it is computed."""
        return self.alpha / (math.sqrt(self.rank) if self.scale == "rslora" else self.rank)


class LoRA(Adapter):
    """The update of one projection: maps x_TI to s (dropout(x) A') B'."""

    def __init__(self, inputs: int, outputs: int, spec: LoRASpec, generator: torch.Generator) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        bound = 1.0 / math.sqrt(inputs)
        self.A = nn.Parameter(torch.empty(spec.rank, inputs).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(outputs, spec.rank))
        self.scaling, self.dropout = spec.scaling, spec.dropout

    def forward(self, x_TI: Tensor) -> Tensor:
        if self.dropout and self.training:
            x_TI = functional.dropout(x_TI, self.dropout)
        low_Tr = functional.linear(x_TI, self.A.to(x_TI.dtype)) * self.scaling
        return functional.linear(low_Tr, self.B.to(x_TI.dtype))


def projections(decoder: Decoder) -> Iterator[tuple[str, Projection]]:
    """Every linear projection with its Hugging Face name (`model.layers.0.self_attn.q_proj`), in order."""
    for name, module in decoder.named_modules():
        if isinstance(module, Projection):
            yield name, module


def add_lora(decoder: Decoder, spec: LoRASpec, seed: int) -> None:
    """Put a LoRA beside every projection that `spec` targets; same seed, same A on every device.

    Raises ValueError where the decoder has one already.
    """
    if lora_parameters(decoder):
        raise ValueError("this decoder has a LoRA already")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        for name, projection in projections(decoder):
            if name.rpartition(".")[2] in spec.targets:
                lora = LoRA(projection.inputs, projection.outputs, spec, generator)
                projection.adapter = lora.to(decoder.device).train(decoder.training)


def lora_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """The trainable fp32 masters by PEFT's names without prefix: `<projection>.lora_A.weight` and `.lora_B.weight`."""
    found: dict[str, nn.Parameter] = {}
    for name, projection in projections(decoder):
        if isinstance(projection.adapter, LoRA):
            found[f"{name}.lora_A.weight"] = projection.adapter.A
            found[f"{name}.lora_B.weight"] = projection.adapter.B
    return found


def lora_shapes(decoder: Decoder, spec: LoRASpec) -> dict[str, tuple[int, int]]:
    """The names and shapes of `lora_parameters` after `add_lora(decoder, spec)`, without anything being made."""
    found: dict[str, tuple[int, int]] = {}
    for name, projection in projections(decoder):
        if name.rpartition(".")[2] in spec.targets:
            found[f"{name}.lora_A.weight"] = (spec.rank, projection.inputs)
            found[f"{name}.lora_B.weight"] = (projection.outputs, spec.rank)
    return found


def set_lora_enabled(decoder: Decoder, enabled: bool) -> None:
    """Switch every LoRA on or off; off is exactly the base model."""
    for _, projection in projections(decoder):
        if projection.adapter is not None:
            projection.adapter.enabled = enabled


@contextmanager
def lora_enabled(decoder: Decoder, enabled: bool) -> Iterator[None]:
    """Every LoRA on or off in the block; on again afterwards, which is how it trains and is saved."""
    set_lora_enabled(decoder, enabled)
    try:
        yield
    finally:
        set_lora_enabled(decoder, True)


def merge_delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s B A (O, I) in fp32: what merging adds to the frozen weight."""
    return scaling * (B.float() @ A.float())
