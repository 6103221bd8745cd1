"""GPUs: what torch and the driver say of them as facts, and the `Device` that follows from the facts.

Only `torch_gpus` touches torch; all else computes from `Gpu` values, so tests can have cards that nobody here has.

Sources: the CUDA programming guide's table of compute capabilities for fp16 (7.0: tensor cores), int8 (7.2), bf16 (8.0)
and fp8 (8.9); the PCI-SIG base specifications for bytes a second of a lane.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

from luthier.hardware.cgroups import ROOT
from luthier.hardware.cpu import apple_chip, cpu_cores, free_memory, host_memory, own_memory
from luthier.hardware.device import GIB, Device, Format

__all__ = [
    "Gpu",
    "Platform",
    "Run",
    "accelerator_signs",
    "driver_version",
    "gpu_device",
    "intel_signs",
    "link_speed",
    "run_tool",
    "torch_gpus",
]

Platform: TypeAlias = Literal["cuda", "rocm", "mps", "xpu"]
Run: TypeAlias = Callable[[Sequence[str]], str | None]
"""Runs a command and gives what it prints; None where it is missing or fails."""

_INT8_CORES, _TENSOR_CORES, _BF16_CORES, _FP8_CORES = (7, 2), (7, 0), (8, 0), (8, 9)
_MAC_WITH_BF16 = 14  # Metal computes bf16 from macOS 14 on
_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes a second each way of one PCIe lane, by generation."""

_INTEL = "0x8086"  # the PCI vendor

_OWN = 0.75 * GIB
"""Bytes. Asking a card for its free memory takes some of it: this process's CUDA context (0.1 to 0.6 GiB), which a plan
counts as its own. So a card that lacks no more than this is taken to be free; what more is missing, others hold."""


@dataclass(frozen=True)
class Gpu:
    """What is known of one GPU. total, free: bytes. bf16: whether in hardware, None: the capability says.

    free None: not asked. capability None: the platform has none.
    """

    platform: Platform
    name: str
    total: int
    free: int | None
    capability: tuple[int, int] | None = None
    bf16: bool | None = None


def accelerator_signs(root: Path) -> bool:
    """Whether there may be an accelerator: a driver's device file (NVIDIA, WSL's, AMD's), or a Mac of Apple silicon."""
    if any((root / "dev" / name).exists() for name in ("nvidiactl", "nvidia0", "dxg", "kfd")):
        return True
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def intel_signs(root: Path) -> bool:
    """Whether there is an Intel GPU, be it the small one beside a CPU. No reason to import torch for a plan."""
    vendors = (root / "sys" / "class" / "drm").glob("renderD*/device/vendor")
    return any(path.read_text(encoding="utf-8").strip() == _INTEL for path in vendors)


def torch_gpus(every: bool = False) -> tuple[Gpu, ...]:
    """The GPUs that torch can use, the first being the one that trains. Imports torch.

    The free memory is asked of the first, of the others only with `every`: the question takes a context on each. None
    where torch is not installed.
    """
    if find_spec("torch") is None:
        return ()
    import torch

    if torch.cuda.is_available():
        hip = torch.version.hip is not None
        found = []
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            free = _cuda_free(index) if every or index == 0 else None
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if hip else None
            capability = (seen.major, seen.minor)
            found.append(Gpu("rocm" if hip else "cuda", seen.name, seen.total_memory, free, capability, bf16))
        return tuple(found)
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        release = platform.mac_ver()[0].split(".")[0]
        bf16 = release.isdecimal() and int(release) >= _MAC_WITH_BF16
        free = total - torch.mps.driver_allocated_memory()
        return (Gpu("mps", f"{apple_chip() or 'Apple'} GPU", total, free, None, bf16),)
    if torch.xpu.is_available():
        counted = range(torch.xpu.device_count())
        seen_xpu = [torch.xpu.get_device_properties(index) for index in counted]
        return tuple(Gpu("xpu", one.name, one.total_memory, None) for one in seen_xpu)
    return ()


def _cuda_free(index: int) -> int:
    import torch

    try:
        return torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # too full for even a context, or kept by another process alone: nothing can be had
        return 0


def gpu_device(gpus: Sequence[Gpu], root: Path = ROOT) -> Device:
    """The first of `gpus` as the device that trains; `count` is how many are of its kind and size."""
    first = gpus[0]
    if first.platform == "xpu":
        raise ValueError("nothing trains on an XPU")
    free = first.total if first.free is None or first.total - first.free <= _OWN else first.free
    same = sum(
        1 for one in gpus if (one.name, one.total, one.capability) == (first.name, first.total, first.capability)
    )
    return Device(
        "mps" if first.platform == "mps" else "cuda",
        first.name,
        first.total / GIB,
        cpu_cores(root),
        first.capability,
        _formats(first),
        free_gib=free / GIB,
        count=same,
        host_gib=min(host_memory(root), free_memory(root) + own_memory()) / GIB,
    )


def _formats(gpu: Gpu) -> tuple[Format, ...]:
    """What the GPU has hardware for; AMD's capability numbers mean other things than NVIDIA's."""
    if gpu.platform != "cuda":
        return ("bf16", "fp16", "fp32") if gpu.bf16 else ("fp16", "fp32")
    capability = gpu.capability or (0, 0)
    fast: list[Format] = ["bf16"] if capability >= _BF16_CORES else []
    if capability >= _TENSOR_CORES:
        fast.append("fp16")
    fast.append("fp32")
    if capability >= _FP8_CORES:
        fast.append("fp8")
    if capability >= _INT8_CORES:
        fast.append("int8")
    return tuple(fast)


def run_tool(command: Sequence[str]) -> str | None:
    """Run a tool of the driver's."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # not installed, not allowed, or hanging: then it is not known
        return None
    return done.stdout if done.returncode == 0 else None


def link_speed(run: Run = run_tool) -> float | None:
    """Bytes a second each way from the first NVIDIA card to the others: NVLink's lanes together, else PCIe's; None
    where nvidia-smi does not tell."""
    lanes = re.findall(r"Link \d+:\s*([\d.]+) GB/s", run(("nvidia-smi", "nvlink", "--status", "-i", "0")) or "")
    if lanes:
        return sum(map(float, lanes)) * 1e9
    query = ("nvidia-smi", "--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader", "-i", "0")
    found = re.match(r"\s*(\d+)\s*,\s*(\d+)", run(query) or "")
    if found is None or int(found[1]) not in _LANE:
        return None
    return _LANE[int(found[1])] * int(found[2])


def driver_version(root: Path = ROOT) -> str | None:
    """The version of NVIDIA's kernel driver; None where there is none."""
    path = root / "proc" / "driver" / "nvidia" / "version"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else None
