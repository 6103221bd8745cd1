"""Which set of kernels a run computes with: the rule, without torch, for the plan that states it and for
kernels/choose.py, which obeys it.

    native     on a CPU, fp32 and bf16: C, where it was compiled for this processor
    torch      on a CPU otherwise: torch alone, gradients by hand
    cuda       on an NVIDIA card of compute capability 8.0 or more, bf16 and fp16, where triton is installed
    reference  elsewhere, and where attention is asked for as "math": torch alone, gradients by autograd

LUTHIER_KERNELS in the environment takes one of them in place of the best. What a rule cannot know, kernels/choose.py
finds out before the first step: kernels that give a wrong answer on their first check are not used, and it says so.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from luthier.errors import UsageError
from luthier.hardware.compiled import compiled_kernels
from luthier.hardware.device import Device, Installed, KernelSet

__all__ = ["VARIABLE", "KernelChoice", "cuda_lacks", "installed_here", "kernel_set", "kernels_of", "wish"]

VARIABLE = "LUTHIER_KERNELS"
_NATIVE, _HALVES = ("fp32", "bf16"), ("bf16", "fp16")


@dataclass(frozen=True)
class KernelChoice:
    """`label` is the set with its instruction set, as the plan has it; `notice` a sentence where it is not the one that
    would be expected (else empty)."""

    name: KernelSet
    label: str
    notice: str = ""


def wish(environment: Mapping[str, str]) -> KernelSet | None:
    """What LUTHIER_KERNELS asks for, if anything. Raises UsageError where it is none of the sets."""
    said = environment.get(VARIABLE) or None
    for one in get_args(KernelSet):
        if said == one:
            known: KernelSet = one
            return known
    if said is not None:
        known_names = ", ".join(get_args(KernelSet))
        raise UsageError(f"{VARIABLE} is {said!r}", f"set it to one of {known_names}, or unset it")
    return None


def installed_here(*, rocm: bool = False) -> Installed:
    """What this machine has. Raises UsageError as `wish` does."""
    compiled = compiled_kernels()
    return Installed(
        compiled=compiled.variant,
        reason=compiled.reason,
        triton=find_spec("triton") is not None,
        rocm=rocm,
        glibc=sys.platform == "linux" and platform.libc_ver()[0] == "glibc",
        tunables=os.environ.get("GLIBC_TUNABLES", ""),
        wish=wish(os.environ),
    )


def kernel_set(
    kind: str,
    precision: str,
    attention: Literal["flash", "efficient", "math"],
    wanted: KernelSet | None,
    compiled: str | None,
    reason: str = "",
) -> KernelChoice:
    """The set for a device of `kind` (cpu, cuda, mps); of a card only that it may have "cuda", see `cuda_lacks`.

    precision: fp32, bf16, fp16, or the name of another. compiled: the C kernels' instruction set, "" where nobody knows
    which; None: there are none, for `reason`.
    """
    if wanted == "reference" or attention == "math" or (kind not in ("cpu", "cuda") and wanted is None):
        return KernelChoice("reference", "reference")
    if kind == "cuda" and wanted in (None, "cuda"):
        return KernelChoice("cuda", "cuda")
    if wanted == "torch":
        return KernelChoice("torch", "torch")
    if wanted == "cuda":
        notice = f"the CUDA kernels need an NVIDIA card, and this run is on {kind}: torch's are used"
    elif precision not in _NATIVE or kind != "cpu":
        notice = f"the C kernels know fp32 and bf16 on a CPU, not {precision} on {kind}: torch's are used"
    elif compiled is None:
        notice = f"{reason}: torch's kernels are used, at 50 to 60 % of the speed"
    else:
        return KernelChoice("native", f"native, {compiled}" if compiled else "native")
    return KernelChoice("torch", "torch", notice)


def cuda_lacks(precision: str, capability: tuple[int, int], *, rocm: bool, triton: bool) -> str:
    """What the kernels of cuda.py need and do not find; empty: nothing."""
    if rocm:
        return "the CUDA kernels are made for NVIDIA's cards"
    if precision not in _HALVES:
        return f"the CUDA kernels know bf16 and fp16, not {precision}"
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, and this card has {'.'.join(map(str, capability))}"
    if not triton:
        return "the CUDA kernels are compiled by triton, which is not installed"
    return ""


def kernels_of(device: Device, precision: str, attention: Literal["flash", "efficient", "math"]) -> KernelChoice:
    """What a run on `device` will compute with, as far as can be said before."""
    there = device.installed
    choice = kernel_set(device.kind, precision, attention, there.wish, there.compiled, there.reason)
    if choice.name != "cuda":
        return choice
    lacks = cuda_lacks(precision, device.capability or (0, 0), rocm=there.rocm, triton=there.triton)
    if not lacks:
        return choice
    return KernelChoice("reference", "reference", f"{lacks}: torch's kernels are used, with gradients by autograd")
