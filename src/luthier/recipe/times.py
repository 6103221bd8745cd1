"""Lengths of time as a recipe says them: `5400` (seconds), `90m`, `2h30m`, `1d12h`."""

from __future__ import annotations

import re

__all__ = ["DURATION", "seconds_of"]

DURATION = r"^([0-9]{1,6}(\.[0-9]{1,3})?[dhms] ?)+$"
"""A time in words: numbers with d, h, m or s behind them, which are summed."""

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)([dhms])")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def seconds_of(time: float | str) -> float:
    """Seconds of a time that a recipe may say: a number is seconds already, a text one that DURATION matches."""
    if isinstance(time, str):
        return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(time))
    return float(time)
