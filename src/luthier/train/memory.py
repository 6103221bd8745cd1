"""Memory in use, as the events report it. GiB is 2^30 bytes."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

__all__ = ["Memory", "memory_now", "out_of_memory", "reset_peaks"]


@dataclass(frozen=True)
class Memory:
    """In GiB: `active` in live tensors or not yet free to reuse, `allocated` in live tensors, `reserved` held by torch.

    On a CPU, where torch keeps no such books, all three are the process's resident set.
    """

    active: float
    allocated: float
    reserved: float


def reset_peaks(device: torch.device) -> None:
    """Begin a new interval for CUDA's peak figures; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_now(device: torch.device) -> Memory:
    """CUDA: the peaks since `reset_peaks`. MPS: what is held now. CPU: the resident set now."""
    if device.type == "cuda":
        statistics = torch.cuda.memory_stats(device)
        peaks = [statistics[f"{kind}_bytes.all.peak"] / 2**30 for kind in ("active", "allocated", "reserved")]
        return Memory(*peaks)
    if device.type == "mps":
        held, driver = torch.mps.current_allocated_memory() / 2**30, torch.mps.driver_allocated_memory() / 2**30
        return Memory(held, held, driver)
    resident = psutil.Process().memory_info().rss / 2**30
    return Memory(resident, resident, resident)


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch has a class of its own for CUDA's allocator only; the others' errors are known by what they say."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator: can't allocate memory", "out of memory"))
