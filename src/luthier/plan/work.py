"""What is to be computed, as far as memory and time depend on it: the input of both models, memory.py and speed.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from luthier.hardware.device import KernelSet, Precision
from luthier.model.config import ModelConfig
from luthier.plan.settings import Attention, Optimizer, Quantize

__all__ = ["Sharding", "Work"]

Sharding: TypeAlias = Literal["none", "ddp", "fsdp"]
"""One device; a replica on each (DDP); weights, gradients and state cut over all (FSDP2)."""


@dataclass(frozen=True)
class Work:
    """One way to train one model.

    tokens: of the largest micro-batch (on one device). longest: tokens of the longest document in it. documents: how
    many it has. recomputed: layers whose activations are computed a second time, from the first on.
    evaluation_tokens: of the largest group of held-out rows that goes through together, 0: nothing is held out.
    step_tokens: of an average optimizer step on all devices. batch_tokens: of an average micro-batch where there are
    several devices, which a batch need not fill evenly; 0: step_tokens / micro_batches. micro_batches: of a step, on
    the fullest device. labelled: the share of tokens that have a label; the others never reach the head. kernels: what
    computes it (hardware/kernels.py); all but the reference have layers with gradients by hand.
    """

    config: ModelConfig
    precision: Precision
    quantize: Quantize
    optimizer: Optimizer
    attention: Attention
    rank: int
    targets: tuple[str, ...]
    tokens: int
    longest: int
    documents: int = 1
    recomputed: int = 0
    sharding: Sharding = "none"
    devices: int = 1
    evaluation_tokens: int = 0
    step_tokens: float = 0.0
    batch_tokens: float = 0.0
    micro_batches: int = 1
    dropout: float = 0.0
    labelled: float = 1.0
    kernels: KernelSet = "reference"
