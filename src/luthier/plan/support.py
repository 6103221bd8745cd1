"""What runs on which device, of the things that need kernels of their own (bitsandbytes', torch's attention). The plan
refuses by it, and so does training, which may be called without a plan.

Source: bitsandbytes 0.50: 8-bit optimizers have kernels for CPU and CUDA, and only CUDA pages memory to the host. NF4
is used on CPU and CUDA, where this project's parity tests hold it against transformers. FP8 products with a scale for
each row are torch._scaled_mm's: NVIDIA cards of compute capability 8.9 or more, results in bf16. PyTorch's
FlashAttention-2 needs compute capability 8.0 and 16 bits, and takes no mask, which a sliding window needs; its
memory-efficient kernels serve the rest of CUDA. On a CPU it has a flash kernel of its own that takes all of these, on
Apple's GPU none.
"""

from __future__ import annotations

from luthier.errors import UsageError
from luthier.hardware.device import Device, DeviceKind, Precision
from luthier.model.config import ModelConfig
from luthier.plan.settings import Attention, Optimizer, Quantize

__all__ = [
    "OPTIMIZER_DEVICES",
    "QUANTIZE_DEVICES",
    "attentions",
    "check_attention",
    "check_optimizer",
    "check_quantize",
    "quantizes",
]

OPTIMIZER_DEVICES: dict[Optimizer, tuple[DeviceKind, ...]] = {
    "adamw": ("cpu", "cuda", "mps"),
    "adamw-8bit": ("cpu", "cuda"),
    "paged-adamw-8bit": ("cuda",),
}
QUANTIZE_DEVICES: dict[Quantize, tuple[DeviceKind, ...]] = {
    "none": ("cpu", "cuda", "mps"),
    "nf4": ("cpu", "cuda"),
    "fp8": ("cuda",),
}


def check_optimizer(name: Optimizer, device: str) -> None:
    """Raise UsageError, with those that are there, where `device` (cpu, cuda or mps) has no optimizer `name`."""
    if device not in OPTIMIZER_DEVICES[name]:
        able = ", ".join(other for other, devices in OPTIMIZER_DEVICES.items() if device in devices)
        raise UsageError(
            f"train.optimizer: {name} needs {' or '.join(OPTIMIZER_DEVICES[name])}, and this run is on {device}",
            f"set train.optimizer to one of: {able}",
        )


def quantizes(name: Quantize, device: Device) -> bool:
    """Whether `device` can compute with a base quantised as `name`."""
    return device.kind in QUANTIZE_DEVICES[name] and (name != "fp8" or "fp8" in device.fast)


def check_quantize(name: Quantize, device: Device, precision: Precision) -> None:
    """Raise UsageError where `device` cannot compute with a base quantised as `name`, or not in `precision`."""
    if name == "fp8":
        _check_fp8(device, precision)
    if device.kind not in QUANTIZE_DEVICES[name]:
        raise UsageError(
            f"quantize: {name} needs {' or '.join(QUANTIZE_DEVICES[name])}, and this run is on {device.kind}",
            f"a machine with {' or '.join(QUANTIZE_DEVICES[name])}, also to evaluate or resume a run that has such a "
            "base; a new run can have quantize: none, where the weights fit unquantised",
        )


def _check_fp8(device: Device, precision: Precision) -> None:
    if not quantizes("fp8", device):
        raise UsageError(
            "quantize: fp8 needs an NVIDIA card with products in FP8 (compute capability 8.9 or more: Ada, Hopper, "
            f"Blackwell), and this run is on {device.name}",
            "a machine with such a card, such as l4, l40s or h100-80g, also to evaluate or resume a run that has such "
            "a base; a new run can have quantize: auto",
        )
    if precision != "bf16":
        raise UsageError(
            f"quantize: fp8 computes in bf16, and train.precision is {precision}", "set train.precision: bf16"
        )


def attentions(device: Device, config: ModelConfig, precision: Precision) -> tuple[Attention, ...]:
    """The backends of attention that serve this model on `device`, the best first."""
    if device.kind == "mps":
        return ("math",)
    old = device.capability is not None and device.capability < (8, 0)
    if device.kind == "cuda" and (old or precision == "fp32" or config.window is not None):
        return ("efficient", "math")
    return ("flash", "efficient", "math")


def check_attention(name: Attention, device: Device, config: ModelConfig, precision: Precision) -> None:
    """Raise UsageError, with those that are there: torch itself would take another one and not say so."""
    able = attentions(device, config, precision)
    if name not in able:
        window = " and a sliding window" if config.window is not None else ""
        raise UsageError(
            f"train.attention: {name} is not there on {device.name} for {precision}{window}",
            f"set train.attention to one of: auto, {', '.join(able)}",
        )
