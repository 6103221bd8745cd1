"""What is wrong with one row, as values that travel: from the readers and templates to rejected.jsonl and the audit."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from luthier.errors import Problem

__all__ = ["BadRow", "RowProblem", "Severity"]

Severity: TypeAlias = Literal["error", "warning", "note"]


class RowProblem(NamedTuple):
    """One thing about one row. `line` and `column` count from 1, `row` from 0 within its source; None: not known."""

    file: str
    line: int
    column: int | None
    row: int | None
    reason: str
    remedy: str
    severity: Severity = "error"

    def as_problem(self) -> Problem:
        """The line of an error message."""
        where = self.reason if self.column is None else f"column {self.column}: {self.reason}"
        return Problem(self.file, self.line, where, self.remedy or None)


class BadRow(NamedTuple):
    """A row that cannot be used: why, and its text as found, at most 2,000 characters."""

    problem: RowProblem
    raw: str
