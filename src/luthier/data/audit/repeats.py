"""Rows that say the same: twice in the data, under one prompt with different answers, or on both sides of the split.

    exact        what is said and how it is parted into turns is equal
    near         connected by near-equal wording, see duplicates.py
    same prompt  everything before the last answer is equal, the rest is not

All of it follows from three numbers a row and its side, so it is settled with sorted arrays, 25 bytes a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from luthier.data.audit.findings import KEPT_PLACES
from luthier.data.conversation import Conversation

__all__ = ["NO_PROMPT", "Keys", "Repeats", "Same", "find_repeats", "hash_of", "prompt_hash"]

Hashes: TypeAlias = NDArray[np.uint64]

NO_PROMPT = 0
"""The hash of the prompt of a row that has none: a plain text."""


def hash_of(text: str) -> int:
    """8 bytes of a text, as a number: the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def prompt_hash(conversation: Conversation) -> int:
    """A hash of all that stands before the last answer of a row."""
    turns = conversation.turns
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    if last == 0:
        return NO_PROMPT
    if last == 1:
        return hash_of(turns[0].content)
    return hash_of(orjson.dumps([turn[:2] for turn in turns[:last]]).decode())


@dataclass(frozen=True, eq=False)
class Keys:
    """What is compared, one entry a row.

    Attributes:
        content: a hash of what is said.
        group: the smallest row that says the same or nearly.
        prompt: a hash of what stands before the last answer, `NO_PROMPT` for none.
        side: 0 for train, 1 for eval, 2 for test, as in split.SIDES; -1 for rows that are not used.
    """

    content: Hashes
    group: NDArray[np.int64]
    prompt: Hashes
    side: NDArray[np.int8]


@dataclass(frozen=True)
class Same:
    """How many rows are the same as another, and the first of them as pairs (row, the row it is the same as)."""

    rows: int
    first: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Repeats:
    """Rows beyond the first that say the same, and held-out rows that say the same as one that is trained on.

    `prompts` are rows whose prompt stands in an earlier row with another answer. A row is counted under the strongest
    of the kinds only: exact, then near; of the held out exact, then near, then same prompt.
    """

    exact: Same
    near: Same
    prompts: Same
    leaked_exact: Same
    leaked_near: Same
    leaked_prompts: Same

    @property
    def leaked(self) -> int:
        """Held-out rows that say the same as a trained one, or nearly."""
        return self.leaked_exact.rows + self.leaked_near.rows


def _first_of(values: NDArray[np.uint64] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each entry, the first entry with the same value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def _same(rows: NDArray[np.bool_], as_which: NDArray[np.int64]) -> Same:
    found = np.flatnonzero(rows)
    shown = found[:KEPT_PLACES]
    pairs = tuple((int(row), int(other)) for row, other in zip(shown, as_which[shown], strict=True))
    return Same(len(found), pairs)


def _trained_like(
    values: NDArray[np.uint64] | NDArray[np.int64], trained: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Of each row, whether a trained one has its value, and the first that has."""
    at = np.flatnonzero(trained)
    known, first = np.unique(values[at], return_index=True)
    if not len(known):
        return np.zeros(len(values), dtype=np.bool_), np.zeros(len(values), dtype=np.int64)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[place] == values, at[first[place]]


def find_repeats(keys: Keys) -> Repeats:
    """Compare all rows."""
    own = np.arange(len(keys.content))
    same_content, same_prompt = _first_of(keys.content), _first_of(keys.prompt)
    exact = same_content < own
    near = (keys.group < own) & ~exact
    has_prompt = keys.prompt != NO_PROMPT
    # Of rows with one prompt, those that bring an answer that the first does not have.
    prompts = has_prompt & (same_prompt < own) & (keys.content != keys.content[same_prompt]) & ~exact
    kinds = _leaks(keys, has_prompt)
    return Repeats(_same(exact, same_content), _same(near, keys.group), _same(prompts, same_prompt), *kinds)


def _leaks(keys: Keys, has_prompt: NDArray[np.bool_]) -> Iterator[Same]:
    trained, unexplained = keys.side == 0, keys.side > 0
    for values, counts in ((keys.content, unexplained), (keys.group, unexplained), (keys.prompt, has_prompt)):
        found, which = _trained_like(values, trained)
        leaked = found & unexplained & counts
        unexplained = unexplained & ~leaked
        yield _same(leaked, which)
