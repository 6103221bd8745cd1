"""What every epoch holds and in which order, from (lengths, weights, seed, epoch) alone: no epoch before it is walked.

    rows --weights--> entries --shuffle--> units of one row            (without packing)
                              --best fit--> units of several, shuffled (with it)

Weights. A row of weight w is in an epoch ⌊w⌋ times, and of the n rows that share the weight m = round(n·(w − ⌊w⌋)), at
least one, are in it once more. Which ones rotates: row p of the n, in an order drawn once, is among those of epoch e
where (e − p)·m mod n < m. That is m rows in each epoch, so that all epochs are equally long, and for each row as even
as whole numbers can be: of any E epochs in a row it is in ⌊E·m/n⌋ or ⌈E·m/n⌉. With w = 0.5: in every second one.

Packing. The packs' shape (packing.py) depends on the lengths alone and is made once. Each epoch assigns rows to it
anew, shuffling those of equal length, and shuffles the packs. Rows that rotate are first ordered by length: row j of an
epoch's m is then always one of ⌈n/m⌉ or so neighbours of that order, and the longest of these is what the shape keeps
room for. So no pack ever goes over, the number of packs never changes, and what is lost is the difference in length
between neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.data.packing import best_fit

__all__ = ["Epochs", "Units"]

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """An epoch's units in order: unit u is the rows `rows[starts[u] : starts[u + 1]]` (indices into the examples)."""

    rows: Indices
    starts: Indices

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, unit: int) -> Indices:
        return self.rows[self.starts[unit] : self.starts[unit + 1]]

    def ordered(self, order: Indices) -> Units:
        """The same units in another order."""
        sizes = np.diff(self.starts)[order]
        starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        moved = np.repeat(self.starts[order] - starts[:-1], sizes)
        return Units(self.rows[np.arange(len(self.rows)) + moved], starts)


@dataclass(frozen=True, slots=True, eq=False)
class _Rotation:
    """`members` of one weight, of which every epoch has `share` rows."""

    members: Indices
    share: int

    def of(self, epoch: int) -> Indices:
        count, turn = len(self.members), epoch * self.share % len(self.members)
        return self.members[(np.arange(self.share) * count + turn) // self.share]

    def room(self, lengths: NDArray[np.integer]) -> NDArray[np.integer]:
        """The length of the longest that can come in each of the share's places (members in descending order)."""
        return lengths[self.of(0)]


class Epochs:
    """The epochs of a run.

    Args:
        count: how many rows there are, at least one.
        seed: draws the order of every epoch.
        weights: of each row, see above; None: 1 each.
        lengths: tokens of each row; needed for packing and for `longest_first`.
        capacity: tokens of a pack at most; None: every row is a unit of its own.
        longest_first: units of a batch where the first epoch's whole batches are to come in descending order of their
            tokens; 0: in the order drawn. What is in a batch stays as drawn.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        weights: NDArray[np.float64] | None = None,
        lengths: NDArray[np.integer] | None = None,
        capacity: int | None = None,
        longest_first: int = 0,
    ) -> None:
        if (capacity is not None or longest_first) and lengths is None:
            raise ValueError("packing and longest_first need the rows' lengths")
        self.seed = seed
        self._lengths = np.empty(0, np.int32) if lengths is None else np.asarray(lengths)
        self._longest_first = longest_first
        uneven = weights is not None and bool((weights != 1).any())
        self._whole = np.arange(count, dtype=np.int64)
        self._rotations: list[_Rotation] = []
        if weights is not None and uneven:
            self._whole = np.repeat(self._whole, np.floor(weights).astype(np.int64))
            self._rotations = self._make_rotations(np.asarray(weights), by_length=capacity is not None)
        self.rows = len(self._whole) + sum(rotation.share for rotation in self._rotations)
        if not self.rows:
            raise ValueError("no row has a weight above 0")
        self._rooms = None if capacity is None else self._make_rooms()
        self._shape = None if capacity is None or self._rooms is None else best_fit(self._rooms, capacity)
        self.units = self.rows if self._shape is None else len(self._shape)
        self._last: tuple[int, Units] | None = None

    def _make_rotations(self, weights: NDArray[np.float64], by_length: bool) -> list[_Rotation]:
        found: list[_Rotation] = []
        fractions = weights - np.floor(weights)
        for group, weight in enumerate(np.unique(weights[fractions > 0])):
            # A third word, so that no epoch's generator is this one.
            members = self._generator(group, 1).permutation(np.flatnonzero(weights == weight))
            if by_length:
                members = members[np.argsort(-self._lengths[members].astype(np.int64), kind="stable")]
            wanted = int(np.floor((weight - np.floor(weight)) * len(members) + 0.5))
            found.append(_Rotation(members, max(1, wanted)))
        return found

    def _make_rooms(self) -> NDArray[np.integer]:
        parts = [self._lengths[self._whole], *(rotation.room(self._lengths) for rotation in self._rotations)]
        return np.concatenate(parts)

    def _generator(self, *words: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *words))))

    def entries(self, epoch: int) -> Indices:
        """The rows of an epoch, copies and all, not yet in order; always `rows` of them."""
        return np.concatenate((self._whole, *(rotation.of(epoch) for rotation in self._rotations)))

    @property
    def tokens(self) -> int:
        """Of the first epoch (others have as many but for what rotates). Needs `lengths`."""
        return int(self._lengths[self.entries(0)].sum(dtype=np.int64))

    def units_of(self, epoch: int) -> Units:
        """The epoch's units in its order."""
        if self._last is None or self._last[0] != epoch:  # steps come in order: one epoch is kept
            self._last = (epoch, self._draw(epoch))
        return self._last[1]

    def _draw(self, epoch: int) -> Units:
        generator, entries = self._generator(epoch), self.entries(epoch)
        order = generator.permutation(self.rows)
        if self._shape is None or self._rooms is None:
            units = Units(entries[order], np.arange(self.rows + 1))
        else:
            # Longest first; those that take the same room stand as shuffled.
            order = order[np.argsort(-self._rooms[order].astype(np.int64), kind="stable")]
            filled = Units(entries[order][self._shape.places], self._shape.starts)
            units = filled.ordered(generator.permutation(self.units))
        return self._with_longest_first(units) if epoch == 0 and self._longest_first else units

    def _with_longest_first(self, units: Units) -> Units:
        """Whole batches in descending order of tokens. What is left shares a step with the next epoch: it stays."""
        size, order = self._longest_first, np.arange(len(units))
        whole = len(units) // size * size
        tokens = np.add.reduceat(self._lengths[units.rows].astype(np.int64), units.starts[:-1])
        descending = np.argsort(-tokens[:whole].reshape(-1, size).sum(axis=1), kind="stable")
        return units.ordered(np.concatenate((order[:whole].reshape(-1, size)[descending].reshape(-1), order[whole:])))
