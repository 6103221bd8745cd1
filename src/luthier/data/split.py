"""Which rows are trained on and which are held out, by what they say and not by where they stand.

    u = first 8 bytes of SHA-256(canonical content) / 2^64          test: u < test,  eval: u < test + eval,  else train

So the same row is always on the same side: adding rows, removing them or putting them in another order moves no other
row, and two identical rows cannot be on different sides. Files that the recipe gives a split of their own keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

import orjson

from luthier.data.conversation import Conversation
from luthier.data.sources import SourceRows
from luthier.recipe.schema import SplitRecipe

__all__ = ["Split", "content_position", "split_rows"]

Split: TypeAlias = Literal["train", "eval", "test"]


def content_position(conversation: Conversation) -> float:
    """A number in [0, 1) made from the conversation's turns alone: stable over machines, versions and files."""
    canonical = orjson.dumps([[turn.role, turn.content] for turn in conversation.turns])
    return int.from_bytes(hashlib.sha256(canonical).digest()[:8], "big") / 2**64


def split_rows(sources: Sequence[SourceRows], split: SplitRecipe) -> tuple[list[Split], list[str]]:
    """The side of every row, over all sources in order, and notes on what a reader would not expect.

    A split that some source is explicitly for is not cut from the others as well. Where fractions hold rows out but
    the hash gave none (a few rows only), the row next in line is taken, so that there is something to measure on;
    likewise one row is always left to train on.
    """
    explicit = {rows.source.split for rows in sources if rows.source.split != "all"}
    test = 0.0 if "test" in explicit else split.test
    held_out = 0.0 if "eval" in explicit else split.eval
    sides: list[Split] = []
    free: list[tuple[float, int]] = []
    for rows in sources:
        for conversation in rows.conversations:
            if rows.source.split != "all":
                sides.append(rows.source.split)
                continue
            position = content_position(conversation)
            free.append((position, len(sides)))
            sides.append("test" if position < test else "eval" if position < test + held_out else "train")
    notes: list[str] = []
    if held_out > 0 and "eval" not in sides:
        notes += _take_one(sides, free, "eval")
    if "train" not in sides:
        notes += _take_one(sides, free, "train")
    return sides, notes


def _take_one(sides: list[Split], free: Sequence[tuple[float, int]], side: Split) -> list[str]:
    """Give `side` the row whose position is nearest to its band, with all rows of the same content."""
    rows = sorted(free)
    if side == "eval":
        rows = [(position, i) for position, i in rows if sides[i] == "train"]
    positions = sorted({position for position, _ in rows}, reverse=side == "train")
    if len(positions) < 2:  # one content only: it cannot be on two sides
        return [f"no row is for {side}: there are too few different rows to cut"]
    taken = [i for position, i in rows if position == positions[0]]
    for i in taken:
        sides[i] = side
    count = "one row" if len(taken) == 1 else f"{len(taken)} equal rows"
    return [f"{count} went to {side} so that it is not empty; with so few rows the fractions cannot be met"]
