"""The choice that the hardware decides before memory is looked at: the number format."""

from __future__ import annotations

from luthier.hardware.device import Device, Precision
from luthier.plan import sources
from luthier.plan.decision import YOURS, Decision
from luthier.recipe.schema import Recipe

__all__ = ["choose_precision", "hardware_source"]


def hardware_source(device: Device) -> str:
    """Who says what the device is."""
    return "the probe of this machine" if device.known_as is None else "the catalogue of machines (docs/hardware.md)"


def choose_precision(recipe: Recipe, device: Device) -> Decision[Precision]:
    """bf16 where there is hardware for it, fp16 with loss scaling on older CUDA cards, else fp32."""
    asked = recipe.train.precision
    if asked != "auto":
        reason = "As you set it."
        if asked not in device.fast:
            reason += f" {device.name} has no fast {asked}; it is fast in {', '.join(device.fast)}."
        if asked == "fp16":
            reason += " fp16 overflows where bf16 does not: a fifth of QLoRA's 7B runs in it failed."
        if asked == "fp32" and "bf16" in device.fast:
            reason += f" {device.name} is fast in bf16, which takes half the memory for weights and activations."
        return Decision("train.precision", asked, reason, YOURS if asked != "fp16" else f"{YOURS}; {sources.QLORA}")
    if "bf16" in device.fast:
        reason = f"{device.name} computes bf16 in hardware; it has fp32's range, so the loss needs no scaling."
        rejected: tuple[str, ...] = ("fp32: twice the memory, slower", "fp16: can overflow")
        return Decision(
            "train.precision", "bf16", reason, f"{hardware_source(device)}; {sources.QLORA} on fp16", rejected
        )
    if "fp16" in device.fast and device.kind == "cuda":
        reason = f"{device.name} has fp16 but no bf16 hardware; the loss is scaled against underflow."
        rejected = ("bf16: emulated on this device", "fp32: twice the memory, slower")
        return Decision(
            "train.precision", "fp16", reason, f"{hardware_source(device)}; {sources.QLORA} warns of fp16", rejected
        )
    reason = f"{device.name} has no bf16 hardware, and fp32 is safe."
    rejected = tuple(
        f"{name}: {'no loss scaling here' if name in device.fast else 'emulated'}" for name in ("bf16", "fp16")
    )
    return Decision("train.precision", "fp32", reason, hardware_source(device), rejected)
