"""Memory in use, and at its peak, as the events report it. GiB is 2^30 bytes."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["Memory", "memory_now", "memory_peak", "out_of_memory", "reset_peaks", "synchronize"]

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """In GiB: `active` in live tensors or not yet free to reuse, `allocated` in live tensors, `reserved` held by torch.

    On a CPU, where torch keeps no such books, all three are the process's resident set.
    """

    active: float
    allocated: float
    reserved: float


def reset_peaks(device: torch.device) -> None:
    """Begin a new interval for the peak figures, where the system has them: CUDA, and a CPU under Linux."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else nothing to reset
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "cpu" and _CLEAR.exists():
        with suppress(OSError):  # where it may not be written, the interval is the process's life: said in memory_peak
            _CLEAR.write_text("5", encoding="ascii")


def memory_peak(device: torch.device) -> Memory:
    """CUDA: the peaks since `reset_peaks`. MPS, which counts no peaks: all three are what the driver holds, which stays
    what it was at the fullest. CPU: the peak of the resident set, under Linux since `reset_peaks`, elsewhere since
    the process began."""
    if device.type == "cuda":
        return memory_now(device)
    if device.type == "mps":
        held = memory_now(device).reserved
        return Memory(held, held, held)
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        if found is not None:
            peak = int(found[1]) / 2**20
            return Memory(peak, peak, peak)
    import resource  # here: Windows has none

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    peak = most / (2**30 if sys.platform == "darwin" else 2**20)
    return Memory(peak, peak, peak)


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


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


_WORDS = (
    *("DefaultCPUAllocator: can't allocate memory", "out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),  # no room for these libraries' own buffers
    "could not create a primitive",  # oneDNN, for a kernel or its buffers; "primitive descriptor" is another fault
)


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch has a class of its own for CUDA's allocator only; the others' errors are known by what they say."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _WORDS) and "primitive descriptor" not in str(error)
