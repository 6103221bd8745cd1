"""What this machine does in a second: measured in at most three, kept, and found again without torch.

`calibrate` runs the operations that training is made of, on tensors of its own, and takes the median of each. Rates
belong to one device, torch version, number of threads and set of kernels; they lie in the cache as rates/<key>.json,
and a file that is broken or of another machine counts as absent. Where nothing was measured, `estimate_rates` says what
such a machine usually reaches, on the low side.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import get_args

import orjson

from luthier.errors import UsageError
from luthier.hardware.device import AttentionRate, Device, MatmulRate, Precision, Rates
from luthier.hardware.kernels import kernels_of
from luthier.hardware.timed import Timed
from luthier.runs import SCHEMA_VERSION, cache_root, read_json, write_json

__all__ = ["calibrate", "estimate_rates", "kernels_timed", "stored_rates"]


def calibrate(device: Device, clock: Callable[[], float] = time.perf_counter, timed: Timed | None = None) -> Rates:
    """Measure this machine, which `device` describes, and keep the result for `stored_rates`.

    `clock` gives seconds; on a busy machine with one thread, time.process_time leaves other programs out. `timed` is
    what runs on it compute with (train/timed.py); None: torch's own operations.
    Raises UsageError where the cache cannot be written to.
    """
    from luthier.hardware.measure import measure

    rates = measure(device, clock, timed)
    document = {"schema": SCHEMA_VERSION, "machine": _machine(device), "rates": asdict(rates)}
    path = _path(device)
    try:
        write_json(path, document)
    except OSError as error:
        message = f"the measured rates cannot be kept in {path.parent}: {error.strerror}"
        raise UsageError(message, "set LUTHIER_CACHE to a folder that can be written to") from error
    return rates


def stored_rates(device: Device) -> Rates | None:
    """What `calibrate` measured on this device with this torch, as many threads, and the kernels that a run would have.

    None: nothing that can be used.
    """
    try:
        document = read_json(_path(device))
    except (OSError, orjson.JSONDecodeError):  # never measured, or not whole
        return None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA_VERSION:
        return None
    if document.get("machine") != _machine(device) or not isinstance(document.get("rates"), dict):
        return None
    try:
        found = _read(document["rates"])
    except (KeyError, TypeError, ValueError):  # of an older release, or edited
        return None
    return found if found.kernels == kernels_timed(device) else None


def kernels_timed(device: Device) -> str:
    """The kernels that rates of this device should be of: those of its best precision."""
    return kernels_of(device, _trained(device)[0], "flash").label


def _machine(device: Device) -> dict[str, object]:
    """What rates depend on: all of it must be the same for them to be used again."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    return {
        "kind": device.kind,
        "device": device.name,
        "cores": device.cores,
        "threads": int(threads) if threads.isdecimal() else device.cores,
        "torch": torch,
        "kernels": kernels_timed(device),
    }


def _path(device: Device) -> Path:
    key = hashlib.sha256(repr(sorted(_machine(device).items())).encode()).hexdigest()[:16]
    return cache_root() / "rates" / f"{key}.json"


def _read(found: Mapping[str, object]) -> Rates:
    return Rates(
        matmul=tuple(
            MatmulRate(_precision(one["precision"]), _whole(one["width"]), _positive(one["flops"]))
            for one in _objects(found["matmul"])
        ),
        attention=tuple(
            AttentionRate(
                _precision(one["precision"]),
                _whole(one["length"]),
                _positive(one["forward"]),
                _positive(one["backward"]),
            )
            for one in _objects(found["attention"])
        ),
        bandwidth=_positive(found["bandwidth"]),
        dequantize=_positive(found["dequantize"]),
        operation=_positive(found["operation"]),
        source=str(found["source"]),
        fresh=None if found["fresh"] is None else _positive(found["fresh"]),
        kernels=str(found["kernels"]),
    )


def _objects(value: object) -> list[Mapping[str, object]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise ValueError("a list of objects is wanted")
    return value


def _positive(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError("a positive number is wanted")
    return float(value)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("a positive whole number is wanted")
    return value


def _precision(value: object) -> Precision:
    for one in get_args(Precision):
        if value == one:
            found: Precision = one
            return found
    raise ValueError("a precision is wanted")


ESTIMATED = "estimated; `luthier doctor --calibrate` measures it"

_CLOCK = 2.5e9
"""Cycles a second of a core that computes with wide vectors."""

_CPU_CYCLE: dict[Precision, float] = {"fp32": 18.0, "bf16": 60.0}
"""FLOP that a core reaches in a cycle: about 60 % of two fp32 FMA units of 8 lanes; bf16 dot products on 16 lanes."""

_MPS_CORE: dict[Precision, float] = {"fp32": 2.0e11, "bf16": 2.4e11, "fp16": 2.4e11}
"""FLOP/s of Apple's GPU for each CPU core beside it: the two grow together from M1 (8 cores, 2.6 TFLOP/s) on."""

_CUDA: tuple[tuple[tuple[int, int], float], ...] = (
    ((9, 0), 3.5e14),
    ((8, 0), 5.0e13),
    ((7, 0), 2.0e13),
    ((0, 0), 3.0e12),
)
"""FLOP/s in 16 bits of the smaller cards of each CUDA capability and up."""


def estimate_rates(device: Device) -> Rates:
    """What a machine of this kind usually reaches, on the low side; for those that nobody measured."""
    return replace(_estimate(device), kernels=kernels_timed(device))


def _estimate(device: Device) -> Rates:
    if device.kind == "cuda":
        return _estimate_cuda(device)
    if device.kind == "mps":
        flops = {one: _MPS_CORE[one] * device.cores for one in _trained(device)}
        return _rates(flops, attention=0.3, bandwidth=1e10 * device.cores, operation=3e-5, fresh=None)
    flops = {one: _CPU_CYCLE[one] * _CLOCK * device.cores for one in _trained(device) if one in _CPU_CYCLE}
    native = kernels_timed(device).startswith("native")  # its attention makes nearly as much of a core as products do
    attention, operation = (0.6, 1.5e-5) if native else (0.2, 8e-6)
    return _rates(flops, attention=attention, bandwidth=2e10 * min(device.cores, 8), operation=operation, fresh=3e9)


def _estimate_cuda(device: Device) -> Rates:
    narrow = next(flops for least, flops in _CUDA if (device.capability or (0, 0)) >= least)
    flops = {one: narrow / 6 if one == "fp32" else narrow for one in _trained(device)}
    return _rates(flops, attention=0.4, bandwidth=narrow / 150, operation=1e-5, fresh=None)


def _trained(device: Device) -> tuple[Precision, ...]:
    """The precisions that the device has hardware for."""
    known: tuple[Precision, ...] = get_args(Precision)
    return tuple(one for one in known if one in device.fast or one == "fp32")


def _rates(
    flops: Mapping[Precision, float], *, attention: float, bandwidth: float, operation: float, fresh: float | None
) -> Rates:
    """Rates from the matrix rates; `attention` is its part of them. Products with a LoRA's few rows are slower."""
    matmul = [MatmulRate(one, width, flops[one] * part) for one in flops for width, part in ((16, 0.4), (512, 1.0))]
    fused = [
        AttentionRate(one, length, flops[one] * attention * part, flops[one] * attention * part)
        for one in flops
        for length, part in ((128, 0.4), (2048, 1.0))
    ]
    return Rates(tuple(matmul), tuple(fused), bandwidth, bandwidth / 8, operation, ESTIMATED, fresh)
