"""What every reader gives: a row as it stands in its file, before anything is known of its format.

A reader is a function `(path, start) -> Iterator[RawRow]`: every row from the one with ordinal `start` on, in constant
memory. What is wrong with one row is that row's value (`Fault`); what ends the file early is raised (`Broken`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

__all__ = ["ROW_LIMIT", "SHOWN_TEXT", "Broken", "Fault", "RawRow", "Read", "as_text"]

ROW_LIMIT = 16 * 2**20
"""Bytes of the longest row that is read. A longer one is a line break that was lost, and must not fill the memory."""

SHOWN_TEXT = 2000
"""How much of a bad row's text is kept, in characters."""


class Fault(NamedTuple):
    """Why a row cannot be read. `line` and `column` count from 1 within the file."""

    reason: str
    remedy: str
    line: int
    column: int | None


RawRow: TypeAlias = tuple[int, int, object, "bytes | str | None"]
"""A row: the line and the column it begins at; what it holds, a dict when all is well, or a `Fault`; and how it is
written there, None where the file is not text. A plain tuple, because it is made and unpacked once a row."""

Read: TypeAlias = Callable[[str, int], Iterator[RawRow]]
"""What a reader is."""


class Broken(Exception):  # noqa: N818  (it is no error of a caller's: it ends one file)
    """From here on nothing can be read of the file: packed data that is cut off or damaged."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def as_text(found: bytes | str) -> str:
    """The beginning of a row's text, what cannot be decoded as U+FFFD."""
    if isinstance(found, bytes):
        found = found[: 4 * SHOWN_TEXT].decode("utf-8", errors="replace")
    # A lone surrogate could not be written to rejected.jsonl.
    return found[:SHOWN_TEXT].encode("utf-8", errors="replace").decode("utf-8")
