"""The machine as a value: what the plan needs to know of it, and nothing that has to be asked of it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["GIB", "Device", "DeviceKind", "Precision"]

GIB = 2**30

DeviceKind: TypeAlias = Literal["cpu", "cuda", "mps"]
Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """The device that trains.

    memory_gib: its memory in GiB; of a CPU what this process may use: physical memory or the container's limit,
    whichever is less. cores: physical CPU cores that this process may use, for every kind. capability: CUDA's, else
    None. fast: the number formats that it has hardware for, fp32 always.
    """

    kind: DeviceKind
    name: str
    memory_gib: float
    cores: int
    capability: tuple[int, int] | None = None
    fast: tuple[Precision, ...] = ("fp32",)
