"""Choices that the machine decides: number format, quantisation, checkpointing, optimizer state, micro-batch.

What weights take, in bytes per parameter: 2 (bf16, fp16), 4 (fp32); NF4 with double quantisation 4.127 bits for the
projections of the layers (QLoRA, section 3); embeddings, head and norms keep the precision. A plan is refused only
where the weights alone are more than the whole memory: then no setting can make it fit.
"""

from __future__ import annotations

from typing import Literal

from luthier.errors import FitError
from luthier.hardware.device import GIB, Device, Precision
from luthier.model.config import ModelConfig, parameters, projection_shapes
from luthier.plan import sources
from luthier.plan.decision import YOURS, Decision
from luthier.plan.settings import Optimizer, Quantize
from luthier.plan.support import OPTIMIZER_DEVICES, QUANTIZE_DEVICES, check_optimizer, check_quantize
from luthier.recipe.schema import Recipe

__all__ = [
    "choose_checkpointing",
    "choose_micro_batch",
    "choose_optimizer",
    "choose_precision",
    "choose_quantize",
    "weight_gib",
]

_NF4_BYTES = 4.127 / 8
_SHARE_OF_WEIGHTS = 0.6
_SHARE_TO_RECOMPUTE = 0.2
_SHARE_OF_STATE = 0.05
_STATE_BYTES = 8  # AdamW: two fp32 moments for each parameter of the adapter
_TOKENS_AT_ONCE, _TOKENS_AT_ONCE_LARGE, _LARGE_GIB = 4096, 8192, 32


def weight_gib(config: ModelConfig, precision: Precision, quantize: Quantize) -> float:
    """GiB of the frozen base's weights."""
    wide = 4 if precision == "fp32" else 2
    if quantize == "none":
        return parameters(config) * wide / GIB
    linear = config.layers * sum(out * inp for out, inp in projection_shapes(config).values())
    return (linear * _NF4_BYTES + (parameters(config) - linear) * wide) / GIB


def choose_precision(recipe: Recipe, device: Device) -> Decision[Precision]:
    """bf16 where there is hardware for it, fp16 with loss scaling on older CUDA cards, else fp32."""
    asked = recipe.train.precision
    if asked != "auto":
        reason = "As you set it."
        if asked not in device.fast:
            reason += f" {device.name} has no fast {asked}; it is fast in {', '.join(device.fast)}."
        if asked == "fp16":
            reason += " fp16 overflows where bf16 does not: a fifth of QLoRA's 7B runs in it failed."
        return Decision("train.precision", asked, reason, YOURS if asked != "fp16" else f"{YOURS}; {sources.QLORA}")
    if "bf16" in device.fast:
        reason = f"{device.name} computes bf16 in hardware; it has fp32's range, so the loss needs no scaling."
        rejected: tuple[str, ...] = ("fp32: twice the memory, slower", "fp16: can overflow")
        return Decision(
            "train.precision", "bf16", reason, f"the probe of this machine; {sources.QLORA} on fp16", rejected
        )
    if "fp16" in device.fast and device.kind == "cuda":
        reason = f"{device.name} has fp16 but no bf16 hardware; the loss is scaled against underflow."
        rejected = ("bf16: emulated on this device", "fp32: twice the memory, slower")
        return Decision(
            "train.precision", "fp16", reason, f"the probe of this machine; {sources.QLORA} warns of fp16", rejected
        )
    reason = f"{device.name} has no bf16 hardware, and fp32 is safe."
    rejected = tuple(
        f"{name}: {'no loss scaling here' if name in device.fast else 'emulated'}" for name in ("bf16", "fp16")
    )
    return Decision("train.precision", "fp32", reason, "the probe of this machine", rejected)


def choose_quantize(recipe: Recipe, config: ModelConfig, device: Device, precision: Precision) -> Decision[Quantize]:
    """NF4 only where the unquantised weights would take more than a stated share of memory.

    Raises:
        FitError: the weights alone, in the format asked for (auto: in NF4, where the device has it), are more than the
            memory.
        UsageError: NF4 is asked for, and the device has it not.
    """
    if recipe.quantize == "nf4":
        check_quantize("nf4", device.kind)
    able = device.kind in QUANTIZE_DEVICES["nf4"]
    plain, packed = (weight_gib(config, precision, kind) for kind in ("none", "nf4"))
    memory = device.memory_gib
    sizes = f"the weights take {plain:.3g} GiB in {precision} and {packed:.3g} GiB in NF4"
    numbers = f"{sizes}; {device.name} has {memory:.3g} GiB"
    if (recipe.quantize == "none" or not able) and plain > memory:
        _refuse(f"it cannot fit: {numbers}", "quantize: nf4" if able and packed < memory else None)
    if recipe.quantize != "none" and able and packed > memory:
        _refuse(f"it cannot fit, not even in 4 bits: {numbers}", None)
    if recipe.quantize != "auto":
        reason = f"As you set it: {numbers}."
        if recipe.quantize == "nf4" and plain <= _SHARE_OF_WEIGHTS * memory:
            reason += f" {precision} would fit too, runs faster, and is what the merged model is made of."
        return Decision("quantize", recipe.quantize, reason, YOURS)
    share = f"{_SHARE_OF_WEIGHTS:.0%} of memory"
    if not able:
        reason = f"Not quantised: NF4 runs on {' and '.join(QUANTIZE_DEVICES['nf4'])} only; {numbers}."
        return Decision("quantize", "none", reason, "bitsandbytes", (f"nf4: not on {device.kind}",))
    if plain > _SHARE_OF_WEIGHTS * memory:
        reason = (
            f"In {precision} the weights would take more than {share}, little would be left for training: {numbers}."
        )
        return Decision("quantize", "nf4", reason, sources.QLORA, (f"none: {plain:.3g} GiB of {memory:.3g}",))
    reason = f"Not needed: {numbers}, so they stay below {share}."
    rejected = ("nf4: slower, and its rounding is trained around",)
    return Decision("quantize", "none", reason, f"{sources.QLORA}: for what does not fit in 16 bits", rejected)


