"""What is missing or wrong on a machine, and what mends it. Computed from values, so that any machine can be tested."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from luthier.hardware.device import Device
from luthier.hardware.kernels import VARIABLE, kernels_of
from luthier.hardware.probe import Accelerator, Machine

__all__ = ["LIBRARIES", "Finding", "Library", "checks", "installed", "kernels_line"]


@dataclass(frozen=True)
class Library:
    """use: what it is for. extra: the part of Luthier that brings it; None: every installation has it."""

    name: str
    use: str
    extra: str | None = None


LIBRARIES = (
    Library("torch", "training"),
    Library("transformers", "chat templates"),
    Library("tokenizers", "tokens"),
    Library("safetensors", "reading and writing weights"),
    Library("huggingface_hub", "models of the hub"),
    Library("bitsandbytes", "nf4 (QLoRA) and 8-bit optimizers"),
    Library("gguf", "exports for llama.cpp and Ollama"),
    Library("datasets", "data sets of the hub", "data"),
    Library("llama-cpp-python", "checking a GGUF export", "llama-cpp"),
)

_PYTHON = (3, 10)
_LITTLE_DISK, _NO_DISK = 10.0, 0.5
_TAKEN = 0.1  # of a card, before it is worth a word
_SMALLER = 0.75  # a container's part of the host's memory
_BUSY = 0.25  # of the memory free


@dataclass(frozen=True)
class Finding:
    """One thing to know. remedy: the command, or what to do."""

    severity: Literal["problem", "warning", "note"]
    message: str
    remedy: str | None = None


def installed() -> dict[str, str | None]:
    """The version of each library, None where it is missing. Imports none of them."""
    return {one.name: _version(one.name) for one in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def wanted() -> dict[str, str]:
    """The least version of each library that this Luthier was made for, as its own metadata has it."""
    found = (re.match(r"([\w.-]+?)\s*>=\s*([\w.]+)", line) for line in metadata.requires("luthier") or ())
    return {match[1]: match[2] for match in found if match is not None}


def checks(
    machine: Machine,
    versions: Mapping[str, str | None],
    python: tuple[int, ...],
    least: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    """All that is to be said of a machine, the worst first. least: versions wanted; left out, Luthier's own."""
    found = [
        *_software(versions, python, wanted() if least is None else least),
        *_cards(machine, versions.get("torch")),
        *_kernels(machine.device),
        *_memory(machine),
        *_disk(machine),
    ]
    order = ("problem", "warning", "note")
    return tuple(sorted(found, key=lambda one: order.index(one.severity)))


def _software(
    versions: Mapping[str, str | None], python: tuple[int, ...], least: Mapping[str, str]
) -> Iterator[Finding]:
    if python[:2] < _PYTHON:
        said = f"Python {'.'.join(map(str, python[:3]))} is older than {_PYTHON[0]}.{_PYTHON[1]}, which Luthier needs"
        yield Finding("problem", said, "install a newer Python, and Luthier into an environment of it")
    for one in LIBRARIES:
        version, low = versions.get(one.name), least.get(one.name)
        pinned = f"'{one.name}>={low}'" if low else one.name
        if version is None and one.extra is None:
            yield Finding("problem", f"{one.name} is not installed: no {one.use}", f"pip install {pinned}")
        elif version is not None and low is not None and _release(version) < _release(low):
            said = f"{one.name} {version} is older than {low}, which Luthier was made for"
            yield Finding("warning", said, f"pip install --upgrade {pinned}")


