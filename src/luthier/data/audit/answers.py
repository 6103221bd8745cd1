"""How answers begin, which come again and again, and who speaks in the rows. Counted in passing, in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Conversation

__all__ = ["Openings", "Repeated", "Speakers", "repeated_answers"]

_WORDS = 3
_MOST_DIFFERENT = 50_000
_LONGEST = 60
SHOWN = 10


@dataclass
class Openings:
    """The first three words of every answer.

    At most 50,000 different ones are counted at a time: where there are more, the rare ones are forgotten, so a count
    can come out a little low, never high (lossy counting, Manku and Motwani 2002).
    """

    answers: int = 0
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, answer: str) -> None:
        """Count an answer."""
        self.answers += 1
        self._counts[" ".join(answer[:200].split(maxsplit=_WORDS)[:_WORDS])[:_LONGEST]] += 1
        if len(self._counts) > _MOST_DIFFERENT:
            self._counts = Counter(dict(self._counts.most_common(_MOST_DIFFERENT // 2)))

    def most_common(self) -> list[tuple[str, int]]:
        """The ten most frequent, of those that came more than once."""
        return [(opening, count) for opening, count in self._counts.most_common(SHOWN) if count > 1]


@dataclass
class Speakers:
    """Who speaks: how many rows have a system turn, a tool's, several answers; how many turns there are."""

    rows: int = 0
    turns: int = 0
    longest: int = 0
    with_system: int = 0
    with_tool: int = 0
    several_answers: int = 0
    plain: int = 0
    answers: int = 0
    untrained_answers: int = 0

    def add(self, conversation: Conversation) -> None:
        """Count a row."""
        turns = conversation.turns
        answers = [turn for turn in turns if turn.role == "assistant"]
        self.rows += 1
        self.turns += len(turns)
        self.longest = max(self.longest, len(turns))
        self.plain += conversation.plain
        self.several_answers += len(answers) > 1
        self.answers += len(answers)
        self.untrained_answers += sum(not turn.train for turn in answers)
        self.with_system += turns[0].role == "system"
        self.with_tool += len(turns) > 2 and any(turn.role == "tool" for turn in turns)


@dataclass(frozen=True, slots=True)
class Repeated:
    """An answer that stands in `rows` rows; `row` is the first of them."""

    row: int
    rows: int


def repeated_answers(hashes: NDArray[np.uint64]) -> tuple[int, tuple[Repeated, ...]]:
    """How many different last answers there are, and the ten most frequent of those that come more than once."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:SHOWN]
    return len(counts), tuple(Repeated(int(first[i]), int(counts[i])) for i in order if counts[i] > 1)
