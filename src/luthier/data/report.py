"""What happened to the data, as a value: shown to the user, and written to the run's data/data.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luthier.runs import SCHEMA_VERSION

__all__ = ["SHOWN_EXCLUDED", "DataReport", "Excluded", "SourceReport", "SplitReport"]

SHOWN_EXCLUDED = 20
"""How many excluded rows the document names; their count is always whole."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One file: how many rows it had, the format they were read as, how that was known, what they are for."""

    path: str
    rows: int
    format: str
    recognised: str
    split: str


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One side of the split. Lengths and counts are in tokens; `labelled` are those that are trained or measured."""

    rows: int
    tokens: int
    labelled: int
    shortest: int
    median: int
    longest: int
    truncated: int

    @property
    def labelled_share(self) -> float:
        """Labelled tokens as a share of all."""
        return self.labelled / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that is not used."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class DataReport:
    """What `prepare` did.

    Attributes:
        template: the name that `make_template` takes to make the same template again.
        end_of_turn: the text of the token that every answer ends with; labelled in every row that is not truncated.
        max_length: the longest row in tokens, None for no limit.
        parted: rows in which a token would have reached over a prompt's end and was parted there.
        notes: what a reader would not expect, in sentences.
    """

    sources: tuple[SourceReport, ...]
    template: str
    end_of_turn: str
    stop_strings: tuple[str, ...]
    max_length: int | None
    splits: Mapping[str, SplitReport]
    excluded: tuple[Excluded, ...]
    parted: int
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """All rows read, the excluded ones among them."""
        return sum(source.rows for source in self.sources)

    @property
    def longest(self) -> int:
        """The longest row that is used, in tokens."""
        return max(split.longest for split in self.splits.values())

    @property
    def truncated(self) -> int:
        """How many used rows were cut at their end."""
        return sum(split.truncated for split in self.splits.values())

    def as_document(self) -> dict[str, object]:
        """The JSON document of data/data.json."""
        splits = {
            name: {
                "rows": split.rows,
                "tokens": split.tokens,
                "labelled_tokens": split.labelled,
                "labelled_share": round(split.labelled_share, 4),
                "length": {"shortest": split.shortest, "median": split.median, "longest": split.longest},
                "truncated": split.truncated,
            }
            for name, split in self.splits.items()
        }
        shown = [{"file": row.file, "line": row.line, "reason": row.reason} for row in self.excluded[:SHOWN_EXCLUDED]]
        return {
            "schema": SCHEMA_VERSION,
            "rows": self.rows,
            "sources": [
                {"path": s.path, "rows": s.rows, "format": s.format, "recognised": s.recognised, "split": s.split}
                for s in self.sources
            ],
            "template": self.template,
            "end_of_turn": self.end_of_turn,
            "stop_strings": list(self.stop_strings),
            "max_length": self.max_length,
            "splits": splits,
            "excluded": {"rows": len(self.excluded), "first": shown},
            "parted_rows": self.parted,
            "notes": list(self.notes),
        }
