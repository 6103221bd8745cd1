"""What the audit says: findings about the data as a whole, each with its reason, its remedy and places to look at.

A finding is one sentence about many rows ("12 rows hold garbled letters"). The rows themselves are sightings: a place
and the piece of text that was seen there. Only the first of them are kept, their count is always whole.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from luthier.data.conversation import Source
from luthier.data.problems import Severity

__all__ = [
    "KEPT_PLACES",
    "SEVERITIES",
    "Finding",
    "Sighting",
    "Tally",
    "excerpt",
    "rows_in_words",
    "rows_that",
    "share_in_words",
]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Worst first. An error stops training, a warning probably makes it worse, a note is for you to judge."""

KEPT_PLACES = 1_000
"""How many places of each kind are kept; so memory does not grow with the data."""

_AROUND = 32


class Sighting(NamedTuple):
    """One place. `row` counts from 0 within its file, None where unknown; `text` is what is to be seen there; `other`
    is the place that it is the same as, where that is the fault."""

    source: Source
    row: int | None
    text: str
    other: Source | None = None


@dataclass
class Tally:
    """How many rows there are of a kind, and where the first of them stand."""

    rows: int = 0
    first: list[Sighting] = field(default_factory=list)

    def add(self, sighting: Sighting) -> None:
        """One more row."""
        self.rows += 1
        if len(self.first) < KEPT_PLACES:
            self.first.append(sighting)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know about the data.

    Attributes:
        check: the name of the check that found it.
        reason: what is so, with how many rows, in a sentence.
        remedy: what to do about it, or that nothing has to be done.
        rows: how many rows it is about, 0 where it is about none in particular.
        evidence: the first of these rows.
    """

    check: str
    severity: Severity
    reason: str
    remedy: str
    rows: int = 0
    evidence: Sequence[Sighting] = ()


def excerpt(text: str, start: int = 0, end: int | None = None) -> str:
    """The piece of `text` from `start` to `end` with some words around it, on one line, nothing in it invisible.

    Without an end it is the first words from `start` on.
    """
    stop = start + _AROUND if end is None else end
    left, right = max(0, start - _AROUND), min(len(text), max(stop, start) + _AROUND)
    piece = " ".join(text[left:right].split(" "))
    shown = "".join(_visible(character) for character in piece)
    return ("…" if left else "") + shown.strip() + ("…" if right < len(text) else "")


def _visible(character: str) -> str:
    if character in "\n\r\t":
        return " "
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"<U+{ord(character):04X}>"
    return character


def rows_in_words(rows: int) -> str:
    """`1 row`, `2 rows`: numbers with thousands parted."""
    return f"{rows:,} row" + ("" if rows == 1 else "s")


def share_in_words(part: int, whole: int) -> str:
    """A share that never rounds to nothing or to all: `12%`, `0.3%`, `under 0.1%`."""
    if whole == 0 or part == 0:
        return "0%"
    share = part / whole
    if share < 0.001:
        return "under 0.1%"
    if share < 0.0995:
        return f"{share:.1%}"
    return f"{share:.0%}" if part == whole or share < 0.995 else "over 99%"


_SINGULAR = {"hold": "holds", "have": "has", "repeat": "repeats", "say": "says", "ask": "asks", "are": "is"}


def rows_that(rows: int, what: str, share: str = "") -> str:
    """`2 rows hold letters`, `1 row holds letters`: `what` begins with a verb as of many; `share` follows the count."""
    verb, _, rest = what.partition(" ")
    return f"{rows_in_words(rows)}{share} {_SINGULAR[verb] if rows == 1 else verb} {rest}"
