"""Amounts as people read them: memory in the unit that has digits before the point, time, money."""

from __future__ import annotations

import math

from luthier.hardware.device import GIB

__all__ = ["amount", "duration", "gib", "gib_up"]

_MIB, _KIB = 2**20, 2**10


def amount(size: float) -> str:
    """`16.2 GiB`, `840 MiB`, `9.2 MiB`, `3 KiB`, `0`: three digits at most."""
    if size <= 0:
        return "0"
    for unit, name in ((GIB, "GiB"), (_MIB, "MiB"), (_KIB, "KiB")):
        if size >= 0.9995 * unit:
            return f"{_three(size / unit)} {name}"
    return f"{size:.0f} B"


def gib(size: float) -> str:
    """An amount that stands in GiB already."""
    return amount(size * GIB)


def gib_up(size: float) -> str:
    """An amount in GiB that must not be too little: rounded up to a tenth."""
    return f"{math.ceil(10 * size) / 10:,.1f} GiB"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """`35 ms`, `1.4 s`, `3 min`, `2 h 05 min`, `3 days 4 h`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if seconds >= 600 else f"{seconds / 60:.2g} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"
