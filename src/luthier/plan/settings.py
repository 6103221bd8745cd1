"""What training, data and model take: every `auto` resolved, nothing left to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from luthier.hardware.device import DeviceKind, Precision

__all__ = ["Optimizer", "Quantize", "Scale", "Schedule", "Settings"]

Quantize: TypeAlias = Literal["none", "nf4"]
Scale: TypeAlias = Literal["standard", "rslora"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
Optimizer: TypeAlias = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Counts are of rows (`batch_size`, `micro_batch`), steps or tokens (`max_length`).

    `targets` are projection names; `eval_every` 0: not while training; `clip` 0: off.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    scale: Scale
    quantize: Quantize
    precision: Precision
    steps: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    optimizer: Optimizer
    weight_decay: float
    clip: float
    checkpointing: bool
    max_length: int
    eval_every: int
    save_every: int
    seed: int
    device: DeviceKind
