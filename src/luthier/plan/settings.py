"""What training, data and model take: every `auto` resolved, nothing left to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from luthier.hardware.device import DeviceKind, Precision

__all__ = ["MAY_CHANGE", "Attention", "LongRows", "Optimizer", "Quantize", "Scale", "Schedule", "Settings", "TrainOn"]

Quantize: TypeAlias = Literal["none", "nf4", "fp8"]
Scale: TypeAlias = Literal["standard", "rslora"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
Optimizer: TypeAlias = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]
Attention: TypeAlias = Literal["flash", "efficient", "math"]
TrainOn: TypeAlias = Literal["completions", "last", "all"]
LongRows: TypeAlias = Literal["truncate", "error", "drop", "split"]


MAY_CHANGE = ("keep", "on_nonfinite", "max_time", "stop_file")
"""The settings that say how a run is kept and stopped: with others of these it computes the same numbers."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run. `batch_size` and `micro_batch` count rows, with `packing` packs of `max_length` tokens.

    `checkpointing` is how many layers, from the first on, are recomputed in the backward pass; `attention` which
    backend of torch's scaled_dot_product_attention; `targets` are projection names; `eval_every` 0: not while training;
    `clip` 0: off. `keep` counts checkpoints beside the best; `on_nonfinite` the steps of the run that may be
    left out for a loss that is not finite; `max_time` is seconds of one sitting; `stop_file`: its coming
    ends it.
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
    checkpointing: int
    attention: Attention
    max_length: int
    packing: bool
    longest_first: bool
    train_on: TrainOn
    prompt_loss_weight: float
    long_rows: LongRows
    eval_every: int
    save_every: int
    seed: int
    device: DeviceKind
    keep: int = 3
    on_nonfinite: int = 0
    max_time: float | None = None
    stop_file: str | None = None