def _refuse(message: str, remedy: str | None) -> None:
    raise FitError(message, remedy or "a smaller model, or a machine with more memory")


def choose_checkpointing(recipe: Recipe, weights_gib: float, device: Device) -> Decision[bool]:
    """On where the weights already take a good part of memory."""
    share = weights_gib / device.memory_gib
    part = f"{share:.0%}" if share >= 0.01 else "under 1%"
    takes = f"The weights take {part} of memory ({weights_gib:.3g} of {device.memory_gib:.3g} GiB)"
    asked = recipe.train.checkpointing
    if asked != "auto":
        return Decision("train.checkpointing", asked, f"As you set it. {takes}.", YOURS)
    if share > _SHARE_TO_RECOMPUTE:
        reason = f"{takes}, more than {_SHARE_TO_RECOMPUTE:.0%}: activations are recomputed to leave room."
        return Decision("train.checkpointing", True, reason, sources.CHECKPOINTING, ("false: may run out of memory",))
    reason = f"{takes}, at most {_SHARE_TO_RECOMPUTE:.0%}: activations are kept, which is faster."
    return Decision("train.checkpointing", False, reason, sources.CHECKPOINTING, ("true: slower, without need",))


def choose_optimizer(recipe: Recipe, trainable: int, device: Device) -> Decision[Optimizer]:
    """Plain AdamW unless its state would be a good part of a CUDA card's memory.

    Raises:
        UsageError: the one asked for does not exist on the device.
    """
    state = trainable * _STATE_BYTES / GIB
    takes = f"AdamW's state for {trainable:,} parameters is {state:.2g} GiB of {device.memory_gib:.3g}"
    asked = recipe.train.optimizer
    if asked != "auto":
        check_optimizer(asked, device.kind)
        return Decision("train.optimizer", asked, f"As you set it. {takes}.", YOURS)
    if device.kind == "cuda" and state > _SHARE_OF_STATE * device.memory_gib:
        reason = f"{takes}, more than {_SHARE_OF_STATE:.0%}: kept in 8 bits it is a quarter."
        return Decision(
            "train.optimizer", "adamw-8bit", reason, sources.EIGHT_BIT, ("adamw: exact, four times the state",)
        )
    why = "little" if device.kind == "cuda" else "and only on CUDA cards is it made smaller unasked"
    costs: dict[Optimizer, str] = {"adamw-8bit": "rounds its state", "paged-adamw-8bit": "slower"}
    rejected = tuple(
        f"{name}: {cost}, without need" if device.kind in OPTIMIZER_DEVICES[name] else f"{name}: not on {device.kind}"
        for name, cost in costs.items()
    )
    return Decision("train.optimizer", "adamw", f"{takes}: {why}.", sources.EIGHT_BIT, rejected)


def choose_micro_batch(
    recipe: Recipe, batch_size: int, max_length: int, device: Device, unit: Literal["row", "pack"] = "row"
) -> Decision[int]:
    """The most rows (or packs) that divide the batch and stay within a number of tokens, if all were of full length."""
    asked = recipe.train.micro_batch
    large = device.memory_gib >= _LARGE_GIB
    budget = _TOKENS_AT_ONCE_LARGE if large else _TOKENS_AT_ONCE
    most = f"{budget:,} tokens at once ({'from' if large else 'below'} {_LARGE_GIB} GiB of memory)"
    if asked != "auto":
        reason = f"As you set it: up to {asked * max_length:,} tokens at once; this project's rule is {most}."
        return Decision("train.micro_batch", asked, reason, YOURS)
    fitting = [rows for rows in range(1, batch_size + 1) if batch_size % rows == 0 and rows * max_length <= budget]
    rows = fitting[-1] if fitting else 1
    longest = "the longest row" if unit == "row" else "a full pack"
    reason = f"{rows} × {max_length:,} tokens of {longest}: the most that divide {batch_size} within {most}."
    if not fitting:
        reason = f"One {unit} of {max_length:,} tokens is already more than {most}."
    rejected = (f"{batch_size}: up to {batch_size * max_length:,} tokens",) if rows < batch_size else ()
    return Decision("train.micro_batch", rows, reason, sources.MICRO_BATCH, rejected)
