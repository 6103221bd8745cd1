"""The sets of operations by hand that there are to test: torch's, and every compiled variant that runs here."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from luthier.hardware.compiled import FOLDER, VARIANTS
from luthier.kernels.batched import Batched
from luthier.kernels.by_hand import ByHand
from luthier.kernels.native import Native

__all__ = ["ALL", "native_ops", "ops_of"]

ALL = ("torch", *VARIANTS)


def file_of(variant: str) -> Path:
    """The library; the test is skipped where it was not compiled, or is for another processor."""
    found = [file for suffix in EXTENSION_SUFFIXES if (file := FOLDER / f"_{variant}{suffix}").is_file()]
    if not found:
        pytest.skip(f"the kernels for {variant} are not compiled here")
    if not ctypes.CDLL(str(found[0])).supported():
        pytest.skip(f"this processor does not run {variant}")
    return found[0]


def native_ops(variant: str) -> Native:
    """The operations of one variant; skips as `file_of`."""
    return Native(file_of(variant))


def ops_of(name: str) -> ByHand:
    """One of ALL; skips as `file_of`."""
    return Batched() if name == "torch" else native_ops(name)
