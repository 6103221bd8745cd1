"""What runs on which device, of the things that need kernels of their own (bitsandbytes'). The plan refuses by it, and
so does training, which may be called without a plan.

Source: bitsandbytes 0.50: 8-bit optimizers have kernels for CPU and CUDA, and only CUDA pages memory to the host. NF4
is used on CPU and CUDA, where this project's parity tests hold it against transformers.
"""

from __future__ import annotations

from luthier.errors import UsageError
from luthier.hardware.device import DeviceKind
from luthier.plan.settings import Optimizer, Quantize

__all__ = ["OPTIMIZER_DEVICES", "QUANTIZE_DEVICES", "check_optimizer", "check_quantize"]

OPTIMIZER_DEVICES: dict[Optimizer, tuple[DeviceKind, ...]] = {
    "adamw": ("cpu", "cuda", "mps"),
    "adamw-8bit": ("cpu", "cuda"),
    "paged-adamw-8bit": ("cuda",),
}
QUANTIZE_DEVICES: dict[Quantize, tuple[DeviceKind, ...]] = {"none": ("cpu", "cuda", "mps"), "nf4": ("cpu", "cuda")}


def check_optimizer(name: Optimizer, device: str) -> None:
    """Raise UsageError, with those that are there, where `device` (cpu, cuda or mps) has no optimizer `name`."""
    if device not in OPTIMIZER_DEVICES[name]:
        able = ", ".join(other for other, devices in OPTIMIZER_DEVICES.items() if device in devices)
        raise UsageError(
            f"train.optimizer: {name} needs {' or '.join(OPTIMIZER_DEVICES[name])}, and this run is on {device}",
            f"set train.optimizer to one of: {able}",
        )


def check_quantize(name: Quantize, device: DeviceKind) -> None:
    """Raise UsageError where `device` cannot hold a base quantised as `name`."""
    if device not in QUANTIZE_DEVICES[name]:
        raise UsageError(
            f"quantize: {name} needs {' or '.join(QUANTIZE_DEVICES[name])}, and this run is on {device}",
            "set quantize to none, with a model whose weights fit unquantised",
        )
