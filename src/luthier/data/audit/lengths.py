"""Lengths of rows in tokens, what share of them is trained, and what each max_length would cut off.

Everything comes from the store's arrays: no row is tokenised or read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from luthier.data.store import Store

__all__ = ["PREVIEWED", "Bar", "Cut", "Lengths", "measure_lengths"]

PREVIEWED = (512, 1024, 2048, 4096, 8192)
"""The limits whose effect is shown, besides the recipe's own."""
_BARS = 12
_BLOCK = 2**21
"""Tokens whose masks are held at once."""


@dataclass(frozen=True, slots=True)
class Bar:
    """How many rows have `start` to `stop` - 1 tokens; the last bar has no end."""

    start: int
    stop: int | None
    rows: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What a max_length with `long_rows: truncate` does: rows cut, rows left without any trained token, and trained
    tokens lost."""

    max_length: int
    rows: int
    emptied: int
    labelled_lost: int


@dataclass(frozen=True, eq=False)
class Lengths:
    """Lengths and trained tokens of all usable rows. `quantiles` are of the length in tokens, by percent; `limit` is
    what a row may have here, None where that is not known."""

    rows: int
    tokens: int
    labelled: int
    quantiles: dict[int, int]
    labelled_median: int
    bars: tuple[Bar, ...]
    cuts: tuple[Cut, ...]
    limit: int | None

    @property
    def labelled_share(self) -> float:
        """Trained tokens as a share of all."""
        return self.labelled / self.tokens if self.tokens else 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.quantiles[100]


def measure_lengths(store: Store, own_limit: int | None) -> Lengths:
    """Measure the rows of a store (at least one); `own_limit` is the recipe's max_length, or what the model holds."""
    length = store.rows["length"].astype(np.int64)
    labelled = store.rows["labelled"].astype(np.int64)
    percents = (0, 5, 25, 50, 75, 95, 99, 100)
    quantiles = np.percentile(length, percents, method="inverted_cdf")
    limits = sorted({*PREVIEWED, *([own_limit] if own_limit is not None else [])})
    return Lengths(
        rows=len(length),
        tokens=int(length.sum()),
        labelled=int(labelled.sum()),
        quantiles={percent: int(value) for percent, value in zip(percents, quantiles, strict=True)},
        labelled_median=int(np.median(labelled)),
        limit=own_limit,
        bars=_bars(length, int(quantiles[percents.index(99)])),
        cuts=tuple(_cuts(store, limits)),
    )


def _bars(length: NDArray[np.int64], nearly_longest: int) -> tuple[Bar, ...]:
    """Bars of one width, a power of two, over 99 in 100 rows; what is longer is in a last one without an end."""
    low = int(length.min())
    width = 1
    while nearly_longest // width - low // width >= _BARS:
        width *= 2
    first, last = low // width, nearly_longest // width
    counts = np.bincount(np.minimum(length // width, last + 1) - first, minlength=last + 2 - first)
    bars = [Bar((first + i) * width, (first + i + 1) * width, int(count)) for i, count in enumerate(counts[:-1])]
    return (*bars, Bar((last + 1) * width, None, int(counts[-1]))) if counts[-1] else tuple(bars)


def _cuts(store: Store, limits: Sequence[int]) -> Iterator[Cut]:
    """What each limit would cut, from one pass over the masks, in blocks."""
    limit = np.array(limits)[:, None]
    rows, emptied, lost = (np.zeros(len(limits), dtype=np.int64) for _ in range(3))
    for block in _blocks(store.rows["offset"]):
        found = store.rows[block]
        first, length = int(found["offset"][0]), found["length"].astype(np.int64)
        start = found["offset"] - first
        mask = store.trained[first : first + int(start[-1] + length[-1])]
        before = np.concatenate(([0], np.cumsum(mask, dtype=np.int32)))  # trained tokens of the block before each
        kept = before[start + np.minimum(length, limit)] - before[start]
        beyond = before[start + length] - before[start] - kept
        # The first token of a row is never trained: nothing comes before it.
        nothing_left = (kept - mask[start] == 0) & (length > limit)
        rows += np.count_nonzero(length > limit, axis=1)
        emptied += np.count_nonzero(nothing_left, axis=1)
        lost += beyond.sum(axis=1, dtype=np.int64)
    for number, most in enumerate(limits):
        yield Cut(most, int(rows[number]), int(emptied[number]), int(lost[number]))


def _blocks(offset: NDArray[np.int64]) -> Iterator[slice]:
    """Ranges of rows with about `_BLOCK` tokens each."""
    borders = np.flatnonzero(np.diff(np.asarray(offset) // _BLOCK, prepend=-1))
    for start, stop in pairwise([*borders.tolist(), len(offset)]):
        yield slice(start, stop)
