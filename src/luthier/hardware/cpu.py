"""The CPU and the memory beside it, read from /proc, the container's limits and psutil.

Sources: proc(5) for cpuinfo; its flags as arch/x86/include/asm/cpufeatures.h and arch/arm64's elf_hwcaps name them.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from pathlib import Path

import psutil

from luthier.hardware.cgroups import ROOT, cgroup_cores, cgroup_free, cgroup_memory
from luthier.hardware.device import GIB, Device, Format

__all__ = ["apple_chip", "cpu_cores", "cpu_device", "cpu_flags", "free_memory", "host_memory", "own_memory"]

# x86 calls bf16 avx512_bf16 or amx_bf16, 64-bit ARM just bf16; int8 by its dot products.
_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"})
_MATTER = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16")


def cpu_device(root: Path = ROOT) -> Device:
    """The CPU, with what this process may use of it."""
    flags = _flags(root)
    fast: list[Format] = ["bf16"] if flags & _BF16 else []
    fast.append("fp32")
    if flags & _INT8:
        fast.append("int8")
    records = _cpuinfo(root)
    name = (records[0].get("model name") if records else None) or apple_chip() or platform.processor()
    memory = host_memory(root)
    return Device(
        "cpu",
        name or platform.machine(),
        memory / GIB,
        cpu_cores(root),
        None,
        tuple(fast),
        free_gib=min(memory, free_memory(root) + own_memory()) / GIB,
        host_gib=memory / GIB,
    )


def host_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process may use at most: the machine's or the container's, whichever is less."""
    total, limit = int(psutil.virtual_memory().total), cgroup_memory(root)
    return total if limit is None else min(total, limit)


def free_memory(root: Path = ROOT) -> int:
    """Bytes that can be had now without swapping, on the machine and in the container, whichever is less."""
    available, free = int(psutil.virtual_memory().available), cgroup_free(root)
    return available if free is None else min(available, free)


def own_memory() -> int:
    """Bytes that this process holds itself, without files and what it shares; 0 where the system does not tell the
    two apart. A plan counts the interpreter and its libraries as its own, so others do not hold these."""
    held = psutil.Process().memory_info()
    return max(0, int(held.rss - getattr(held, "shared", held.rss)))


def cpu_flags(root: Path = ROOT) -> tuple[str, ...]:
    """The CPU's extensions that matter to training, as the kernel names them."""
    flags = _flags(root)
    return tuple(one for one in _MATTER if one in flags)


def apple_chip() -> str | None:
    """The chip's name, e.g. Apple M4 Max; None where this is no Mac."""
    if platform.system() != "Darwin":
        return None
    command = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # a sandbox that forbids it; there are other names
        return None
    return done.stdout.strip() or None


def cpu_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may use: its affinity mask, then the container's share of CPU time."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores: set[tuple[str, str]] = set()
    for record in _cpuinfo(root):
        if (allowed is None or int(record["processor"]) in allowed) and "core id" in record:
            cores.add((record.get("physical id", "0"), record["core id"]))
    count = len(cores) or (len(allowed) if allowed else psutil.cpu_count(logical=False) or 1)
    share = cgroup_cores(root)
    return max(1, count if share is None else min(count, math.ceil(share)))


def _flags(root: Path) -> frozenset[str]:
    records = _cpuinfo(root)
    first = records[0] if records else {}
    return frozenset((first.get("flags") or first.get("Features") or "").split())


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One mapping for each logical processor; empty where there is no /proc."""
    path = root / "proc" / "cpuinfo"
    if not path.is_file():
        return []
    records: list[dict[str, str]] = []
    for block in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        record = {name.strip(): value.strip() for name, colon, value in pairs if colon}
        if "processor" in record:
            records.append(record)
    return records
