"""Which rows are trained on and which are held out, by what they say and not by where they stand.

    position  first 8 bytes of SHA-256(canonical content) / 2^64; with `split_by`, of the value of that key instead
    u         the smallest position in a row's group: the rows that say the same or nearly (duplicates.py)
    side      u < test: test,  u < test + eval: eval,  else train

So the same row is always on the same side: adding rows, removing them or putting them in another order moves no other
row. A row that is added can join groups, and then u falls or stays: what was held out stays held out. (The one
exception: a group that outgrows duplicates.FORM is taken apart, for it is a form and not one text in variants.)
Files that the recipe gives a split of their own keep it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from luthier.data.conversation import Conversation
from luthier.recipe.schema import SplitRecipe

__all__ = ["SIDES", "Placed", "Side", "Split", "content_key", "split_rows", "value_key"]

Split: TypeAlias = Literal["train", "eval", "test"]
Side: TypeAlias = Literal["all", "train", "eval", "test"]
SIDES: tuple[Split, ...] = ("train", "eval", "test")
_TRAIN, _EVAL, _TEST = range(3)


def content_key(conversation: Conversation) -> bytes:
    """8 bytes made from the conversation's turns alone: stable over machines, versions and files."""
    canonical = orjson.dumps([turn[:2] for turn in conversation.turns])
    return hashlib.sha256(canonical).digest()[:8]


def value_key(value: str) -> bytes:
    """8 bytes made from a value of the key that `split_by` names."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()[:8]


@dataclass(frozen=True)
class Placed:
    """What decides the side of each row, one entry a row.

    `key` is its position times 2^64; `group` the same number for rows that stay together; `given` what the recipe says
    of its file: an index into `SIDES`, or -1 where the fractions decide.
    """

    key: NDArray[np.uint64]
    group: NDArray[np.int64]
    given: NDArray[np.int8]


def split_rows(rows: Placed, split: SplitRecipe) -> tuple[NDArray[np.int8], list[str]]:
    """The side of every row, as an index into `SIDES`, and notes on what a reader would not expect.

    A split that some source is explicitly for is not cut from the others as well. Where fractions hold rows out but
    the hash gave none (a few rows only), the row next in line is taken, so that there is something to measure on;
    likewise one row is always left to train on.
    """
    test = 0.0 if (rows.given == _TEST).any() else split.test
    held_out = 0.0 if (rows.given == _EVAL).any() else split.eval
    free = np.flatnonzero(rows.given < 0)
    key, group = rows.key[free], np.unique(rows.group[free], return_inverse=True)[1]
    notes: list[str] = []
    if len(free) and group.max() == 0 and key.min() != key.max():  # then one side would be empty
        notes.append("all rows say nearly the same: they are cut as if they had nothing in common")
        group = np.unique(key, return_inverse=True)[1]
    position = key / 2.0**64
    lowest = np.ones(group.max(initial=-1) + 1)
    np.minimum.at(lowest, group, position)
    u = lowest[group]
    sides = rows.given.copy()
    sides[free] = np.where(u < test, _TEST, np.where(u < test + held_out, _EVAL, _TRAIN))
    joined = int(np.count_nonzero((sides[free] != _TRAIN) & (position >= test + held_out)))
    if joined:
        rows_are = "row is" if joined == 1 else "rows are"
        why = "held out because a row that says nearly the same is"
        notes.append(f"{joined:,} {rows_are} {why} (split.near_duplicates: anywhere would cut them apart)")
    if len(free) and held_out > 0 and not (sides == _EVAL).any():
        notes += _take_one(sides, free, u, group, _EVAL)
    if len(free) and not (sides == _TRAIN).any():
        notes += _take_one(sides, free, u, group, _TRAIN)
    return sides, notes


def _take_one(
    sides: NDArray[np.int8], free: NDArray[np.int64], u: NDArray[np.float64], group: NDArray[np.int64], side: int
) -> list[str]:
    """Give `side` the group whose u is nearest to its band."""
    open_to_it = sides[free] == _TRAIN if side == _EVAL else np.ones(len(free), dtype=np.bool_)
    groups = len(np.unique(group[open_to_it]))
    if groups == 0 or (groups == 1 and side == _EVAL):  # one content only: it cannot be on two sides
        return [f"no row is for {SIDES[side]}: there are too few different rows to cut"]
    among = np.where(open_to_it, u, np.inf if side == _EVAL else -np.inf)
    chosen = among.argmin() if side == _EVAL else among.argmax()
    taken = free[group == group[chosen]]
    sides[taken] = side
    count = "one row" if len(taken) == 1 else f"{len(taken)} rows that say the same"
    return [f"{count} went to {SIDES[side]} so that it is not empty; with so few rows the fractions cannot be met"]