def _release(version: str) -> tuple[int, ...]:
    """2.9.1+cu128 -> (2, 9, 1), without zeros at the end."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _cards(machine: Machine, torch: str | None) -> Iterator[Finding]:
    if machine.signs and not machine.accelerators and torch is not None:
        yield _unusable(machine.driver, torch)
    for index, one in enumerate(machine.accelerators):
        yield from _card(index, one)
    names = list(dict.fromkeys(one.name for one in machine.accelerators if one.trains))
    if len(names) > 1:
        said = f"different cards: {', '.join(names)}; training takes the first"
        yield Finding("note", said, "CUDA_VISIBLE_DEVICES=1 luthier … takes the second")


def _unusable(driver: str | None, torch: str) -> Finding:
    if driver is None:  # WSL, AMD, a Mac: the sign does not say whether torch should be able to
        said = f"there are signs of a GPU, but torch {torch} finds none that it can use"
        return Finding("warning", said, "the command for your GPU that PyTorch's page Get Started gives")
    if "+cpu" in torch:
        said = f"an NVIDIA card is here (driver {driver}), but torch {torch} is a build for the CPU"
        mends = "pip uninstall torch, then the command for CUDA that PyTorch's page Get Started gives"
    else:
        said = f"an NVIDIA driver is here ({driver}), but torch {torch} finds no card that it can use"
        mends = "nvidia-smi shows whether the card answers; a newer driver, or a container started with --gpus all"
    return Finding("problem", said, mends)


def _card(index: int, one: Accelerator) -> Iterator[Finding]:
    if one.platform == "xpu":
        yield Finding("note", f"{one.name}: nothing trains on Intel's GPUs yet; the CPU is used")
    if one.platform == "rocm":
        yield Finding("note", f"{one.name}: torch serves it through ROCm; nobody has trained on it with Luthier yet")
    if one.platform in ("cuda", "rocm") and one.free_gib is not None:
        taken = one.memory_gib - one.free_gib
        if taken > _TAKEN * one.memory_gib:
            said = f"card {index}, {one.name}: others hold {taken:.1f} of its {one.memory_gib:.1f} GiB"
            severity: Literal["warning", "note"] = "warning" if taken > one.memory_gib / 2 else "note"
            tool = "nvidia-smi" if one.platform == "cuda" else "rocm-smi"
            yield Finding(severity, said, f"{tool} lists the processes; end what you do not need")


def kernels_line(device: Device) -> str:
    """Which kernels training has here, in its best precision; of a CPU also which of the C kernels there are."""
    precision = next(one for one in ("bf16", "fp16", "fp32") if one in device.fast)
    there, choice = device.installed, kernels_of(device, precision, "math" if device.kind == "mps" else "flash")
    if there.wish is not None:
        return f"{choice.label}, as {VARIABLE} says"
    if device.kind == "cpu" and there.compiled is None:
        return f"{choice.label}: {there.reason}"
    return choice.label


def _kernels(device: Device) -> Iterator[Finding]:
    there = device.installed
    if device.kind == "cpu" and there.compiled is None:
        said = f"training computes with torch's own operations, more slowly: {there.reason}"
        yield Finding("warning", said, "install a C compiler (gcc or clang), and luthier again from its source")
    if device.kind == "cuda" and not there.triton and not there.rocm:
        said = "training computes with torch's own operations, more slowly: triton is not installed"
        yield Finding("warning", said, "pip install triton")


def _memory(machine: Machine) -> Iterator[Finding]:
    limit, total = machine.limit_gib, machine.total_gib
    if limit is not None and limit < _SMALLER * total:
        said = f"this container may use {limit:.1f} GiB of the host's {total:.1f}; plans count on {limit:.1f}"
        yield Finding("note", said, "start it with a higher limit, e.g. docker run --memory")
    usable = machine.cpu.memory_gib
    if machine.free_gib < _BUSY * usable:
        said = f"of {usable:.1f} GiB of memory only {machine.free_gib:.1f} can be had now"
        yield Finding("warning", said, "end other programs; top shows which hold it")


def _disk(machine: Machine) -> Iterator[Finding]:
    free = machine.disk_gib
    mends = "remove what you do not need there, or write to another disk with --out"
    if free < _NO_DISK:
        yield Finding("problem", f"{machine.disk}: the disk is full ({free:.1f} GiB free); no run can be saved", mends)
    elif free < _LITTLE_DISK:
        said = f"{machine.disk}: {free:.1f} GiB free; checkpoints and exports of large models need more"
        yield Finding("warning", said, mends)
