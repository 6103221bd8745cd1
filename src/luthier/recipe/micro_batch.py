"""What `train.micro_batch` means in tokens. The plan counts memory with it, the data stage cuts steps by it."""

from __future__ import annotations

import math

__all__ = ["LEAST", "ROWS", "WORTH", "most_tokens"]

ROWS = 64
"""Rows are filled up to a multiple of this where each number of them has kernels of its own (data/batches.py). Finer
steps were tried: at 16 the filling costs less, but the kernels more, in time and in memory (docs/decisions/0012)."""

WORTH = 2**19
"""Numbers in the residual stream of a micro-batch (tokens x hidden size) from which on a CPU takes it as two halves at
once (train/halves.py). With fewer an operation is so short that the halves wait for each other's Python: 8M, at 2^18.3,
gained nothing."""

LEAST = 384
"""Tokens that such a half has at least: both read all weights. 1.2B lost 6 % with halves of 170 to 250 tokens, and
gained 7 % with halves of 500 to 780."""

ABOVE_AVERAGE = 1.2
"""How much heavier than on average a micro-batch may be. Of sets of eight random rows of GSM8K one in twenty lies above
it, yet its eight longest have 2.5 times the average, and memory would have to be there for them."""


def most_tokens(rows: int, average: float, longest: int) -> int:
    """Tokens that a micro-batch of at most `rows` rows may have; a step that would have a larger one is cut once more.

    `average` and `longest` are tokens of a row. Up to a multiple of ROWS more of them take no more memory. The gradient
    is the same however a step is cut.
    """
    return max(longest, math.ceil(ABOVE_AVERAGE * rows * average / ROWS) * ROWS)
