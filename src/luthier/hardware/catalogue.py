"""Known machines by name, so that a plan can be made for one that nobody here sits at.

Memory of Apple's chips is what Metal recommends to use at most (recommendedMaxWorkingSetSize, which torch plans with):
two thirds up to 32 GB, three quarters above, as llama.cpp's users report it (10,922.67 MiB of 16 GB in
llama-cpp-python #687, 21,845.34 of 32 in ollama #434, 73,728 of 96 in llama.cpp #3213). Approximate: newer systems
allow more (107.52 GiB of 128 on macOS 26, antirez/ds4 #893), and `sysctl iogpu.wired_limit_mb` changes it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from luthier.errors import UsageError
from luthier.hardware.datasheets import CARDS, CHIPS, PROCESSORS, Card, Chip, Processor
from luthier.hardware.device import Device, Format, Installed, Precision
from luthier.hardware.utilisation import CPU, CUDA, CUDA_LIMITED, MPS, ROCM, Peaks, rates_of

__all__ = ["MACHINES", "known"]

_TERA, _GIGA = 1e12, 1e9
_FP8, _BF16 = (8, 9), (8, 0)
_SMALL_MAC = 32  # GB; up to here Metal recommends two thirds
_MOST = 1024  # devices in one name
_SYSTEM_GB = 1.0  # of a plain computer's memory, what the system itself holds and no process gets


def _card(card: Card) -> Device:
    half: tuple[Precision, ...] = ("bf16", "fp16") if card.rocm or card.capability >= _BF16 else ("fp16",)
    fp8: tuple[Format, ...] = ("fp8",) if card.rocm or card.capability >= _FP8 else ()
    flops: dict[Precision, float] = dict.fromkeys(half, card.half * _TERA)
    flops["fp32"] = card.single * _TERA
    part = ROCM if card.rocm else CUDA_LIMITED if card.limited else CUDA
    return Device(
        "cuda",
        card.title,
        card.seen_gib,
        card.cores,
        card.capability,
        (*half, "fp32", *fp8, "int8"),
        host_gib=card.host_gib,
        link=card.link * _GIGA,
        rates=rates_of(Peaks(flops, card.bandwidth * _GIGA, card.source), part),
        known_as=card.name,
        installed=Installed(rocm=card.rocm),
    )


def _mac(chip: Chip, gigabytes: int) -> Device:
    share = 2 / 3 if gigabytes <= _SMALL_MAC else 3 / 4
    flops: dict[Precision, float] = dict.fromkeys(("bf16", "fp16", "fp32"), chip.single * _TERA)
    return Device(
        "mps",
        f"{chip.title}, {gigabytes} GB",
        gigabytes * share,
        chip.cores,
        None,
        ("bf16", "fp16", "fp32"),
        host_gib=float(gigabytes),
        rates=rates_of(Peaks(flops, chip.bandwidth * _GIGA, chip.source), MPS),
        known_as=f"{chip.name}-{gigabytes}g",
    )


def _processor(processor: Processor) -> Device:
    flops: dict[Precision, float] = {}
    if processor.half is not None:
        flops["bf16"] = processor.half * _TERA
    flops["fp32"] = processor.single * _TERA
    memory = processor.sold_gb - _SYSTEM_GB
    return Device(
        "cpu",
        processor.title,
        memory,
        processor.cores,
        None,
        ("fp32",) if processor.half is None else ("bf16", "fp32", "int8"),
        host_gib=memory,
        rates=rates_of(Peaks(flops, processor.bandwidth * _GIGA, processor.source), CPU),
        known_as=processor.name,
    )


MACHINES: tuple[Device, ...] = (
    *(_card(card) for card in CARDS),
    *(_mac(chip, gigabytes) for chip in CHIPS for gigabytes in chip.sold_gb),
    *(_processor(processor) for processor in PROCESSORS),
)
"""Every machine with one device, cards first. `known` also knows several of one card."""


def _plain(name: str) -> str:
    """A name without what people write differently: case, separators, makers, the form of the socket."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    left = "".join(word for word in words if word not in ("nvidia", "geforce", "tesla", "amd", "instinct", "apple"))
    return re.sub(r"sxm\d?", "", left)


def _spellings() -> dict[str, Device]:
    """Every spelling that is taken, in `_plain`'s form."""
    found: dict[str, Device] = {}
    sold = {card.name: card.sold_gb for card in CARDS}
    for device in MACHINES:
        name = device.known_as or ""
        bases = [_plain(name)]
        sized = re.fullmatch(r"(.*?)-(\d+)g", name)
        if sized is not None:
            bases = [_plain(sized[1]) + sized[2]]
        elif name in sold:
            bases.append(f"{_plain(name)}{sold[name]}")
        bases += [base.removeprefix("rtx") for base in bases if base.startswith("rtx")]
        for base in bases:
            for ending in ("", "g", "gb", "gib") if base[-1].isdecimal() else ("",):
                found[base + ending] = device
    return found


_SPELLINGS = _spellings()


def known(name: str) -> Device:
    """The machine of that name: t4, rtx4090, "A100 40GB", m4-max-64g; several of one card: 4xa100-40g.

    Raises:
        UsageError: there is none; the message has the nearest names.
    """
    several = re.fullmatch(r"\s*(\d+)\s*[xX×*]\s*(\S.*)", name)
    if several is None:
        return _one(name, name)
    device = _one(several[2], name)
    count = int(several[1]) if len(several[1]) <= len(str(_MOST)) else _MOST + 1
    if not 1 <= count <= _MOST:
        raise UsageError(f"{name}: so many cannot be planned for", f"name from 1 to {_MOST:,} devices")
    if count == 1:
        return device
    if device.kind != "cuda":
        raise UsageError(f"{name}: only CUDA cards train together", f"plan for one: --hardware {device.known_as}")
    host = None if device.host_gib is None else device.host_gib * count
    return replace(
        device, count=count, host_gib=host, cores=device.cores * count, known_as=f"{count}x{device.known_as}"
    )


def _one(name: str, asked: str) -> Device:
    plain = _plain(name)
    if plain in _SPELLINGS:
        return _SPELLINGS[plain]
    names = [device.known_as or "" for device in MACHINES]
    sizes = [one for one in names if "-" in one and _plain(one.rpartition("-")[0]) == plain]
    listed = "luthier doctor --machines lists all that are known"
    if sizes:
        raise UsageError(f"{asked}: sold with several sizes of memory", f"name one of {', '.join(sizes)}; {listed}")
    near = difflib.get_close_matches(plain, list(_SPELLINGS), n=12, cutoff=0.5)
    nearest = list(dict.fromkeys(_SPELLINGS[one].known_as or "" for one in near))[:3]
    hint = f"did you mean {', '.join(nearest)}? " if nearest else ""
    raise UsageError(f"there is no machine {asked!r} in the catalogue", f"{hint}{listed}; `this` is the one at hand")
