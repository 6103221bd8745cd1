"""The types of weights that a GGUF file can be asked for, by the names that users know. Imports nothing heavy.

f32 f16 bf16         as they are, rounded once
q8_0 q5_0 q4_0       blocks of 32 values with one scale: the gguf library writes them
q6_k q5_k_m q4_k_m   super-blocks of 256 with scales that are quantised too: llama.cpp's own quantiser writes them
"""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from luthier.errors import UsageError

__all__ = ["K_QUANTS", "QUANTIZE", "SPLIT_BYTES", "Quantize", "quantize_named"]

Quantize = Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "q6_k", "q5_k_m", "q4_k_m"]
QUANTIZE: tuple[Quantize, ...] = get_args(Quantize)
"""From the largest of each kind to the smallest."""

K_QUANTS: tuple[Quantize, ...] = ("q6_k", "q5_k_m", "q4_k_m")

SPLIT_BYTES = 2_000_000_000
"""`--split`: no part is larger, but one that holds a single tensor which is."""


def quantize_named(text: str) -> Quantize:
    """The type called `text`, in any case: llama.cpp writes Q4_K_M. Raises UsageError with the nearest name."""
    wanted = text.lower()
    for name in QUANTIZE:
        if name == wanted:
            return name
    near = difflib.get_close_matches(wanted, QUANTIZE, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"there is no --quantize {text}", f"{meant}Known: {', '.join(QUANTIZE)}")
