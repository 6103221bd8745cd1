"""What `train.micro_batch` means in tokens. The plan counts memory with it, the data stage cuts steps by it."""

from __future__ import annotations

import math

__all__ = ["most_tokens"]

ABOVE_AVERAGE = 1.5
"""How much heavier than on average a micro-batch may be. Eight random rows of GSM8K lie above it once in five
thousand times, yet its eight longest have 2.5 times the average, and memory would have to be there for them."""


def most_tokens(rows: int, average: float, longest: int) -> int:
    """Tokens that a micro-batch of at most `rows` rows may have; a step that would have a larger one is cut once more.

    `average` and `longest` are tokens of a row. The gradient is the same however a step is cut.
    """
    return max(longest, math.ceil(ABOVE_AVERAGE * rows * average))
