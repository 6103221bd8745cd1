"""Rows that are longer than a limit: cut at the end, refused, left out, or cut into several. All are counted.

    truncate  the first max_length tokens stay; such a row does not teach the model to stop
    error     refused, with the first of them listed
    drop      left out
    split     cut into parts of max_length tokens; later parts begin with BOS where the row does, and none of the text
              before. Only what is trained on is split: a held-out row is truncated, so that it is asked once

A row, or part of one, in which no token of an answer is left teaches nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.data.dataset import Cuts, Examples
from luthier.data.split import Split

__all__ = ["LIMITS", "Limited", "LongRows", "limit_side"]

LongRows: TypeAlias = Literal["truncate", "error", "drop", "split"]
_TOO_LONG = "it has {length:,} tokens, more than max_length {most:,}"
_NO_ANSWER = "its prompt alone fills max_length, so nothing of the answer is left"


@dataclass(frozen=True)
class Limited:
    """A side within the limit. `left_out` are rows that are not used, `refused` those of `error`, with the reason."""

    examples: Examples
    truncated: int = 0
    pieces: int = 0
    left_out: tuple[tuple[int, str], ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


def _reasons(examples: Examples, long: NDArray[np.bool_], most: int) -> tuple[tuple[int, str], ...]:
    chosen = examples.take(long)
    lengths = chosen.lengths.tolist()
    return tuple(
        (row, _TOO_LONG.format(length=n, most=most)) for row, n in zip(chosen.rows.tolist(), lengths, strict=True)
    )


def _truncate(examples: Examples, long: NDArray[np.bool_], most: int) -> Limited:
    cuts = examples.cuts
    cut = examples.recut(Cuts(cuts.row, cuts.start, np.minimum(cuts.stop, cuts.start + most)), examples.weights)
    kept = cut.labelled > 0
    left_out = tuple((int(row), _NO_ANSWER) for row in cut.rows[~kept])
    return Limited(cut.take(kept), truncated=int(np.count_nonzero(long & kept)), left_out=left_out)


def _drop(examples: Examples, long: NDArray[np.bool_], most: int) -> Limited:
    return Limited(examples.take(~long), left_out=_reasons(examples, long, most))


def _refuse(examples: Examples, long: NDArray[np.bool_], most: int) -> Limited:
    return Limited(examples, refused=_reasons(examples, long, most))


def _split(examples: Examples, long: NDArray[np.bool_], most: int) -> Limited:
    cuts, later = examples.cuts, most - (examples.bos is not None)
    beyond = cuts.stop - cuts.start - most
    parts = np.where(long, 1 + -(-beyond // later), 1)
    index = np.repeat(np.arange(len(examples)), parts)
    part = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = cuts.start[index] + np.where(part == 0, 0, most + (part - 1) * later)
    stop = np.minimum(start + np.where(part == 0, most, later), cuts.stop[index])
    pieces = Cuts(cuts.row[index], start.astype(np.int32), stop.astype(np.int32))
    cut = examples.recut(pieces, examples.weights[index])
    kept = cut.labelled > 0
    left_out = tuple((int(cuts.row[i]), _NO_ANSWER) for i in np.setdiff1d(index, index[kept]))
    return Limited(cut.take(kept), pieces=int(np.count_nonzero(kept & long[index])), left_out=left_out)


LIMITS: dict[LongRows, Callable[[Examples, NDArray[np.bool_], int], Limited]] = {
    "truncate": _truncate,
    "error": _refuse,
    "drop": _drop,
    "split": _split,
}
"""What the recipe's `long_rows` may say -> what is done to a side."""


def limit_side(examples: Examples, most: int, policy: LongRows, side: Split) -> Limited:
    """A side with no example longer than `most` tokens (with `error`: only if `refused` is empty)."""
    long = examples.lengths > most
    if not long.any():
        return _truncate(examples, long, most)
    return LIMITS["truncate" if policy == "split" and side != "train" else policy](examples, long, most)
