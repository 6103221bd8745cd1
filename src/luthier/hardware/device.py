"""The machine as a value: what the plan needs to know of it, and nothing that has to be asked of it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "GIB",
    "AttentionRate",
    "Device",
    "DeviceKind",
    "Format",
    "Installed",
    "KernelSet",
    "MatmulRate",
    "Precision",
    "Rates",
]

GIB = 2**30

DeviceKind: TypeAlias = Literal["cpu", "cuda", "mps"]
Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]
Format: TypeAlias = Literal["bf16", "fp16", "fp32", "fp8", "int8"]
"""A number format that hardware may be fast in; training is done in a `Precision`."""
KernelSet: TypeAlias = Literal["native", "cuda", "torch", "reference"]
"""See hardware/kernels.py."""


@dataclass(frozen=True)
class MatmulRate:
    """Dense matrix products: `flops` a second (a multiply and an add are two) in `precision`, where the smaller side
    of the weight is `width` elements. Narrow products are slower, so a machine has one for several widths."""

    precision: Precision
    width: int
    flops: float


@dataclass(frozen=True)
class AttentionRate:
    """Fused causal attention over documents of `length` tokens: useful FLOP/s, 2 L² H d forward and 2.5 times that
    backward (the masked half is not counted, what the backward pass computes again is)."""

    precision: Precision
    length: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, as large programs reach it (not the datasheet's peak).

    matmul: ascending in width for each precision. attention: ascending in length for each precision; one length will
    do where long documents are all that is known. bandwidth: bytes read and written by element-wise operations (4 an
    element on a CPU, which computes narrow formats in fp32). dequantize: weights turned from NF4 into the compute
    dtype. operation: seconds that one operation costs however small it is (the launch, Python, autograd). source: who
    says so. fresh: bytes of large new blocks that the system hands out and the program touches first; None: free, as
    where an allocator keeps its blocks. kernels: what attention, element-wise operations and calls were timed with, as
    a plan names it; empty: not timed.
    """

    matmul: tuple[MatmulRate, ...]
    attention: tuple[AttentionRate, ...]
    bandwidth: float
    dequantize: float
    operation: float
    source: str
    fresh: float | None = None
    kernels: str = ""


@dataclass(frozen=True)
class Installed:
    """What of Luthier and of what it stands on is there, as far as speed and memory depend on it.

    compiled: the instruction set of the C kernels that this processor runs; "": a machine of the catalogue, whose
    installation will find its own; None: there are none, for `reason`. triton: whether it is installed. rocm: whether
    torch is AMD's. glibc: whether the C library is glibc, whose allocator training sets; tunables: GLIBC_TUNABLES of
    the environment. wish: LUTHIER_KERNELS of the environment.
    """

    compiled: str | None = ""
    reason: str = ""
    triton: bool = True
    rocm: bool = False
    glibc: bool = True
    tunables: str = ""
    wish: KernelSet | None = None


@dataclass(frozen=True)
class Device:
    """The device that trains; of several equal ones, each.

    memory_gib: its memory in GiB; of a CPU what this process may use: physical memory or the container's limit,
    whichever is less. cores: physical CPU cores that this process may use, for every kind. capability: CUDA's, else
    None. fast: the number formats that it has hardware for, fp32 always.

    free_gib: what of `memory_gib` nobody holds now; None: all of it (a machine from the catalogue). count: how many
    such devices. host_gib: memory of the host (of a CPU and of unified memory: the same memory). disk_gib: free on the
    disk that runs are written to; None: not known. link: bytes a second between devices, each way. rates: measured or
    the catalogue's; None: not known. known_as: its name in the catalogue, None where it was probed.
    installed: what is there to compute with.
    """

    kind: DeviceKind
    name: str
    memory_gib: float
    cores: int
    capability: tuple[int, int] | None = None
    fast: tuple[Format, ...] = ("fp32",)
    free_gib: float | None = None
    count: int = 1
    host_gib: float | None = None
    disk_gib: float | None = None
    link: float | None = None
    rates: Rates | None = None
    known_as: str | None = None
    installed: Installed = Installed()

    @property
    def usable_gib(self) -> float:
        """What a plan may count on: the memory, less what others hold of it."""
        return self.memory_gib if self.free_gib is None else min(self.free_gib, self.memory_gib)
