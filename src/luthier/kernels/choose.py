"""Which kernels a run computes with: chosen once, for its device, dtype and implementation of attention.

    native     on a CPU, fp32 and bf16: C, if it was compiled and passes its check      (native.py)
    torch      on a CPU otherwise: torch alone, gradients by hand                       (batched.py)
    cuda       on an NVIDIA card of capability 8.0 or more, bf16 and fp16: Triton and torch's flash attention, if
               triton is installed and they pass their check                            (cuda.py)
    reference  elsewhere: torch alone, gradients by autograd                            (the specification)

LUTHIER_KERNELS=reference, torch, native or cuda in the environment takes one in place of the best, to compare them or
to go around one that is at fault.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from luthier.hardware.compiled import compiled_kernels
from luthier.hardware.kernels import cuda_lacks, kernel_set, wish
from luthier.kernels import REFERENCE, Kernels, kernels_with
from luthier.kernels.batched import Batched
from luthier.kernels.by_hand import ByHand, Differentiable
from luthier.kernels.check import disagreement
from luthier.kernels.loss import CrossEntropy, filled_cross_entropy, linear_cross_entropy
from luthier.kernels.native import DTYPES, Native

__all__ = ["Choice", "kernels_for"]

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Choice:
    """The kernels, and a sentence where they are not those that one would expect (else empty)."""

    kernels: Kernels
    notice: str = ""


def kernels_for(
    device: torch.device, dtype: torch.dtype, attention: Literal["flash", "efficient", "math"] = "flash"
) -> Choice:
    """The fastest kernels that work here; to attention "math" belongs `only_math`.

    Raises UsageError where LUTHIER_KERNELS is none of those above.
    """
    compiled = compiled_kernels()
    name = DTYPES.get(dtype) or str(dtype).removeprefix("torch.")
    first = kernel_set(device.type, name, attention, wish(os.environ), compiled.variant, compiled.reason)
    if first.name == "cuda" and attention != "math":
        return _on_cuda(device, dtype, attention)
    if first.name == "native" and compiled.file is not None:
        return _native(compiled.file, compiled.variant or "")
    if first.name == "torch":
        return Choice(TORCH, first.notice)
    return Choice(kernels_with(attention))


def _on_cuda(device: torch.device, dtype: torch.dtype, attention: Literal["flash", "efficient"]) -> Choice:
    why = _cuda_missing(device, dtype)
    if not why:
        kernels, why = _cuda(device, dtype)
        if kernels is not None:
            same = "train.attention: efficient is computed by flash attention, which keeps no scores either"
            return Choice(kernels, same if attention == "efficient" else "")
    return Choice(kernels_with(attention), f"{why}: torch's kernels are used, with gradients by autograd")


def _cuda_missing(device: torch.device, dtype: torch.dtype) -> str:
    """What the kernels of cuda.py need and do not find; empty: nothing."""
    capability, triton = torch.cuda.get_device_capability(device), find_spec("triton") is not None
    name = HALVES.get(dtype) or str(dtype).removeprefix("torch.")
    return cuda_lacks(name, capability, rocm=torch.version.hip is not None, triton=triton)


@cache
def _cuda(device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str]:
    """Compiled and held against the reference, once in a process for each dtype; None, and why, where they fail."""
    from luthier.kernels.check_cuda import disagreement as on_device
    from luthier.kernels.check_cuda import faults

    try:
        from luthier.kernels.cuda import Cuda

        ops = Cuda()
        wrong = on_device(ops, device, dtype)
    except faults() as error:
        wrong = f"cannot be used ({type(error).__name__}: {error})"
    if wrong is not None:
        return None, f"the CUDA kernels {wrong}"
    return replace(_table("cuda", ops, None), linear_cross_entropy=ops.linear_cross_entropy), ""


@cache
def _native(file: Path, variant: str) -> Choice:
    """Loaded and held against the reference, once in a process."""
    try:
        ops = Native(file)
        wrong = disagreement(ops)
    except (OSError, AttributeError, MemoryError) as error:
        wrong = f"cannot be used ({error})"
    if wrong is not None:
        return Choice(TORCH, f"{file.name} {wrong}: torch's kernels are used; install luthier again to compile it anew")
    return Choice(_table(f"native, {variant}", ops, ops.cross_entropy))


def _table(name: str, ops: ByHand, of_rows: CrossEntropy | None) -> Kernels:
    known = Differentiable(ops)
    loss = linear_cross_entropy if of_rows is None else partial(filled_cross_entropy, of_rows)
    return Kernels(
        name=name,
        rms_norm=known.rms_norm,
        rope=known.rope,
        swiglu=known.swiglu,
        attention=known.attention,
        cached_attention=REFERENCE.cached_attention,
        linear_cross_entropy=loss,
        document=1 if isinstance(ops, Native) else 16,  # torch's products are built for each length, the C ones not
        by_hand=ops,
    )


_BATCHED = Batched()
TORCH = _table("torch", _BATCHED, _BATCHED.cross_entropy)
"""Torch alone, with gradients by hand."""
