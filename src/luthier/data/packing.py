"""Best-fit decreasing: which documents share a pack. Whole documents only; nothing is cut, nothing goes over.

Documents are taken from the longest to the shortest, and each goes into the open pack that it fills best: that with the
least room left that is still enough (Johnson 1974; for language models Ding et al. 2024, arXiv:2404.10830). How full
the packs become depends on the lengths alone, not on which document of a length is which. So the result is a `Shape`:
packs of *places* in the descending order of lengths. Every epoch puts other documents of the same lengths into the same
shape (epochs.py), and so has the same number of packs.

All documents of one length are placed at once. The first goes into the pack of least sufficient room; that room is then
smaller yet, so while it suffices the same pack is the best fit for the next one. A pack of room r therefore takes
⌊r / length⌋ of them in a row, and so does every other pack of room r. The work grows with the number of different
lengths, not of documents: a million take a fraction of a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shape", "best_fit"]


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Packs of places: pack p holds the documents at `places[starts[p] : starts[p + 1]]` of the descending order.

    `places` is a permutation of all places, int64; `starts` has one entry more than there are packs.
    """

    places: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        """How many packs there are."""
        return len(self.starts) - 1


def best_fit(lengths: NDArray[np.integer], capacity: int) -> Shape:
    """The packs of documents of these lengths, at most `capacity` tokens each.

    Raises ValueError where a document is empty or longer than a pack: what to do with such is not decided here.
    """
    if len(lengths) and (int(lengths.min()) < 1 or int(lengths.max()) > capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, packs of {capacity}")
    different, counts = np.unique(lengths, return_counts=True)
    packs = _Packs(capacity)
    parts = [packs.place(int(length), int(count)) for length, count in zip(different[::-1], counts[::-1], strict=True)]
    pack_of = np.concatenate(parts) if parts else np.empty(0, np.int64)
    sizes = np.bincount(pack_of, minlength=packs.count)
    return Shape(np.argsort(pack_of, kind="stable"), np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))


class _Packs:
    """The packs begun so far, by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._rooms: list[int] = []  # ascending; a key of _open each
        self._open: dict[int, NDArray[np.int64]] = {}

    def place(self, length: int, count: int) -> NDArray[np.int64]:
        """The pack of each of `count` documents of `length`, which is not above that of any placed before."""
        placed: list[NDArray[np.int64]] = []
        while count:
            packs, room = self._best(length, count)
            each = room // length
            taken = min(count, len(packs) * each)
            full, over = divmod(taken, each)
            placed.append(np.repeat(packs, each)[:taken])
            self._leave(packs[:full], room - each * length)
            if over:
                self._leave(packs[full : full + 1], room - over * length)
                full += 1
            self._leave(packs[full:], room)
            count -= taken
        return np.concatenate(placed)

    def _best(self, length: int, count: int) -> tuple[NDArray[np.int64], int]:
        """All packs of the least room that is enough, taken out of the open ones; new packs where none is."""
        at = bisect_left(self._rooms, length)
        if at < len(self._rooms):
            room = self._rooms.pop(at)
            return self._open.pop(room), room
        new = -(-count // (self.capacity // length))
        self.count += new
        return np.arange(self.count - new, self.count, dtype=np.int64), self.capacity

    def _leave(self, packs: NDArray[np.int64], room: int) -> None:
        if not len(packs) or not room:
            return
        if room in self._open:
            self._open[room] = np.concatenate((self._open[room], packs))
        else:
            self._open[room] = packs
            insort(self._rooms, room)
