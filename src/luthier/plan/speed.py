"""Time in closed form. (Skeleton: its formulas are being written; signatures stay.)"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.hardware.device import Device
from luthier.model.config import parameters
from luthier.plan.work import Work

__all__ = ["Speed", "predict_speed"]


@dataclass(frozen=True)
class Speed:
    """step_seconds: an average optimizer step. evaluation_seconds: 1,000 held-out tokens, forward only. parts: seconds
    of one step by what is done. flops_per_token: of training, the recomputation counted. source: whose rates."""

    step_seconds: float
    tokens_per_second: float
    evaluation_seconds: float
    flops_per_token: float
    parts: tuple[tuple[str, float], ...]
    source: str


def predict_speed(work: Work, device: Device) -> Speed:
    """How long `work` takes on `device`."""
    again = 1 + 0.5 * work.recomputed / work.config.layers
    flops = 4 * parameters(work.config) * again * (1.1 if work.quantize == "nf4" else 1.0)
    rate = 1e12
    seconds = work.step_tokens * flops / rate / work.devices
    per_second = work.step_tokens / seconds if seconds else 0.0
    return Speed(seconds, per_second, 1000 * flops / 3 / rate, flops, (), "skeleton")
