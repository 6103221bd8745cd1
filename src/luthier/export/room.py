"""Whether the disk has room for an export, asked before the first byte of it is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.errors import FitError

__all__ = ["check_room"]

_SPARE = 2**24
"""Bytes that stay free: small files, and what the file system takes for itself."""


def check_room(place: Path, needed: int, what: str) -> None:
    """Raise FitError where the disk of `place` (which need not be there yet) has less than `needed` bytes free.

    An older export is replaced only when the new one is whole, so its room does not count as free.
    """
    there = place
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed + _SPARE:
        raise FitError(
            f"{what} takes {_gigabytes(needed)}, and the disk of {there} has {_gigabytes(free)} free",
            "make room, or move the run directory to a larger disk; an older export that is no longer needed can go",
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
