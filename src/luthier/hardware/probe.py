"""Looks at this machine and says what it has. With the files it calls, the only impure part of the plan's side.

Torch is imported only where there is a sign of an accelerator, so that on a plain CPU a plan takes no seconds to start.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from luthier.hardware.accelerators import (
    Gpu,
    Platform,
    Run,
    accelerator_signs,
    driver_version,
    gpu_device,
    intel_signs,
    link_speed,
    run_tool,
    torch_gpus,
)
from luthier.hardware.calibrate import stored_rates
from luthier.hardware.cgroups import ROOT, cgroup_memory
from luthier.hardware.cpu import cpu_device, cpu_flags, free_memory
from luthier.hardware.device import GIB, Device
from luthier.hardware.kernels import installed_here

__all__ = ["Accelerator", "Machine", "describe", "free_disk", "this_device"]

Look = Callable[[bool], tuple[Gpu, ...]]
"""Gives the GPUs that torch can use; with True asks each for its free memory."""


@dataclass(frozen=True)
class Accelerator:
    """One accelerator of this machine. free_gib None: it was not asked. trains: whether this version trains on it."""

    platform: Platform
    name: str
    memory_gib: float
    free_gib: float | None
    capability: tuple[int, int] | None
    trains: bool


@dataclass(frozen=True)
class Machine:
    """All that `luthier doctor` shows of the hardware.

    device: the one that trains here, as plans get it. flags: the CPU's extensions that matter. total_gib, free_gib: the
    host's memory, and what of it can be had now in this container. limit_gib: the container's limit, None without one.
    disk: the folder whose disk was looked at. driver: NVIDIA's kernel driver; None: none. signs: whether there is a
    driver's device file, be it that torch can use it or not.
    """

    system: str
    device: Device
    cpu: Device
    flags: tuple[str, ...]
    total_gib: float
    free_gib: float
    limit_gib: float | None
    disk: Path
    disk_gib: float
    accelerators: tuple[Accelerator, ...]
    driver: str | None
    signs: bool


def this_device(root: Path = ROOT, look: Look = torch_gpus, folder: Path | None = None) -> Device:
    """The device that this machine trains on: the first CUDA device, else Apple's GPU, else the CPU.

    folder: where runs go to, whose disk counts; left out, the current one. Rates are those that were measured on it
    before, if any. How fast the devices are linked is not asked: one of them trains.
    """
    gpus = look(False) if accelerator_signs(root) else ()
    return _device(gpus, root, Path.cwd() if folder is None else folder)


def describe(root: Path = ROOT, look: Look = torch_gpus, folder: Path | None = None, run: Run = run_tool) -> Machine:
    """The whole machine, every accelerator asked."""
    signs = accelerator_signs(root)
    gpus = look(True) if signs or intel_signs(root) else ()
    where = _existing(Path.cwd() if folder is None else folder)
    limit = cgroup_memory(root)
    total = int(psutil.virtual_memory().total)
    device = _device(gpus, root, where)
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        device=replace(device, link=link_speed(run)) if device.count > 1 else device,
        cpu=cpu_device(root),
        flags=cpu_flags(root),
        total_gib=total / GIB,
        free_gib=free_memory(root) / GIB,
        limit_gib=None if limit is None or limit >= total else limit / GIB,
        disk=where,
        disk_gib=free_disk(where),
        accelerators=tuple(_accelerator(gpu) for gpu in gpus),
        driver=driver_version(root),
        signs=signs,
    )


def free_disk(folder: Path) -> float:
    """GiB free to this user on the disk that `folder` is on, or will be once it is made."""
    return shutil.disk_usage(_existing(folder)).free / GIB


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _device(gpus: tuple[Gpu, ...], root: Path, folder: Path) -> Device:
    usable = gpus if gpus and gpus[0].platform != "xpu" else ()
    device = gpu_device(usable, root) if usable else cpu_device(root)
    rocm = bool(usable) and usable[0].platform == "rocm"
    device = replace(device, disk_gib=free_disk(folder), installed=installed_here(rocm=rocm))
    return replace(device, rates=stored_rates(device))


def _accelerator(gpu: Gpu) -> Accelerator:
    free = None if gpu.free is None else gpu.free / GIB
    return Accelerator(gpu.platform, gpu.name, gpu.total / GIB, free, gpu.capability, gpu.platform != "xpu")
