"""What a run computes with, as decisions of the plan: kernels, attention, compilation, the allocator."""

from __future__ import annotations

from luthier.hardware.device import Device, Precision
from luthier.hardware.kernels import VARIABLE, KernelChoice, kernels_of
from luthier.model.config import ModelConfig
from luthier.plan import sources
from luthier.plan.decision import YOURS, Decision
from luthier.plan.search import attention_on
from luthier.plan.settings import Attention
from luthier.recipe.schema import Recipe

__all__ = ["TUNABLES", "choose_computing"]

TUNABLES = "tcache_count=0:mxfast=0:mmap_max=0:trim_threshold=17179869184:top_pad=33554432"
"""What cli/allocator.py sets of glibc's allocator; held equal by a test."""

_DOES = {
    "native": "Norms, rotary positions, SwiGLU, attention and the loss are C kernels{variant}, and a layer's gradients "
    "are written by hand; before the first step each kernel is held against torch's.",
    "torch": "A layer's gradients are written by hand, of torch's operations; attention is batched matrix products for "
    "each document.",
    "cuda": "Norms, rotary positions, SwiGLU and the loss are Triton kernels, attention is torch's flash kernel, and a "
    "layer's gradients are written by hand; before the first step each kernel is held against torch's.",
    "reference": "Plain torch operations, with gradients by autograd: the specification of all other kernels.",
}
_WITHOUT = {
    "native": ("torch: the same without C, slower", "reference: gradients by autograd, slower, and more is kept"),
    "torch": ("reference: gradients by autograd, slower, and more is kept",),
    "cuda": ("reference: gradients by autograd, slower, and more is kept",),
    "reference": (),
}


def choose_computing(
    recipe: Recipe, device: Device, config: ModelConfig, precision: Precision
) -> tuple[Decision[object], ...]:
    """Kernels, attention, compilation, and where it is set the allocator."""
    attention = _attention(recipe, device, config, precision)
    choice = kernels_of(device, precision, attention.value)
    return (_kernels(device, choice), attention, _compilation(choice), *_allocator(device))


def _kernels(device: Device, choice: KernelChoice) -> Decision[str]:
    """The set of kernels; which one is no setting of a run, for a run may be gone on with under another."""
    variant = choice.label.partition(", ")[2]
    reason = _DOES[choice.name].format(variant=f" compiled for {variant}" if variant else "")
    if choice.notice:
        reason += f" {choice.notice[0].upper()}{choice.notice[1:]}."
    if device.installed.wish is not None:
        return Decision("train.kernels", choice.label, f"As {VARIABLE} says. {reason}", "your environment")
    return Decision("train.kernels", choice.label, reason, "this installation", _WITHOUT[choice.name])


def _allocator(device: Device) -> tuple[Decision[str], ...]:
    """Where training on this device sets the C library's allocator, and to what; elsewhere nothing."""
    if device.kind != "cpu" or not device.installed.glibc:
        return ()
    given = device.installed.tunables
    if "glibc.malloc." in given and "glibc.malloc.mmap_max=0" not in given:
        reason = "As GLIBC_TUNABLES of your environment says; what is predicted of memory is so without it."
        return (Decision("train.allocator", given, reason, "your environment"),)
    reason = (
        "glibc's allocator keeps what a step gives back for the next step, instead of handing it to the system page by "
        "page or holding splinters of it. It is set when a process starts, so the command starts itself once more."
    )
    return (Decision("train.allocator", TUNABLES, reason, "measured: docs/decisions/0009"),)


def _attention(recipe: Recipe, device: Device, config: ModelConfig, precision: Precision) -> Decision[Attention]:
    """How attention is computed: with kernels by hand in blocks, else by a backend of torch."""
    usual, asked = attention_on(device, config, precision), recipe.train.attention
    reasons = {
        "flash": f"{device.name} has torch's flash attention: scores are never kept, so memory is linear in length.",
        "efficient": f"Flash attention needs compute capability 8.0, 16 bits and no sliding window, and {device.name} "
        f"in {precision} with this model lacks one of them; the memory-efficient kernels keep no scores either.",
        "math": f"{device.name} has neither: scores of a whole document are kept, so long documents cost memory.",
    }
    by_hand = {
        "native": "The C kernel of train.kernels keeps the scores of a block of queries in a core's cache, and none "
        "after that: memory is linear in length.",
        "torch": "Batched matrix products, for a block of queries at a time; no scores are kept for the backward pass.",
    }
    reason = by_hand.get(kernels_of(device, precision, usual).name, reasons[usual])
    if asked != "auto":
        said = "As you set it."
        if asked != usual:
            said += f" {usual} is what the plan would take: {reason}"
        return Decision("train.attention", asked, said, YOURS)
    rejected = {
        "flash": ("math: keeps length × length scores",),
        "efficient": ("flash: not possible here", "math: keeps length × length scores"),
        "math": ("flash, efficient: torch has them for CPU and CUDA only",),
    }
    source = sources.ATTENTION if reason == reasons[usual] else "this installation"
    return Decision("train.attention", usual, reason, source, rejected[usual])


def _compilation(choice: KernelChoice) -> Decision[bool]:
    reasons = {
        "native": "Nothing is compiled while it trains: the C kernels were, when luthier was installed.",
        "cuda": "torch.compile is not used; Triton compiles the kernels of train.kernels when each is first called.",
    }
    usual = "Nothing is compiled: what runs is torch's own operations."
    return Decision("train.compile", False, reasons.get(choice.name, usual), "this version")
