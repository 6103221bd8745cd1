"""Looks at this machine and says what it has. The only impure file of the plan's side of the house.

Torch is imported only where there is a sign of an accelerator, so that on a plain CPU a plan takes no seconds to start.
Every reader takes the root of the file system, so that tests can lay out the files of machines they do not sit at.

Sources: proc(5) for cpuinfo; the kernel's admin guide for cgroup v1 (memory.limit_in_bytes, cpu.cfs_quota_us) and v2
(memory.max, cpu.max; limits of every ancestor hold); the CUDA programming guide's table of compute capabilities for
fp16 (7.0: tensor cores) and bf16 (8.0).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

from luthier.hardware.device import GIB, Device, Precision

__all__ = ["accelerator_signs", "cgroup_cores", "cgroup_memory", "cpu_device", "this_device"]

_ROOT = Path("/")
_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number just below 2**63
_TENSOR_CORES = (7, 0)
_BF16_CORES = (8, 0)
_MAC_WITH_BF16 = 14  # Metal computes bf16 from macOS 14 on


def this_device() -> Device:
    """The device that this machine trains on: the first CUDA device, else Apple's GPU, else the CPU."""
    if accelerator_signs(_ROOT):
        import torch

        if torch.cuda.is_available():
            return _cuda_device()
        if torch.backends.mps.is_available():
            return _mps_device()
    return cpu_device()


def accelerator_signs(root: Path) -> bool:
    """Whether there may be an accelerator: a driver's device file (NVIDIA, WSL's, AMD's), or a Mac of Apple silicon."""
    if any((root / "dev" / name).exists() for name in ("nvidiactl", "nvidia0", "dxg", "kfd")):
        return True
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _cuda_device() -> Device:
    import torch

    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    fast: tuple[Precision, ...] = ("fp32",)
    if torch.version.hip is not None:  # AMD: the capability numbers mean other things
        fast = ("bf16", "fp16", "fp32") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp16", "fp32")
    elif capability >= _BF16_CORES:
        fast = ("bf16", "fp16", "fp32")
    elif capability >= _TENSOR_CORES:
        fast = ("fp16", "fp32")
    return Device("cuda", properties.name, properties.total_memory / GIB, _cores(_ROOT), capability, fast)


def _mps_device() -> Device:
    import torch

    release = platform.mac_ver()[0].split(".")[0]
    new = release.isdecimal() and int(release) >= _MAC_WITH_BF16
    fast: tuple[Precision, ...] = ("bf16", "fp16", "fp32") if new else ("fp16", "fp32")
    memory = torch.mps.recommended_max_memory() / GIB
    return Device("mps", f"Apple {platform.processor() or platform.machine()} GPU", memory, _cores(_ROOT), None, fast)


def cpu_device(root: Path = _ROOT) -> Device:
    """The CPU, with what this process may use of it."""
    records = _cpuinfo(root)
    first = records[0] if records else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    # x86 calls it avx512_bf16 or amx_bf16, 64-bit ARM just bf16.
    fast: tuple[Precision, ...] = ("bf16", "fp32") if flags & {"avx512_bf16", "amx_bf16", "bf16"} else ("fp32",)
    name = first.get("model name") or platform.processor() or platform.machine()
    memory = float(psutil.virtual_memory().total)
    limit = cgroup_memory(root)
    return Device("cpu", name, (memory if limit is None else min(memory, limit)) / GIB, _cores(root), None, fast)


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


def _cores(root: Path) -> int:
    """Physical cores that this process may use: its affinity mask, then the container's share of CPU time."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    records = _cpuinfo(root)
    cores: set[tuple[str, str]] = set()
    for record in records:
        if (allowed is None or int(record["processor"]) in allowed) and "core id" in record:
            cores.add((record.get("physical id", "0"), record["core id"]))
    count = len(cores) or (len(allowed) if allowed else psutil.cpu_count(logical=False) or 1)
    share = cgroup_cores(root)
    return max(1, count if share is None else min(count, math.ceil(share)))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders whose limits hold for this process: its own group's and every ancestor's, of v1 and v2.

    Inside a container the path in /proc may not be mounted; then the mount's own top is the container's group.
    """
    listing = root / "proc" / "self" / "cgroup"
    mount = root / "sys" / "fs" / "cgroup"
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    tops = {mount: "", mount / controller: ""}
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            tops[mount] = path
        elif controller in names.split(","):
            tops[mount / controller] = path
    for top, path in tops.items():
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield top


def _first_numbers(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def cgroup_memory(root: Path = _ROOT) -> int | None:
    """The container's memory limit in bytes, the least along its ancestors; None where there is none."""
    limits = []
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _first_numbers(folder / name)
            if words and words[0].isdecimal() and int(words[0]) < _UNLIMITED:
                limits.append(int(words[0]))
    return min(limits, default=None)


def cgroup_cores(root: Path = _ROOT) -> float | None:
    """The container's share of CPU time in cores, the least along its ancestors; None where there is no limit."""
    shares = []
    for folder in _cgroups(root, "cpu"):
        words = _first_numbers(folder / "cpu.max")
        if not words:
            words = [*_first_numbers(folder / "cpu.cfs_quota_us"), *_first_numbers(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]) > 0:  # -1, max: no limit
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)
