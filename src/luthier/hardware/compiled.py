"""Which of the compiled C kernels (kernels/native) this processor runs: what setup.py made, and what the machine has.

Imports no torch: a plan states what a run will compute with.
"""

from __future__ import annotations

import _ctypes
import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["VARIANTS", "Compiled", "compiled_kernels"]

VARIANTS = ("avx512_bf16", "avx512", "avx2", "plain")
"""Instruction sets that setup.py compiles for, the fastest first. Which processors have one it says itself."""

FOLDER = Path(__file__).parent.parent / "kernels" / "native"


@dataclass(frozen=True)
class Compiled:
    """`file` is the library to load and `variant` its instruction set; None, and why not, where there is none."""

    variant: str | None
    file: Path | None
    reason: str = ""


@cache
def compiled_kernels(folder: Path = FOLDER) -> Compiled:
    """The first of VARIANTS that was compiled and that this processor runs."""
    reasons: list[str] = []
    for variant in VARIANTS:
        found = [folder / f"_{variant}{suffix}" for suffix in EXTENSION_SUFFIXES]
        file = next((one for one in found if one.is_file()), None)
        if file is None:
            continue
        try:
            if _supported(file):
                return Compiled(variant, file)
            reasons.append(f"{file.name} is for another processor")
        except (OSError, AttributeError) as error:  # not a library, or not this one
            reasons.append(f"{file.name} cannot be loaded ({error})")
    nothing = "the C kernels were not compiled when luthier was installed (no C compiler?)"
    return Compiled(None, None, "; ".join(reasons) or nothing)


def _supported(file: Path) -> bool:
    """Whether this processor runs the library in `file`; raises OSError or AttributeError where it is none of ours.

    It is let go again: opened before torch it would bring the system's OpenMP into the process, and torch would compute
    with that in place of its own.
    """
    library = ctypes.CDLL(str(file))
    try:
        return bool(library.supported())
    finally:
        if sys.platform != "win32":
            _ctypes.dlclose(library._handle)
