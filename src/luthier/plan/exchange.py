"""Bytes between devices that train together."""

from __future__ import annotations

from luthier.model.config import parameters
from luthier.plan.sizes import adapter_parameters, base_bytes, element_bytes, layer_weights
from luthier.plan.work import Work

__all__ = ["gathered_bytes", "reduced_bytes"]


def reduced_bytes(work: Work) -> float:
    """Bytes that each device sends in a step to sum the adapter's fp32 gradients: 2 (n - 1) / n of them in a ring."""
    if work.sharding == "none" or work.devices == 1:
        return 0.0
    return 2 * (work.devices - 1) / work.devices * adapter_parameters(work.config, work.targets, work.rank) * 4


def gathered_bytes(work: Work) -> float:
    """Bytes of weights that each device receives in a micro-batch under FSDP: forward, and again backward."""
    if work.sharding != "fsdp" or work.devices == 1:
        return 0.0
    linear, stored = work.config.layers * layer_weights(work.config), float(element_bytes(work.precision))
    held = work.config.layers * base_bytes(work.config, work.quantize, work.precision)
    held += (parameters(work.config) - linear) * stored
    return 2 * (work.devices - 1) / work.devices * held
